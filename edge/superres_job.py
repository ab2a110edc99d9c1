"""A scan that waits to be super-resolved: a small file in the state folder, left before its findings go out.

It holds where each leading volume lies and how it was made; pixels are in the results folder, and what DICOM needs to
know in the spool's header. Killed at any moment, the work begins again from it and gives the same files. A job that was
begun three times and never ended is given up, so that a scan cannot take a process down again and again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.atomic import write_atomically
from edge.recall import describe, recall
from edge.results import Results, read_report
from recon.errors import DeliveryError

MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class Job:
    """One file of the jobs folder, read."""

    path: Path
    content: dict[str, Any]

    @property
    def scan_id(self) -> str:
        """Whose volumes wait."""
        return self.path.stem

    def begin(self) -> bool:
        """Count an attempt on disk before it is made; False where there were enough of them. Raises DeliveryError."""
        attempts = int(self.content.get("attempts", 0))
        if attempts >= MOST_ATTEMPTS:
            return False
        self.content["attempts"] = attempts + 1
        _write(self.path, self.content)
        return True

    def results(self) -> Results:
        """Return the scan's results as they were when the job was left; raises AcquisitionError, DeliveryError."""
        said = self.content
        folder, spool = Path(said["results"]), Path(said["spool"])
        return recall(self.scan_id, folder, spool, said["received_at"], said["volumes"])

    @property
    def verdict(self) -> str:
        """The level of the verdict on the scan, "" where there is none."""
        return str(self.content["verdict"])

    def report(self) -> dict[str, Any]:
        """Return the scan's report as it stands; raises DeliveryError."""
        return read_report(Path(self.content["results"]))

    def settle(self) -> None:
        """Note that the work was done: what dies from here on did not die of it. Raises DeliveryError."""
        self.content["attempts"] = 0
        _write(self.path, self.content)


def end_job(folder: Path, scan_id: str) -> None:
    """Forget the scan's job in `folder`; a second call does nothing."""
    (folder / f"{scan_id}.json").unlink(missing_ok=True)


def leave_job(folder: Path, results: Results, spool: Path, verdict: str) -> None:
    """Leave a job in `folder` for the volumes that `results` has written; raises DeliveryError."""
    received_at = results.received_at
    content = {
        "results": str(results.folder),
        "spool": str(spool),
        "received_at": "" if received_at is None else received_at.isoformat(),
        "verdict": verdict,
        "volumes": describe(results),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeliveryError(f"the jobs folder cannot be made: {error.strerror}") from error
    _write(folder / f"{results.scan.scan_id}.json", content)


def jobs(folder: Path) -> Iterator[Job]:
    """Yield what waits in `folder`, the oldest first; a file that cannot be read is taken away."""
    found = []
    for path in folder.glob("*.json"):
        with suppress(OSError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found):
        try:
            yield Job(path, json.loads(path.read_bytes()))
        except ValueError:
            path.unlink(missing_ok=True)
        except OSError:
            continue


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(content, allow_nan=False).encode())
    except OSError as error:
        raise DeliveryError(f"a super-resolution job cannot be written: {error.strerror}") from error
