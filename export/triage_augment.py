"""Planes made different: another patient's lesion, a skull, another scanner's blur, noise and brightness.

All functions take and return float32 planes (y, x) with the brain's median at 1, as `triage.preprocess` gives them.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from triage.preprocess import MAX_LEVEL

BRAIN = 0.35  # of the median: brighter is tissue
MOST_DISEASED = 0.08  # of a plane's tissue, by rims of ventricles


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], n: int) -> Array:
    """Return smooth noise of about unit size, float32 (y, x), with about `n` waves each way."""
    knots = rng.standard_normal((n + 3, n + 3)).astype(np.float32)
    zoom = [(n + 2) / (m - 1) for m in shape]
    found: Array = ndimage.affine_transform(knots, zoom, 0, shape, np.float32, order=1 if n > 12 else 3, mode="nearest")
    return found


def brain_of(image: Array) -> Array:
    """Return where there is tissue of a skull-stripped plane, holes filled, bool (y, x)."""
    return np.asarray(ndimage.binary_fill_holes(image > 0.12))


def is_stripped(image: Array) -> bool:
    """Return whether the background of a plane is exactly nothing."""
    return bool((image == 0).mean() > 0.3)


def add_skull(rng: np.random.Generator, image: Array) -> Array:
    """Return a skull-stripped plane inside a head: fluid or nothing, bone, and a scalp of any brightness."""
    small = image[::2, ::2]
    inside = brain_of(small)
    if not inside.any():
        return image
    distance = 2 * ndimage.distance_transform_edt(~inside)
    thick = [np.exp(0.35 * smooth_noise(rng, small.shape, 3)) for _ in range(2)]
    bone = rng.uniform(0.5, 3) + rng.uniform(3, 8) * thick[0]
    scalp = bone + rng.uniform(2, 9) * thick[1]
    level = np.where(distance < bone, rng.uniform(0, 0.25), rng.uniform(0.1, 2.2))
    if rng.random() < 0.4:  # marrow between the tables
        level = np.where(np.abs(distance - 0.5 * bone) < 1.2, rng.uniform(0.3, 1.6), level)
    level = level * np.exp(0.2 * smooth_noise(rng, small.shape, 10))
    level = np.where((distance > scalp) | inside, 0, level)
    level = ndimage.gaussian_filter(np.kron(level, np.ones((2, 2))).astype(np.float32), rng.uniform(0.6, 1.2))
    return np.maximum(image, np.where(image > 0.1, 0, level))


def paste(
    rng: np.random.Generator, image: Array, mask: Array, donor: Array, donor_mask: Array
) -> tuple[Array, Array] | None:
    """Return a plane with another plane's lesion in it, and the mask; None where it found no place.

    The lesion keeps its contrast to its surroundings, which are exchanged with it over a soft edge.
    Source: Zhang et al., CarveMix, NeuroImage 271:120041 (2023), with both planes upright and centred already.
    """
    if rng.random() < 0.5:
        donor, donor_mask = donor[:, ::-1], donor_mask[:, ::-1]
    c, s = np.cos(a := rng.normal(0, 0.2)), np.sin(a)
    scale = np.exp(rng.normal(0, 0.15))
    matrix = np.array([[c, -s], [s, c]]) / scale
    centre = (np.array(image.shape) - 1) / 2
    tissue = (image > BRAIN) & (ndimage.uniform_filter(image, 9) > BRAIN)
    for _ in range(4):
        offset = centre - matrix @ (centre + rng.normal(0, 8, 2))
        placed = ndimage.affine_transform(donor_mask.astype(np.float32), matrix, offset, order=1)
        covered = placed > 0.5
        if covered.sum() > 20 and tissue[covered].mean() > 0.75:
            break
    else:
        return None
    soft = ndimage.gaussian_filter(np.maximum(placed, ndimage.binary_dilation(covered, iterations=2)), 1.2)
    moved = ndimage.affine_transform(donor, matrix, offset, order=1)
    around = ndimage.binary_dilation(covered, iterations=8) & ~ndimage.binary_dilation(covered, iterations=3)
    ring = around & tissue & (moved > BRAIN)
    ratio = float(np.median(image[ring]) / max(float(np.median(moved[ring])), 0.1)) if ring.sum() > 20 else 1.0
    out = image * (1 - soft) + np.clip(moved * np.clip(ratio, 0.6, 1.6), 0, MAX_LEVEL) * soft
    return out.astype(np.float32), mask | covered


def decoy(rng: np.random.Generator, image: Array, outline: Array) -> Array:
    """Return a plane whose values inside any outline were stored again: what marks an annotation must not matter."""
    step = rng.uniform(0.004, 0.04)
    again = np.round(image / step) * step
    if rng.random() < 0.4:
        again = ndimage.gaussian_filter(again, rng.uniform(0.3, 0.7))
    if rng.random() < 0.3:
        again = again * rng.uniform(0.98, 1.02)
    inside = outline
    if rng.random() < 0.3:
        inside = outline & ~ndimage.binary_erosion(outline, iterations=int(rng.integers(1, 3)))
    return np.where(inside, again, image).astype(np.float32)


def add_white_matter_disease(rng: np.random.Generator, image: Array) -> Array:
    """Return a FLAIR plane with what small vessels or plaques leave: rims of the ventricles and spots, on both sides.

    Bright on either side alike, but for noise; that is what an infarct is not.
    """
    tissue = (image > BRAIN) & (ndimage.uniform_filter(image, 5) > BRAIN)
    inside = ndimage.binary_fill_holes(image > 0.12)
    depth = ndimage.distance_transform_edt(inside)
    deep = depth > 0.45 * depth.max()
    fluid = ndimage.binary_opening((image < 0.5) & deep)
    noise = smooth_noise(rng, image.shape, int(rng.integers(4, 14)))
    both = 0.75 * (noise + noise[:, ::-1]) + rng.uniform(0, 0.8) * smooth_noise(rng, image.shape, 8)
    level = np.zeros(image.shape, np.float32)
    if fluid.sum() > 40 and rng.random() < 0.8:
        away = ndimage.distance_transform_edt(~fluid)
        reach = rng.uniform(1.5, 9) * np.exp(0.5 * both)
        level = np.clip((reach - away) / rng.uniform(1, 3), 0, 1)
        if (level[tissue] > 0.5).sum() > MOST_DISEASED * tissue.sum():  # cisterns, not ventricles
            level = np.zeros_like(level)
    if rng.random() < 0.6:
        n = int(rng.integers(1, 14))
        y, x = np.nonzero(tissue & (depth > 12))
        if len(y):
            chosen = rng.integers(len(y), size=n)
            spots = np.zeros(image.shape, np.float32)
            for row, column in zip(y[chosen], x[chosen], strict=True):
                _spot(spots, rng, row, column)
                if rng.random() < 0.5:
                    _spot(spots, rng, row + rng.normal(0, 4), image.shape[1] - 1 - column + rng.normal(0, 4))
            level = np.maximum(level, spots)
    level = ndimage.gaussian_filter(np.where(tissue & (depth > 6), level, 0), rng.uniform(0.6, 1.2))
    return (image * (1 + rng.uniform(0.15, 0.9) * level)).astype(np.float32)


def _spot(level: Array, rng: np.random.Generator, row: float, column: float) -> None:
    """Put a blurred ellipse of 2 to 8 mm where there is none."""
    y, x = (np.arange(n, dtype=np.float32) for n in level.shape)
    a, (high, wide) = rng.uniform(0, np.pi), rng.uniform(1.0, 4.0, 2)
    dy, dx = (y - row)[:, None], x - column
    along, across = dy * np.cos(a) + dx * np.sin(a), dx * np.cos(a) - dy * np.sin(a)
    np.maximum(level, np.clip(1.5 - np.sqrt((along / high) ** 2 + (across / wide) ** 2), 0, 1), out=level)


def look(rng: np.random.Generator, image: Array) -> Array:
    """Return a plane as another scanner would show it: brightness, shading, resolution and noise."""
    out = image
    if rng.random() < 0.7:
        out = out ** np.float32(np.exp(rng.normal(0, 0.22)))
    if rng.random() < 0.6:
        out = out * np.exp(np.float32(rng.uniform(0, 0.22)) * smooth_noise(rng, image.shape, int(rng.integers(1, 4))))
    kind = rng.random()
    if kind < 0.35:
        out = ndimage.gaussian_filter(out, rng.uniform(0.3, 1.3))
    elif kind < 0.55:  # fewer lines of k-space
        out = _truncate(out, rng.uniform(0.35, 0.8, 2))
    elif kind < 0.65:
        out = out + rng.uniform(0.2, 1.0) * (out - ndimage.gaussian_filter(out, 1.0))
    if rng.random() < 0.6:
        sigma = np.float32(np.exp(rng.uniform(np.log(0.008), np.log(0.12))))
        noise = rng.standard_normal((2, *image.shape), np.float32) * sigma
        if rng.random() < 0.3:
            noise = ndimage.gaussian_filter(noise, (0, 0.7, 0.7)) * 2
        out = np.hypot(out + noise[0], noise[1])
    if rng.random() < 0.1:
        out = _ghost(rng, out)
    return np.clip(out * np.exp(rng.normal(0, 0.06)), 0, MAX_LEVEL).astype(np.float32)


def _truncate(image: Array, kept: Array) -> Array:
    spectrum = np.fft.rfft2(image)
    y = np.abs(np.fft.fftfreq(image.shape[0])) * 2
    x = np.abs(np.fft.rfftfreq(image.shape[1])) * 2
    spectrum *= (y[:, None] < kept[0]) & (x < kept[1])
    return np.abs(np.fft.irfft2(spectrum, image.shape)).astype(np.float32)


def _ghost(rng: np.random.Generator, image: Array) -> Array:
    shift = int(rng.integers(20, 110))
    axis = int(rng.integers(2))
    return image + np.float32(rng.uniform(0.01, 0.06)) * (np.roll(image, shift, axis) + np.roll(image, -shift, axis))


def move(rng: np.random.Generator, image: Array, mask: Array) -> tuple[Array, Array]:
    """Return plane and mask turned, stretched and shifted a little, and as often as not the other way round."""
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    c, s = np.cos(a := np.radians(rng.normal(0, 3.5))), np.sin(a)
    scale = np.exp(rng.normal(0, 0.07, 2) + rng.normal(0, 0.04))
    matrix = np.array([[c, -s], [s, c]]) / scale
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - matrix @ (centre + rng.normal(0, (5.0, 1.6)))
    moved = ndimage.affine_transform(image, matrix, offset, order=1)
    return moved, ndimage.affine_transform(mask.astype(np.float32), matrix, offset, order=1) > 0.5
