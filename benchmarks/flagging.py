"""`scanside serve` with a triage that flags every scan: what tests and `benchmarks.chaos` start in its place.

Only the answers of the triage process are changed, as they reach the daemon; everything behind is the product's. Of
what is deleted to make room the DICOM objects are linked to `deleted/<scan_id>/` first, with how many of its alerts
were open.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

from benchmarks.chaos_world import rows
from edge.command import main
from edge.crew import Report
from edge.retention import Retention
from edge.triage_crew import TriageCrew

DELETED, OPEN_ALERTS = "deleted", "open_alerts"

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


class RecordingRetention(Retention):
    """Leaves behind what is needed to tell whether a scan was deleted too early."""

    def _delete(self, state: Path, scan_id: str, n_triaged: int | None) -> bool:
        kept = state / DELETED / scan_id
        try:
            for path in (state / "results" / scan_id).glob("dicom/*/*.dcm"):
                place = kept / path.relative_to(state / "results" / scan_id)
                place.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    os.link(path, place)
            kept.mkdir(parents=True, exist_ok=True)
            sql = f"SELECT count(*) FROM alerts WHERE scan_id = '{scan_id}' AND acknowledged_at = ''"
            (kept / OPEN_ALERTS).write_text(str(rows(state, sql)[0][0]))
        except OSError:
            return False  # the disk is full: another time
        return super()._delete(state, scan_id, n_triaged)


def _flagged(report: Report) -> Report:
    return {**report, "findings": [FLAGGED, *report["findings"][1:]]}


if __name__ == "__main__":
    with patch("edge.daemon.TriageCrew", FlaggingCrew), patch("edge.daemon.Retention", RecordingRetention):
        sys.exit(main())
