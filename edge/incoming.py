"""Series that the scanner reconstructs itself: taken by a process of its own, triaged with the scans, told as they are.

What was received lies under `incoming/<scan_id>/`, and that is all there is to remember: at a start, or when the
receiving process dies, every series with other objects than the ledger calls triaged is taken up again. A series is
complete some time after its last object, or at once when the sender releases the association that brought it; objects
that come later have it triaged again, under the same scan and alert ids, so that nobody is told twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge.alert import Times, alerts_of
from edge.audit import AuditTrail
from edge.crew import Report
from edge.exams import Exams
from edge.front import Front
from edge.ledger import Ledger
from edge.settings import Settings
from edge.triage_crew import Task, TriageCrew
from edge.triage_json import findings_json
from edge.wire import utc_now
from recon.errors import DeliveryError
from triage.findings import not_assessed

log = logging.getLogger(__name__)

FOLDER = "incoming"  # under the state folder
_AFTER_RELEASE_S = 1.0  # for senders that make an association for each object
_RESTART_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0


@dataclass
class _Series:
    """A series with objects that nobody has triaged. due_s: when (monotonic) it is complete."""

    started_at: str
    ended_at: str
    due_s: float
    is_ordered: bool = False
    has_more: bool = False  # since it was ordered


class Incoming:
    """Takes series where the settings say so, and always finishes those that were taken."""

    def __init__(
        self, settings: Settings, ledger: Ledger, exams: Exams, audit: AuditTrail, front: Front, triage: TriageCrew
    ) -> None:
        """Prepare; nothing is received before `run`."""
        self._settings, self._ledger, self._exams = settings, ledger, exams
        self._audit, self._front, self._triage = audit, front, triage
        self._folder = settings.state / FOLDER
        self._series: dict[str, _Series] = {}
        self._wake = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def n_open(self) -> int:
        """How many series are not triaged."""
        return len(self._series)

    def is_open(self, scan_id: str) -> bool:
        """Whether this series waits for triage."""
        return scan_id in self._series

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """Return what is to run while the daemon does."""
        self._take_up()
        return [self._order_due(), *([self._receive()] if self._settings.incoming.host else [])]

    def reload(self, settings: Settings) -> None:
        """Take over what may change while objects come in."""
        self._settings = settings
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps({"min_free_mib": settings.disk.min_free_mib}).encode() + b"\n")

    # What triage tells

    def _on_triaged(self, scan_id: str, report: Report) -> None:
        """Enter findings and alerts at once, then show them: a crash leaves all of them or none."""
        now, series = utc_now(), self._series[scan_id]
        try:
            alerts = alerts_of(scan_id, report, report["exam"], Times(series.ended_at, "", now, now))
        except DeliveryError as error:
            self._fail(scan_id, error.code, str(error))
            return
        events = self._front.events
        with events.together():
            found = {"findings": report["findings"], "measurements": report["measurements"]}
            events.publish("findings", scan_id, {**found, **self._exams.join(scan_id, report, now)})
            entered = self._front.enter(scan_id, alerts, report["objects"])
            if not report["objects"]:
                self._front.pacs.hold(scan_id)  # the scanner sends its images; nothing of ours is to follow
            said = {"source": "dicom", "objects": report["n_objects"], "results": f"results/{scan_id}"}
            events.publish("scan.done", scan_id, {"ending": "complete", "reason": "", **said})
            self._ledger.finish_scan(scan_id, "done", "", now)
            self._ledger.note_triaged(scan_id, report["n_objects"])
        self._front.announce(entered)
        objects = {"scan": scan_id, "objects": str(report["n_objects"])}
        self._audit.record("import", objects=objects)
        log.info("series done id=%s objects=%d alerts=%d", scan_id, report["n_objects"], len(entered))
        self._conclude(scan_id)

    def _fail(self, scan_id: str, code: str, reason: str) -> None:
        """Say that a series is not assessed; its objects stay."""
        events = self._front.events
        with events.together():
            found = {"findings": findings_json(not_assessed(reason)), "measurements": {}}
            events.publish("findings", scan_id, found)
            events.publish("scan.failed", scan_id, {"code": code, "reason": reason})
            self._ledger.finish_scan(scan_id, "failed", reason, utc_now())
            self._ledger.note_triaged(scan_id, self._n_objects(scan_id))
        log.warning("series failed id=%s code=%s", scan_id, code)
        self._conclude(scan_id)

    def _conclude(self, scan_id: str) -> None:
        series = self._series.pop(scan_id)
        if series.has_more:
            self._open(scan_id, self._settings.incoming.quiet_s)

    # What the receiving process tells

    async def _receive(self) -> None:
        """Keep the receiving process alive."""
        pause_s = _RESTART_PAUSE_S
        try:
            while True:
                process = self._process = await self._start()
                assert process.stdout is not None
                while line := await process.stdout.readline():
                    with suppress(ValueError):  # the last words of one that is killed
                        pause_s = self._hear(json.loads(line), pause_s)
                await process.wait()
                log.warning("receiving process ended; another is started")
                self._take_up()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            running, self._process = self._process, None
            if running is not None:
                with suppress(ProcessLookupError):
                    running.kill()
                await running.wait()

    def _hear(self, said: dict[str, Any], pause_s: float) -> float:
        """Take one line; return the pause before the next start of the process."""
        if "port" in said:
            log.info("incoming port=%d", said["port"])
            return _RESTART_PAUSE_S
        if "fault" in said:
            log.error("incoming series cannot be received: %s", said["fault"])
        elif "stored" in said:
            self._count("stored" if said["is_new"] else "repeated")
            self._open(said["stored"], self._settings.incoming.quiet_s)
        elif "ended" in said:
            for scan_id in said["ended"]:
                self._open(scan_id, min(_AFTER_RELEASE_S, self._settings.incoming.quiet_s))
        elif "refused" in said:
            self._count("refused")
            log.warning("incoming refused: %s", said["refused"])
            self._audit.record("refused", "serious", source=said["source"], reason=f"DICOM: {said['refused']}")
        return pause_s

    def _count(self, outcome: str) -> None:
        if self._front.metrics is not None:
            self._front.metrics.on_incoming(outcome)

    async def _start(self) -> asyncio.subprocess.Process:
        settings = {
            **asdict(self._settings.incoming),
            "folder": str(self._folder),
            "pseudonym_key": str(self._settings.state / "keys" / "pseudonym.key"),
            "min_free_mib": self._settings.disk.min_free_mib,
        }
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "edge.incoming_process",
            json.dumps(settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )

    # What is to be triaged

    def _take_up(self) -> None:
        """Find the series that have other objects than the ledger calls triaged."""
        for folder in self._folder.iterdir() if self._folder.exists() else ():
            if not folder.name.startswith("."):
                self._open(folder.name, self._settings.incoming.quiet_s)

    def _open(self, scan_id: str, quiet_s: float) -> None:
        """Wait for the end of a series that has something new."""
        series = self._series.get(scan_id)
        now, due_s = utc_now(), time.monotonic() + quiet_s
        if series is not None:
            series.ended_at, series.due_s = now, due_s
            series.has_more |= series.is_ordered
        elif self._n_objects(scan_id) != (self._ledger.n_triaged(scan_id) or 0):
            self._ledger.open_scan(scan_id, now)
            self._series[scan_id] = _Series(now, now, due_s)
            self._front.events.publish("scan.started", scan_id, {"source": "dicom"})
        self._wake.set()

    async def _order_due(self) -> None:
        """Have complete series triaged, for ever."""
        while True:
            self._wake.clear()
            now = time.monotonic()
            for scan_id, series in self._series.items():
                if not series.is_ordered and series.due_s <= now:
                    self._order(scan_id, series)
            waits = [series.due_s - now for series in self._series.values() if not series.is_ordered]
            timer = asyncio.get_running_loop().call_later(max(min(waits, default=60.0), 0.01), self._wake.set)
            await self._wake.wait()
            timer.cancel()

    def _order(self, scan_id: str, series: _Series) -> None:
        series.is_ordered, series.has_more = True, False
        self._ledger.end_scan(scan_id, "complete", "", self._n_bytes(scan_id), 0)
        order = {
            "do": "series",
            "folder": str(self._folder / scan_id),
            "results": str(self._settings.state / "results" / scan_id),
        }
        self._triage.add(
            Task(
                scan_id,
                order,
                lambda report: self._on_triaged(scan_id, report),
                lambda code, reason: self._fail(scan_id, code, reason),
            )
        )

    def _objects(self, scan_id: str) -> list[Path]:
        return list((self._folder / scan_id).glob("*.dcm"))

    def _n_objects(self, scan_id: str) -> int:
        return len(self._objects(scan_id))

    def _n_bytes(self, scan_id: str) -> int:
        return sum(path.stat().st_size for path in self._objects(scan_id))
