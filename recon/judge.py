"""Measures of slices against their limits: reasons in words for what is not as in a clean scan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from recon.arrays import Array
from recon.consistency import SliceMeasures
from recon.limits import ODDS, Limits, completed, for_many
from recon.quality import Level, Reason
from recon.scan import ImageKey

MAX_LINES = 100  # that a reason lists
HIDDEN = "held_out"
MOTION = "inconsistency"


class Said(NamedTuple):
    """How a measure is called as a reason. words: with {value} and {threshold}, of the worst slice."""

    code: str
    words: str


SAYINGS = {
    MOTION: Said("motion", "lines contradict each other as when a head moves: {value}, at most {threshold} is usual"),
    HIDDEN: Said(
        "held-out-lines",
        "measured lines that were hidden are not predicted from the rest: error {value}, at most {threshold} is usual",
    ),
    "hidden": Said(
        "inconsistent-lines", "lines do not agree with those around them: {value}, at most {threshold} is usual"
    ),
    "disagreement": Said(
        "disagreement", "the network's lines are far from the classical ones: {value}, at most {threshold} is usual"
    ),
    "misfit": Said(
        "unexplained-lines", "measured lines do not fit the coil maps: {value}, at most {threshold} is usual"
    ),
    "map_residual": Said(
        "coil-maps", "coil maps do not explain their calibration lines: {value}, at most {threshold} is usual"
    ),
    "ghost": Said("ghost", "a ghost beside the head: {value} of its signal, at most {threshold} is usual"),
    "odds": Said(
        "doubtful", "all measures together speak of a spoiled image: odds {value} to 1, at most {threshold} are usual"
    ),
    "novelty": Said(
        "unfamiliar", "the image is unlike those that limits were made on: {value}, at most {threshold} is usual"
    ),
}


def slice_reasons(
    measures: Mapping[ImageKey, SliceMeasures], limits: Limits, numbers: Mapping[ImageKey, Array]
) -> list[Reason]:
    """Return what is wrong with slices, one reason a measure, the gravest first; [] where nothing is.

    measures: of each image that was measured. numbers: of the readouts that first gave its lines, in ascending order.
    A slice's threshold rises with the number of slices, so that a scan of many is not called wrong more often than one
    of few.
    """
    values = {key: completed(each.values, limits) for key, each in measures.items()}
    out = []
    for measure, said in SAYINGS.items():
        found = []
        n = sum(measure in each for each in values.values())
        for key, each in values.items():
            limit = limits.of(measure, each)
            if measure not in each or limit is None:
                continue
            deviation = limit.deviation(each[measure], each)
            degraded = for_many(limit.degraded, n)
            if deviation > degraded:
                is_grave = deviation > for_many(limit.untrusted, n)
                found.append((deviation - degraded, key, each[measure], limit.at(degraded, each), is_grave))
        if found:
            out.append(_reason(measure, said, found, measures, numbers))
    return sorted(out, key=lambda reason: reason.level is not Level.UNTRUSTED)


def worst(measures: Mapping[ImageKey, SliceMeasures], limits: Limits) -> dict[str, float]:
    """Return each measure's largest value over slices; of what is better when it is large, the least."""
    out: dict[str, float] = {}
    for each in measures.values():
        for name, value in completed(each.values, limits).items():
            pick = min if name in ("snr", "coverage", "noise_known") else max
            out[name] = pick(out[name], value) if name in out else value
    return out


def suspicion(values: Mapping[str, float], limits: Limits) -> float:
    """Return the odds that a slice's image is spoiled, in the logarithm; nought without measures or weights."""
    return math.log(completed(values, limits).get(ODDS, 1.0)) if values else 0.0


def _reason(
    measure: str,
    said: Said,
    found: list[tuple[float, ImageKey, float, float, bool]],
    measures: Mapping[ImageKey, SliceMeasures],
    numbers: Mapping[ImageKey, Array],
) -> Reason:
    _, key, value, threshold, _ = max(found)
    level = Level.UNTRUSTED if any(each[-1] for each in found) else Level.DEGRADED
    words = said.words.format(value=f"{value:.3g}", threshold=f"{threshold:.3g}")
    slices = sorted({each[1].slice for each in found})
    onset = measures[key].onset
    lines: tuple[int, ...] = ()
    if measure == MOTION and onset is not None:
        readouts = numbers[key]
        words += f"; in slice {key.slice} from its {onset + 1}th of {len(readouts)} lines on"
        lines = tuple(int(number) for number in readouts[onset:])[:MAX_LINES]
    elif len(slices) > 1:
        words += f" (slice {key.slice}, the worst of {len(slices)})"
    return Reason(said.code, words, measure, value, threshold, level, tuple(slices), lines)
