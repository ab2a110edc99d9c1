"""Interference from outside: power that stands in a few columns where k-space should hold noise.

A transmitter near the scanner is narrow-band: after the readout transform it stands in the same few columns of every
line, however far from the centre of k-space. Anatomy fades towards the outermost lines and is wider than a few columns.
Source: the raw data of the unshielded 0.055 T scanner of Liu et al., Nature Communications 12:7238 (2021).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import median_filter

from recon.arrays import Array
from recon.fourier import to_image

OUTER_SHARE = 1 / 4  # of the lines, half of them at either end: as far from anatomy as the scan goes
MIN_LINES = 4  # at an end; fewer are too random
WIDE, NARROW = 33, 17  # columns of the running median: wider than interference; the narrower bars thin bright objects
# Over the running median. The outermost lines of 16 clean real scans at R = 1, 2 and 4 reach 2.8 (wide) and 2.2
# (narrow), an unshielded 0.055 T scan 10.8 to 11.5 and 4.8 to 5.6. Few lines are few draws of an exponential, hence the
# second term: in 600 draws of one-coil noise, 256 columns, 4 to 64 lines at an end, nothing stands out.
MIN_WIDE, MIN_WIDE_OF_FEW = 4.0, 14.0
MIN_NARROW = 3.5
# One readout of one coil is a single draw a column, and the median is uncertain too: 18 times it is passed in 3 of 100
# readouts of 512 columns, 44 times in one of 20 000. Several coils are several draws.
MIN_ALONE, MIN_ALONE_OF_FEW = 4.0, 40.0
MIN_FLOOR = 1e-6  # of the mean power: where the background is weaker, the data are a phantom's and free of noise
MAX_COLUMNS = 8  # that are named


class Tone(NamedTuple):
    """One column where interference stands. column: distance from the centre of the readout, in columns of the sent
    readout. ratio: its power over that of the columns around. floor_ratio: over the noise floor."""

    column: int
    ratio: float
    floor_ratio: float


class Spectrum:
    """Power by coil and column, summed over the readouts that `add` is given, in two groups: the ends of k-space."""

    def __init__(self) -> None:
        self._sums: list[Array | None] = [None, None]
        self._counts = [0, 0]

    def add(self, samples: Array, end: int) -> None:
        """Add one readout, complex64 (coil, kx), from one end of k-space (`end` 0 or 1). Another length starts anew."""
        power = np.abs(to_image(samples, axes=(1,))) ** 2
        held = self._sums[end]
        if held is None or held.shape != power.shape:
            self._sums[end], self._counts[end] = power, 1
        else:
            held += power
            self._counts[end] += 1

    def tones(self) -> tuple[list[Tone], float]:
        """Return the columns that stand out at both ends (or the one that was measured), strongest first, and the
        threshold that `Tone.ratio` had to pass."""
        profiles, n = [], 0
        for total, count in zip(self._sums, self._counts, strict=True):
            if total is not None and count >= MIN_LINES:
                profiles.append(_profile(total))
                n = count if n == 0 else min(n, count)
        if not profiles or len({len(each) for each in profiles}) != 1:
            return [], 0.0
        return _stand_out(profiles, MIN_WIDE + MIN_WIDE_OF_FEW / n)


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
