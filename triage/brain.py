"""Where the brain is in a plane, whether or not the skull was taken off."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from recon.arrays import Array

BRIGHT = 0.35  # of the brain's median: tissue
NECK_MM = 4  # bridges to the scalp that are thinner than twice this are cut
COARSE = 2  # the cutting is done at this many mm


def brain_masks(images: Array) -> Array:
    """Return bool (plane, y, x): the brain in planes of 1 mm, filled, without scalp.

    images: float32 (plane, y, x), brightness over the median of the brain, as `triage.preprocess` makes it.
    """
    out = np.zeros(images.shape, bool)
    for number, image in enumerate(images):
        if image.any():
            out[number] = _brain(image)
    return out


def _brain(image: Array) -> Array:
    n_y, n_x = image.shape
    small = image[: n_y // COARSE * COARSE, : n_x // COARSE * COARSE]
    small = small.reshape(n_y // COARSE, COARSE, n_x // COARSE, COARSE).mean(axis=(1, 3))
    tissue = np.pad(small > BRIGHT, 1)
    sure = ndimage.distance_transform_edt(tissue) * COARSE > NECK_MM
    parts, n = ndimage.label(sure)
    if not n:
        return np.zeros(image.shape, bool)
    y, x = (np.arange(m) - m / 2 for m in sure.shape)
    central = np.exp(-((y[:, None] / 28) ** 2) - (x / 24) ** 2)  # the middle of the head is the middle of the plane
    largest = parts == 1 + int(np.argmax(ndimage.sum_labels(central, parts, range(1, n + 1))))
    grown = ndimage.distance_transform_edt(~largest) * COARSE <= NECK_MM + COARSE
    brain = ndimage.binary_fill_holes(grown & (tissue | ndimage.binary_closing(largest, iterations=4)))
    brain = ndimage.binary_closing(np.pad(brain, 8), iterations=6)[8:-8, 8:-8]
    brain = ndimage.binary_fill_holes(brain)[1:-1, 1:-1]
    out = np.zeros(image.shape, bool)
    whole = np.kron(brain, np.ones((COARSE, COARSE), bool))
    out[: whole.shape[0], : whole.shape[1]] = whole
    return out
