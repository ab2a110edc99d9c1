"""How far a volume is from its reference: PSNR, SSIM and NMSE inside the head, after one least-squares scale."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from recon.errors import ShapeError

_WINDOW = 7
_MARGIN = 3


class Scores(NamedTuple):
    """PSNR in dB (peak: the reference's 99.9th percentile), mean SSIM, NMSE; inside the head, one scale a volume."""

    psnr: float
    ssim: float
    nmse: float


def head_mask(reference: Array) -> Array:
    """Return bool (slice, y, x): 8 % of the 99th percentile and more, opened, filled, grown by 3 voxels a slice."""
    bright = reference > 0.08 * np.percentile(reference, 99)
    filled = (ndimage.binary_fill_holes(ndimage.binary_opening(plane, iterations=2)) for plane in bright)
    return np.stack([ndimage.binary_dilation(plane, iterations=3) for plane in filled])


def compare(reference: Array, volume: Array, mask: Array | None = None) -> Scores:
    """Return the scores of `volume` (slice, y, x) against `reference`, inside `mask` (None: the head).

    Raises ShapeError where the two are not on one grid.
    """
    if volume.shape != reference.shape:
        raise ShapeError("volume", volume.shape, reference.shape)
    reference, volume = np.asarray(reference, np.float64), np.abs(np.asarray(volume, np.float64))
    mask = head_mask(reference) if mask is None else mask
    inside, found = reference[mask], volume[mask]
    scale = float(inside @ found) / max(float(found @ found), 1e-30)
    error = inside - scale * found
    peak = float(np.percentile(inside, 99.9))
    shown = np.zeros_like(mask)
    shown[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = mask[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    similar = np.stack([ssim(a, b, peak) for a, b in zip(reference, scale * volume, strict=True)])
    return Scores(
        psnr=10 * float(np.log10(peak**2 / np.mean(error**2))),
        ssim=float(similar[shown].mean()),
        nmse=float(error @ error) / float(inside @ inside),
    )


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
