"""From a measured axis to a finer one: where its values go, and which part of the fine axis they determine.

Two ways an axis is measured. A *band* axis is an encoded one: k-space was measured from −n/2 to n/2 − 1, everything
beyond is unknown. A *profile* axis is a stack of thick slices: each value is the mean of fine ones, weighted with the
slice's profile. For both, `place` makes fine values that agree with what was measured, and `basis` spans all that the
measurement determines; what an estimate says about that span is taken away again. A *kept* axis is not made finer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recon.arrays import Array
from recon.errors import ShapeError

UNIT = 8  # fine axes are filled to multiples of this, for the network's coarser levels
MAX_FACTOR = 4
EDGE = 1 / 3  # width (full, at half height) of the slice profile's two edges, as a share of its thickness
OVERSAMPLING = 8  # of the integral of the profile over a fine voxel


@dataclass(frozen=True, eq=False)
class FineAxis:
    """One axis of n measured and N fine values, filled up to a multiple of `UNIT`.

    place: float32 (filled, n), from measured to fine values. basis: float32 (filled, m), orthonormal columns; rows
    beyond N are zero. phase: float32 (filled,), a fine voxel's offset from the centre of the measured one, in quarters
    of fine voxels; 0 where nothing is made finer. size: N. factor: N / n.
    """

    place: Array
    basis: Array
    phase: Array
    size: int
    factor: int


def band_axis(n: int) -> FineAxis:
    """Return the axis of `n` values whose k-space is measured, made two times finer.

    The fine axis' k-space equals the measured one at every measured frequency. That of −n/2 (n even) is put at +n/2
    too, as the image is real.
    """
    size = 2 * n
    at = (np.arange(size) - n) / size  # position over the field
    coarse = (np.arange(n) - n // 2) / n
    waves = np.arange(1, (n - 1) // 2 + 1)
    apart = at[:, None] - coarse[None]
    place = 1 + 2 * np.cos(2 * np.pi * apart[..., None] * waves).sum(-1)
    columns = [np.ones((size, 1))]
    for wave in waves:
        columns += [np.cos(2 * np.pi * wave * at)[:, None], np.sin(2 * np.pi * wave * at)[:, None]]
    if n % 2 == 0:
        highest = np.pi * n * at
        place += 2 * np.cos(highest)[:, None] * np.cos(np.pi * n * coarse)[None]
        columns += [np.cos(highest)[:, None], np.sin(highest)[:, None]]
    basis = np.hstack(columns)
    phase = 0.25 * ((np.arange(size) + n) % 2)  # a measured voxel's centre lies on every second fine one
    return _filled(place / n, basis / np.linalg.norm(basis, axis=0), phase, 2)


def profile_axis(n: int, factor: int) -> FineAxis:
    """Return the axis of `n` thick slices that touch, each made of `factor` fine ones.

    The mean of the fine values over each slice's profile equals the measured one. Among all such values `place` takes
    the most likely ones of a signal whose energy falls as 1 / k².
    """
    weights = profile_weights(n, factor)
    size = n * factor
    apart = np.abs(np.arange(size)[:, None] - np.arange(size)[None])
    covariance = np.exp(-apart / (8.0 * factor))
    shared = covariance @ weights.T
    place = np.linalg.solve(weights @ shared, shared.T).T
    basis = np.linalg.qr(weights.T)[0]
    phase = np.tile((np.arange(factor) - (factor - 1) / 2) / 4, n)
    return _filled(place, basis, phase, factor)


def profile_weights(n: int, factor: int, width: float = 1.0) -> Array:
    """Return float64 (n, n · factor): the share of each fine value in each slice; rows sum to 1.

    A slice profile is a box of `width` slices with edges smoothed by a Gaussian of `EDGE` slices, as selective pulses
    make it (Bernstein, King & Zhou, Handbook of MRI Pulse Sequences, 2004, chapter 3). What falls off the stack's ends
    is left out.
    """
    if not 2 <= factor <= MAX_FACTOR:
        raise ShapeError("thick slices", (factor,), (f"2 to {MAX_FACTOR} fine slices each",))
    fine = (np.arange(n * factor * OVERSAMPLING) + 0.5) / (factor * OVERSAMPLING)  # in slices
    apart = (fine[None] - (np.arange(n) + 0.5)[:, None]) / width
    reach = 5 * EDGE
    steps = np.linspace(-1.5 - reach, 1.5 + reach, 2001)
    sigma = EDGE / 2.3548
    box = (np.abs(steps) <= 0.5).astype(float)
    blur = np.exp(-0.5 * (steps / sigma) ** 2)
    shape = np.convolve(box, blur / blur.sum(), "same")
    weights = np.interp(apart, steps, shape, left=0, right=0).reshape(n, n * factor, OVERSAMPLING).sum(-1)
    out: Array = weights / weights.sum(1, keepdims=True)
    return out


def kept_axis(n: int) -> FineAxis:
    """Return the axis of `n` values that stay as they are."""
    return _filled(np.eye(n), np.eye(n), np.zeros(n), 1)


def _filled(place: Array, basis: Array, phase: Array, factor: int) -> FineAxis:
    size = len(place)
    beyond = -size % UNIT
    mirrored = np.arange(size - 1, size - 1 - beyond, -1) % size
    return FineAxis(
        np.vstack((place, place[mirrored])).astype(np.float32),
        np.vstack((basis, np.zeros((beyond, basis.shape[1])))).astype(np.float32),
        np.concatenate((phase, phase[mirrored])).astype(np.float32),
        size,
        factor,
    )
