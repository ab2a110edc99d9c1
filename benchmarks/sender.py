"""A fast MRD sender: a scan is encoded once into one buffer, which then goes out in large pieces.

A client that encodes readout by readout measures itself. This one leaves the server the whole machine but for a copy
into the socket, keeps the scanner's pace where asked to, and notes when the last readout of every image went out.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from edge.mrd import DEFAULT_LIMITS, NOISE, Image, MessageId, next_message, read_image, read_text
from edge.mrd_write import encode_close, encode_config_file, encode_header
from edge.rawfile import RawFile
from recon.arrays import Array
from recon.errors import DeliveryError, StreamError

PIECE_BYTES = 1 << 20
_TICK_S = 1e-3  # between two pieces of a paced scan; what is due by then goes out together
_SHARED = ("slice", "contrast", "phase", "repetition", "set")


class Place(NamedTuple):
    """The counters that an image shares with its readouts."""

    slice: int
    contrast: int
    phase: int
    repetition: int
    set: int


@dataclass(frozen=True, eq=False)
class EncodedScan:
    """A scan as MRD messages, ready to be sent any number of times.

    messages: configuration, header, waveforms, readouts, CLOSE. ends: int64 (readout,), the offset behind each readout.
    begin: offset of the first readout. lasts: for each image the index of its last readout, in the order of sending.
    """

    messages: bytes
    begin: int
    ends: Array
    lasts: Mapping[Place, int]

    @property
    def n_readouts(self) -> int:
        """How many readouts it has."""
        return len(self.ends)

    @property
    def n_bytes(self) -> int:
        """How many bytes go over the wire."""
        return len(self.messages)


def encode_scan(raw: RawFile, config: str = "scanside") -> EncodedScan:
    """Return a scan as it goes over the wire, asking for `config`; raises AcquisitionError for a broken file."""
    out = bytearray(encode_config_file(config) + encode_header(raw.header))
    for waveform in raw.waveforms():
        out += waveform
    begin = len(out)
    ends = []
    for message in raw.acquisitions():
        out += message
        ends.append(len(out))
    out += encode_close()
    lasts: dict[Place, int] = {}
    for index, head in enumerate(raw.heads):
        if not int(head["flags"]) & NOISE:
            place = Place(*(int(head["idx"][name]) for name in _SHARED))
            lasts.pop(place, None)  # so that the order is that of the last readouts
            lasts[place] = index
    return EncodedScan(bytes(out), begin, np.asarray(ends, np.int64), lasts)


@dataclass
class Sent:
    """What one scan's sending gave; moments are seconds on the monotonic clock.

    begun_s: before the first byte. last_readout_s: for each image, before its last readout went out. sent_s: after the
    last byte. ended_s: when the server's CLOSE came. images with image_s, when each was there; pixels only if kept.
    problem: why the answer is not whole, in words; "" where the server ended it with CLOSE.
    """

    begun_s: float = 0.0
    sent_s: float = 0.0
    ended_s: float = 0.0
    last_readout_s: dict[Place, float] = field(default_factory=dict)
    image_s: list[tuple[Place, int, float]] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def sending_s(self) -> float:
        """From the first byte to the last."""
        return self.sent_s - self.begun_s

    def missing(self, scan: EncodedScan) -> list[Place]:
        """Return the places of images that never came back."""
        came = {place for place, _, _ in self.image_s}
        return [place for place in scan.lasts if place not in came]


def send_scan(
    scan: EncodedScan,
    host: str,
    port: int,
    *,
    rate: float | None = None,
    gate: Callable[[Place], None] | None = None,
    on_sent: Callable[[int], None] | None = None,
    keep_images: bool = False,
    answer_s: float = 600.0,
) -> Sent:
    """Send a scan, take what comes back meanwhile, and return it after the server's CLOSE.

    rate: readouts a second; None sends as fast as the server takes them. gate: called after each image's last readout;
    nothing more is sent until it returns. on_sent: called with how many readouts went out. answer_s: the longest
    silence that is waited for. Raises DeliveryError where no server answers.
    """
    result = Sent()
    try:
        connection = socket.create_connection((host, port), 10.0)
    except OSError as error:
        raise DeliveryError(f"no server answers at {host}:{port}: {error.strerror or 'timed out'}") from error
    with ThreadPoolExecutor(1) as receiver, connection:
        connection.settimeout(answer_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = receiver.submit(_receive, connection, result, keep_images)
        try:
            try:
                _send(connection, scan, result, rate, gate, on_sent)
            except OSError:  # what the server said before tells why
                result.problem = "the server took no more of the scan"
            result.sent_s = time.monotonic()
            result.problem = received.result() or result.problem
            result.ended_s = time.monotonic()
        finally:
            with contextlib.suppress(OSError):  # wakes the receiver, whatever went wrong here
                connection.shutdown(socket.SHUT_RDWR)
    return result


def _send(
    connection: socket.socket,
    scan: EncodedScan,
    result: Sent,
    rate: float | None,
    gate: Callable[[Place], None] | None,
    on_sent: Callable[[int], None] | None,
) -> None:
    view = memoryview(scan.messages)
    ends = [int(end) for end in scan.ends]
    result.begun_s = time.monotonic()
    connection.sendall(view[: scan.begin])
    due_s, sent = time.monotonic(), 0  # `sent`: readouts

    def piece(until: int) -> None:
        nonlocal sent
        start = ends[sent - 1] if sent else scan.begin
        for at in range(start, ends[until - 1], PIECE_BYTES):
            connection.sendall(view[at : min(at + PIECE_BYTES, ends[until - 1])])
        sent = until
        if on_sent is not None:
            on_sent(sent)

    for place, last in scan.lasts.items():
        while sent < last:  # all but the image's last readout
            ready = last
            if rate is not None:
                ready = min(last, sent + int((time.monotonic() - due_s) * rate))
                if ready == sent:
                    time.sleep(max(_TICK_S, due_s + 1 / rate - time.monotonic()))
                    continue
                due_s += (ready - sent) / rate
            piece(ready)
        if rate is not None:
            due_s += 1 / rate
            time.sleep(max(0.0, due_s - time.monotonic()))
        result.last_readout_s[place] = time.monotonic()
        piece(last + 1)
        if gate is not None:
            gate(place)
            due_s = time.monotonic()
    if sent < len(ends):
        piece(len(ends))
    connection.sendall(view[ends[-1] if ends else scan.begin :])


def _receive(connection: socket.socket, result: Sent, keep_images: bool) -> str:
    """Take messages until CLOSE; return why it did not come, "" where it did."""
    buffer = bytearray()
    while True:
        try:
            now = time.monotonic()
            while (message := next_message(buffer, 0, DEFAULT_LIMITS)) is not None:
                data = bytes(memoryview(buffer)[: message.end])
                del buffer[: message.end]
                if message.id is MessageId.CLOSE:
                    return ""
                if message.id is MessageId.IMAGE:
                    image = read_image(data, message)
                    place = Place(*(int(image.header[name]) for name in _SHARED))
                    result.image_s.append((place, int(image.header["image_series_index"]), now))
                    if keep_images:
                        result.images.append(image)
                elif message.id is MessageId.TEXT:
                    result.texts.append(read_text(data, message))
            chunk = connection.recv(PIECE_BYTES)
        except StreamError as error:
            return f"the server's answer cannot be read: {error}"
        except TimeoutError:
            return "the server fell silent"
        except OSError:
            chunk = b""
        if not chunk:
            return "the server ended the connection without CLOSE"
        buffer += chunk
