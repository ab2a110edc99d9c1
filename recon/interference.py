"""Interference from outside: power that stands in a few columns where k-space should hold noise.

A transmitter near the scanner is narrow-band: after the readout transform it stands in the same few columns of every
line, as strong at the outermost lines as further in. Anatomy fades towards the outermost lines; the scalp at the side
of a head, which fills one column, is told from a transmitter by that alone.
Source: the raw data of the unshielded 0.055 T scanner of Liu et al., Nature Communications 12:7238 (2021).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import median_filter

from recon.arrays import Array
from recon.fourier import to_image

OUTER_SHARE = 1 / 4  # of the lines, half of them at either end: as far from anatomy as the scan goes
INNER = (1 / 4, 5 / 16)  # of the rows, from either end: lines that are looked at for comparison
MIN_LINES = 4  # at an end; fewer are too random
WIDE, NARROW = 33, 17  # columns of the running median: wider than interference; the narrower bars thin bright objects
# Over the running median. Few lines are few draws of an exponential, hence the second term: in 600 draws of one-coil
# noise, 256 columns, 4 to 64 lines at an end, nothing stands out.
MIN_WIDE, MIN_WIDE_OF_FEW = 5.0, 17.0
MIN_NARROW = 3.5
# One readout of one coil is a single draw a column, and the median is uncertain too: 18 times it is passed in 3 of 100
# readouts of 512 columns, 44 times in one of 20 000. Several coils are several draws.
MIN_ALONE, MIN_ALONE_OF_FEW = 4.0, 40.0
# What a column has more than those around in lines nearer to the centre, over what it has more in the outermost ones:
# 0.9 to 1.1 for a transmitter of ten times the noise in its column; the anatomy that stands out in nine of 120
# simulated scans has 1.4 to 8.
MAX_FADING = 1.3
# Of the power in the column, from line to line: its standard deviation over its mean. A steady carrier of ten times the
# noise has 0.02 to 0.35, anatomy in the outermost lines of simulated scans 0.6 and more: it is speckle there, as an
# unsteady transmitter is. The latter is told by how it fades, once enough lines were read to be sure of that.
MAX_VARIATION = 0.5
MANY_LINES = 32  # at each end and inside
MIN_FLOOR = 1e-6  # of the mean power: where the background is weaker, the data are a phantom's and free of noise
MAX_COLUMNS = 8  # that are named


class Tone(NamedTuple):
    """One column where interference stands. column: distance from the centre of the readout, in columns of the sent
    readout. ratio: its power over that of the columns around. floor_ratio: over the noise floor."""

    column: int
    ratio: float
    floor_ratio: float


class Spectrum:
    """Power by coil and column, summed over the readouts that `add` is given: two ends of k-space, and lines inside."""

    def __init__(self) -> None:
        self._sums: list[Array | None] = [None, None, None]
        self._squares: list[Array] = [np.zeros(0)] * 3  # of the power of all coils, by column
        self._counts = [0, 0, 0]

    def add(self, samples: Array, group: int) -> None:
        """Add one readout, complex64 (coil, kx), of one end of k-space (0 or 1) or from `INNER` rows (2).

        Another length starts anew.
        """
        power = np.abs(to_image(samples, axes=(1,))) ** 2
        square = power.sum(axis=0) ** 2
        held = self._sums[group]
        if held is None or held.shape != power.shape:
            self._sums[group], self._squares[group], self._counts[group] = power, square, 1
        else:
            held += power
            self._squares[group] += square
            self._counts[group] += 1

    def tones(self) -> tuple[list[Tone], float]:
        """Return the columns that stand out at both ends (or the one that was measured), strongest first, and the
        threshold that `Tone.ratio` had to pass."""
        ends = [
            total / count
            for total, count in zip(self._sums[:2], self._counts[:2], strict=True)
            if total is not None and count >= MIN_LINES
        ]
        if not ends or len({each.shape for each in ends}) != 1:
            return [], 0.0
        n = min(count for count in self._counts[:2] if count >= MIN_LINES)
        tones, threshold = _stand_out([_profile(each) for each in ends], MIN_WIDE + MIN_WIDE_OF_FEW / n)
        inner, n_inner = self._sums[2], self._counts[2]
        if inner is not None and n_inner >= MIN_LINES and inner.shape == ends[0].shape:
            fading = _fading(np.mean(ends, axis=0), inner / n_inner)
            centre = inner.shape[1] // 2
            tones = [tone for tone in tones if fading[tone.column + centre] < MAX_FADING]
        if min(n, n_inner) >= MANY_LINES:
            return tones, threshold
        return [tone for tone in tones if self._variation(tone) < MAX_VARIATION], threshold

    def _variation(self, tone: Tone) -> float:
        """By how much the power in a column differs between the lines of one end, the larger of both."""
        out = 0.0
        for total, square, count in zip(self._sums[:2], self._squares[:2], self._counts[:2], strict=True):
            if total is not None and count >= MIN_LINES:
                column = tone.column + total.shape[1] // 2
                mean = float(total[:, column].sum()) / count
                out = max(out, float(np.sqrt(max(float(square[column]) / count / max(mean, 1e-30) ** 2 - 1, 0.0))))
        return out


def noise_tones(samples: Array) -> tuple[list[Tone], float]:
    """Return the columns that stand out in one noise readout, complex64 (coil, sample), and the threshold."""
    threshold = MIN_ALONE + MIN_ALONE_OF_FEW / len(samples)
    return _stand_out([_profile(np.abs(to_image(samples, axes=(1,))) ** 2)], threshold)


def describe_tones(tones: list[Tone]) -> str:
    """Return in words where `tones`, strongest first, stand and how strong they are."""
    columns = ", ".join(f"{each.column:+d}" for each in tones[:MAX_COLUMNS])
    more = f" and {len(tones) - MAX_COLUMNS} more" if len(tones) > MAX_COLUMNS else ""
    db = 10 * np.log10(max(tones[0].floor_ratio, 1e-3))
    return (
        f"columns {columns}{more} from the centre of the readout: {tones[0].ratio:.1f} times the columns around, "
        f"{db:.0f} dB over the noise floor"
    )


def _stand_out(profiles: list[Array], threshold: float) -> tuple[list[Tone], float]:
    wide = np.min([_over_median(each, WIDE) for each in profiles], axis=0)
    narrow = np.min([_over_median(each, NARROW) for each in profiles], axis=0)
    floor = np.min(profiles, axis=0)
    columns = np.flatnonzero((wide > threshold) & (narrow > MIN_NARROW))
    columns = columns[np.argsort(wide[columns])[::-1]]
    centre = len(wide) // 2
    return [Tone(int(x) - centre, float(wide[x]), float(floor[x])) for x in columns], threshold


def _fading(outer: Array, inner: Array) -> Array:
    """What each column has more than those around it in inner lines, over the same in outer ones: float (column,)."""
    more = [each - median_filter(each, NARROW, mode="wrap") for each in (inner.sum(axis=0), outer.sum(axis=0))]
    out: Array = np.full(len(more[1]), np.inf)
    np.divide(np.abs(more[0]), more[1], out=out, where=more[1] > MIN_FLOOR * outer.sum(axis=0).mean())
    return out


def _profile(power: Array) -> Array:
    """Power (coil, column) to one profile (column,) in units of the noise floor; a coil without noise says nothing."""
    floor = np.quantile(power, 0.25, axis=1)
    is_noisy = floor > MIN_FLOOR * power.mean(axis=1)
    if not is_noisy.any():
        return np.ones(power.shape[1])
    out: Array = (power[is_noisy] / floor[is_noisy, None]).mean(axis=0)
    return out


def _over_median(profile: Array, width: int) -> Array:
    out: Array = profile / np.maximum(median_filter(profile, min(width, len(profile)), mode="wrap"), MIN_FLOOR)
    return out
