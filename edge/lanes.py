"""The processes that reconstruct, side by side: each has some of the scans, and a scan stays with one.

One is there from the start. Another is started when a scan comes while each of those that were has one, which several
scanners at once need and one does not; those started stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from edge.crew import Crew, Report
from edge.live import LiveScan
from edge.mrd import Limits
from edge.settings import Settings


class Lanes:
    """Keeps up to `worker.processes` of them, and knows which scan is whose."""

    def __init__(
        self,
        settings: Settings,
        wire: Limits,
        scans: Mapping[str, LiveScan],
        on_report: Callable[[Report, bytes], None],
        on_start: Callable[[int], None],
        on_death: Callable[[int], None],
    ) -> None:
        """scans: those in flight, by id. on_start, on_death: as a crew's, with the number of the lane."""
        self._scans = scans
        own = {
            "method": settings.worker.method,
            "model": settings.network.model,
            "backend": settings.network.backend,
            "engines": str(settings.state / "engines"),
            "precision": settings.network.precision,
            "max_scan_mib": settings.worker.max_scan_mib,
            "limits": asdict(wire),
            "pseudonym_key": str(settings.state / "keys" / "pseudonym.key"),
            "identifiers": settings.alerts.identifiers,
        }
        self.crews = [
            Crew(
                own, settings.worker.timeout_s, on_report, partial(on_start, lane), partial(on_death, lane),
                is_wanted=lane == 0,
            )
            for lane in range(settings.worker.processes)
        ]  # fmt: skip

    @property
    def wanted(self) -> list[Crew]:
        """Those that were started; the others wait for scans that overlap."""
        return [crew for crew in self.crews if crew.is_wanted]

    def scans_of(self, lane: int) -> list[LiveScan]:
        """Return the scans that a lane has not reconstructed yet."""
        return [scan for scan in self._scans.values() if scan.outcome is None and scan.lane == lane]

    def lane_for_scan(self) -> int:
        """Return the lane for a scan that begins: one that has none, another process, or who has the fewest."""
        n_started = len(self.wanted)
        freest = min(range(n_started), key=lambda lane: len(self.scans_of(lane)))
        if not self.scans_of(freest) or n_started == len(self.crews):
            return freest
        self.crews[n_started].want()  # told of its scans once it is ready
        return n_started

    def order(self, scan: LiveScan, do: str, **fields: Any) -> None:
        """Give an order about a scan to whose it is."""
        self.crews[scan.lane].order(do, scan.scan_id, **fields)
