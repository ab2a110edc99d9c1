"""The process that triages: scans whose images are out, and series that the scanner made; one order at a time.

No image waits for it: it yields to the process that reconstructs. It holds nothing: killed at any moment, another is
given the same order and writes the same files. Orders are JSON lines on standard input, answers go to standard output.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from threadpoolctl import threadpool_limits

from edge.crash import log_crashes
from edge.exam_triage import open_triage, triage_scan
from edge.objects import objects_of
from edge.recall import recall
from edge.received_series import ReceivedSeries
from edge.reports import Reports
from edge.results import read_report
from edge.superres_job import leave_job
from recon.errors import ScanError

log = logging.getLogger(__name__)

_NICE = 5
_BEAT_S = 1.0


class Process:
    """Takes orders until standard input ends."""

    def __init__(self, orders: int, out: BinaryIO, settings: Mapping[str, Any]) -> None:
        self._orders, self._reports, self._settings = orders, Reports(out), settings
        self._triage = open_triage(settings["triage"])

    def run(self) -> None:
        """Answer each order with `triaged` or `failed`; between orders, beat each second."""
        self._reports.send("ready")
        for order in self._listen():
            if order is None:
                self._reports.send("beat")
                continue
            scan_id = order["scan_id"]
            try:
                said = self._read_scan(order) if order["do"] == "scan" else self._read_series(order)
            except ScanError as error:
                log.info("triage failed id=%s code=%s", scan_id, error.code)
                self._reports.send("failed", scan_id=scan_id, code=error.code, reason=str(error))
            else:
                self._reports.send("triaged", scan_id=scan_id, **said)

    def _read_scan(self, order: Mapping[str, Any]) -> dict[str, Any]:
        folder, spool = Path(order["results"]), Path(order["spool"])
        results = recall(order["scan_id"], folder, spool, order["received_at"], order["volumes"])
        report = triage_scan(self._triage, results, read_report(folder))
        if self._settings["super_resolution"] and report["volumes"]:  # later, by another process: nothing waits for it
            leave_job(Path(self._settings["super_resolution"]), results, spool, report["quality"]["verdict"] or "")
        said = {name: report[name] for name in ("findings", "measurements", "stage_ms")}
        return {**said, "objects": objects_of(folder, report)}

    def _read_series(self, order: Mapping[str, Any]) -> dict[str, Any]:
        return ReceivedSeries(order, self._settings, self._triage).read()

    def _listen(self) -> Iterator[dict[str, Any] | None]:
        """Yield orders as they come, None after each second without one; end with standard input."""
        rest = b""
        while True:
            ready, _, _ = select.select([self._orders], [], [], _BEAT_S)
            if not ready:
                yield None
                continue
            chunk = os.read(self._orders, 1 << 16)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)


def main() -> int:
    """Run on standard input and output; the one argument is the settings as JSON."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    log_crashes()
    with suppress(OSError):
        os.nice(_NICE)
    threadpool_limits(limits=1, user_api="blas")  # their number changes the last bits, as in `edge.chain`
    with suppress(BrokenPipeError):
        Process(sys.stdin.fileno(), sys.stdout.buffer, json.loads(sys.argv[1])).run()
    sys.stdout = None  # nothing is left to flush into a broken pipe
    return 0


if __name__ == "__main__":
    sys.exit(main())
