"""`scanside serve` with a triage that flags every scan: what tests and `benchmarks.chaos` start in its place.

Only the report of the reconstruction process is changed, as it reaches the daemon; everything behind is the product's.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

from edge.command import main
from edge.crew import Report
from edge.daemon import Daemon
from edge.incoming import Incoming
from edge.live import LiveScan

FLAGGED = {
    "finding": "infarct",
    "state": "flagged",
    "why": "",
    "probability": 0.9,
    "conformal": ["present"],
    "contrast": "dwi",
    "evidence": "simulated",
    "key_slice": 1,
    "model": "flags every scan",
    "model_sha256": "0" * 64,
    "operating_point": "everything",
}


class FlaggingDaemon(Daemon):
    """Flags an infarct in every scan that is served."""

    def _on_done(self, scan: LiveScan, report: Report) -> None:
        super()._on_done(scan, _flagged(report))


class FlaggingIncoming(Incoming):
    """Flags an infarct in every series that came in."""

    def on_report(self, report: Report) -> None:
        super().on_report(_flagged(report) if report["report"] == "done" else report)


def _flagged(report: Report) -> Report:
    return {**report, "findings": [FLAGGED, *report["findings"][1:]]}


if __name__ == "__main__":
    with patch("edge.serve.Daemon", FlaggingDaemon), patch("edge.daemon.Incoming", FlaggingIncoming):
        sys.exit(main())
