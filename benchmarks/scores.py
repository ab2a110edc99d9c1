"""How far a volume is from its reference inside the head, after one least-squares scale.

PSNR, SSIM and NMSE for all of it, the high-frequency error norm for edges, and how much contrast small structures keep.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from recon.errors import ShapeError
from recon.parity import ssim

_MARGIN = 3
_SIGMA, _REACH = 1.5, 7  # voxels, of the Laplacian of Gaussian: 15×15
_GAP, _RING = 1, 3  # voxels: a structure's blurred edge, left out, and the width of the ring around it
_MIN_CONTRAST = 0.05  # of the 99.9th percentile: a structure that hardly differs from its ring tells nothing


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
    reference = np.asarray(reference, np.float64)
    mask = head_mask(reference) if mask is None else mask
    volume = matched(reference, volume, mask)
    inside = reference[mask]
    error = inside - volume[mask]
    peak = float(np.percentile(inside, 99.9))
    shown = np.zeros_like(mask)
    shown[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = mask[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    similar = np.stack([ssim(a, b, peak) for a, b in zip(reference, volume, strict=True)])
    return Scores(
        psnr=10 * float(np.log10(peak**2 / np.mean(error**2))),
        ssim=float(similar[shown].mean()),
        nmse=float(error @ error) / float(inside @ inside),
    )


def matched(reference: Array, volume: Array, mask: Array) -> Array:
    """Return |`volume`| times the factor that brings it nearest to `reference` inside `mask`, float64 (slice, y, x).

    Raises ShapeError where the two are not on one grid.
    """
    if volume.shape != reference.shape:
        raise ShapeError("volume", volume.shape, reference.shape)
    volume = np.abs(np.asarray(volume, np.float64))
    inside, found = np.asarray(reference, np.float64)[mask], volume[mask]
    return volume * (float(inside @ found) / max(float(found @ found), 1e-30))


def hfen(reference: Array, volume: Array, mask: Array | None = None) -> float:
    """Return the high-frequency error norm ‖LoG(x) − LoG(r)‖ / ‖LoG(r)‖ inside `mask` (None: the head); less is better.

    x is `volume` (slice, y, x) after its scale; LoG is a Laplacian of Gaussian, slice by slice, and finds edges.
    Raises ShapeError where the two are not on one grid.
    Source: Ravishankar and Bresler, IEEE TMI 30:1028 (2011).
    """
    mask = head_mask(reference) if mask is None else mask
    edges, found = (
        np.stack([ndimage.gaussian_laplace(plane, _SIGMA, truncate=_REACH / _SIGMA) for plane in stack])[mask]
        for stack in (np.asarray(reference, np.float64), matched(reference, volume, mask))
    )
    return float(np.linalg.norm(found - edges) / np.linalg.norm(edges))


def retention(reference: Array, volume: Array, structures: Array) -> float | None:
    """Return how much of its contrast a small structure keeps: 1 for all of it, 0 for a structure that is gone.

    Each connected part of `structures`, bool (slice, y, x), is compared with the ring around it; its contrast in
    `volume`, after the scale, is divided by the one in `reference`, and the median over structures is returned. None
    where no structure stands out in the reference.
    Raises ShapeError where the two volumes are not on one grid.
    """
    mask = head_mask(reference)
    volume = matched(reference, volume, mask)
    least = _MIN_CONTRAST * float(np.percentile(reference[mask], 99.9))
    kept = []
    for true, found, places in zip(reference, volume, structures, strict=True):
        labels, n = ndimage.label(places, np.ones((3, 3)))
        for number in range(1, n + 1):
            inside = labels == number
            near = ndimage.binary_dilation(inside, iterations=_GAP)
            ring = ndimage.binary_dilation(near, iterations=_RING) & ~near & ~places
            if ring.any() and abs(contrast := _contrast(true, inside, ring)) >= least:
                kept.append(_contrast(found, inside, ring) / contrast)
    return float(np.median(kept)) if kept else None


def _contrast(image: Array, inside: Array, ring: Array) -> float:
    return float(image[inside].mean() - image[ring].mean())
