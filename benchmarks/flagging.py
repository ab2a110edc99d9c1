"""`scanside serve` with a triage that flags every scan: what tests and `benchmarks.chaos` start in its place.

Only the answers of the triage process are changed, as they reach the daemon; everything behind is the product's.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

from edge.command import main
from edge.crew import Report
from edge.triage_crew import TriageCrew

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


class FlaggingCrew(TriageCrew):
    """Flags an infarct in every scan and series that is triaged."""

    def on_report(self, report: Report) -> None:
        super().on_report(_flagged(report) if report["report"] == "triaged" else report)


def _flagged(report: Report) -> Report:
    return {**report, "findings": [FLAGGED, *report["findings"][1:]]}


if __name__ == "__main__":
    with patch("edge.daemon.TriageCrew", FlaggingCrew):
        sys.exit(main())
