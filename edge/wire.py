"""The ZeroMQ event stream: PUB, multipart [kind, header JSON, payload?], every header with a gap-free `seq`.

A slow subscriber loses messages and sees it by a gap; a publisher never waits for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

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
    "heartbeat",
)
_HIGH_WATER_MARK = 1000  # messages kept for one slow subscriber


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


class Publisher:
    """The PUB socket of the daemon."""

    def __init__(self, address: str) -> None:
        """Bind to `address`; port 0 (`tcp://127.0.0.1:0`) takes any free one. Raises DeliveryError if it cannot."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 500)
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
        self._context.term()


class Subscriber:
    """A plain SUB client: what the demo and the tests listen with."""

    def __init__(self, address: str) -> None:
        """Subscribe to every kind at `address`."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
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
