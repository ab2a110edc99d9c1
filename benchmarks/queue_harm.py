"""What a reading queue gains and loses when flagged exams are read first: minutes saved, and minutes added.

Exams arrive at random and take exponential times; one reader; a flagged exam goes before all that are not flagged, and
nothing being read is interrupted. Whoever is not flagged waits longer, those whose finding was missed among them.
Source: Cobham, Oper Res 2:70 (1954), the M/M/1 queue with two non-preemptive classes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Desk:
    """A site's reading desk. load: share of the time that the reader reads. read_min: minutes an exam takes."""

    prevalence: float
    load: float
    sensitivity: float
    specificity: float
    read_min: float = 10.0

    @property
    def flag_rate(self) -> float:
        """Share of exams that are flagged."""
        return self.prevalence * self.sensitivity + (1 - self.prevalence) * (1 - self.specificity)


def waits(desk: Desk) -> dict[str, float]:
    """Return mean minutes until reading begins, by whom it is about, in closed form."""
    busy = desk.load * desk.read_min
    flagged = busy / (1 - desk.load * desk.flag_rate)
    return _by_group(desk, busy / (1 - desk.load), flagged, flagged / (1 - desk.load))


def simulated_waits(desk: Desk, n_exams: int, seed: int = 0) -> dict[str, float]:
    """Return the same as `waits`, from a simulated desk."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(desk.read_min / desk.load, n_exams))
    reads = rng.exponential(desk.read_min, n_exams)
    diseased = rng.random(n_exams) < desk.prevalence
    flagged = rng.random(n_exams) < np.where(diseased, desk.sensitivity, 1 - desk.specificity)
    begun = _begin(arrivals, reads, flagged)
    first_come = _begin(arrivals, reads, np.zeros(n_exams, bool))
    wait = begun - arrivals
    return {
        "first_come": float((first_come - arrivals).mean()),
        "flagged": float(wait[flagged].mean()),
        "not_flagged": float(wait[~flagged].mean()),
        "diseased": float(wait[diseased].mean()),
        "without": float(wait[~diseased].mean()),
        "missed": float(wait[diseased & ~flagged].mean()),
    }


def table(
    prevalences: tuple[float, ...], loads: tuple[float, ...], points: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Return minutes for each prevalence, load and operating point (sensitivity, specificity), saved and added."""
    rows = []
    for name, (sensitivity, specificity) in points.items():
        for prevalence in prevalences:
            for load in loads:
                found = waits(Desk(prevalence, load, sensitivity, specificity))
                rows.append({
                    "operating_point": name, "sensitivity": sensitivity, "specificity": specificity,
                    "prevalence": prevalence, "load": load, **{k: round(v, 2) for k, v in found.items()},
                    "saved_diseased": round(found["first_come"] - found["diseased"], 2),
                    "added_without": round(found["without"] - found["first_come"], 2),
                    "added_missed": round(found["missed"] - found["first_come"], 2),
                })  # fmt: skip
    return rows


def check(n_exams: int) -> list[dict[str, float]]:
    """Return, at several loads, the greatest difference between simulation and closed form, relative.

    Each wait is taken over the first-come wait of the same simulated exams: at high load a run of a million exams is a
    short one, and its good or bad luck strikes both.
    """
    out = []
    for load in (0.5, 0.8, 0.95):
        desk = Desk(0.1, load, 0.9, 0.9)
        closed, drawn = waits(desk), [simulated_waits(desk, n_exams, seed) for seed in range(4)]
        total = {name: float(np.mean([each[name] for each in drawn])) for name in closed}
        ratio = {name: total[name] / total["first_come"] * closed["first_come"] / closed[name] for name in closed}
        out.append({
            "load": load,
            "difference": max(abs(value - 1) for value in ratio.values()),
            "first_come_difference": abs(total["first_come"] / closed["first_come"] - 1),
        })  # fmt: skip
    return out


def _by_group(desk: Desk, first_come: float, flagged: float, not_flagged: float) -> dict[str, float]:
    return {
        "first_come": first_come,
        "flagged": flagged,
        "not_flagged": not_flagged,
        "diseased": desk.sensitivity * flagged + (1 - desk.sensitivity) * not_flagged,
        "without": (1 - desk.specificity) * flagged + desk.specificity * not_flagged,
        "missed": not_flagged,
    }


def _begin(arrivals: np.ndarray, reads: np.ndarray, flagged: np.ndarray) -> np.ndarray:
    """Return when the reading of each exam begins."""
    begun = np.empty(len(arrivals))
    waiting: list[tuple[bool, int]] = []
    now, n = 0.0, 0
    for _ in range(len(arrivals)):
        if not waiting and arrivals[n] > now:
            now = float(arrivals[n])
        while n < len(arrivals) and arrivals[n] <= now:
            heapq.heappush(waiting, (not flagged[n], n))
            n += 1
        number = heapq.heappop(waiting)[1]
        begun[number] = now
        now += float(reads[number])
    return begun
