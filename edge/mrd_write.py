"""MRD v1 messages as bytes: what this program sends to scanners, and what its own client sends to a server.

Every function returns one whole message. Images are float32 magnitudes: some readers take int32 for 8-byte integers.
Source: the ISMRMRD C++ library; attribute names as Siemens FIRE and python-ismrmrd-server use them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import numpy as np

from edge.mrd import ACQUISITION_HEADER, IMAGE_HEADER, MAX_CHANNELS, WAVEFORM_HEADER, MessageId
from recon.arrays import Array
from recon.errors import ShapeError, StreamError

_U2, _U4, _U8, _QUERY = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<QQQ")
_MAGNITUDE, _FLOAT32 = 1, 5

AttributeValue = str | int | float | Sequence[str | int | float]


def _message(number: MessageId, *parts: bytes) -> bytes:
    return b"".join((_U2.pack(number), *parts))


def encode_config_file(name: str) -> bytes:
    """Return CONFIG_FILE with `name`; raises StreamError above 1023 bytes of UTF-8."""
    content = name.encode()
    if len(content) > 1023:
        raise StreamError(f"a configuration name of {len(content)} bytes; at most 1023 fit")
    return _message(MessageId.CONFIG_FILE, content.ljust(1024, b"\0"))


def encode_config_text(text: str) -> bytes:
    """Return CONFIG_TEXT with `text`, ended by one NUL as python-ismrmrd-server's sender does."""
    return _ended(MessageId.CONFIG_TEXT, text.encode())


def encode_header(xml: bytes) -> bytes:
    """Return HEADER with `xml`, ended by one NUL as python-ismrmrd-server's sender does."""
    return _ended(MessageId.HEADER, xml)


def encode_text(text: str, level: str = "") -> bytes:
    """Return TEXT, ended by one NUL; `level` (INFO, WARNING, ERROR) comes first, padded to eight characters."""
    return _ended(MessageId.TEXT, (f"{level:<8}{text}" if level else text).encode("utf-8", "replace"))


def _ended(number: MessageId, content: bytes) -> bytes:
    content = content.rstrip(b"\0") + b"\0"
    return _message(number, _U4.pack(len(content)), content)


def encode_close() -> bytes:
    """Return CLOSE."""
    return _message(MessageId.CLOSE)


def encode_query(correlation: int, text: str) -> bytes:
    """Return QUERY with `text`, to be answered under the id `correlation`."""
    content = text.encode()
    return _message(MessageId.QUERY, _QUERY.pack(0, correlation, len(content)), content)


def encode_response(correlation: int, text: str) -> bytes:
    """Return RESPONSE to the query `correlation`; only for a client that sent one, others do not know the id."""
    content = text.encode()
    return _message(MessageId.RESPONSE, _U8.pack(correlation), _U8.pack(len(content)), content)


def encode_acquisition(header: Array, samples: Array, trajectory: Array | None = None) -> bytes:
    """Return ACQUISITION with samples complex64 (coil, sample) and trajectory float32 (sample, dimension).

    The counts in `header` are set to fit them. Raises StreamError where the two do not have one length or a count does
    not fit its field.
    """
    samples = np.ascontiguousarray(samples, "<c8")
    n_coils, n_samples = samples.shape
    path = np.zeros((n_samples, 0), "<f4") if trajectory is None else np.ascontiguousarray(trajectory, "<f4")
    if len(path) != n_samples or n_samples > 65535 or n_coils > MAX_CHANNELS:
        raise StreamError(f"samples {samples.shape} and trajectory {path.shape} do not make an ACQUISITION")
    head = np.array(header, ACQUISITION_HEADER)
    head["number_of_samples"], head["active_channels"], head["trajectory_dimensions"] = (
        n_samples,
        n_coils,
        path.shape[1],
    )
    return _message(MessageId.ACQUISITION, head.tobytes(), path.tobytes(), samples.tobytes())


def encode_waveform(header: Array, samples: Array) -> bytes:
    """Return WAVEFORM: `header` with its counts set to fit samples uint32 (channel, sample)."""
    samples = np.ascontiguousarray(samples, "<u4")
    head = np.array(header, WAVEFORM_HEADER)
    head["channels"], head["number_of_samples"] = samples.shape
    return _message(MessageId.WAVEFORM, head.tobytes(), samples.tobytes())


@dataclass(frozen=True)
class ImageInfo:
    """What an image says of itself beside its pixels.

    position_mm: centre of the slice, patient LPS. row_dir, col_dir: the unit directions in which x and y grow;
    slice_dir: the normal. acquisition_dirs: read, phase and slice direction of the readouts, where the pixels were
    turned against them (row_dir, col_dir and slice_dir where they were not). fov_mm: x, y, z; z is the slice thickness.
    series and index become DICOM's Series Number and Instance Number. window: centre and width in the pixels' units.
    """

    position_mm: tuple[float, float, float]
    row_dir: tuple[float, float, float]
    col_dir: tuple[float, float, float]
    slice_dir: tuple[float, float, float]
    fov_mm: tuple[float, float, float]
    series: int
    index: int
    series_description: str
    slice: int = 0
    contrast: int = 0
    phase: int = 0
    repetition: int = 0
    set: int = 0
    window: tuple[float, float] | None = None
    measurement_uid: int = 0
    acquisition_time_stamp: int = 0
    acquisition_dirs: tuple[tuple[float, float, float], ...] | None = None
    processing: tuple[str, ...] = ()
    comment: str = ""
    more: Mapping[str, AttributeValue] = field(default_factory=dict)


def attributes_xml(attributes: Mapping[str, AttributeValue]) -> str:
    """Return `attributes` as ISMRMRD meta XML; a sequence becomes several values, a float keeps 18 decimals."""
    parts = ['<?xml version="1.0" encoding="UTF-8"?>\n<ismrmrdMeta>\n']
    for name, value in attributes.items():
        values: Iterable[str | int | float] = [value] if isinstance(value, str | int | float) else value
        shown = "".join(f"<value>{_shown(v)}</value>" for v in values)
        parts.append(f"<meta><name>{escape(name)}</name>{shown}</meta>\n")
    parts.append("</ismrmrdMeta>\n")
    return "".join(parts)


def _shown(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.18f}"
    # Control characters cannot stand in XML 1.0, not even escaped.
    return escape("".join(c for c in str(value) if c >= " " or c in "\t\n"))


def encode_image(pixels: Array, info: ImageInfo) -> bytes:
    """Return IMAGE with magnitude `pixels`, real (y, x) or (z, y, x), sent as float32 without any scaling.

    The directions go into the attributes too, because readers that turn pixels trust only those.
    Raises ShapeError for another number of axes or a size that its uint16 field cannot hold.
    """
    if np.iscomplexobj(pixels) or np.ndim(pixels) not in (2, 3) or max(np.shape(pixels)) > 65535:
        raise ShapeError("real pixels of an image", np.shape(pixels), ("z", "y", "x"))
    data = np.ascontiguousarray(pixels, "<f4")
    nz, ny, nx = data.shape if data.ndim == 3 else (1, *data.shape)
    attributes: dict[str, AttributeValue] = {
        "DataRole": "Image",
        "ImageProcessingHistory": info.processing or ("SCANSIDE",),
        "SeriesDescription": info.series_description,
        "SequenceDescriptionAdditional": "SCANSIDE",
        "Keep_image_geometry": 1,
        "ImageRowDir": tuple(map(float, info.row_dir)),
        "ImageColumnDir": tuple(map(float, info.col_dir)),
        "ImageSliceDir": tuple(map(float, info.slice_dir)),
    }
    if info.comment:
        attributes["ImageComments"] = info.comment
    if info.window is not None:
        attributes["WindowCenter"], attributes["WindowWidth"] = (f"{v:.9g}" for v in info.window)
    content = attributes_xml({**attributes, **info.more}).encode()
    head = np.zeros((), IMAGE_HEADER)
    values = {
        "version": 1, "data_type": _FLOAT32, "image_type": _MAGNITUDE, "channels": 1, "matrix_size": (nx, ny, nz),
        "field_of_view": info.fov_mm, "position": info.position_mm, "image_series_index": info.series,
        "image_index": info.index, "attribute_string_len": len(content), "measurement_uid": info.measurement_uid,
        "acquisition_time_stamp": info.acquisition_time_stamp, "slice": info.slice, "contrast": info.contrast,
        "phase": info.phase, "repetition": info.repetition, "set": info.set,
    }  # fmt: skip
    directions = info.acquisition_dirs or (info.row_dir, info.col_dir, info.slice_dir)
    values.update(zip(("read_dir", "phase_dir", "slice_dir"), directions, strict=True))
    for name, value in values.items():
        head[name] = value
    return _message(MessageId.IMAGE, head.tobytes(), _U8.pack(len(content)), content, data.tobytes())
