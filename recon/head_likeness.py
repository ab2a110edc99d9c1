"""Whether images show a head as the training images did: noise, phantoms and other objects lie far from all of them.

A slice is described by a few numbers: how its brightness is spread, how large and how round the bright part is, how
much of it is edge at three scales, how its halves agree. Its distance is that from the nearest training slices, in
units of the training slices' own spread; a volume's is the median over its middle slices.
Source: Ramaswamy et al., SIGMOD 2000 (distance to nearest neighbours tells outliers).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from recon.arrays import Array, closed
from recon.errors import ShapeError

GRID_MM = 2.0  # voxels that slices are compared in
MIDDLE = (0.3, 0.7)  # of the stack: what is looked at
MOST_PLANES = 9
LEVELS = (10, 25, 50, 75, 90)  # percentiles of brightness in the object
N_NEAREST = 3
NAMES = (
    *(f"level {p}" for p in LEVELS),
    *("area", "fill", "aspect", "halves", "outside", "fine", "middle", "coarse", "edges", "flatness", "noise"),
)


@dataclass(frozen=True, eq=False)
class Likeness:
    """Slices that are familiar, float32 (slice, number), the spread of each number, and the distance most keep."""

    known: Array
    spread: Array
    limit: float

    def __post_init__(self) -> None:
        if self.known.ndim != 2 or self.spread.shape != self.known.shape[1:]:
            raise ShapeError("known slices", self.known.shape, ("slice", len(self.spread)))
        for name in ("known", "spread"):
            object.__setattr__(self, name, closed(getattr(self, name), np.float32))

    def distance(self, planes: Array) -> float:
        """Return how far slices (slice, number) are from the known ones: the median over slices."""
        away = (planes[:, None] - self.known[None]) / self.spread
        far = np.sqrt((away**2).mean(2))
        nearest = np.sort(far, axis=1)[:, : min(N_NEAREST, far.shape[1])].mean(1)
        return float(np.median(nearest))


def describe_volume(data: Array, spacing_mm: tuple[float, float], noise: float) -> Array:
    """Return float32 (slice, number) of the middle slices of `data` (slice, y, x), voxels (y, x) in mm.

    noise: its standard deviation over the image's scale.
    """
    n = len(data)
    first, last = int(MIDDLE[0] * n), max(int(np.ceil(MIDDLE[1] * n)), int(MIDDLE[0] * n) + 1)
    shown = np.unique(np.linspace(first, last - 1, min(MOST_PLANES, last - first)).round().astype(int))
    return np.stack([describe(np.asarray(data[k], np.float32), spacing_mm, noise) for k in shown])


def describe(image: Array, spacing_mm: tuple[float, float], noise: float) -> Array:
    """Return float32 (number,), in the order of `NAMES`, of a slice (y, x); all are finite."""
    scale = float(np.percentile(image, 99.5)) or 1.0
    small = _resampled(image / scale, spacing_mm)
    bright = ndimage.binary_opening(small > 0.15)
    labels, n = ndimage.label(bright)
    if n:
        sizes = ndimage.sum_labels(bright, labels, range(1, n + 1))
        bright = labels == 1 + int(np.argmax(sizes))
    head = ndimage.binary_fill_holes(bright)
    if head.sum() < 50:
        return np.zeros(len(NAMES), np.float32)
    rows, columns = np.flatnonzero(head.any(1)), np.flatnonzero(head.any(0))
    box = small[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape
    halves = max(_agreement(box, box[:, ::-1]), _agreement(box, box[::-1]))
    inner = ndimage.binary_erosion(head, iterations=4) if head.sum() > 900 else head
    inner = inner if inner.any() else head
    bands = [small - ndimage.gaussian_filter(small, 0.8)]
    bands += [ndimage.gaussian_filter(small, s) - ndimage.gaussian_filter(small, 2 * s) for s in (0.8, 2.0)]
    gradient = ndimage.gaussian_gradient_magnitude(small, 0.8)[inner]
    values = (
        *np.percentile(small[inner], LEVELS),
        np.log(head.sum() * GRID_MM**2 / 1e4),
        head.sum() / (height * width),
        max(height, width) / min(height, width),
        halves,
        np.log(float(np.abs(small[~head]).mean() if not head.all() else 0) + 0.01),
        *(np.log(float(band[inner].std()) + 0.003) for band in bands),
        np.log(float(gradient.mean()) + 0.003),
        np.log(float(np.median(gradient)) + 0.003) - np.log(float(np.percentile(gradient, 90)) + 0.003),
        np.log(noise + 0.003),
    )
    return np.nan_to_num(np.array(values, np.float32), posinf=0, neginf=0)


def _agreement(one: Array, other: Array) -> float:
    a, b = one - one.mean(), other - other.mean()
    return float((a * b).sum() / max(float(np.sqrt((a**2).sum() * (b**2).sum())), 1e-12))


def _resampled(image: Array, spacing_mm: tuple[float, float]) -> Array:
    """Return `image` on a grid of `GRID_MM`, smoothed first where that is coarser."""
    factors = [mm / GRID_MM for mm in spacing_mm]
    smooth = ndimage.gaussian_filter(image, [0.35 * max(0.0, 1 / f - 1) for f in factors])
    shape = [max(8, round(n * f)) for n, f in zip(image.shape, factors, strict=True)]
    zoom = [new / old for new, old in zip(shape, image.shape, strict=True)]
    return np.asarray(ndimage.zoom(smooth, zoom, order=1, mode="nearest", grid_mode=True), np.float32)
