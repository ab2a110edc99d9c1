"""Deadlines that neither a stepped wall clock nor a restart can lose or stretch.

While the machine runs, time is read from the clock since boot, which nobody sets. A deadline is kept with the boot it
belongs to; after another boot the wall clock decides, and a wall clock that went back never adds to the full wait.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Clock(Protocol):
    """Where deadlines read the time. boot: names the boot that `since_boot_s` counts from, "" where nobody knows."""

    boot: str

    def since_boot_s(self) -> float:
        """Return seconds since boot, suspension included."""

    def wall_s(self) -> float:
        """Return seconds since 1970."""


class SystemClock:
    """The machine's own clocks."""

    def __init__(self) -> None:
        """Read which boot this is."""
        try:
            self.boot = _BOOT_ID.read_text("ascii").strip()
        except OSError:
            self.boot = ""

    def since_boot_s(self) -> float:
        """Return seconds since boot, suspension included where the system counts it."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def wall_s(self) -> float:
        """Return seconds since 1970."""
        return time.time()


@dataclass(frozen=True)
class Deadline:
    """A moment that lies `wait_s` after it was set, on both clocks."""

    boot: str
    since_boot_s: float
    wall_s: float
    wait_s: float

    @staticmethod
    def after(wait_s: float, clock: Clock) -> Deadline:
        """Return the deadline `wait_s` from now."""
        return Deadline(clock.boot, clock.since_boot_s() + wait_s, clock.wall_s() + wait_s, wait_s)

    def left_s(self, clock: Clock) -> float:
        """Return the seconds that are left, 0 and less where it has passed."""
        if self.boot and self.boot == clock.boot:
            return self.since_boot_s - clock.since_boot_s()
        return min(self.wall_s - clock.wall_s(), self.wait_s)

    def carried_over(self, clock: Clock) -> Deadline:
        """Return the same moment as a deadline of this boot."""
        if self.boot and self.boot == clock.boot:
            return self
        left_s = max(self.left_s(clock), 0.0)
        return Deadline(clock.boot, clock.since_boot_s() + left_s, clock.wall_s() + left_s, self.wait_s)
