"""A scan in flight as the daemon remembers it, and what the scanner is told of each of its images."""

from __future__ import annotations

import asyncio
import bisect
import time
from typing import Any

import numpy as np

from edge.crew import Report
from edge.mrd_write import ImageInfo
from edge.session import Session
from edge.spool import Ending
from recon.arrays import Array

_SERIES = {"classical": 1, "network": 2, "super-resolved": 3}  # image_series_index, plus ten for each encoding
SERIES_NAMES = {number: name for name, number in _SERIES.items()}  # of the first encoding


class LiveScan:
    """What the daemon remembers of a scan that is not finished."""

    def __init__(self, scan_id: str, session: Session | None, received_at: str, lane: int = 0) -> None:
        """lane: which of the processes that reconstruct has it."""
        self.scan_id = scan_id
        self.lane = lane
        self.session = session
        self.received_at = received_at
        self.ending: Ending | None = None
        self.reason = ""
        self.n_bytes = 0
        self.n_readouts = 0
        self.n_sent = 0
        self.n_retries = 0
        self.making = ""
        self.warned = False
        self.is_announced = False
        self.progress_at = 0.0
        self.window_high = 0.0
        self.faulty_to: dict[str, int] = {}  # by fault, the last readout that an early event named
        self.outcome: tuple[str, str] | None = None  # level and words for the client, once it is served
        self.latencies_ms: list[float] = []
        self.ended_at = self.made_at = ""  # when its stream ended and its last image was made, RFC 3339
        self._arrivals: list[tuple[int, float]] = []  # bytes in the spool, and when (monotonic)
        self.outbox: asyncio.Queue[bytes | tuple[str, str] | None] = asyncio.Queue()

    def arrived(self, n_bytes: int, n_readouts: int) -> None:
        """Note how far the stream has come."""
        self.n_bytes, self.n_readouts = n_bytes, n_readouts
        self._arrivals.append((n_bytes, time.monotonic()))

    def end(self, report: Report) -> dict[str, Any]:
        """What `scan.done` says."""
        latency = np.percentile(self.latencies_ms, [50, 95]).round(1).tolist() if self.latencies_ms else None
        return {
            "ending": self.ending,
            "reason": self.reason,
            "method": report["method"],
            "images": report["n_images"],
            "readouts": report["n_readouts"],
            "results": f"results/{self.scan_id}",
            "latency_ms_p50_p95": latency,
            "stage_ms": report["stage_ms"],
        }

    def arrived_at(self, message_end: int) -> float | None:
        """When (monotonic) the byte before `message_end` had come; forgets what came before."""
        at = bisect.bisect_left(self._arrivals, (message_end, 0.0))
        if not message_end or at == len(self._arrivals):
            return None
        when = self._arrivals[at][1]
        del self._arrivals[:at]
        return when


def image_info(report: Report, index: int) -> ImageInfo:
    """What the scanner is told of an image: its own place, direction and size."""
    n_z, n_y, n_x = report["shape"]
    distance, dy, dx = report["spacing_mm"]
    row, col = np.array(report["row_dir"]), np.array(report["col_dir"])
    centre = np.array(report["origin_mm"])[n_z // 2] + row * dx * (n_x // 2) + col * dy * (n_y // 2)
    key = report["key"]
    return ImageInfo(
        position_mm=_three(centre),
        row_dir=_three(row),
        col_dir=_three(col),
        slice_dir=_three(np.cross(row, col)),
        fov_mm=(n_x * dx, n_y * dy, n_z * distance if n_z > 1 else report["thickness_mm"]),
        series=_SERIES[report["series"]] + 10 * key["encoding"],
        index=index,
        series_description=f"Scanside {report['series']}",
        slice=key["slice"],
        contrast=key["contrast"],
        phase=key["phase"],
        repetition=key["repetition"],
        set=key["set"],
        comment="Not for diagnostic use",
    )


def plane_fields(report: Report, number: int, shape: list[int]) -> dict[str, Any]:
    """What an `image` event says of plane `number` of an image."""
    return {
        "series": report["series"],
        "method": report["method"],
        **({"no_network": report["reason"]} if report["reason"] else {}),
        "slice": number if report["shape"][0] > 1 else report["key"]["slice"],
        "slices": report["n_slices"],
        "volume": report["volume_index"],
        "dtype": "<f4",
        "shape": shape,
        "spacing_mm": report["spacing_mm"],
        "stage_ms": report["stage_ms"],
    }


def _three(vector: Array) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in vector)
    return x, y, z
