"""How unlike the scans that are familiar is this one: a few cheap numbers of it, and their distance from the usual."""

from __future__ import annotations

import numpy as np

from recon.arrays import Array
from recon.reconstruct import Start

FEATURES = (
    "slope of log energy over log distance from the centre, along the lines' axis",
    "the same along the readout",
    "share of the field that is brighter than a tenth of the peak",
    "mean relative step between neighbours in the foreground",
    "share of the field that coil maps cover",
    "log of the noise over the peak",
    "spread of brightness in the foreground, relative",
    "how well the phase of neighbours agrees",
)
FOREGROUND = 0.1  # of the peak


def features(start: Start, level: float = 1.0) -> Array:
    """Return what a scan looks like as float32 (feature), in the order of `FEATURES`; all are finite.

    level: standard deviation of the noise in a sample.
    """
    image = start.image[0]
    bright = np.abs(image)
    peak = max(float(np.percentile(bright, 99.5)), 1e-20)
    inside = bright > FOREGROUND * peak
    pair = inside[:, 1:] & inside[:, :-1]
    step = np.abs(bright[:, 1:] - bright[:, :-1])[pair] / np.maximum(bright[:, 1:] + bright[:, :-1], 1e-20)[pair]
    product = (image[:, 1:] * image[:, :-1].conj())[pair]
    maps = start.maps.maps[0]
    values = (
        _slope(start.kspace.samples[0], 1, level),
        _slope(np.fft.fftshift(np.fft.fft(image, axis=1), axes=1)[None] / image.shape[1] ** 0.5, 2, level),
        float(inside.mean()),
        float(step.mean()) if step.size else 0.0,
        float(((maps.real**2 + maps.imag**2).sum(0) > 0.25).mean()),
        float(np.log(max(level, 1e-6) / peak)),
        float(bright[inside].std() / bright[inside].mean()) if inside.any() else 0.0,
        float(np.abs(product.sum()) / max(float(np.abs(product).sum()), 1e-20)),
    )
    return np.nan_to_num(np.array(values, np.float32), posinf=0, neginf=0)


def novelty(found: Array, mean: Array, precision: Array) -> float:
    """Return the Mahalanobis distance of features from the familiar, root mean square: about 1 where they belong.

    found, mean: (feature). precision: (feature, feature), the inverse covariance of familiar scans.
    Source: Lee et al., NeurIPS 31 (2018), of a network's features; here of what it is given.
    """
    away = np.asarray(found, np.float64) - mean
    return float(np.sqrt(max(0.0, away @ precision @ away) / len(away)))


def _slope(samples: Array, axis: int, level: float) -> float:
    """Return the slope of log energy over log distance from the centre of `axis`, of what stands out of the noise."""
    others = tuple(i for i in range(samples.ndim) if i != axis)
    energy = (samples.real**2 + samples.imag**2).mean(others)
    distance = np.abs(np.arange(len(energy)) - len(energy) // 2)
    known = (distance > 1) & (energy > 0)
    if known.sum() < 4:
        return 0.0
    rest = np.maximum(energy[known] - level**2, 0.05 * level**2)
    return float(np.polyfit(np.log(distance[known]), np.log(rest), 1)[0])
