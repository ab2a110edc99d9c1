"""The pattern of the lines of one image: how far apart they lie, which are missing, how many fill the centre."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recon.arrays import Array

MAX_ACCELERATION = 8
MIN_LINES = 8  # fewer show no pattern
# Of the lines that a pattern expects. One with more holes is meant to be irregular: pseudo-random sampling leaves out
# half of the lines and more, while an image that lost 30 % of its lines by accident is still told from it.
MAX_MISSING_SHARE = 0.3


class Pattern(NamedTuple):
    """What a set of lines looks like.

    acceleration: every how many rows a line lies, outside the centre; None for irregular sampling or too few lines.
    missing: the rows that the pattern expects between its first and last line and that were not measured.
    n_central: how many lines without a gap lie around the centre, 0 where the central line is missing.
    share: rows between the first and the last line for each measured one, the central run left out of both.
    """

    acceleration: int | None
    missing: tuple[int, ...]
    n_central: int
    share: float


def read_pattern(measured: Array) -> Pattern:
    """Return the pattern of lines `measured`, bool (ky,), the centre of k-space at n // 2.

    A regular pattern is every R-th row from its first to its last line, and any further lines in one block without
    gaps. That R is taken which leaves fewest rows missing, and the smallest of those.
    """
    found = np.flatnonzero(measured)
    n_central = central_run(measured)
    if len(found) < MIN_LINES:
        return Pattern(None, (), n_central, 1.0)
    extent = int(found[-1] - found[0]) + 1
    share = max(extent - n_central, 1) / max(len(found) - n_central, 1) if len(found) < extent else 1.0
    best: tuple[int, int, Array] | None = None
    for acceleration in range(1, MAX_ACCELERATION + 1):
        for offset in range(acceleration):
            missing, n_expected = _missing(measured, found, acceleration, offset)
            if len(missing) <= MAX_MISSING_SHARE * n_expected and (best is None or len(missing) < best[0]):
                best = (len(missing), acceleration, missing)
    if best is None:
        return Pattern(None, (), n_central, share)
    return Pattern(best[1], tuple(int(row) for row in best[2]), n_central, share)


def central_run(measured: Array) -> int:
    """Return how many measured lines without a gap hold the central one, n // 2; 0 where it is missing itself."""
    centre = len(measured) // 2
    if not measured[centre]:
        return 0
    gaps = np.flatnonzero(~np.asarray(measured))
    below, above = gaps[gaps < centre], gaps[gaps > centre]
    stop = int(above[0]) if len(above) else len(measured)
    return stop - (int(below[-1]) + 1 if len(below) else 0)


def _missing(measured: Array, found: Array, acceleration: int, offset: int) -> tuple[Array, int]:
    """The rows missing from every `acceleration`-th one and one block, and how many that pattern expects."""
    expected = np.zeros(len(measured), bool)
    start = int(found[0])
    expected[start + (offset - start) % acceleration : found[-1] + 1 : acceleration] = True
    beside = found[~expected[found]]
    if len(beside):
        expected[beside[0] : beside[-1] + 1] = True
    return np.flatnonzero(expected & ~measured), int(expected.sum())
