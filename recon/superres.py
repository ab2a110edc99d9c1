"""Super-resolution (being written)."""

from __future__ import annotations

import numpy as np

from recon.arrays import Array

FOREGROUND = 0.1  # of the image's scale
NORMAL_MAD = 0.6745  # median of |x| of a standard normal


def noise_level(image: Array) -> float:
    """Return the standard deviation of the noise in `image` (slice, y, x), in its own units.

    From the finest diagonal differences where there is signal, of which tissue has next to none.
    Source: Donoho & Johnstone, Biometrika 81:425 (1994), the median of the finest wavelet coefficients.
    """
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
    a, b, c, d = (even[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    diagonal, mean = np.abs(a - b - c + d) / 2, (a + b + c + d) / 4
    scale = float(np.percentile(image, 99.5))
    inside = mean > FOREGROUND * scale
    if not inside.any():
        return 0.0
    return float(np.median(diagonal[inside])) / NORMAL_MAD
