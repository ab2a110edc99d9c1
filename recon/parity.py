"""Does one way of running a network give the images of another? A fixed scan, and how far two answers to it differ.

An engine computes in other precisions and orders than the reference; before it serves it must show that images stay the
same to the eye and to any threshold behind them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from recon.engine import Profile, fit
from recon.fourier import to_kspace
from recon.network import Network
from recon.scan import CoilMaps, KSpace
from recon.sense import cg_sense
from recon.unrolled import prepare

LEAST_SSIM = 0.999
MOST_DIFFERENCE = 0.02  # of the image's maximum
_WINDOW = 7
_MIN_CALIBRATION = 12
_COLUMNS = 2  # planes of a fixed 3-D scan
_NOISE = 0.01  # of the brightest part


class Parity(NamedTuple):
    """How alike two answers are: the least SSIM of a plane's magnitude, the largest complex |Δ| of the maximum."""

    ssim: float
    difference: float

    @property
    def is_passed(self) -> bool:
        """Whether the one may stand in for the other."""
        return self.ssim >= LEAST_SSIM and self.difference <= MOST_DIFFERENCE

    def __str__(self) -> str:
        return (
            f"SSIM {self.ssim:.5f} (at least {LEAST_SSIM} is needed), "
            f"largest difference {self.difference:.2%} of the maximum (at most {MOST_DIFFERENCE:.0%})"
        )


def check_parity(candidate: Network, reference: Network, profile: Profile) -> Parity:
    """Return how far `candidate` is from `reference` on the fixed scan of `profile`; BackendError as they raise it."""
    inputs = fixed_scan(profile)
    return compare_planes(reference.run(inputs)["image"], candidate.run(inputs)["image"])


def compare_planes(wanted: Array, found: Array) -> Parity:
    """Return how far images `found` are from `wanted`, float32 (plane, 2, y, x)."""
    peak = max(float(np.sqrt((wanted**2).sum(1).max())), 1e-30)
    largest = float(np.sqrt(((found - wanted) ** 2).sum(1).max())) / peak
    magnitudes = (np.sqrt((image.astype(np.float64) ** 2).sum(1)) for image in (wanted, found))
    least = min(float(ssim(a, b, peak).mean()) for a, b in zip(*magnitudes, strict=True))
    return Parity(least, largest)


def fixed_scan(profile: Profile) -> dict[str, Array]:
    """Return the network's inputs for a simulated scan that fits `profile`; always the same numbers.

    A head-like set of ellipses with texture and a phase, seen by smooth coils, noise added.
    """
    rng = np.random.default_rng(0)
    n_y, n_x = profile.y, profile.x
    image = picture(n_y, n_x, rng)
    maps = _coils(profile.coils, n_y, n_x)
    noise = _NOISE * (rng.standard_normal((*maps.shape, 2)) @ [1, 1j])
    lines = _lines(profile)
    if profile.missing > 1:  # planes are cuts (y, z) at one x: kz stands where columns stood
        seen = to_kspace((maps * image), (1, 2)) + noise
        kept = np.ones(n_x, np.uint16)
        start = n_x // 2 + _MIN_CALIBRATION
        kept[start : start + 2 * min(profile.missing, (n_x - start) // 2) : 2] = 0
        averages = kept[:, None] * lines[None]
        samples = np.repeat(seen.transpose(2, 0, 1)[..., None], _COLUMNS, -1) * averages[:, None, :, None]
        planes = np.repeat(maps.transpose(2, 0, 1)[..., None], _COLUMNS, -1)
    else:
        averages = lines[None]
        samples = (to_kspace(maps * image, (1,)) + noise)[None] * averages[:, None, :, None]
        planes = maps[None]
    kspace = KSpace((samples / _NOISE).astype(np.complex64), averages, 1.0, True, None, profile.missing > 1)
    coils = CoilMaps(planes.astype(np.complex64))
    return fit(prepare(kspace, coils, cg_sense(kspace, coils)).inputs, profile)


def _lines(profile: Profile) -> Array:
    """Return averages, uint16 (ky), whose lines fit the profile: its lattice with as many beside it as it allows."""
    n, step = profile.y, profile.aliases
    averages = np.zeros(n, np.uint16)
    centre = n // 2
    if step == 1 and profile.coarse < n:
        averages[:] = 1  # a lattice of every line
        return averages
    if step > 1:
        averages[::step] = 1
    reach = n // 2 if step == 1 else max(0, (profile.coarse - 56) // 2)
    n_left = profile.lines
    for distance in range(reach):
        apart = 1 if step > 1 or distance < _MIN_CALIBRATION else 2
        for line in {centre - distance, centre + distance} if distance % apart == 0 else ():
            if 0 <= line < n and not averages[line] and n_left:
                averages[line] = 1
                n_left -= 1
    return averages


def picture(n_y: int, n_x: int, rng: np.random.Generator) -> Array:
    """Return a complex image (y, x) of ellipses with texture, brightest part about 1."""
    y, x = np.linspace(-1, 1, n_y)[:, None], np.linspace(-1, 1, n_x)
    image = np.zeros((n_y, n_x))
    for a, b, y_0, x_0, level in (
        (0.85, 0.68, 0, 0, 0.9),
        (0.78, 0.61, 0, 0, -0.4),
        (0.3, 0.1, -0.1, 0.18, -0.3),
        (0.3, 0.1, -0.1, -0.18, -0.3),
        (0.06, 0.06, 0.4, 0.2, 0.4),
        (0.03, 0.05, 0.5, -0.1, 0.3),
    ):
        image += level * (((y - y_0) / a) ** 2 + ((x - x_0) / b) ** 2 < 1)
    texture = ndimage.gaussian_filter(rng.standard_normal((n_y, n_x)), 1.5)
    return image * (1 + 0.3 * texture) * np.exp(1j * (0.8 * y + 0.5 * x**2))


def _coils(n_coils: int, n_y: int, n_x: int) -> Array:
    """Return smooth coil maps (coil, y, x) whose squares sum to 1."""
    y, x = np.linspace(-1, 1, n_y)[:, None], np.linspace(-1, 1, n_x)
    angles = 2 * np.pi * np.arange(n_coils) / n_coils
    maps = np.stack(
        [
            np.exp(-0.5 * ((y - np.sin(a)) ** 2 + (x - np.cos(a)) ** 2) + 1j * (a + y * np.cos(a) - x * np.sin(a)))
            for a in angles
        ]
    )
    normed: Array = maps / np.sqrt((np.abs(maps) ** 2).sum(0))
    return normed


def ssim(a: Array, b: Array, peak: float) -> Array:
    """Return the map (y, x) of structural similarity of two images (y, x) with a 7×7 uniform window.

    Source: Wang et al., IEEE TIP 13:600 (2004), with unbiased variances.
    """
    n = _WINDOW**2

    def mean(image: Array) -> Array:
        return ndimage.uniform_filter(image, _WINDOW)

    mean_a, mean_b = mean(a), mean(b)
    unbiased = n / (n - 1)
    var_a, var_b = unbiased * (mean(a * a) - mean_a**2), unbiased * (mean(b * b) - mean_b**2)
    cov = unbiased * (mean(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
