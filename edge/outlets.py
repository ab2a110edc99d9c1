"""The receivers of alerts that the settings name, beside the alert socket: none unless they do."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from edge.audit import AuditTrail
from edge.courier import Courier, Sink
from edge.deliveries import Deliveries, Delivery
from edge.ledger import Ledger
from edge.settings import SinkSettings, host_and_port
from edge.wire import utc_now
from recon.errors import DeliveryError


class Outlets:
    """One courier for each receiver."""

    def __init__(self, settings: SinkSettings, ledger: Ledger, audit: AuditTrail) -> None:
        """Prepare; raises DeliveryError where a receiver's library or secret is missing."""
        self.deliveries = Deliveries(ledger)
        self._audit = audit
        self._couriers = [
            Courier(sink, self.deliveries, attempts=settings.attempts, on_outcome=self._on_outcome)
            for sink in _open_sinks(settings)
        ]

    def enter(self, alert: Mapping[str, Any]) -> None:
        """Enter an alert for every receiver, within the caller's transaction."""
        for courier in self._couriers:
            self.deliveries.enter(courier.sink.name, alert["alert_id"], alert, utc_now())

    def wake(self) -> None:
        """Look for what was entered."""
        for courier in self._couriers:
            courier.wake()

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """Return what is to run while the daemon does."""
        return [courier.run() for courier in self._couriers]

    def list_dead(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Answer an admin's `deliveries`: how many of each, and what was given up with its reason."""
        count = {f"{sink} {state}": n for (sink, state), n in sorted(self.deliveries.count().items())}
        dead = [
            {"sink": d.sink, "key": d.key, "attempts": d.attempts, "reason": d.reason, "at": d.at}
            for d in self.deliveries.dead(100)
        ]
        return {"op": "deliveries", "count": count, "dead": dead}

    def retry(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Answer an admin's `retry` of a `sink`, and of one `key` where it is named."""
        n = self.deliveries.revive(str(asked.get("sink", "")), str(asked.get("key", "")))
        self.wake()
        return {"op": "retried", "count": n}

    def _on_outcome(self, delivery: Delivery, state: str, reason: str) -> None:
        outcome = "success" if state == "delivered" else "serious"
        objects = {"alert": delivery.key, "sink": delivery.sink}
        self._audit.record("export", outcome, objects=objects, reason=reason)


def _open_sinks(settings: SinkSettings) -> list[Sink]:
    """Return the receivers; their libraries are imported only where they are chosen."""
    sinks: list[Sink] = []
    try:
        if settings.hl7:
            from edge.hl7_sink import Hl7Sink

            host, port = host_and_port(settings.hl7)
            sinks.append(Hl7Sink(host, port, ca=_path(settings.hl7_ca), timeout_s=settings.timeout_s))
        if settings.fhir:
            from edge.fhir_sink import FhirSink

            sinks.append(
                FhirSink(
                    settings.fhir,
                    token=_path(settings.fhir_token),
                    ca=_path(settings.fhir_ca),
                    timeout_s=settings.timeout_s,
                )
            )
    except ModuleNotFoundError as error:
        raise DeliveryError(f"{error.name} is not installed: pip install 'scanside[sinks]'") from error
    return sinks


def _path(setting: str) -> Path | None:
    return Path(setting) if setting else None
