"""Numbers for Prometheus: what was served, how long each stage took, what waits, and for how long.

Counters follow the event stream, so that what is counted is what was published; gauges are set with each heartbeat.
Labels are names of kinds, stages, findings and receivers: nothing that tells one scan or patient from another.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from recon.errors import DeliveryError

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """The numbers, and the page that shows them where one is asked for."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = CollectorRegistry()
        self._server: Any = None
        registry = self.registry
        self._events = Counter("scanside_events", "Events published", ["kind"], registry=registry)
        self._stages = Histogram(
            "scanside_stage_seconds", "Time of an image's stages", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._latency = Histogram(
            "scanside_latency_seconds",
            "From an image's last readout in the spool to its sending",
            ["series"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._verdicts = Counter("scanside_verdicts", "Scans by quality verdict", ["verdict"], registry=registry)
        self._findings = Counter("scanside_findings", "Findings by state", ["finding", "state"], registry=registry)
        self._scans = Gauge("scanside_scans_open", "Scans being received or reconstructed", registry=registry)
        self._series = Gauge("scanside_incoming_open", "Series of the scanner that wait for triage", registry=registry)
        self._incoming = Counter(
            "scanside_incoming_objects", "DICOM objects that came in", ["outcome"], registry=registry
        )
        self._worker = Gauge("scanside_worker_up", "Whether the reconstruction processes run", registry=registry)
        self._silent = Gauge("scanside_worker_silent_seconds", "Since its last report", registry=registry)
        self._triage = Gauge("scanside_triage_up", "Whether the triage process runs", registry=registry)
        self._unread = Gauge("scanside_triage_waiting", "Scans and series that wait for triage", registry=registry)
        self._unread_s = Gauge("scanside_triage_wait_seconds", "For how long the oldest has waited", registry=registry)
        self._free = Gauge("scanside_disk_free_bytes", "Left for the state folder", registry=registry)
        self._open = Gauge("scanside_alerts_open", "Alerts that nobody acknowledged", registry=registry)
        self._oldest = Gauge(
            "scanside_alert_wait_seconds", "The longest wait of a group for an answer", registry=registry
        )
        self._clients = Gauge("scanside_alert_clients", "Clients of the alert socket", registry=registry)
        self._audit = Gauge("scanside_audit_records", "Records in the audit trail", registry=registry)
        self._broken = Gauge("scanside_audit_broken", "Whether the last record was not written", registry=registry)
        self._queue = Gauge(
            "scanside_deliveries", "What goes to other systems, by state", ["sink", "state"], registry=registry
        )

        self._energy = Counter(
            "scanside_energy_joules", "Counted by this machine's meters", ["source", "meter"], registry=registry
        )
        self._told_j: dict[tuple[str, str], float] = {}
        self._archive = Gauge(
            "scanside_archive_wait_seconds", "For how long the oldest object has waited", ["sink"], registry=registry
        )

    def serve(self, host: str, port: int) -> None:
        """Answer at http://host:port/metrics; raises DeliveryError where the port cannot be had."""
        try:
            self._server, _ = start_http_server(port, host, self.registry)
        except (OSError, socket.gaierror) as error:
            raise DeliveryError(f"metrics cannot be served at {host}:{port}: {error.strerror}") from error

    def port(self) -> int:
        """Return the port that is served; 0 where none is."""
        return int(self._server.server_port) if self._server is not None else 0

    def on_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Count an event that was published."""
        self._events.labels(kind).inc()
        if kind == "image":
            for stage, ms in fields.get("stage_ms", {}).items():
                self._stages.labels(stage).observe(ms / 1e3)
            moments = fields.get("moments_s", {})
            if moments.get("spooled") is not None:
                self._latency.labels(fields["series"]).observe(max(moments["sent"] - moments["spooled"], 0.0))
        elif kind == "quality" and not fields.get("early"):
            self._verdicts.labels(fields.get("verdict") or "none").inc()
        elif kind == "findings":
            for finding in fields["findings"]:
                self._findings.labels(finding["finding"], finding["state"]).inc()

    def on_incoming(self, outcome: str) -> None:
        """Count a DICOM object that came in: stored, repeated or refused."""
        self._incoming.labels(outcome).inc()

    def set_energy(self, joules: Mapping[tuple[str, str], float | None]) -> None:
        """Count what meters have counted; one that has failed is not told of any more, rather than standing still."""
        for labels, now_j in joules.items():
            if now_j is not None:
                self._energy.labels(*labels).inc(max(now_j - self._told_j.get(labels, 0.0), 0.0))
                self._told_j[labels] = now_j
            elif self._told_j.pop(labels, None) is not None:
                self._energy.remove(*labels)

    def set_gauges(
        self,
        *,
        scans: int,
        series: int,
        worker: bool,
        silent_s: float,
        triage: bool,
        triage_waiting: int,
        triage_s: float,
        free_bytes: int,
        open_alerts: int,
        oldest_s: float,
        clients: int,
        audit: int,
        audit_is_broken: bool,
        deliveries: Mapping[tuple[str, str], int],
        archive_s: Mapping[str, float],
    ) -> None:
        """Set what is as it is now."""
        self._scans.set(scans)
        self._series.set(series)
        self._worker.set(worker)
        self._silent.set(silent_s)
        self._triage.set(triage)
        self._unread.set(triage_waiting)
        self._unread_s.set(triage_s)
        self._free.set(free_bytes)
        self._open.set(open_alerts)
        self._oldest.set(oldest_s)
        self._clients.set(clients)
        self._audit.set(audit)
        self._broken.set(audit_is_broken)
        for (sink, state), n in deliveries.items():
            self._queue.labels(sink, state).set(n)
        for sink, oldest in archive_s.items():
            self._archive.labels(sink).set(oldest)

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
