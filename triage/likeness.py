"""How like the training images a plane is: noise, phantoms, other organs and mislabelled contrasts lie far away.

A few numbers describe a plane by its brightness, edges and halves; to them come the network's own features. What was
trained on has a mean and a covariance of both, and the distance from it is Mahalanobis'.
Source: Lee et al., NeurIPS 31:7167 (2018), distance in feature space.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from recon.errors import ShapeError
from triage.preprocess import Planes

LEVELS = (5, 25, 75, 95, 99)  # percentiles of brightness inside the head
EDGE_MM = 12  # from the outside of the head: scalp and skull, where they are


def describe(planes: Planes) -> Array:
    """Return float64 (plane, number): see `describe_images`."""
    return describe_images(planes.inputs[:, 0])


def describe_images(images: Array) -> Array:
    """Return float64 (plane, number): brightness inside and at the rim of the head, its size, edges and symmetry.

    images: float (plane, y, x), the first channel of planes.
    """
    return np.array([_describe(each) for each in images]).reshape(len(images), -1)


def _describe(image: Array) -> list[float]:
    small = image[:224, :192].reshape(56, 4, 48, 4).mean(axis=(1, 3))
    head = ndimage.binary_fill_holes(small > 0.2)
    if head.sum() < 60:
        return [0.0] * (len(LEVELS) + 7)
    depth = ndimage.distance_transform_edt(np.pad(head, 1))[1:-1, 1:-1] * 4
    deep = np.kron(depth > EDGE_MM, np.ones((4, 4), bool))
    if not deep.any():
        return [0.0] * (len(LEVELS) + 7)
    levels = [float(v) for v in np.percentile(image[deep], LEVELS)]
    rim = small[head & (depth <= EDGE_MM)]
    fine = image - ndimage.gaussian_filter(image, 1.0)
    middle = ndimage.gaussian_filter(image, 1.0) - ndimage.gaussian_filter(image, 3.0)
    rough, coarse = float(fine[deep].std()), float(middle[deep].std())
    mirrored = small[:, ::-1]
    halves = float((small * mirrored).sum() / max(float((small**2).sum()), 1e-9))
    outside = float(small[~head].mean()) if not head.all() else 0.0
    return [
        *levels,
        float(np.log(rough + 0.005)),
        float(np.log(coarse + 0.005)),
        float(rim.mean()),
        float(np.log(head.sum() * 16 / 1e4)),
        halves,
        outside,
        float(small[head].std()),
    ]


def distance(features: Array, mean: Array, precision: Array) -> Array:
    """Return float64 (plane,): Mahalanobis' distance of features (plane, number) over the root of their number.

    Raises ShapeError where the numbers of features differ.
    """
    if features.ndim != 2 or features.shape[1] != len(mean):
        raise ShapeError("features", features.shape, ("plane", len(mean)))
    offset = features - mean
    square = np.einsum("pi,ij,pj->p", offset, precision, offset)
    return np.asarray(np.sqrt(np.maximum(square, 0) / len(mean)))
