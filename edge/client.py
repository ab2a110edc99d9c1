"""A client of alerts and events: what `scanside watch`, `scanside ack`, tests and the chaos benchmark use.

It says hello again and again, so that it is served after a restart of the daemon without anybody's help; an alert that
it has been handed comes again until somebody acknowledges it, so what a caller does with one must be done once for
each `alert_id`.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from edge.secret import read_secret
from recon.errors import DeliveryError

Message = dict[str, Any]
_HELLO_S = 3.0
_RETRY_S = 1.0
_SILENT_S = 10.0


class RefusedError(DeliveryError):
    """The daemon refused what was asked; `answer` says why."""

    code = "refused"

    def __init__(self, answer: Message) -> None:
        """Take the daemon's answer."""
        super().__init__(f"{answer.get('reason', 'no reason was given')} ({answer.get('code', 'refused')})")
        self.answer = answer


@dataclass(frozen=True)
class ClientKey:
    """What `scanside keys create` hands to one client: its own pair of keys, and the daemon's public one."""

    name: str
    public: bytes
    secret: bytes
    server: bytes


def read_client_key(path: Path) -> ClientKey:
    """Return the key in a file; raises SecretError where others may read it, DeliveryError where it is none."""
    try:
        found = json.loads(read_secret(path))
        keys = [found[name].encode("ascii") for name in ("public", "secret", "server_public")]
        return ClientKey(str(found["name"]), *keys)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeliveryError(f"{path} is not a client's key; scanside keys create makes one") from error


class AlertClient:
    """One connection to the alert socket. Not for several threads at once."""

    def __init__(
        self, address: str, name: str, *, after: int = 0, groups: Sequence[str] = (), key: ClientKey | None = None
    ) -> None:
        """Connect to `address` as `name`; nothing is waited for.

        after: the last event whose alerts need not be told again. groups: whose alerts are wanted, all where empty.
        """
        self.session = ""
        self.heard_at: float | None = None  # monotonic: when the daemon last said something
        self._hello = {"op": "hello", "client": name, "after": after, "groups": list(groups)}
        self._said_at = 0.0
        self._held: deque[Message] = deque()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 2000),
            (zmq.HEARTBEAT_IVL, 3000),
            (zmq.HEARTBEAT_TIMEOUT, 9000),
        ):
            self._socket.setsockopt(option, value)
        if key is not None:
            self._socket.curve_publickey = key.public
            self._socket.curve_secretkey = key.secret
            self._socket.curve_serverkey = key.server
        self._socket.connect(address)

    def __enter__(self) -> AlertClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """Whether the daemon has been heard within the last ten seconds."""
        return self.heard_at is not None and time.monotonic() - self.heard_at < _SILENT_S

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message (`op` alert, acknowledged, heartbeat, …), or None when none came in time."""
        if self._held:
            return self._held.popleft()
        return self._receive(timeout_s)

    def ack(self, alert_id: str, by: str, timeout_s: float = 10.0) -> Message:
        """Acknowledge an alert and return the daemon's confirmation, asking again until it comes.

        Raises RefusedError where the daemon says no, DeliveryError where it says nothing within `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        asked_at, asked_as = 0.0, ""
        while (left_s := until - time.monotonic()) > 0:
            if self.session and (self.session != asked_as or time.monotonic() - asked_at >= _RETRY_S):
                asked_at, asked_as = time.monotonic(), self.session
                self._send({"op": "ack", "alert_id": alert_id, "by": by, "session": self.session})
            message = self._receive(min(left_s, 0.2))
            if message is None:
                continue
            if message.get("alert_id") == alert_id and message["op"] == "acknowledged" and message["by"] == by:
                return message
            if message["op"] == "refused":
                if message["code"] in ("hello", "session"):  # the daemon has been started anew
                    self._say_hello()
                    continue
                raise RefusedError(message)
            self._held.append(message)
        raise DeliveryError(f"nobody answered within {timeout_s:g} s; the acknowledgement may or may not have arrived")

    def snapshot(self, after: int, timeout_s: float = 10.0) -> list[Message]:
        """Return the headers of all events after number `after`; raises DeliveryError, as `ack`."""
        events: list[Message] = []
        until = time.monotonic() + timeout_s
        asked_at = 0.0
        while (left_s := until - time.monotonic()) > 0:
            if time.monotonic() - asked_at >= _RETRY_S:
                asked_at = time.monotonic()
                self._send({"op": "snapshot", "after": after})
            message = self._receive(min(left_s, 0.2))
            if message is None:
                continue
            if message["op"] == "refused":
                raise RefusedError(message)
            if message["op"] != "events":
                self._held.append(message)
            elif message["after"] == after:
                events += message["events"]
                if not message["more"]:
                    return events
                after, asked_at = events[-1]["seq"] if events else after, 0.0
        raise DeliveryError(f"nobody answered within {timeout_s:g} s")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
        self._context.term()

    def _receive(self, timeout_s: float) -> Message | None:
        until = time.monotonic() + timeout_s
        while True:
            if time.monotonic() - self._said_at >= _HELLO_S or not self.session:
                self._say_hello()
            left_s = until - time.monotonic()
            if not self._socket.poll(max(int(min(left_s, 0.25) * 1000), 0)):
                if left_s <= 0:
                    return None
                continue
            message: Message = json.loads(self._socket.recv())
            self.heard_at = time.monotonic()
            if message["op"] == "welcome":
                self.session = message["session"]
            return message

    def _say_hello(self) -> None:
        if time.monotonic() - self._said_at < 0.2:
            return
        self._said_at = time.monotonic()
        self._send(self._hello)

    def _send(self, message: Message) -> None:
        with suppress(zmq.Again):  # not connected: it is said again
            self._socket.send(json.dumps(message).encode(), zmq.NOBLOCK)
