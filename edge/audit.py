"""The audit trail: who did what, in an order that cannot be changed unseen.

One line of JSON a record, with the content of a DICOM audit message and the SHA-256 of the line before it. A changed,
removed or moved line breaks the chain; removed last lines are told by the ledger, which keeps the head of the chain.
A file that is full gets the number of its last record in its name, and the chain goes on in a new one.
Source: DICOM PS3.15 A.5 (content), PS3.16 CID 400 to 402 (codes).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.atomic import sync_folder
from edge.wire import utc_now

log = logging.getLogger(__name__)

EVENTS = {  # what happened: (event id, event type), both DICOM DCM codes with their meanings
    "start": (("110100", "Application Activity"), ("110120", "Application Start")),
    "stop": (("110100", "Application Activity"), ("110121", "Application Stop")),
    "login": (("110114", "User Authentication"), ("110122", "Login")),
    "refused": (("110113", "Security Alert"), ("110126", "Node Authentication")),
    "restricted": (("110113", "Security Alert"), ("110132", "Use of Restricted Function")),
    "keys": (("110113", "Security Alert"), ("110136", "Security Roles Changed")),
    "settings": (("110113", "Security Alert"), ("110131", "Software Configuration")),
    "alert": (("110111", "Procedure Record"), None),
    "acknowledged": (("110111", "Procedure Record"), None),
    "escalated": (("110111", "Procedure Record"), None),
    "transfer": (("110104", "DICOM Instances Transferred"), None),
    "import": (("110107", "Import"), None),
    "export": (("110106", "Export"), None),
    "deleted": (("110105", "DICOM Study Deleted"), None),
}
TRAIL = Path("audit", "audit.jsonl")  # under the state folder
_ACTIONS = {
    "alert": "C",
    "import": "C",
    "acknowledged": "U",
    "escalated": "U",
    "deleted": "D",
}  # create, update, delete; else execute
_LIMITED = frozenset({"login", "refused", "restricted"})  # what anybody can cause as often as they like
_MOST_A_SECOND = 20
_OUTCOMES = {"success": 0, "minor": 4, "serious": 8}
_FIRST = "0" * 64
_MOST_BYTES = 32 << 20  # of one file: some 40 000 records


@dataclass(frozen=True)
class Head:
    """The last record: its number and hash."""

    n: int = 0
    sha256: str = _FIRST

    def to_text(self) -> str:
        """Return it as the ledger keeps it."""
        return f"{self.n} {self.sha256}"

    @staticmethod
    def from_text(text: str) -> Head:
        """Return what `to_text` wrote; raises ValueError where it is something else."""
        n, sha256 = text.split()
        return Head(int(n), sha256)


class AuditTrail:
    """Appends records to one file; each is on disk when `record` returns. Several processes may write to one."""

    def __init__(self, path: Path, most_bytes: int = _MOST_BYTES) -> None:
        """Open or create the trail; a last line that a crash cut short is set aside as `.torn`. Raises OSError.

        most_bytes: of one file, give or take a record.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path, self._most_bytes = path, most_bytes
        self._file = self._open()
        self._host = socket.gethostname()
        self.head = Head()
        self.is_broken = False  # whether the last record could not be written
        self._lock = threading.Lock()
        self._second = (0.0, 0)  # which second, and how many limited records it has had
        self._n_left_out = 0
        with self._locked():
            torn = _last_line(self._file).rpartition(b"\n")[2]
            if torn:
                path.with_suffix(".torn").write_bytes(torn)
                os.ftruncate(self._file, os.lseek(self._file, 0, os.SEEK_END) - len(torn))
            self.head = self._read_head()
        if torn:
            self.record("start", "minor", reason="the last record was cut short by a crash and set aside")

    def record(
        self,
        what: str,
        outcome: str = "success",
        *,
        user: str = "",
        role: str = "",
        source: str = "",
        objects: Mapping[str, str] | None = None,
        reason: str = "",
    ) -> None:
        """Append one record. A disk that does not take it is logged and stops nobody: an alert must still be answered.

        what: one of EVENTS. user, role: who asked, as authenticated. source: its address. objects: what it is about,
        ids of scans and alerts; never anything that names a patient.
        """
        if what in _LIMITED and self._is_flood():
            return
        if self._n_left_out and what in _LIMITED:
            reason, self._n_left_out = f"{reason} (and {self._n_left_out} records before it were left out)", 0
        event, kind = EVENTS[what]
        content = {
            "v": 1,
            "at": utc_now(),
            "what": what,
            "EventID": _code(*event),
            "EventTypeCode": _code(*kind) if kind else None,
            "EventActionCode": _ACTIONS.get(what, "E"),
            "EventOutcomeIndicator": _OUTCOMES[outcome],
            "EventOutcomeDescription": reason,
            "ActiveParticipants": [
                {"UserID": user or "local", "RoleIDCode": role, "UserIsRequestor": True, "NetworkAccessPointID": source}
            ],
            "AuditSource": {"AuditSourceID": "scanside", "AuditEnterpriseSiteID": self._host},
            "ParticipantObjects": [
                {"ParticipantObjectTypeCode": name, "ParticipantObjectID": value}
                for name, value in (objects or {}).items()
            ],
        }
        try:
            with self._locked():
                self._append(content)
        except OSError as error:
            self.is_broken = True
            log.critical("audit record not written what=%s errno=%s", what, error.errno)
        else:
            self.is_broken = False

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _is_flood(self) -> bool:
        """Whether too many came within this second; the next record says how many were left out."""
        second = time.monotonic() // 1.0
        n = self._second[1] + 1 if self._second[0] == second else 1
        self._second = (second, n)
        self._n_left_out += n > _MOST_A_SECOND
        return n > _MOST_A_SECOND

    def _append(self, content: Mapping[str, Any]) -> None:
        if os.fstat(self._file).st_size >= self._most_bytes:
            self._turn_over()
        before = self._read_head()
        record = {**content, "n": before.n + 1, "before": before.sha256}
        digest = _digest(record)
        size = os.lseek(self._file, 0, os.SEEK_END)
        try:
            _write(self._file, _line({**record, "sha256": digest}))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self.head = Head(before.n + 1, digest)

    def _read_head(self) -> Head:
        """Return the last record; where it cannot be read, one that `verify` will find not to fit."""
        tail = _last_line(self._file)
        if not tail:
            parts = _full_parts(self._path)
            if not parts:
                return Head()
            with parts[-1].open("rb") as part:
                tail = _last_line(part.fileno())
        try:
            record = json.loads(tail)
            return Head(int(record["n"]), str(record["sha256"]))
        except (ValueError, KeyError, TypeError):
            return self.head

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _turn_over(self) -> None:
        """Give the file its number and begin another; it stays locked, and so does the new one."""
        self._path.rename(self._path.with_name(f"{self._path.stem}-{self._read_head().n:012d}{self._path.suffix}"))
        full, self._file = self._file, self._open()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        os.close(full)
        sync_folder(self._path.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:  # a file's lock keeps out other processes, not other threads
            fcntl.flock(self._file, fcntl.LOCK_EX)
            while not _is_at(self._file, self._path):  # another process has turned over meanwhile
                former, self._file = self._file, self._open()
                os.close(former)
                fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def verify(path: Path, head: Head | None = None) -> tuple[int, str]:
    """Return how many records of a trail hold, and "" or what is wrong with the next.

    head: what the ledger says the trail had reached; a trail that ends before it, or differs there, is wrong.
    Raises OSError where the file cannot be read.
    """
    before, n = _FIRST, 0
    for number, line in enumerate(_lines(path), 1):
        try:
            record = json.loads(line)
            is_ours = isinstance(record, dict) and _line(record) == line
        except (ValueError, RecursionError):
            is_ours = False
        if not is_ours:
            return n, f"record {number} is not as it was written"
        digest = record.pop("sha256", None)
        if record.get("before") != before:
            return n, f"record {number} does not follow the one before it: one was changed, removed or moved"
        if record.get("n") != number or digest != _digest(record):
            return n, f"record {number} was changed"
        before, n = digest, number
        if head is not None and head.n == n and head.sha256 != digest:
            return n - 1, f"record {n} is another than the ledger saw: the trail was written anew"
    if head is not None and head.n > n:
        return n, f"the trail ends after {n} records, the ledger saw {head.n}: its end was removed"
    return n, ""


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of the full files and of the last one, as they are at one moment."""
    while True:
        with path.open("rb") as last:
            fcntl.flock(last, fcntl.LOCK_SH)
            if not _is_at(last.fileno(), path):
                continue
            parts = _full_parts(path)
            fcntl.flock(last, fcntl.LOCK_UN)
            for part in parts:
                with part.open("rb") as file:
                    yield from file
            yield from last
            return


def _full_parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_line(record)).hexdigest()


def _code(value: str, meaning: str) -> dict[str, str]:
    return {"csd-code": value, "codeSystemName": "DCM", "originalText": meaning}


def _last_line(file: int) -> bytes:
    """Return the end of a file: its last line, and what follows its last newline where something does."""
    size = os.lseek(file, 0, os.SEEK_END)
    length = 4096
    while True:
        begin = max(size - length, 0)
        tail = os.pread(file, size - begin, begin)
        if not tail or begin == 0 or tail.rstrip(b"\n").count(b"\n"):
            if tail.endswith(b"\n"):
                return tail[:-1].rpartition(b"\n")[2] + b"\n"
            return tail if begin == 0 and b"\n" not in tail else b"\n" + tail.rpartition(b"\n")[2]
        length *= 2


def _write(file: int, line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[os.write(file, view) :]
