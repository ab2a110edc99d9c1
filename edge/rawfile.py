"""Raw data files as MRD messages: ISMRMRD HDF5 files, read in blocks, and recorded streams such as the spool's.

An ISMRMRD file may also hold images, coil maps or a phantom (the truth); none of that is read.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from edge.mrd import (
    ACQUISITION_HEADER,
    COMPRESSED,
    DEFAULT_LIMITS,
    WAVEFORM_HEADER,
    Limits,
    Message,
    MessageId,
    messages,
    read_bytes,
)
from recon.arrays import Array
from recon.errors import AcquisitionError, ScanError

_BLOCK_BYTES = 16 << 20
_HEADS = 128


class _Source(Protocol):
    """Where the bodies of acquisitions come from."""

    def bodies(self, places: Array) -> Iterator[bytes]:
        """Yield trajectory and samples of the acquisitions at `places` (increasing), as they follow the header."""

    def waveforms(self) -> Iterator[bytes]:
        """Yield all WAVEFORM messages."""


@dataclass(frozen=True, eq=False)
class RawFile:
    """A scan in a file, ready to be sent.

    header: the ISMRMRD XML. heads: ACQUISITION_HEADER (acquisition,), what will be sent, in the order of the file.
    places: int64 (acquisition,), where each lies in the file.
    """

    header: bytes
    heads: Array
    places: Array
    source: _Source

    def acquisitions(self) -> Iterator[bytes]:
        """Yield each ACQUISITION as a message; raises AcquisitionError where samples do not fit their header."""
        bodies = self.source.bodies(self.places)
        for head, place, body in zip(self.heads, self.places, bodies, strict=True):
            n = int(head["number_of_samples"]) * (
                4 * int(head["trajectory_dimensions"]) + 8 * int(head["active_channels"])
            )
            if len(body) != n and not int(head["flags"]) & COMPRESSED:
                raise AcquisitionError(f"acquisition {place} of the file has {len(body)} bytes; its header says {n}")
            yield b"\xf0\x03" + head.tobytes() + body  # 1008

    def waveforms(self) -> Iterator[bytes]:
        """Yield each WAVEFORM as a message."""
        return self.source.waveforms()


def open_raw(path: Path, limits: Limits = DEFAULT_LIMITS) -> RawFile:
    """Return the scan in an ISMRMRD HDF5 file or in a recorded MRD stream; keeps no samples.

    Raises AcquisitionError where the file is neither, or holds no header or no readouts, and ScanError where it cannot
    be opened.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start == b"\x89HDF\r\n\x1a\n":
            return _open_hdf5(path)
        return _open_stream(path, limits)
    except OSError as error:
        raise ScanError(f"the file cannot be read: {os.strerror(error.errno) if error.errno else 'damaged'}") from error


def _open_hdf5(path: Path) -> RawFile:
    # A lock would keep two readers of a read-only file apart, as HDF5 takes it for writing on some file systems.
    file = h5py.File(path, "r", locking=False)
    group = _find_group(file)
    data = group["data"]
    if data.dtype.names is None or not {"head", "data"} <= set(data.dtype.names):
        raise AcquisitionError("the file's acquisitions have no 'head' and 'data'; an ISMRMRD file has both")
    xml = group["xml"][0]
    # Whole rows, a few at a time: asked for the heads alone, HDF5 reads the samples too and never gives them back.
    rows = (np.array(data[at : at + _HEADS]["head"]) for at in range(0, len(data), _HEADS))
    heads = _renamed(np.concatenate(list(rows)), ACQUISITION_HEADER)
    return RawFile(
        xml.encode() if isinstance(xml, str) else bytes(xml).rstrip(b"\0"),
        heads,
        np.arange(len(heads)),
        _Hdf5(group, _block(heads)),
    )


def _find_group(file: Any) -> Any:
    """The group with a header and acquisitions: "dataset" where it is one, else the only one."""
    groups = [g for g in file.values() if isinstance(g, h5py.Group) and {"data", "xml"} <= set(g)]
    named = [g for g in groups if g.name == "/dataset"] or groups
    if len(named) != 1:
        raise AcquisitionError(f"the file has {len(named)} groups with 'xml' and 'data'; one is needed")
    if not named[0]["data"].size or not named[0]["xml"].size:
        raise AcquisitionError("the file holds no readouts or no header")
    return named[0]


def _renamed(records: Array, dtype: np.dtype[Any]) -> Array:
    """Return `records` as `dtype`, field by field and by name: files differ in padding."""
    if records.dtype == dtype:
        return records
    out = np.zeros(records.shape, dtype)
    for name in dtype.names or ():
        if name not in (records.dtype.names or ()):
            raise AcquisitionError(f"the file's readout headers lack {name!r}; an ISMRMRD 1.x file has it")
        field = dtype[name]
        out[name] = _renamed(records[name], field) if field.names else records[name]
    return out


def _block(heads: Array) -> int:
    """How many acquisitions to read at once."""
    largest = heads["number_of_samples"].astype(np.int64) * (heads["active_channels"].astype(np.int64) * 8 + 1)
    return max(1, min(1024, _BLOCK_BYTES // max(1, int(largest.max(initial=1)))))


class _Hdf5:
    def __init__(self, group: Any, block: int) -> None:
        self._group = group
        self._block = block

    def bodies(self, places: Array) -> Iterator[bytes]:
        data = self._group["data"]
        has_trajectory = "traj" in data.dtype.names
        for at in range(0, len(places), self._block):
            wanted = places[at : at + self._block]
            first = int(wanted[0])
            try:
                rows = data[first : int(wanted[-1]) + 1]
            except OSError as error:
                raise AcquisitionError(f"the file is damaged at acquisition {first} or soon after") from error
            for place in wanted:
                row = rows[place - first]
                trajectory = np.asarray(row["traj"], "<f4").tobytes() if has_trajectory else b""
                yield trajectory + np.asarray(row["data"], "<f4").tobytes()

    def waveforms(self) -> Iterator[bytes]:
        if "waveforms" not in self._group:
            return
        data = self._group["waveforms"]
        for at in range(0, len(data), 256):
            for row in data[at : at + 256]:
                head = _renamed(np.asarray(row["head"]), WAVEFORM_HEADER)
                yield b"\x02\x04" + head.tobytes() + np.asarray(row["data"], "<u4").tobytes()  # 1026


class _Stream:
    def __init__(self, buffer: memoryview, acquisitions: list[Message], waveforms: list[Message]) -> None:
        self._buffer = buffer
        self._acquisitions = acquisitions
        self._waveforms = waveforms

    def bodies(self, places: Array) -> Iterator[bytes]:
        for place in places:
            message = self._acquisitions[place]
            yield bytes(self._buffer[message.body + ACQUISITION_HEADER.itemsize : message.end])

    def waveforms(self) -> Iterator[bytes]:
        for message in self._waveforms:
            yield bytes(self._buffer[message.start : message.end])


def _open_stream(path: Path, limits: Limits) -> RawFile:
    """A recorded stream; one that was cut off gives what is whole."""
    with path.open("rb") as file:
        n = os.fstat(file.fileno()).st_size
        buffer = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) if n else memoryview(b"")
    header = b""
    found: dict[MessageId, list[Message]] = {MessageId.ACQUISITION: [], MessageId.WAVEFORM: []}
    for message in messages(buffer, 0, limits):
        if message.id is MessageId.HEADER:
            header = read_bytes(buffer, message)
        elif message.id in found:
            found[message.id].append(message)
    acquisitions = found[MessageId.ACQUISITION]
    if not header or not acquisitions:
        raise AcquisitionError("the file is neither ISMRMRD HDF5 nor an MRD stream with a header and readouts")
    raw = b"".join(bytes(buffer[m.body : m.body + ACQUISITION_HEADER.itemsize]) for m in acquisitions)
    heads = np.frombuffer(raw, ACQUISITION_HEADER)
    return RawFile(header, heads, np.arange(len(heads)), _Stream(buffer, acquisitions, found[MessageId.WAVEFORM]))


def selected(raw: RawFile, keep: Array, heads: Array, header: bytes) -> RawFile:
    """Return `raw` with the acquisitions where `keep` (bool) is set, under new `heads` (of all) and `header`."""
    return replace(raw, header=header, heads=heads[keep], places=raw.places[keep])
