"""What the daemon shows the world: events, alerts, further receivers; behind keys wherever others could reach it."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

from edge.alert import Alert
from edge.audit import AuditTrail
from edge.deadline import SystemClock
from edge.desk import Desk, DeskRules
from edge.event_log import EventLog
from edge.gate import Gate
from edge.keyring import Keyring
from edge.ledger import Ledger
from edge.metrics import Metrics
from edge.outlets import Outlets
from edge.pacs import Pacs
from edge.refinery import Refinery
from edge.router import Router
from edge.settings import AlertSettings, Settings, host_and_port, needs_keys
from edge.wire import Publisher
from recon.errors import DeliveryError

log = logging.getLogger(__name__)


def rules_of(alerts: AlertSettings) -> DeskRules:
    """Return the desk's rules as the settings name them."""
    return DeskRules(alerts.groups, alerts.deadline_s, alerts.resend_s)


class Front:
    """Opens the sockets that the settings name, and closes them."""

    def __init__(self, settings: Settings, ledger: Ledger, audit: AuditTrail) -> None:
        """Bind; raises DeliveryError where an address cannot be had, or where it needs keys and there are none."""
        keyring = Keyring(settings.state / "keys")
        locked = {
            name: needs_keys(address, settings.security)
            for name, address in (("events", settings.events.address), ("alerts", settings.alerts.address))
        }
        self._gate = Gate(keyring, audit) if any(locked.values()) else None
        self._publisher: Publisher | None = None
        self._router: Router | None = None
        self.metrics: Metrics | None = None
        try:
            if settings.metrics.address:
                self.metrics = Metrics()
                self.metrics.serve(*host_and_port(settings.metrics.address, least_port=0))
            self._publisher = Publisher(settings.events.address, self._gate if locked["events"] else None)
            self._router = Router(settings.alerts.address, self._gate if locked["alerts"] else None)
            self._router.open()
            self.outlets = Outlets(settings.sinks, ledger, audit)
            self.pacs = Pacs(settings, ledger, audit, self.outlets.deliveries)
        except DeliveryError:
            self.close()
            raise
        if self._gate is not None:
            self._gate.watch()
        if self.metrics is not None:
            log.info("metrics port=%d", self.metrics.port())
        self.events_address, self.alerts_address = self._publisher.address, self._router.address
        self.events = EventLog(ledger, self._publisher, self.metrics.on_event if self.metrics else lambda *event: None)
        self.desk = Desk(
            ledger,
            self.events,
            self._router,
            rules_of(settings.alerts),
            SystemClock(),
            audit,
            keyring.role_of if locked["alerts"] else lambda user: "admin",
            self.outlets.enter,
        )
        self.refinery = Refinery(settings.super_resolution, settings.state, ledger, self.events, self._enter_refined)
        self.desk.offer("deliveries", self.outlets.list_dead)
        self.desk.offer("retry", self.outlets.retry)

    def enter(self, scan_id: str, alerts: Sequence[Alert], objects: Iterable[str]) -> list[str]:
        """Enter a scan's alerts and DICOM objects within the caller's transaction; return the alerts that are new."""
        self.pacs.enter(scan_id, objects)
        return self.desk.enter(alerts)

    def announce(self, alert_ids: Iterable[str]) -> None:
        """Begin to send what was entered and committed."""
        self.desk.announce(alert_ids)
        self.outlets.wake()
        self.pacs.wake()
        self.refinery.wake()

    def _enter_refined(self, scan_id: str, objects: Iterable[str]) -> None:
        self.pacs.enter(scan_id, objects)
        self.pacs.wake()

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """Return what is to run while the daemon does."""
        return [self.desk.run(), *self.outlets.tasks(), *self.pacs.tasks(), self.refinery.run()]

    def close(self) -> None:
        """Close all sockets, after half a second for what is queued."""
        for each in (self._router, self._publisher, self._gate, self.metrics):
            if each is not None:
                with suppress(DeliveryError):
                    each.close()
