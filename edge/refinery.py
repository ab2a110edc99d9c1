"""Super-resolution after triage: keeps its process alive, publishes what it made, and sends that to the archive."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edge.crew import Crew, Report
from edge.event_log import EventLog
from edge.ledger import Ledger
from edge.settings import SuperResolutionSettings
from edge.super_resolution import NOTICE
from edge.superres_job import end_job
from edge.window import display_window

log = logging.getLogger(__name__)

JOBS = "super_resolution"  # in the state folder
_TIMEOUT_S = 600.0  # a process that yields to all others may be slow
_NAMES = ("series", "method", "slice", "slices", "volume", "shape", "spacing_mm")


class Refinery:
    """Has finished scans super-resolved where the settings want it; nothing of a scan waits for it."""

    def __init__(
        self,
        settings: SuperResolutionSettings,
        state: Path,
        ledger: Ledger,
        events: EventLog,
        enter_objects: Callable[[str, Iterable[str]], None],
    ) -> None:
        """enter_objects: called with a scan and its new DICOM objects within the ledger's transaction."""
        self._ledger, self._events, self._enter_objects = ledger, events, enter_objects
        self._jobs = state / JOBS
        self._crew: Crew | None = None
        if settings.enabled:
            own = {
                "jobs": str(self._jobs),
                "model": settings.model,
                "backend": settings.backend,
                "engines": str(state / "engines"),
                "n_thin": settings.thin_slices,
                "style": settings.style,
            }
            self._crew = Crew(
                own, _TIMEOUT_S, self._on_report, lambda: None, lambda: None, module="edge.superres_process"
            )

    def has(self, scan_id: str) -> bool:
        """Whether a scan waits for it."""
        return self._jobs.joinpath(f"{scan_id}.json").exists()

    def wake(self) -> None:
        """A scan may have left a job."""
        if self._crew is not None:
            self._crew.order("look", "")

    async def run(self) -> None:
        """Keep the process running until cancelled; its jobs survive it."""
        if self._crew is None:
            return
        try:
            await self._crew.run()
        except asyncio.CancelledError:
            await self._crew.stop()
            raise

    def _on_report(self, report: Report, payload: bytes) -> None:
        if report["report"] == "image":
            self._on_image(report, payload)
        elif report["report"] == "refined":
            self._on_refined(report)

    def _on_image(self, report: Report, payload: bytes) -> None:
        """Publish one plane, unless this very one went out before."""
        digest = hashlib.sha256(payload).hexdigest()
        if not self._ledger.note_image(report["scan_id"], report["series"], report["image_key"], digest):
            return
        low, high = display_window(np.frombuffer(payload, "<f4").reshape(report["shape"]))
        fields: dict[str, Any] = {name: report[name] for name in _NAMES}
        fields |= {"dtype": "<f4", "window": [low, high], "sha256": digest, "is_synthetic": True, "notice": NOTICE}
        self._events.publish("image", report["scan_id"], fields, payload)

    def _on_refined(self, report: Report) -> None:
        scan_id, volumes = report["scan_id"], report["volumes"]
        with self._events.together():
            self._enter_objects(scan_id, report["objects"])
            said = [{name: each.get(name) for name in ("volume", "state", "why", "factors")} for each in volumes]
            self._events.publish("scan.super-resolved", scan_id, {"volumes": said, "notice": NOTICE})
        end_job(self._jobs, scan_id)  # only now: a daemon killed before has it made again, and then entered
        states = ",".join(str(each["state"]) for each in volumes)
        log.info("super-resolution done id=%s volumes=%s", scan_id, states or "none")
