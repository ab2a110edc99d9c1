"""The process that super-resolves finished scans: last of all, and slowly where anything else wants the machine.

It looks for jobs when it is told to, works through them one plane at a time, and says on standard output what it made.
It yields to every other process: no image and no alert waits for it. It holds nothing that its job's file does not: the
daemon takes that away once results and events are in its ledger, and until then the work would be done again.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from edge.crash import log_crashes
from edge.reports import Reports
from edge.results import write_report
from edge.super_resolution import SERIES, Choice, super_resolve_scan
from edge.superres_job import Job, jobs
from edge.superres_model import SUPER_RESOLUTION, open_refiner
from recon.errors import BackendError, ModelError, ScanError
from recon.scan import Volume
from recon.superres_card import Refiner

log = logging.getLogger(__name__)

_NICE = 19
_BEAT_S = 1.0


class Process:
    """Serves jobs until standard input ends."""

    def __init__(self, orders: int, out: BinaryIO, settings: dict[str, Any]) -> None:
        self._orders, self._reports = orders, Reports(out)
        self._jobs = Path(settings["jobs"])
        self._choice = Choice(settings["n_thin"], settings["style"])
        self._refiner: Refiner | ModelError | BackendError
        try:
            self._refiner = open_refiner(
                Path(settings["model"] or SUPER_RESOLUTION), settings["backend"], Path(settings["engines"])
            )
        except (ModelError, BackendError) as error:
            log.warning("super-resolution not available code=%s", error.code)
            self._refiner = error
        self._is_over = False
        self._beat_at = 0.0
        self._served: set[str] = set()  # whose jobs wait for the daemon to take their results over

    def run(self) -> None:
        """Work through what waits, then wait to be told of more."""
        self._reports.send("ready")
        while not self._is_over:
            waiting = list(jobs(self._jobs))
            self._served &= {job.scan_id for job in waiting}
            for job in waiting:
                if job.scan_id not in self._served:
                    self._serve(job)
                if self._is_over:
                    return
            self._listen(_BEAT_S)
            self._beat()

    def _serve(self, job: Job) -> None:
        try:
            if not job.begin():
                log.warning("super-resolution given up id=%s", job.scan_id)
                made = [{"state": "refused", "why": "the process died each time that it was tried"}]
                objects: list[str] = []
            else:
                made = self._made(job)
                objects = _objects(job, made)
            self._write_report(job, made)
            job.settle()
        except ScanError as error:
            log.warning("super-resolution failed id=%s code=%s", job.scan_id, error.code)
            made, objects = [{"state": "refused", "why": str(error)}], []
        if not self._is_over:
            self._served.add(job.scan_id)
            self._reports.send("refined", scan_id=job.scan_id, volumes=made, objects=objects)

    def _made(self, job: Job) -> list[dict[str, Any]]:
        return super_resolve_scan(
            job.results(),
            self._refiner,
            self._choice,
            job.verdict,
            on_step=lambda done, of: self._between(),
            on_volume=lambda index, contrast, volume: self._send(job.scan_id, index, contrast, volume),
        )

    def _write_report(self, job: Job, made: list[dict[str, Any]]) -> None:
        write_report(Path(job.content["results"]), {**job.report(), "super_resolution": made})

    def _send(self, scan_id: str, index: int, contrast: int, volume: Volume) -> None:
        for number, plane in enumerate(volume.data):
            self._reports.send(
                "image",
                plane,
                scan_id=scan_id,
                series=SERIES,
                method=volume.provenance.method,
                image_key=f"{index}-{number}",
                slice=number,
                slices=len(volume.data),
                volume=index,
                shape=list(plane.shape),
                spacing_mm=list(volume.geometry.spacing_mm),
            )

    def _between(self) -> None:
        """Between two planes: beat, and end at once where nobody listens any more."""
        self._beat()
        self._listen(0.0)
        if self._is_over:
            os._exit(0)  # the job's file stays: the next process begins it again

    def _beat(self) -> None:
        if time.monotonic() - self._beat_at >= _BEAT_S:
            self._beat_at = time.monotonic()
            self._reports.send("beat")

    def _listen(self, timeout_s: float) -> None:
        """Wait for orders; what they say does not matter, only that the jobs folder is worth a look."""
        ready, _, _ = select.select([self._orders], [], [], timeout_s)
        if ready and not os.read(self._orders, 1 << 16):
            self._is_over = True


def _objects(job: Job, made: list[dict[str, Any]]) -> list[str]:
    folder = Path(job.content["results"])
    names = [each["dicom"] for each in made if "dicom" in each]
    names += [each["style"]["dicom"] for each in made if each.get("style")]
    return [str(path.relative_to(folder)) for name in names for path in sorted((folder / name).glob("*.dcm"))]


def main() -> int:
    """Run on standard input and output; the one argument is the settings as JSON."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    log_crashes()
    with suppress(OSError):
        os.nice(_NICE)
    with suppress(BrokenPipeError):
        Process(sys.stdin.fileno(), sys.stdout.buffer, json.loads(sys.argv[1])).run()
    sys.stdout = None  # nothing is left to flush into a broken pipe
    return 0


if __name__ == "__main__":
    sys.exit(main())
