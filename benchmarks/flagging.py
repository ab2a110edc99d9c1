"""`scanside serve` with a triage that flags every scan: what tests and `benchmarks.chaos` start in its place.

Only the report of the reconstruction process is changed, as it reaches the daemon; everything behind is the product's.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

from edge.command import main
from edge.crew import Report
from edge.daemon import Daemon
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
        super()._on_done(scan, {**report, "findings": [FLAGGED, *report["findings"][1:]]})


if __name__ == "__main__":
    with patch("edge.serve.Daemon", FlaggingDaemon):
        sys.exit(main())
