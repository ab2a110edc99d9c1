"""The ROUTER socket that alerts go through: JSON in and out, never waiting for anybody.

A client that does not read has a queue of bounded length; what does not fit is not sent, and the caller is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import zmq

from edge.wire import Gatekeeper
from recon.errors import DeliveryError

_QUEUE = 100  # messages that wait for one client, and from one
_LONGEST = 64 << 10  # of a message that is taken
_BEAT_MS, _DEAD_MS = 5_000, 15_000


class PeerGoneError(DeliveryError):
    """The client's connection has ended."""


@dataclass(frozen=True)
class Incoming:
    """What one client sent.

    user: the name of its key, "" where the socket asks for none. source: its address. body: None where not JSON.
    """

    peer: bytes
    user: str
    source: str
    body: dict[str, Any] | None


class Router:
    """The daemon's side of the alert socket."""

    def __init__(self, address: str, gate: Gatekeeper | None = None) -> None:
        """Prepare a socket for `address`, behind `gate` where there is one; `open` binds it."""
        self._context = gate.context if gate else zmq.Context()
        self._owns_context = gate is None
        self._wanted = address
        self.address = ""
        self.socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.SNDHWM, _QUEUE),
            (zmq.RCVHWM, _QUEUE),
            (zmq.MAXMSGSIZE, _LONGEST),
            (zmq.LINGER, 0),
            (zmq.HEARTBEAT_IVL, _BEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _DEAD_MS),
            (zmq.HEARTBEAT_TTL, _DEAD_MS),
            (zmq.HANDSHAKE_IVL, _BEAT_MS),
        ):
            self.socket.setsockopt(option, value)
        if gate is not None:
            gate.protect(self.socket)

    def open(self) -> None:
        """Bind; port 0 takes a free one. Raises DeliveryError where the address cannot be had."""
        wanted = self._wanted
        try:
            self.socket.bind(wanted[:-1] + "*" if wanted.endswith(":0") else wanted)
        except zmq.ZMQError as error:
            self.close()
            raise DeliveryError(f"alerts cannot be served at {wanted}: {error.strerror}") from error
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def fileno(self) -> int:
        """Return what becomes readable when `receive` may have something."""
        return int(self.socket.FD)

    def receive(self, most: int = 64) -> list[Incoming]:
        """Return what has come, at most so many messages; never waits."""
        found: list[Incoming] = []
        while len(found) < most:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            body = _parse(frames[-1].bytes) if len(frames) > 1 else None
            user, source = _property(frames[-1], "User-Id"), _property(frames[-1], "Peer-Address")
            found.append(Incoming(frames[0].bytes, user, source, body))
        return found

    def has_input(self) -> bool:
        """Whether `receive` would return something; a socket tells of that only once by itself."""
        return bool(int(self.socket.EVENTS) & zmq.POLLIN)

    def send(self, peer: bytes, message: Mapping[str, Any]) -> bool:
        """Queue a message for one client; False where its queue is full. Raises PeerGoneError; never waits."""
        body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
        try:
            self.socket.send_multipart([peer, body], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise PeerGoneError("the client's connection has ended") from error
        return True

    def close(self) -> None:
        """Close the socket; what is queued is dropped, as alerts are sent again."""
        self.socket.close()
        if self._owns_context:
            self._context.term()


def _property(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:  # the socket asks nobody who he is
        return ""


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
