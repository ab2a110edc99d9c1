"""The grey-scale window that a magnitude image is first shown with."""

from __future__ import annotations

import numpy as np

from recon.arrays import Array

TOP_PERCENTILE = 99.7  # of the head: leaves a few bright vessels and skin to saturate


def display_window(image: Array) -> tuple[float, float]:
    """Return (low, high) in the units of `image` (real, any shape): black and white of a first look.

    Low is 0 unless the image goes below; high is a percentile of what is brighter than a tenth of the bright tissue,
    so that neither the air around a head nor a few hot voxels decide. High is above low always.
    """
    values = np.asarray(image, np.float32).ravel()
    values = values[:: max(1, values.size // 1_000_000)]  # a million voxels tell the same percentiles, at once
    low = min(0.0, float(np.percentile(values, 0.3)))
    tissue = float(np.percentile(values, 99)) or float(values.max())
    bright = values[values > 0.1 * tissue]
    high = float(np.percentile(bright, TOP_PERCENTILE)) if len(bright) else 0.0
    return (low, high) if high > low else (low, low + 1.0)
