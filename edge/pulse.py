"""The daemon's own heartbeat: published, counted, and told to systemd only while the pipeline is alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sized

from edge.audit import AuditTrail
from edge.front import Front
from edge.incoming import Incoming
from edge.lanes import Lanes
from edge.ledger import Ledger
from edge.metrics import Metrics
from edge.notify import Notifier
from edge.power import Odometer, open_meters
from edge.settings import Settings
from edge.spool import Spool
from edge.triage_crew import TriageCrew

_LONGEST_S = 5.0  # between two looks, whatever the settings say of heartbeats: the watchdog waits for 20 s


class Pulse:
    """Looks after the daemon every few seconds while `run` runs."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        scans: Sized,
        ledger: Ledger,
        spool: Spool,
        audit: AuditTrail,
        front: Front,
        lanes: Lanes,
        triage: TriageCrew,
        notifier: Notifier,
        incoming: Incoming,
    ) -> None:
        """settings: asked at each beat, as they may change."""
        self._settings, self._scans = settings, scans
        self._ledger, self._spool, self._audit = ledger, spool, audit
        self._front, self._lanes, self._triage = front, lanes, triage
        self._notifier, self._incoming = notifier, incoming

    async def run(self) -> None:
        """Beat for ever."""
        meters = await asyncio.to_thread(open_meters) if self._front.metrics is not None else []
        odometer = Odometer(meters)
        try:
            await self._beat(odometer)
        finally:
            odometer.close()

    async def _beat(self, odometer: Odometer) -> None:
        published_at = float("-inf")
        while True:
            heartbeat_s = self._settings().events.heartbeat_s
            if time.monotonic() - published_at >= heartbeat_s:
                published_at = time.monotonic()
                self._publish()
            if self._front.metrics is not None:
                self._set_gauges(self._front.metrics)
                self._front.metrics.set_energy(odometer.joules())
            if all(crew.is_alive for crew in (*self._lanes.wanted, self._triage.crew)):
                self._notifier.alive(f"{len(self._scans)} scans, {self._front.desk.n_open} alerts open")
            await asyncio.sleep(min(heartbeat_s, _LONGEST_S))

    def _publish(self) -> None:
        fields = {
            "scans": len(self._scans),
            "worker": all(crew.pid is not None for crew in self._lanes.wanted),
            "triage_waiting": self._triage.n_waiting,
            "alerts_open": self._front.desk.n_open,
            "deliveries_dead": sum(
                n for (_, state), n in self._front.outlets.deliveries.count().items() if state == "dead"
            ),
        }
        self._front.events.publish("heartbeat", "", fields)
        self._ledger.prune_events(self._settings().events.keep)
        self._ledger.write_note("audit", self._audit.head.to_text())

    def _set_gauges(self, metrics: Metrics) -> None:
        desk = self._front.desk
        metrics.set_gauges(
            scans=len(self._scans),
            series=self._incoming.n_open,
            worker=all(crew.pid is not None for crew in self._lanes.wanted),
            silent_s=max(crew.silent_s for crew in self._lanes.wanted),
            triage=self._triage.crew.pid is not None,
            triage_waiting=self._triage.n_waiting,
            triage_s=self._triage.oldest_s(),
            free_bytes=self._spool.free_bytes(),
            open_alerts=desk.n_open,
            oldest_s=desk.oldest_s(),
            clients=desk.n_clients,
            audit=self._audit.head.n,
            audit_is_broken=self._audit.is_broken,
            deliveries=self._front.outlets.deliveries.count(),
            archive_s=self._front.pacs.oldest_s(),
        )
