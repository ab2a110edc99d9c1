"""The daemon: scanners in, images, files and events out; everything that must survive is on disk before it is shown.

It is crash-only: killed at any moment and started again, it reads the spool and the ledger and goes on. Complete scans
are finished, interrupted ones are reconstructed as far as whole slices reach and marked.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any

import numpy as np

from edge.alert import Times
from edge.crew import Report
from edge.exams import Exams
from edge.front import Front, rules_of
from edge.incoming import Incoming
from edge.lanes import Lanes
from edge.live import LiveScan, image_info, plane_fields
from edge.mrd import Limits
from edge.mrd_write import encode_image
from edge.notify import Notifier
from edge.pulse import Pulse
from edge.refinery import JOBS
from edge.reload import take_over
from edge.retention import Retention
from edge.scan_triage import ScanTriage
from edge.server import MrdServer
from edge.session import ServerLimits, Session
from edge.settings import Settings
from edge.spool import Ending, Spool
from edge.state import State
from edge.triage_crew import TriageCrew
from edge.triage_json import findings_json
from edge.window import display_window
from edge.wire import utc_now
from recon.arrays import Array
from recon.errors import DeliveryError, ScanError
from triage.findings import not_assessed

log = logging.getLogger(__name__)

_PROGRESS_S = 0.5  # between two progress events of one scan
_MAX_RETRIES, _LONGEST_RETRY_S = 60, 60.0  # of a scan whose results find no room: about an hour
_MAX_DEATHS = 10  # of workers that were reading a scan and making no image


class Daemon:
    """Ties server, worker, triage, ledger and events together. `run` serves until `stop`."""

    def __init__(self, settings: Settings) -> None:
        """Open the state folder; raises ScanError or DeliveryError where it cannot be used."""
        self._settings = settings
        state = settings.state
        self._state = State(state)
        self._ledger, self._audit = self._state.ledger, self._state.audit
        self._spool = Spool(state / "spool")
        self._scans: dict[str, LiveScan] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        wire = Limits(acquisition_bytes=settings.mrd.max_message_mib << 20)
        limits = ServerLimits(
            wire=wire,
            sessions=settings.mrd.max_sessions,
            first_s=settings.mrd.first_data_timeout_s,
            idle_s=settings.mrd.idle_timeout_s,
        )
        mrd = settings.mrd
        self._server = MrdServer(mrd.host, mrd.port, self._spool, self, limits, mrd.allow, self._on_stranger)
        self._lanes = Lanes(settings, wire, self._scans, self._on_report, self._on_worker_start, self._on_worker_death)
        self._front = Front(settings, self._ledger, self._audit)
        self._events, self._desk = self._front.events, self._front.desk
        exams = Exams(self._ledger)
        self._triage = TriageCrew(
            {
                "triage": asdict(settings.triage),
                "super_resolution": str(state / JOBS) if settings.super_resolution.enabled else "",
                "pseudonym_key": str(state / "keys" / "pseudonym.key"),
                "identifiers": settings.alerts.identifiers,
            },
            settings.worker.timeout_s,
            self._ledger,
        )
        self._unread = ScanTriage(settings, self._ledger, exams, self._front, self._triage)
        self._incoming = Incoming(settings, self._ledger, exams, self._audit, self._front, self._triage)
        self._retention = Retention(
            lambda: self._settings, self._ledger, self._spool, self._audit, self._front.pacs.names,
            lambda scan_id: self._incoming.is_open(scan_id) or self._front.refinery.has(scan_id),
        )  # fmt: skip
        self._notifier = Notifier()
        self._pulse = Pulse(
            lambda: self._settings, self._scans, self._ledger, self._spool, self._audit,
            self._front, self._lanes, self._triage, self._notifier, self._incoming,
        )  # fmt: skip
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None

    @property
    def port(self) -> int:
        """The port that scanners connect to; known once `run` has started the server."""
        return self._server.port

    async def run(self) -> None:
        """Recover what a crash left, then serve until `stop`; raises what made a task fail."""
        self._recover()
        await self._server.start()
        log.info(
            "serving mrd=%s:%d events=%s alerts=%s",
            self._settings.mrd.host, self.port, self._front.events_address, self._front.alerts_address,
        )  # fmt: skip
        self._audit.record("start")
        self._start(self._watch_server())
        crews = [*self._lanes.crews, self._triage.crew]
        for crew in crews:
            self._start(crew.run())
        for work in [*self._front.tasks(), *self._incoming.tasks()]:
            self._start(work)
        self._start(self._retention.run())
        self._start(self._pulse.run())
        self._notifier.ready()
        await self._stopping.wait()
        self._notifier.stopping()
        await self._server.stop()
        await asyncio.gather(*(crew.stop() for crew in crews))  # what they are at is taken up at the next start
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._audit.record("stop")
        self._front.close()
        self._state.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End `run`. Scans in flight stay in the spool and are taken up at the next start."""
        self._stopping.set()

    def reload(self, read: Settings) -> None:
        """Take over what can change while scans are served; say what waits for a restart."""
        self._settings, taken, waiting = take_over(self._settings, read)
        self._server.allow(self._settings.mrd.allow)
        self._desk.rules = rules_of(self._settings.alerts)
        self._incoming.reload(self._settings)
        log.info("settings read again taken=%s waiting=%s", ",".join(taken) or "-", ",".join(waiting) or "-")
        self._audit.record("settings", reason=f"taken over: {', '.join(taken) or 'nothing'}")

    # What the MRD server tells

    async def admit(self) -> None:
        """Refuse a new scan while the disk is too full for it."""
        free = self._spool.free_bytes() >> 20
        least = self._settings.disk.min_free_mib
        if free < least:
            raise ScanError(f"no new scan is taken: the disk has {free} MiB left, {least} MiB are kept free")

    def scan_opened(self, session: Session, scan_id: str, config: str, header: bytes) -> None:
        """A scan starts."""
        now = utc_now()
        self._ledger.open_scan(scan_id, now)
        scan = self._scans[scan_id] = LiveScan(scan_id, session, now, self._lanes.lane_for_scan())
        self._start(self._deliver(scan))
        self._open_at_worker(scan)

    def scan_grew(self, scan_id: str, n_bytes: int, n_readouts: int) -> None:
        """More of it is in the spool."""
        scan = self._scans.get(scan_id)
        if scan is None:
            return
        scan.arrived(n_bytes, n_readouts)
        self._lanes.order(scan, "grow")
        now = time.monotonic()
        if now - scan.progress_at >= _PROGRESS_S:
            scan.progress_at = now
            self._publish("scan.progress", scan_id, {"readouts": n_readouts, "bytes": n_bytes, "images": scan.n_sent})

    def scan_text(self, scan_id: str, text: str) -> None:
        """Parameters from a scanner's console; none of them changes anything yet."""
        log.info("scan text id=%s bytes=%d", scan_id, len(text))

    def scan_closed(self, scan_id: str, ending: Ending, reason: str) -> None:
        """Its stream has ended."""
        scan = self._scans[scan_id]
        scan.ending, scan.reason = ending, reason
        scan.ended_at = utc_now()
        self._ledger.end_scan(scan_id, ending, reason, scan.n_bytes, scan.n_readouts)
        if scan.outcome is not None:
            self._conclude(scan)
        else:
            self._lanes.order(scan, "close", ending=ending, reason=reason)

    # What the worker tells

    def _on_worker_start(self, lane: int) -> None:
        for scan in self._lanes.scans_of(lane):
            self._open_at_worker(scan)

    def _on_worker_death(self, lane: int) -> None:
        """Count the death against what was being made; an image that killed twice is set aside at the next start."""
        open_scans = self._lanes.scans_of(lane)
        for scan in [scan for scan in open_scans if scan.making] or open_scans:
            n = self._ledger.note_death(scan.scan_id, scan.making)
            log.warning("worker died at id=%s image=%s times=%d", scan.scan_id, scan.making or "none", n)
            if not scan.making and n >= _MAX_DEATHS:
                self._fail(scan, "worker", f"the reconstruction process died {n} times while it read this scan")
            scan.making = ""

    def _open_at_worker(self, scan: LiveScan) -> None:
        self._lanes.order(
            scan,
            "open",
            spool=str(self._spool.path(scan.scan_id)),
            results=str(self._settings.state / "results" / scan.scan_id),
            received_at=scan.received_at.replace("Z", "+00:00"),
            set_aside=self._ledger.set_aside(scan.scan_id),
        )
        if scan.ending is not None:
            self._lanes.order(scan, "close", ending=scan.ending, reason=scan.reason)

    def _on_report(self, report: Report, payload: bytes) -> None:
        scan = self._scans.get(report.get("scan_id", ""))
        if scan is None:
            return
        kind = report["report"]
        if kind == "started" and not scan.is_announced:
            scan.is_announced = True
            names = ("matrix", "slices", "coils", "acceleration", "field_t")
            self._publish("scan.started", scan.scan_id, {name: report[name] for name in names})
        elif kind == "making":
            scan.making = report["image_key"]
        elif kind == "image":
            scan.making = ""
            self._on_image(scan, report, np.frombuffer(payload, "<f4").reshape(report["shape"]))
        elif kind == "fault":
            self._on_fault(scan, report["fields"])
        elif kind == "reconstructed":
            self._on_reconstructed(scan, report)
        elif kind == "failed" and report["code"] == DeliveryError.code and scan.n_retries < _MAX_RETRIES:
            self._start(self._try_again(scan))
        elif kind == "failed":
            self._fail(scan, report["code"], report["reason"])

    async def _try_again(self, scan: LiveScan) -> None:
        """Have a scan reconstructed from its spool again, in a while: its results found no room on the disk."""
        scan.n_retries += 1
        scan.making = ""
        log.warning("results not written id=%s times=%d; tried again", scan.scan_id, scan.n_retries)
        await asyncio.sleep(min(2.0**scan.n_retries, _LONGEST_RETRY_S))
        if scan.scan_id in self._scans and scan.outcome is None:
            self._open_at_worker(scan)

    def _on_image(self, scan: LiveScan, report: Report, image: Array) -> None:
        """Send one image to the scanner and to every subscriber, unless this very image went out before."""
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        if not self._ledger.note_image(scan.scan_id, report["series"], report["image_key"], digest):
            return
        if not report["is_known"] and not scan.warned:
            scan.warned = True
            scan.outbox.put_nowait(("WARNING", "the readouts carry no usable directions: an axial plane is assumed"))
        scan.outbox.put_nowait(encode_image(image if len(image) > 1 else image[0], image_info(report, scan.n_sent + 1)))
        scan.n_sent += 1
        scan.made_at = utc_now()
        last_line_at, now = scan.arrived_at(report["message_end"]), time.monotonic()
        if last_line_at is not None:
            scan.latencies_ms.append((now - last_line_at) * 1e3)
        moments = {"spooled": last_line_at, "begun": report["begun_s"], "made": report["made_s"], "sent": now}
        low, high = display_window(image)
        scan.window_high = max(scan.window_high, high)
        for number, plane in enumerate(image):
            fields = plane_fields(report, number, list(plane.shape))
            fields |= {"window": [low, scan.window_high], "sha256": digest, "moments_s": moments}
            self._publish("image", scan.scan_id, fields, plane.tobytes())

    def _on_fault(self, scan: LiveScan, fault: dict[str, Any]) -> None:
        """Announce a fault while the scan runs; not again when a fresh worker finds it again."""
        if fault["order"] > scan.faulty_to.get(fault["fault"], -1):
            scan.faulty_to[fault["fault"]] = fault["order"]
            self._publish("quality", scan.scan_id, fault)

    def _on_reconstructed(self, scan: LiveScan, report: Report) -> None:
        """Enter the verdict and what triage needs at once, show it, and let the scanner go: it waits for no triage."""
        times = Times(scan.ended_at, scan.made_at)
        with self._events.together():
            self._publish("quality", scan.scan_id, report["quality"])
            self._unread.enter(scan.scan_id, report, scan.end(report), scan.received_at, times)
        self._unread.order(scan.scan_id)
        words = f"{report['n_images']} images sent, method {report['method'] or 'none'}"
        faults = [reason["words"] for reason in report["quality"]["reasons"]]
        scan.outcome = ("WARNING" if faults else "INFO", "; ".join([words, *faults]))
        log.info("scan reconstructed id=%s ending=%s images=%d", scan.scan_id, scan.ending, report["n_images"])
        self._conclude(scan)

    def _fail(self, scan: LiveScan, code: str, reason: str) -> None:
        """Say everywhere that a scan cannot be served; its raw data stay in the spool."""
        with self._events.together():
            found = {"findings": findings_json(not_assessed(reason)), "measurements": {}}
            self._publish("findings", scan.scan_id, found)
            self._publish("scan.failed", scan.scan_id, {"code": code, "reason": reason})
            self._ledger.finish_scan(scan.scan_id, "failed", reason, utc_now())
        log.warning("scan failed id=%s code=%s", scan.scan_id, code)
        scan.outcome = ("ERROR", reason)
        self._conclude(scan)

    def _conclude(self, scan: LiveScan) -> None:
        """Tell the client the outcome; once its stream has ended too, close the session and forget the scan."""
        if scan.outcome is not None and scan.outcome[1]:
            scan.outbox.put_nowait(scan.outcome)
            scan.outcome = (scan.outcome[0], "")
        if scan.ending is not None:
            scan.outbox.put_nowait(None)
            self._scans.pop(scan.scan_id, None)

    # Towards the world

    async def _deliver(self, scan: LiveScan) -> None:
        """Send a scan's images and words to its client, in order; a client that has left misses them, nobody waits."""
        session = scan.session
        is_there = session is not None
        while (item := await scan.outbox.get()) is not None:
            if not is_there or session is None:
                continue
            try:
                await (session.text(*item) if isinstance(item, tuple) else session.send(item))
            except DeliveryError:
                is_there = False
        if session is not None:
            await session.finish()

    def _publish(self, kind: str, scan_id: str, fields: dict[str, Any], payload: bytes | None = None) -> None:
        """Enter an event in the ledger, then send it."""
        self._events.publish(kind, scan_id, fields, payload)

    def _on_stranger(self, address: str) -> None:
        log.warning("a connection was refused code=address")
        self._audit.record("refused", "serious", source=address, reason="not one of the scanners in mrd.allow")

    async def _watch_server(self) -> None:
        """Fail when a session hits a bug."""
        assert self._server.broken is not None
        await self._server.broken

    def _recover(self) -> None:
        """Take up every scan that the ledger does not call finished: for triage, or from its spool."""
        self._spool.recover()
        unread = self._unread.take_up()
        for state in self._spool.scans():
            row = self._ledger.scan(state.scan_id)
            if state.scan_id in unread or (row is not None and row.state in ("done", "failed")):
                continue
            received_at = row.received_at if row is not None else utc_now()
            self._ledger.open_scan(state.scan_id, received_at)
            scan = LiveScan(state.scan_id, None, received_at, self._lanes.lane_for_scan())
            scan.ending, scan.reason = state.ending or "interrupted", state.reason
            scan.n_bytes = state.n_bytes
            self._ledger.end_scan(state.scan_id, scan.ending, scan.reason, state.n_bytes, 0)
            self._scans[state.scan_id] = scan
            self._start(self._deliver(scan))
            log.info("scan recovered id=%s ending=%s", state.scan_id, scan.ending)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task; one that ends by an unforeseen error ends the daemon, for systemd to start afresh."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_end)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = failure
            self._stopping.set()
