"""The ZeroMQ event stream: PUB, multipart [kind, header JSON, payload?], every header with a gap-free `seq`.

A slow subscriber loses messages and sees it by a gap; a publisher never waits for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Protocol

import zmq

from recon.errors import DeliveryError

KINDS = (
    "scan.started",
    "scan.progress",
    "image",
    "quality",
    "findings",
    "alert",
    "alert.acknowledged",
    "alert.escalated",
    "scan.done",
    "scan.failed",
    "scan.super-resolved",
    "heartbeat",
)
_HIGH_WATER_MARK = 200  # messages kept for one slow subscriber: 80 MB of images of 320²


def utc_now() -> str:
    """Return the present moment as RFC 3339 in UTC, with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def encode_event(
    kind: str, seq: int, at: str, fields: Mapping[str, Any], payload: bytes | memoryview | None
) -> list[bytes | memoryview]:
    """Return the frames of one event; `fields` are JSON values, `payload` the raw pixels of an `image`."""
    assert kind in KINDS, kind
    header = {"v": 1, "seq": seq, "kind": kind, "at": at, **fields}
    frames: list[bytes | memoryview] = [
        kind.encode(),
        json.dumps(header, separators=(",", ":"), allow_nan=False).encode(),
    ]
    return frames if payload is None else [*frames, payload]


class Gatekeeper(Protocol):
    """What asks clients of a socket for a key: `edge.gate`. Sockets it protects are made in its context."""

    context: zmq.Context[zmq.Socket[bytes]]

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Ask for keys from now on; before `socket` is bound."""


class Publisher:
    """The PUB socket of the daemon."""

    def __init__(self, address: str, gate: Gatekeeper | None = None) -> None:
        """Bind to `address`, behind `gate` where there is one; raises DeliveryError where it cannot.

        Port 0 (`tcp://127.0.0.1:0`) takes any free one.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = gate.context if gate else zmq.Context()
        self._owns_context = gate is None
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 500)
        if gate is not None:
            gate.protect(self._socket)
        try:
            self._socket.bind(address[:-1] + "*" if address.endswith(":0") else address)
        except zmq.ZMQError as error:
            self.close()
            raise DeliveryError(f"events cannot be published at {address}: {error.strerror}") from error
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, frames: list[bytes | memoryview]) -> None:
        """Send one event to whoever listens; never waits."""
        self._socket.send_multipart(frames, flags=zmq.NOBLOCK)

    def close(self) -> None:
        """Send what is queued, for half a second at most, and close."""
        self._socket.close()
        if self._owns_context:
            self._context.term()


class Subscriber:
    """A plain SUB client: what the demo and the tests listen with."""

    def __init__(self, address: str, curve: tuple[bytes, bytes, bytes] | None = None) -> None:
        """Subscribe to every kind at `address`. curve: own public and secret key, and the daemon's public one."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        if curve is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey, self._socket.curve_serverkey = curve
        self._socket.connect(address)

    def receive(self, timeout_s: float) -> tuple[dict[str, Any], bytes | None] | None:
        """Return the next event's header and payload, or None when none came within `timeout_s`."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        frames = self._socket.recv_multipart()
        return json.loads(frames[1]), frames[2] if len(frames) > 2 else None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        self._context.term()
