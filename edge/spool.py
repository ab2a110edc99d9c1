"""The spool: every scan's stream as it came, on disk before anything is made of it.

`ROOT/<scan_id>/raw.mrd` is append-only and is its own journal: reading it again rebuilds all that follows. `state.json`
beside it says how the stream ended; it is written last, so a scan without one was cut off by a stop of the program, and
`Spool.recover` finds out how far it came.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from edge.atomic import sync_folder, write_atomically
from edge.mrd import DEFAULT_LIMITS, Limits, Message, MessageId, messages
from recon.errors import DeliveryError, ScanError, StreamError

Ending = Literal["complete", "interrupted", "failed"]
ENDINGS: tuple[Ending, ...] = ("complete", "interrupted", "failed")

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32
_SCAN_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_DELETED = ".deleted-"
_WINDOW = 64 << 20
_KEPT_FREE = 64 << 20


def new_scan_id() -> str:
    """Return 128 random bits as 26 characters of Crockford's base 32: a ULID in form, without a time to read back."""
    return scan_id_of(secrets.randbits(128))


def scan_id_of(number: int) -> str:
    """Return 128 bits as a scan id."""
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in range(25, -1, -1))


@dataclass(frozen=True)
class ScanState:
    """How a stream ended: `ending` None while nobody has said so; `reason` in words; `n_bytes` of raw.mrd."""

    scan_id: str
    n_bytes: int
    ending: Ending | None = None
    reason: str = ""


class SpoolWriter:
    """Appends one scan's stream to its file. Not for several threads at once."""

    def __init__(self, scan_id: str, folder: Path) -> None:
        """Create `folder` and an empty raw.mrd in it; raises DeliveryError where the disk does not allow it."""
        self.scan_id = scan_id
        self.n_bytes = 0
        self._folder = folder
        self._file = -1
        try:
            folder.mkdir(mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(folder / "raw.mrd", flags, 0o600)
            sync_folder(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise _undelivered("a scan's spool cannot be created", error) from error

    def append(self, chunk: bytes | bytearray | memoryview) -> None:
        """Write all of `chunk`; raises DeliveryError where the disk takes no more, and keeps what it took.

        The last of the disk is not for the spool: ledger and results of what has come must find room.
        """
        view = memoryview(chunk).cast("B")
        disk = os.fstatvfs(self._file)
        free, kept = disk.f_bavail * disk.f_frsize, min(_KEPT_FREE, disk.f_blocks * disk.f_frsize // 8)
        if free - len(view) < kept:
            raise DeliveryError(
                f"the disk is full: {free >> 20} MiB are left and {kept >> 20} MiB are kept for results; "
                f"the spool ends after {self.n_bytes} bytes of the scan"
            )
        while view:
            try:
                n = os.write(self._file, view)
            except OSError as error:
                raise _undelivered(f"the spool takes no more after {self.n_bytes} bytes of the scan", error) from error
            self.n_bytes += n
            view = view[n:]

    def sync(self) -> None:
        """Return once all that was appended would survive a power cut; raises DeliveryError."""
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise _undelivered("the spool cannot be synchronised", error) from error

    def finish(self, ending: Ending, reason: str = "") -> None:
        """Close the stream and write how it ended; raises DeliveryError. A second call does nothing."""
        if self._file < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._file)
            self._file = -1
        _write_state(self._folder, ScanState(self.scan_id, self.n_bytes, ending, reason))


class SpoolReader:
    """The stream of one scan, mapped into memory a window at a time; it can be read while it is still being written.

    buffer: what is mapped; base: where in the stream it begins.
    """

    def __init__(self, path: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        """Open the file at `path`; raises DeliveryError where there is none."""
        self.buffer: memoryview = memoryview(b"")
        self.base = 0
        self._limits = limits
        self._offset = 0  # in the stream, of the next message
        self._window = _WINDOW
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _undelivered("the scan's stream cannot be opened", error) from error

    def messages(self) -> Iterator[Message]:
        """Yield the whole messages that have come since the last call, up to and with CLOSE.

        A message's offsets are those in `buffer` at that moment; `base` + offset is the place in the stream. Views of
        former buffers stay good. Raises StreamError as `edge.mrd.next_message`.
        """
        while True:
            start = self._offset
            for message in messages(self.buffer, self._offset - self.base, self._limits):
                if message.id is not MessageId.CLOSE:  # CLOSE is found again, so that a late caller sees it too
                    self._offset = self.base + message.end
                yield message
                if message.id is MessageId.CLOSE:
                    return
            if not self._map(is_stuck=start == self._offset):
                return

    def _map(self, is_stuck: bool) -> bool:
        """Map the stream from the next message on, a window of it; False where there is no more than was mapped."""
        mapped = self.base + len(self.buffer)
        n = os.fstat(self._file).st_size
        if n <= mapped:
            return False
        if is_stuck and len(self.buffer) >= self._window:
            self._window *= 2  # one message is longer than the window
        self.base = self._offset - self._offset % mmap.ALLOCATIONGRANULARITY
        length = min(n - self.base, self._window)
        self.buffer = memoryview(mmap.mmap(self._file, length, prot=mmap.PROT_READ, offset=self.base))
        return True

    def close(self) -> None:
        """Close the file; views of its content stay good. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Spool:
    """All scans under one folder."""

    def __init__(self, root: Path) -> None:
        """Create the folder where it is missing; raises DeliveryError."""
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _undelivered("the spool's folder cannot be used", error) from error

    def create(self) -> SpoolWriter:
        """Start a new scan under a random id; raises DeliveryError."""
        scan_id = new_scan_id()
        return SpoolWriter(scan_id, self.root / scan_id)

    def scans(self) -> list[ScanState]:
        """Return all scans, the one that was written to longest ago first."""
        found = []
        for folder in self.root.iterdir():
            if _SCAN_ID.fullmatch(folder.name):
                try:
                    status = (folder / "raw.mrd").stat()
                except FileNotFoundError:
                    continue  # a crash came between the folder and its file, or someone is deleting the scan
                found.append((status.st_mtime_ns, _read_state(folder, status.st_size)))
        return [state for _, state in sorted(found, key=lambda pair: (pair[0], pair[1].scan_id))]

    def state(self, scan_id: str) -> ScanState:
        """Return how far one scan came; raises ScanError where there is none."""
        return _read_state(self._folder(scan_id), self.path(scan_id).stat().st_size)

    def path(self, scan_id: str) -> Path:
        """Return the path of a scan's stream; raises ScanError where there is none."""
        return self._folder(scan_id) / "raw.mrd"

    def open(self, scan_id: str, limits: Limits = DEFAULT_LIMITS) -> SpoolReader:
        """Return a reader of a scan's stream; raises ScanError where there is none."""
        return SpoolReader(self.path(scan_id), limits)

    def recover(self, limits: Limits = DEFAULT_LIMITS) -> list[ScanState]:
        """Say of every scan without an ending how it ended, and return those: for the start, before any session.

        A stream with its CLOSE is complete whether or not the program lived to write it down. Finishes deletions, and
        removes folders that a crash left without a stream. Raises DeliveryError where the disk does not allow it.
        """
        try:
            for folder in self.root.iterdir():
                is_empty = _SCAN_ID.fullmatch(folder.name) and not (folder / "raw.mrd").exists()
                if is_empty or folder.name.startswith(_DELETED):
                    shutil.rmtree(folder)
        except OSError as error:
            raise _undelivered("the spool cannot be tidied", error) from error
        recovered = []
        for state in self.scans():
            if state.ending is None:
                reader = self.open(state.scan_id, limits)
                ending, reason = _judge(reader)
                reader.close()
                recovered.append(ScanState(state.scan_id, state.n_bytes, ending, reason))
                _write_state(self.root / state.scan_id, recovered[-1])
        return recovered

    def delete(self, scan_id: str) -> None:
        """Remove a scan; raises ScanError where there is none and DeliveryError where it cannot be removed."""
        folder = self._folder(scan_id)
        gone = folder.with_name(f"{_DELETED}{scan_id}")
        try:
            folder.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            raise _undelivered("a scan cannot be deleted from the spool", error) from error

    def free_bytes(self) -> int:
        """Return how many bytes the spool's file system has left for this user."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def _folder(self, scan_id: str) -> Path:
        if not _SCAN_ID.fullmatch(scan_id):
            raise ScanError("a scan was asked for by something that is not a scan id (26 characters of base 32)")
        if not (self.root / scan_id / "raw.mrd").is_file():
            raise ScanError(f"scan {scan_id} is not in the spool")
        return self.root / scan_id


def _judge(reader: SpoolReader) -> tuple[Ending, str]:
    try:
        for message in reader.messages():
            if message.id is MessageId.CLOSE:
                return "complete", ""
    except StreamError as error:
        return "failed", str(error)
    return "interrupted", "the server stopped before the stream ended"


def _write_state(folder: Path, state: ScanState) -> None:
    content = json.dumps({"v": 1, **asdict(state)}).encode()
    try:
        write_atomically(folder / "state.json", content)
    except OSError as error:
        raise _undelivered("the end of a scan cannot be written down", error) from error


def _read_state(folder: Path, n_bytes: int) -> ScanState:
    """The state as written; none where the file is missing, not ours, or says more bytes than a power cut left."""
    scan_id = folder.name
    try:
        found = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError):
        return ScanState(scan_id, n_bytes)
    if not isinstance(found, dict) or found.get("ending") not in ENDINGS or found.get("n_bytes") != n_bytes:
        return ScanState(scan_id, n_bytes)
    return ScanState(scan_id, n_bytes, found["ending"], str(found.get("reason", "")))


def _undelivered(what: str, error: OSError) -> DeliveryError:
    return DeliveryError(f"{what}: {os.strerror(error.errno or 0)}")
