"""The MRD v1 stream: where a message ends and what its bytes mean.

Little-endian; every message is a uint16 id and a body whose length only its own fields tell, so an id that is not known
ends the stream. Nothing here touches a socket or a file; nothing is allocated for a size that a message only claims.
Source: the ISMRMRD C++ library (ismrmrd.h, waveform.h), Gadgetron's client and python-ismrmrd-server.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from recon.arrays import Array
from recon.errors import StreamError

Buffer = bytes | bytearray | memoryview
Record = np.void  # one element of the structured dtypes below


class MessageId(enum.IntEnum):
    """The messages whose length is known."""

    CONFIG_FILE = 1
    CONFIG_TEXT = 2
    HEADER = 3
    CLOSE = 4
    TEXT = 5
    QUERY = 6
    RESPONSE = 7
    ACQUISITION = 1008
    IMAGE = 1022
    WAVEFORM = 1026


_REFUSED = {
    8: "error",
    1018: "DICOM",
    1019: "dependency reply",
    1023: "reconstruction data",
    1024: "image array",
    1030: "n-d array",
    1050: "acquisition bucket",
    1051: "acquisition bundle",
} | dict.fromkeys((*range(1001, 1008), *range(1009, 1018), 1020, 1021), "retired typed message")


def flag(number: int) -> int:
    """Return the bit of flag `number`; MRD counts flags from 1."""
    return 1 << (number - 1)


FIRST_IN_SLICE, LAST_IN_SLICE = flag(7), flag(8)
LAST_IN_REPETITION = flag(14)
NOISE = flag(19)
CALIBRATION, CALIBRATION_AND_IMAGING = flag(20), flag(21)
REVERSED = flag(22)
LAST_IN_MEASUREMENT = flag(25)
NOT_IMAGING = flag(19) | flag(23) | flag(24) | flag(26) | flag(27) | flag(28) | flag(30) | flag(31)
COMPRESSED = flag(53) | flag(54) | flag(55) | flag(56)

_COUNTERS = np.dtype([
    ("kspace_encode_step_1", "<u2"), ("kspace_encode_step_2", "<u2"), ("average", "<u2"), ("slice", "<u2"),
    ("contrast", "<u2"), ("phase", "<u2"), ("repetition", "<u2"), ("set", "<u2"), ("segment", "<u2"),
    ("user", "<u2", (8,)),
])  # fmt: skip

_GEOMETRY: list[tuple[str, str, tuple[int, ...]]] = [
    ("position", "<f4", (3,)), ("read_dir", "<f4", (3,)), ("phase_dir", "<f4", (3,)), ("slice_dir", "<f4", (3,)),
    ("patient_table_position", "<f4", (3,)),
]  # fmt: skip

ACQUISITION_HEADER = np.dtype([
    ("version", "<u2"), ("flags", "<u8"), ("measurement_uid", "<u4"), ("scan_counter", "<u4"),
    ("acquisition_time_stamp", "<u4"), ("physiology_time_stamp", "<u4", (3,)), ("number_of_samples", "<u2"),
    ("available_channels", "<u2"), ("active_channels", "<u2"), ("channel_mask", "<u8", (16,)), ("discard_pre", "<u2"),
    ("discard_post", "<u2"), ("center_sample", "<u2"), ("encoding_space_ref", "<u2"), ("trajectory_dimensions", "<u2"),
    ("sample_time_us", "<f4"), *_GEOMETRY, ("idx", _COUNTERS), ("user_int", "<i4", (8,)), ("user_float", "<f4", (8,)),
])  # fmt: skip

IMAGE_HEADER = np.dtype([
    ("version", "<u2"), ("data_type", "<u2"), ("flags", "<u8"), ("measurement_uid", "<u4"),
    ("matrix_size", "<u2", (3,)), ("field_of_view", "<f4", (3,)), ("channels", "<u2"), *_GEOMETRY, ("average", "<u2"),
    ("slice", "<u2"), ("contrast", "<u2"), ("phase", "<u2"), ("repetition", "<u2"), ("set", "<u2"),
    ("acquisition_time_stamp", "<u4"), ("physiology_time_stamp", "<u4", (3,)), ("image_type", "<u2"),
    ("image_index", "<u2"), ("image_series_index", "<u2"), ("user_int", "<i4", (8,)), ("user_float", "<f4", (8,)),
    ("attribute_string_len", "<u4"),
])  # fmt: skip

WAVEFORM_HEADER = np.dtype([
    ("version", "<u2"), ("flags", "<u8"), ("measurement_uid", "<u4"), ("scan_counter", "<u4"), ("time_stamp", "<u4"),
    ("number_of_samples", "<u2"), ("channels", "<u2"), ("sample_time_us", "<f4"), ("waveform_id", "<u2"),
], align=True)  # fmt: skip

PIXELS: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u2"), 2: np.dtype("<i2"), 3: np.dtype("<u4"), 4: np.dtype("<i4"),
    5: np.dtype("<f4"), 6: np.dtype("<f8"), 7: np.dtype("<c8"), 8: np.dtype("<c16"),
}  # fmt: skip

MAX_CHANNELS = 1024  # the channel mask has no bits for more
_U2, _U4, _U8 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_MATRIX = struct.Struct("<3H")


@dataclass(frozen=True)
class Limits:
    """The largest bodies taken, in bytes; a message that claims more ends the stream before anything is allocated."""

    text_bytes: int = 4 << 20
    attribute_bytes: int = 1 << 20
    acquisition_bytes: int = 64 << 20
    image_bytes: int = 256 << 20


DEFAULT_LIMITS = Limits()
_Extent = Callable[[Buffer, int, int, Limits], tuple[int, bool]]


class Message(NamedTuple):
    """Where one whole message lies in its buffer: `start` at its id, `body` after it, `end` after its last byte."""

    id: MessageId
    start: int
    body: int
    end: int


class Readout(NamedTuple):
    """One acquisition as sent.

    trajectory: float32 (sample, dimension). samples: complex64 (coil, sample), None where they are compressed. Both are
    views of the buffer, perhaps unaligned.
    """

    header: Record
    trajectory: Array
    samples: Array | None


class Image(NamedTuple):
    """One image as sent: its header, attribute XML and pixels (channel, z, y, x), a view of the buffer."""

    header: Record
    attributes: str
    pixels: Array


class Waveform(NamedTuple):
    """One piece of a physiological waveform: samples uint32 (channel, sample), a view of the buffer."""

    header: Record
    samples: Array


def extent(buffer: Buffer, start: int, end: int, limits: Limits = DEFAULT_LIMITS) -> tuple[int, bool]:
    """Return how many bytes the message at `start` has, and True; or how many are needed to know more, and False.

    Only bytes before `end` are read. Raises StreamError for an id whose length is not known and for a size that is
    impossible or above its limit.
    """
    have = end - start
    if have < 2:
        return 2, False
    (number,) = _U2.unpack_from(buffer, start)
    measure = _EXTENTS.get(number)
    if measure is None:
        name = f" ({_REFUSED[number]})" if number in _REFUSED else ""
        known = ", ".join(str(int(i)) for i in MessageId)
        raise StreamError(f"message id {number}{name} cannot be read; the ids understood are {known}")
    return measure(buffer, start, have, limits)


def _check(name: str, found: int, limit: int) -> None:
    if found > limit:
        raise StreamError(f"a message {name} claims {found} bytes; at most {limit} are taken")


def _fixed(n: int) -> _Extent:
    return lambda buffer, start, have, limits: (n, True)


def _counted(name: str, at: int, count: struct.Struct) -> _Extent:
    """The extent of a message whose last field counts the bytes that follow; the field lies `at` bytes from the id."""

    def measure(buffer: Buffer, start: int, have: int, limits: Limits) -> tuple[int, bool]:
        if have < at + count.size:
            return at + count.size, False
        (n,) = count.unpack_from(buffer, start + at)
        _check(name, n, limits.text_bytes)
        return at + count.size + n, True

    return measure


def _acquisition(buffer: Buffer, start: int, have: int, limits: Limits) -> tuple[int, bool]:
    if have < 342:
        return 342, False
    head = start + 2
    (flags,) = _U8.unpack_from(buffer, head + 2)
    n_samples, n_coils, n_dims = (_U2.unpack_from(buffer, head + at)[0] for at in (34, 38, 176))
    if n_coils > MAX_CHANNELS:
        raise StreamError(f"an ACQUISITION claims {n_coils} channels; the channel mask has room for {MAX_CHANNELS}")
    trajectory, samples = n_samples * n_dims * 4, n_samples * n_coils * 8
    _check("ACQUISITION", trajectory + samples, limits.acquisition_bytes)
    if not (flags & COMPRESSED and samples):
        return 342 + trajectory + samples, True
    if have < 342 + trajectory + 4:
        return 342 + trajectory + 4, False
    (n,) = _U4.unpack_from(buffer, start + 342 + trajectory)
    _check("ACQUISITION (compressed)", n, limits.acquisition_bytes)
    return 342 + trajectory + 4 + n, True


def _image(buffer: Buffer, start: int, have: int, limits: Limits) -> tuple[int, bool]:
    if have < 208:
        return 208, False
    head = start + 2
    (kind,) = _U2.unpack_from(buffer, head + 2)
    if kind not in PIXELS:
        raise StreamError(f"an IMAGE has data type {kind}; the types are 1 to {len(PIXELS)}")
    nx, ny, nz = _MATRIX.unpack_from(buffer, head + 16)
    (n_channels,) = _U2.unpack_from(buffer, head + 34)
    (n_attributes,) = _U8.unpack_from(buffer, head + 198)
    _check("IMAGE (attributes)", n_attributes, limits.attribute_bytes)
    pixels = nx * ny * nz * n_channels * PIXELS[kind].itemsize
    _check("IMAGE", pixels, limits.image_bytes)
    return 208 + n_attributes + pixels, True


def _waveform(buffer: Buffer, start: int, have: int, limits: Limits) -> tuple[int, bool]:
    if have < 42:
        return 42, False
    n_samples, n_channels = struct.unpack_from("<2H", buffer, start + 2 + 28)
    _check("WAVEFORM", n_samples * n_channels * 4, limits.acquisition_bytes)
    return 42 + n_samples * n_channels * 4, True


_EXTENTS: dict[int, _Extent] = {
    MessageId.CONFIG_FILE: _fixed(2 + 1024),
    MessageId.CONFIG_TEXT: _counted("CONFIG TEXT", 2, _U4),
    MessageId.HEADER: _counted("HEADER", 2, _U4),
    MessageId.CLOSE: _fixed(2),
    MessageId.TEXT: _counted("TEXT", 2, _U4),
    MessageId.QUERY: _counted("QUERY", 18, _U8),
    MessageId.RESPONSE: _counted("RESPONSE", 10, _U8),
    MessageId.ACQUISITION: _acquisition,
    MessageId.IMAGE: _image,
    MessageId.WAVEFORM: _waveform,
}


def next_message(buffer: Buffer, offset: int = 0, limits: Limits = DEFAULT_LIMITS) -> Message | None:
    """Return the message that starts at `offset`, or None while it is not wholly there; raises as `extent`."""
    n, is_known = extent(buffer, offset, len(buffer), limits)
    if not is_known or offset + n > len(buffer):
        return None
    (number,) = _U2.unpack_from(buffer, offset)
    return Message(MessageId(number), offset, offset + 2, offset + n)


def messages(buffer: Buffer, offset: int = 0, limits: Limits = DEFAULT_LIMITS) -> Iterator[Message]:
    """Yield the whole messages from `offset` on, up to and with CLOSE; raises as `extent`."""
    while (message := next_message(buffer, offset, limits)) is not None:
        yield message
        offset = message.end
        if message.id is MessageId.CLOSE:
            return


def read_bytes(buffer: Buffer, message: Message) -> bytes:
    """Return the content of a CONFIG_FILE, CONFIG_TEXT, HEADER or TEXT, without the NULs that some senders add."""
    counted = 0 if message.id is MessageId.CONFIG_FILE else 4
    content = bytes(memoryview(buffer)[message.body + counted : message.end])
    return content.split(b"\0", 1)[0] if message.id is MessageId.CONFIG_FILE else content.rstrip(b"\0")


def read_text(buffer: Buffer, message: Message) -> str:
    """Return `read_bytes` as text; bytes that are not UTF-8 become U+FFFD."""
    return read_bytes(buffer, message).decode("utf-8", "replace")


def read_query(buffer: Buffer, message: Message) -> tuple[int, str]:
    """Return the correlation id and the text of a QUERY."""
    (correlation,) = _U8.unpack_from(buffer, message.body + 8)
    content = bytes(memoryview(buffer)[message.body + 24 : message.end]).rstrip(b"\0")
    return int(correlation), content.decode("utf-8", "replace")


def read_acquisition(buffer: Buffer, message: Message) -> Readout:
    """Return an ACQUISITION's header, trajectory and samples, without a copy."""
    header = np.frombuffer(buffer, ACQUISITION_HEADER, 1, message.body)[0]
    n_samples, n_coils = int(header["number_of_samples"]), int(header["active_channels"])
    n_dims = int(header["trajectory_dimensions"])
    at = message.body + ACQUISITION_HEADER.itemsize
    trajectory = _view(buffer, "<f4", at, (n_samples, n_dims))
    if int(header["flags"]) & COMPRESSED:
        return Readout(header, trajectory, None)
    return Readout(header, trajectory, _view(buffer, "<c8", at + trajectory.nbytes, (n_coils, n_samples)))


def read_image(buffer: Buffer, message: Message) -> Image:
    """Return an IMAGE's header, attribute XML and pixels, without a copy."""
    header = np.frombuffer(buffer, IMAGE_HEADER, 1, message.body)[0]
    at = message.body + IMAGE_HEADER.itemsize
    (n,) = _U8.unpack_from(buffer, at)
    attributes = bytes(memoryview(buffer)[at + 8 : at + 8 + n]).rstrip(b"\0").decode("utf-8", "replace")
    nx, ny, nz = (int(n) for n in header["matrix_size"])
    pixels = PIXELS[int(header["data_type"])]
    return Image(header, attributes, _view(buffer, pixels, at + 8 + n, (int(header["channels"]), nz, ny, nx)))


def read_waveform(buffer: Buffer, message: Message) -> Waveform:
    """Return a WAVEFORM's header and samples, without a copy."""
    header = np.frombuffer(buffer, WAVEFORM_HEADER, 1, message.body)[0]
    shape = (int(header["channels"]), int(header["number_of_samples"]))
    return Waveform(header, _view(buffer, "<u4", message.body + WAVEFORM_HEADER.itemsize, shape))


def _view(buffer: Buffer, dtype: str | np.dtype[Any], offset: int, shape: tuple[int, ...]) -> Array:
    """Return `shape` elements at `offset`; an empty array may lie at the very end, which frombuffer refuses."""
    n = int(np.prod(shape))
    return np.frombuffer(buffer, dtype, n, offset).reshape(shape) if n else np.zeros(shape, dtype)
