"""What an image is expected to look like before it is reconstructed: how strong its detail is, where, and how fine.

The detail is taken for Gaussian with the covariance V½ Fᴴ P F V½: a variance V at each place, times the share P of the
power at each distance from the centre of k-space. Both are learned from the measured lines of the scan itself, in
units of its noise, so nothing has to be tuned for a scan.

Undersampling along one axis folds detail, not mean brightness: the calibration lines settle the coarse image. V is
therefore the local energy of what is finer than they resolve, drawn a little towards the local brightness.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

from recon.arrays import Array, array_module, closed, to_device, to_host
from recon.errors import ShapeError
from recon.fourier import to_image, to_kspace
from recon.scan import KSpace

BLUR_VOXELS = 3.0  # neighbourhood that a voxel's energy is taken from
BRIGHTNESS_SHARE = 0.2  # exponent of the brightness in the variance; the rest is detail
POWER_FLOOR = 1.0  # noise variances: whatever stands out of the noise is never suppressed as background
# Part of the noise variance that is believed. With 1 the error is least, but small structures lose contrast (a 3×3
# lesion at R = 3 keeps 0.69 instead of 0.73), and a level estimated from outer k-space holds some signal.
NOISE_TRUST = 0.5
MODEL_ERROR = 1e-4  # part of the signal power that coil maps and motion leave unexplained
SPECTRUM_FLOOR = 0.3  # of the mean share outside the calibration lines: fine detail stays possible
BAND_SHARE = 0.25  # of the grid: the calibration band is never taken for wider


@dataclass(frozen=True, eq=False)
class SignalPrior:
    """The covariance V½ Fᴴ P F V½ of an image, relative to the variance of the noise.

    variance: float32 (slice, y, x), V, positive.
    spectrum: float32, P, positive, centre at n // 2: (y) for one phase encoding, (slice, y) for two.
    """

    variance: Array
    spectrum: Array

    def __post_init__(self) -> None:
        if self.variance.ndim != 3:
            raise ShapeError("prior variance", self.variance.shape, ("slice", "y", "x"))
        n_slices, n_y, _ = self.variance.shape
        if self.spectrum.shape not in ((n_y,), (n_slices, n_y)):
            raise ShapeError("prior spectrum", self.spectrum.shape, (n_y,))
        for name in ("variance", "spectrum"):
            object.__setattr__(self, name, closed(getattr(self, name), np.float32))


def learn_prior(kspace: KSpace, image: Array, resolution: float = 1.0) -> SignalPrior:
    """Return the prior for a scan from a first image of it, complex (slice, y, x), in units of its noise.

    resolution: how wide the calibration band is in `image`, of what it is in `kspace`; below 1 for an image that was
    made from the calibration lines alone, whose finest detail is what stands for the rest.
    """
    xp = array_module(image)
    band = calibration_band(kspace)
    fine = _energy(_without_centre(image, band * resolution / 4))
    power = _energy(image)
    shares = power / xp.maximum(power.sum((1, 2), keepdims=True), 1e-30)
    noise = NOISE_TRUST + MODEL_ERROR * (shares * power).sum((1, 2), keepdims=True)
    bright, fine = _local(power) + POWER_FLOOR, _local(fine) + POWER_FLOOR
    level = fine.mean((1, 2), keepdims=True) / bright.mean((1, 2), keepdims=True)
    # the power-weighted mean of the fine energy keeps its scale; only its pattern is mixed with the brightness
    variance = fine ** (1 - BRIGHTNESS_SHARE) * (bright * level) ** BRIGHTNESS_SHARE / noise
    return SignalPrior(variance, _spectrum(kspace, band))


def calibration_band(kspace: KSpace) -> int:
    """Return how many central lines are taken for settled, at most `BAND_SHARE` of the grid."""
    n_y = kspace.samples.shape[2]
    widest = max(2, int(BAND_SHARE * n_y))
    return widest // 2 if kspace.calibration is None else min(kspace.calibration.shape[2], widest)


def _energy(image: Array) -> Array:
    return image.real**2 + image.imag**2


def _without_centre(image: Array, width: float) -> Array:
    """Return `image` (slice, y, x) without its lines around ky = 0, a Gaussian of `width` lines."""
    xp = array_module(image)
    n_y = image.shape[1]
    window = 1 - xp.exp(-0.5 * ((xp.arange(n_y) - n_y // 2) / width) ** 2)
    return to_image(to_kspace(image, (1,)) * window.astype(xp.float32)[:, None], (1,))


def _local(power: Array) -> Array:
    """Return the average of (slice, y, x) over a Gaussian neighbourhood in the slice."""
    xp = array_module(power)
    return _blur(xp, power.shape[1]) @ power.astype(xp.float32) @ _blur(xp, power.shape[2])


@lru_cache(maxsize=8)
def _blur(xp: ModuleType, n: int) -> Array:
    """Return the average over a Gaussian neighbourhood along a periodic axis, float32 (n, n), closed to writing."""
    steps = xp.arange(n)
    distance = (steps[:, None] - steps[None] + n // 2) % n - n // 2
    weight = xp.exp(-0.5 * (distance / BLUR_VOXELS) ** 2)
    return closed(weight / weight.sum(1, keepdims=True), xp.float32)


def _spectrum(kspace: KSpace, band: int) -> Array:
    """Return the share of power at each line, mean 1 outside `band`, from the lines that were measured.

    It is taken to depend on the distance from the centre alone and to be smooth in it. From the energy of a line on
    these are a few numbers, worked out on the host: on a device each step would cost a launch and some a wait.
    """
    n_slices, _, n_y, _ = kspace.samples.shape
    averages = np.asarray(kspace.averages, np.float32)
    energy = to_host(_energy(kspace.samples).mean((1, 3))) - 1 / np.maximum(averages, 1)  # without the noise
    ky = np.abs(np.arange(n_y) - n_y // 2).astype(np.float32)
    if kspace.slice_encoded:
        kz = (np.arange(n_slices) - n_slices // 2) * (n_y / n_slices)
        distance = np.sqrt(kz[:, None] ** 2 + ky**2).astype(np.float32)
    else:
        distance = np.broadcast_to(ky, (n_slices, n_y))
    # one bin a line's width, then a smooth curve through the bins that hold measured lines
    n_bins = int(distance.max()) + 2
    bins = np.rint(distance).astype(int)[averages > 0]
    count = np.bincount(bins, minlength=n_bins)
    mean = np.bincount(bins, weights=energy[averages > 0], minlength=n_bins) / np.maximum(count, 1)
    known = np.flatnonzero(count)
    radius = np.arange(n_bins)
    weight = np.exp(-0.5 * ((radius[:, None] - known[None]) / (2 + 0.1 * radius[:, None])) ** 2)
    weight += 1e-12  # beyond the last measured line (partial Fourier) the curve goes on level
    curve = (weight @ np.maximum(mean[known], 0.02)) / weight.sum(1)
    share = np.interp(distance, radius, curve) if kspace.slice_encoded else curve[np.rint(ky).astype(int)]
    outside = (distance if kspace.slice_encoded else ky) > band // 2
    spectrum = np.maximum(share / share[outside].mean(), SPECTRUM_FLOOR).astype(np.float32)
    return to_device(spectrum, array_module(kspace.samples))
