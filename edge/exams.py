"""Which scans and series belong to one exam, and what they say together; in the ledger's file, under pseudonyms.

What the scanner reconstructs itself and what is reconstructed here meet by the study's key. Where a raw header named no
study, by the patient's, within half a day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from edge.ledger import Ledger
from edge.triage_json import findings_from_json
from triage.assess import Assessed, fuse
from triage.findings import LABELS, Finding, Findings

_SCHEMA = """
CREATE TABLE IF NOT EXISTS exams (
    scan_id TEXT PRIMARY KEY,
    exam_key TEXT NOT NULL,
    patient_key TEXT NOT NULL,
    is_study_known INTEGER NOT NULL,
    findings TEXT NOT NULL,
    at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS exams_by_key ON exams (exam_key);
CREATE INDEX IF NOT EXISTS exams_by_patient ON exams (patient_key);
"""
_SAME_PATIENT = timedelta(hours=12)


@dataclass(frozen=True)
class _Part:
    """A scan or series of an exam."""

    scan_id: str
    findings: Mapping[str, Finding]


class Exams:
    """The table of exams. Call it within a `Ledger.transaction` to change it with something else."""

    def __init__(self, ledger: Ledger) -> None:
        """Make the table where it is missing."""
        self._db = ledger.db
        self._db.executescript(_SCHEMA)

    def join(self, scan_id: str, report: Mapping[str, Any], at: str) -> dict[str, Any]:
        """Enter what a scan or series said, instead of what it said before, and return what the event adds of its exam.

        report: its `exam` keys, `is_study_known` and `findings`. Nothing is added while the exam has one part.
        """
        keys = report["exam"]
        key, patient = keys["exam_key"], keys.get("patient_key", "")
        self._db.execute(
            "INSERT OR REPLACE INTO exams (scan_id, exam_key, patient_key, is_study_known, findings, at) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (scan_id, key, patient, report["is_study_known"], json.dumps(report["findings"]), at),
        )
        since = (datetime.fromisoformat(at.replace("Z", "+00:00")) - _SAME_PATIENT).isoformat()
        rows = self._db.execute(
            "SELECT scan_id, findings FROM exams WHERE exam_key = ? OR (patient_key = ? AND patient_key <> '' "
            "AND (NOT is_study_known OR NOT ?) AND at >= ?) ORDER BY at, rowid",
            (key, patient, report["is_study_known"], since),
        )
        parts = [
            _Part(name, {each.label: each for each in findings_from_json(json.loads(said)).findings})
            for name, said in rows
        ]
        if len(parts) < 2:
            return {}
        return {"exam": {"exam_key": key, "scans": [part.scan_id for part in parts], "findings": _together(parts)}}


def _together(parts: list[_Part]) -> list[dict[str, Any]]:
    """Return one answer for each finding: which, and the scan that gave it, null where several could not."""
    found = []
    for label in LABELS:
        said = [(part.scan_id, part.findings[label]) for part in parts if label in part.findings]
        if not said:
            continue
        (answer,) = fuse([Assessed(one.contrast, Findings((one,))) for _, one in said], (label,)).findings
        scan_id = next((name for name, one in said if one is answer), None)
        found.append(
            {
                "finding": label,
                "state": answer.state.value,
                "why": answer.reason,
                "probability": answer.probability,
                "contrast": answer.contrast or None,
                "scan_id": scan_id,
            }
        )
    return found
