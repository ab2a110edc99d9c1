"""Scans whose images are out and whose findings are not: kept in the ledger until findings, alerts and end are in it.

What the reconstruction process said of a scan is entered with its verdict; what triage says is entered with the scan's
end, in one transaction that takes it out again. A daemon that is killed in between finds it there: nothing is
reconstructed again, and nobody is told twice.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge.alert import Times, alerts_of
from edge.crew import Report
from edge.exam_triage import enabled_labels, unread_report
from edge.exams import Exams
from edge.front import Front
from edge.ledger import Ledger
from edge.objects import objects_of
from edge.results import read_report, write_report
from edge.settings import Settings
from edge.triage_crew import Task, TriageCrew
from edge.wire import utc_now
from recon.errors import DeliveryError

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS triage (
    scan_id TEXT PRIMARY KEY,
    content TEXT NOT NULL
);
"""
_OF_REPORT = ("quality", "exam", "is_study_known", "volumes")


class ScanTriage:
    """The table of them, and what becomes of each."""

    def __init__(self, settings: Settings, ledger: Ledger, exams: Exams, front: Front, crew: TriageCrew) -> None:
        """Make the table where it is missing; nothing is triaged before `take_up` or `order`."""
        self._state = settings.state
        self._labels = enabled_labels(asdict(settings.triage))
        self._ledger, self._exams, self._front, self._crew = ledger, exams, front, crew
        self._db = ledger.db
        self._db.executescript(_SCHEMA)

    def enter(self, scan_id: str, report: Report, end: Mapping[str, Any], received_at: str, times: Times) -> None:
        """Enter a scan that was reconstructed, within the caller's transaction; `order` it once that is committed.

        report: what its process said. end: what `scan.done` is to say. times: without those that triage sets.
        """
        said = {name: report[name] for name in _OF_REPORT}
        content = {**said, "end": dict(end), "received_at": received_at, "times": asdict(times)}
        row = (scan_id, json.dumps(content, allow_nan=False))
        self._db.execute("INSERT OR REPLACE INTO triage (scan_id, content) VALUES (?, ?)", row)

    def take_up(self) -> frozenset[str]:
        """Order all that an earlier daemon left, the oldest first; return which."""
        rows = self._db.execute("SELECT scan_id FROM triage ORDER BY rowid").fetchall()
        for (scan_id,) in rows:
            log.info("scan recovered id=%s for triage", scan_id)
            self.order(scan_id)
        return frozenset(scan_id for (scan_id,) in rows)

    def order(self, scan_id: str) -> None:
        """Have a scan triaged that was entered."""
        row = self._db.execute("SELECT content FROM triage WHERE scan_id = ?", (scan_id,)).fetchone()
        content = json.loads(row[0])
        order = {
            "do": "scan",
            "spool": str(self._state / "spool" / scan_id / "raw.mrd"),
            "results": str(self._results(scan_id)),
            "received_at": content["received_at"].replace("Z", "+00:00"),
            "volumes": content["volumes"],
        }
        self._crew.add(
            Task(
                scan_id,
                order,
                lambda said: self._on_triaged(scan_id, content, said),
                lambda code, reason: self._on_given_up(scan_id, content, reason),
            )
        )

    def _on_triaged(self, scan_id: str, content: Mapping[str, Any], said: Report) -> None:
        """Enter findings, alerts and the end at once, then show them: a crash leaves all of them or none."""
        now = utc_now()
        report = {**content, **said}
        end = {**content["end"], "stage_ms": said["stage_ms"]}
        times = Times(**{**content["times"], "triage_end": now, "raised": now})
        try:
            alerts = alerts_of(scan_id, report, content["exam"], times)
        except DeliveryError as error:  # findings that no alert can be made of are findings that nobody made
            self._on_given_up(scan_id, content, str(error))
            return
        with self._front.events.together():
            found = {"findings": said["findings"], "measurements": said["measurements"]}
            self._front.events.publish("findings", scan_id, {**found, **self._exams.join(scan_id, report, now)})
            entered = self._front.enter(scan_id, alerts, said["objects"])
            kind = "scan.failed" if end["ending"] == "failed" else "scan.done"
            self._front.events.publish(kind, scan_id, end)
            self._ledger.finish_scan(scan_id, "done", end["reason"], now)
            self._db.execute("DELETE FROM triage WHERE scan_id = ?", (scan_id,))
        self._front.announce(entered)
        log.info("scan done id=%s ending=%s images=%d alerts=%d", scan_id, end["ending"], end["images"], len(entered))

    def _on_given_up(self, scan_id: str, content: Mapping[str, Any], reason: str) -> None:
        """Say that a scan is not assessed, and why; its images and their verdict stand."""
        unread = unread_report(reason, self._labels)
        objects: list[str] = []
        try:
            report = {**read_report(self._results(scan_id)), **unread}
            for folder in self._results(scan_id).glob("dicom/findings*"):  # what an attempt left nobody was told
                shutil.rmtree(folder, ignore_errors=True)
            objects = objects_of(self._results(scan_id), report)
            write_report(self._results(scan_id), report)
        except DeliveryError as error:
            log.warning("report not written id=%s code=%s", scan_id, error.code)
        said = {**unread, "objects": objects, "stage_ms": content["end"]["stage_ms"]}
        self._on_triaged(scan_id, content, said)

    def _results(self, scan_id: str) -> Path:
        return self._state / "results" / scan_id
