"""A stream cut into messages as its bytes come, in any pieces: short ones are kept, readouts are only counted."""

from __future__ import annotations

from typing import NamedTuple

from edge.mrd import (
    DEFAULT_LIMITS,
    LAST_IN_MEASUREMENT,
    LAST_IN_REPETITION,
    LAST_IN_SLICE,
    Limits,
    Message,
    MessageId,
    extent,
)
from recon.errors import StreamError

_DATA = frozenset({MessageId.ACQUISITION, MessageId.IMAGE, MessageId.WAVEFORM})
_LASTS = LAST_IN_SLICE | LAST_IN_REPETITION | LAST_IN_MEASUREMENT


class Frame(NamedTuple):
    """A whole control message: `data` holds it from its id on, `message` its place in it."""

    data: bytes
    message: Message


class Framer:
    """Follows one client's stream. Memory: at most one control message and the head of one that carries data.

    n_readouts: acquisitions that came whole. n_lasts: those of them marked last of a slice, repetition or measurement.
    is_scan: a header or data was seen, even in part. has_data: an acquisition, image or waveform was seen.
    is_closed: CLOSE came; what follows it is ignored. error: why the stream cannot be read on, None while it can.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        """Start before the first message."""
        self.n_readouts = 0
        self.n_lasts = 0
        self.is_scan = False
        self.has_data = False
        self.is_closed = False
        self.error: StreamError | None = None
        self._limits = limits
        self._has_header = False
        self._held = bytearray()  # the start of the message that is being received, as far as it is needed
        self._skip = 0  # bytes of a data message still to come
        self._is_readout = self._is_last = False

    def feed(self, chunk: bytes | bytearray | memoryview) -> list[Frame]:
        """Take the next bytes and return the control messages that they complete; sets `error` instead of raising."""
        frames: list[Frame] = []
        view = memoryview(chunk)
        at = 0
        try:
            while at < len(view) and not self.is_closed and self.error is None:
                at = self._step(view, at, frames)
        except StreamError as error:
            self.error = error
        return frames

    def _step(self, view: memoryview, at: int, frames: list[Frame]) -> int:
        """Take what one message needs next; return where the rest of `view` begins."""
        if self._skip:
            n = min(self._skip, len(view) - at)
            self._skip -= n
            if not self._skip:
                self._count()
            return at + n
        source, start, end = (self._held, 0, len(self._held)) if self._held else (view, at, len(view))
        is_data = end - start >= 2 and self._see(source, start)
        need, is_known = extent(source, start, end, self._limits)
        if is_known and is_data:
            self._skip = need - len(self._held)
            self._held.clear()
            if not self._skip:
                self._count()
            return at
        n = min(need - len(self._held), len(view) - at)
        self._held += view[at : at + n]
        if len(self._held) < need:
            return at + n
        if not is_known:
            return self._step(view, at + n, frames)  # enough came to know more
        self._complete(frames)
        return at + n

    def _see(self, buffer: memoryview | bytearray, at: int) -> bool:
        """Note what the message at `at` says of the session; True where it carries data."""
        number = int.from_bytes(buffer[at : at + 2], "little")
        if number == MessageId.HEADER:
            self.is_scan = True
            if self.has_data or self._has_header:
                raise StreamError("a header came after another or after data; one is taken, before all data")
        if number not in _DATA:
            return False
        self.is_scan = self.has_data = True
        flags = int.from_bytes(buffer[at + 4 : at + 12], "little") if number == MessageId.ACQUISITION else 0
        self._is_readout = number == MessageId.ACQUISITION
        self._is_last = bool(flags & _LASTS)
        return True

    def _count(self) -> None:
        self.n_readouts += self._is_readout
        self.n_lasts += self._is_last

    def _complete(self, frames: list[Frame]) -> None:
        data = bytes(self._held)
        self._held.clear()
        message = Message(MessageId(int.from_bytes(data[:2], "little")), 0, 2, len(data))
        self._has_header |= message.id is MessageId.HEADER
        self.is_closed = message.id is MessageId.CLOSE
        frames.append(Frame(data, message))
