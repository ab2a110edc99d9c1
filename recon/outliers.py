"""Samples and lines that do not fit those beside them: spikes in a readout, jumps of the gain between lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.ndimage import median_filter

from recon.arrays import Array

# A spark is one to a few samples long (Bernstein, King & Zhou, Handbook of MRI Pulse Sequences (2004), on spike noise);
# k-space off its centre is not. Power over the strongest sample 3 to 8 away, and over the strongest within 2 columns in
# the nearest lines: off the centre 16 clean real scans at R = 1, 2 and 4 reach 8.5 (0.055 T, one coil), a gradient-echo
# phantom at R = 4 17.5. 30 is 15 dB: a spark of 5.5 times the amplitude around it.
SPIKE = 30.0
_SKIP, _REACH = 2, 8
_NEAR_ROWS, _N_NEAR = 8, 4
# Of the log power between lines. Clean real scans reach 0.98 with one coil at 0.055 T, 7.1 standard deviations of their
# own; with 2 coils and more 0.52. A gain of 2 is 1.39.
JUMP_SIGMAS = 9.0
MIN_JUMP, MAX_JUMP = 0.8, 2.0  # 2.0, 8.7 dB: the spoiled 0.055 T scan, the worst of the real ones, reaches 1.7
MIN_JUMP_LINES = 16
_JUMP_WINDOW = 7


def spike_columns(profile: Array) -> Array:
    """Return the columns, int (n,), where a readout's power, float32 (kx,), is `SPIKE` times that around it."""
    n = len(profile)
    padded = np.zeros(n + 2 * _REACH, profile.dtype)
    padded[_REACH:-_REACH] = profile
    two = np.maximum(padded[:-1], padded[1:])
    four = np.maximum(two[:-2], two[2:])
    six = np.maximum(four[:-2], two[4:])  # of 6 samples from each on: 3 to 8 away on either side
    around = np.maximum(six[:n], six[_REACH + _SKIP + 1 :])
    hit = profile > SPIKE * around
    if not hit.any():
        return np.zeros(0, np.intp)
    columns = np.flatnonzero(hit)
    return columns[around[columns] > 0]


def strongest_nearby(profiles: Mapping[tuple[int, int], Array], place: tuple[int, int], column: int) -> list[float]:
    """Return the most power within two columns of `column` in each of the lines nearest to `place`, (kz, ky).

    profiles: power, float32 (kx,), by place. At most `_N_NEAR` lines of its partition, `_NEAR_ROWS` rows away or less.
    """
    out: list[float] = []
    n = len(profiles[place])
    for distance in range(1, _NEAR_ROWS + 1):
        for row in (place[1] - distance, place[1] + distance):
            profile = profiles.get((place[0], row))
            if profile is not None and len(profile) == n and len(out) < _N_NEAR:
                out.append(float(profile[max(0, column - 2) : column + 3].max()))
    return out


def line_level(profile: Array) -> float:
    """Return the mean log power of a readout, float32 (kx,), over its samples that are not 0; NaN where few are.

    A gain shifts it by its own logarithm, wherever the signal lies; signal changes it little from line to line.
    """
    least = float(profile.min())
    kept = profile if least > 0 else profile[profile > 0]
    return float(np.log(kept).mean()) if 2 * len(kept) >= len(profile) else float("nan")


class Jump(NamedTuple):
    """A change of level. line: which one, in the order given. value: by how much its log power differs from the
    lines before it. threshold: what would have passed. is_single: the next line is back where it was."""

    line: int
    value: float
    threshold: float
    is_single: bool


def jumps(levels: Array, is_judged: Array) -> list[Jump]:
    """Return where the levels of an image's lines, float64 (line,) in the order of their rows, jump.

    is_judged: bool (line,), False for lines near the centre of k-space, which differ by nature.
    """
    if len(levels) < MIN_JUMP_LINES or not np.isfinite(levels).all():
        return []
    steps = np.diff(levels)
    rest = steps - median_filter(steps, _JUMP_WINDOW, mode="nearest")
    judged = is_judged[1:] & is_judged[:-1]
    if not judged.any():
        return []
    sigma = 1.4826 * float(np.median(np.abs(rest[judged])))
    threshold = min(max(MIN_JUMP, JUMP_SIGMAS * sigma), MAX_JUMP)
    out: list[Jump] = []
    for index in np.flatnonzero(judged & (np.abs(rest) > threshold)):
        if out and out[-1].is_single and out[-1].line == index:
            continue  # the way back of the jump before
        follows = rest[index + 1] if index + 1 < len(rest) else 0.0
        is_single = bool(abs(follows) > threshold / 2 and follows * rest[index] < 0)
        out.append(Jump(int(index) + 1, float(rest[index]), threshold, is_single))
    return out
