"""The head in the simulated scanner: an atlas of tissue fractions, made into one person by a seed.

Everything is a function of points in patient LPS mm, so any slice plane at any resolution sees the same head. An atlas
is an average and therefore blurred; fractions are sharpened where they are sampled, after smooth random fields have
decided how wide this person's sulci and cortex are, and smooth displacements have given the head its own shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from recon.arrays import Array, closed
from recon.errors import ShapeError

STORED_TISSUES = ("wm", "gm", "fluid", "marrow", "fat", "muscle", "bone")
FULL = 255  # a stored fraction of 1
BONE = STORED_TISSUES.index("bone")
BLOCK = 4  # voxels along the side of a block that is searched for tissue
FIELD_SPACING_MM = 2.0
FOLD_WIDTH_MM = 3.0
FOLD_STRENGTH = 0.8
FLUID_PRIOR = 4.0  # sulci are narrower than the scatter of an average, which therefore understates them
TEXTURE = 0.02  # standard deviation of the signal within one tissue, of its mean, fine and coarse alike
N_BUMPS = 6
BUMP_MM = 2.0
SCALE_SPREAD = 0.03


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Tissue fractions of an average head.

    fractions: uint8 (tissue, z, y, x), 0 to FULL, in the order of STORED_TISSUES; the rest of a voxel is air.
    origin_mm: LPS of voxel (0, 0, 0) as (x, y, z); the axes run along x, y and z.
    """

    fractions: Array
    origin_mm: tuple[float, float, float]
    spacing_mm: float

    def __post_init__(self) -> None:
        if self.fractions.ndim != 4 or len(self.fractions) != len(STORED_TISSUES):
            raise ShapeError("anatomy", self.fractions.shape, (len(STORED_TISSUES), "z", "y", "x"))
        object.__setattr__(self, "fractions", closed(self.fractions, np.uint8))

    @property
    def bounds_mm(self) -> tuple[Array, Array]:
        """Return the LPS corners (3,) of the box that holds the head."""
        low = np.asarray(self.origin_mm)
        return low, low + self.spacing_mm * (np.array(self.fractions.shape[:0:-1]) - 1)

    @functools.cached_property
    def blocks(self) -> Array:
        """Bool (z, y, x), with a margin of one block: where BLOCK³ voxels, or their neighbours, hold any tissue."""
        filled = self.fractions.any(axis=0)
        padded = np.pad(filled, [(BLOCK, BLOCK + -n % BLOCK) for n in filled.shape])
        coarse = padded.reshape(*(m for n in padded.shape for m in (n // BLOCK, BLOCK))).any(axis=(1, 3, 5))
        return ndimage.binary_dilation(coarse, np.ones((3, 3, 3)))


@dataclass(frozen=True, eq=False)
class Head:
    """One person: the anatomy and what makes it individual.

    scale: (3,) size of the head against the atlas along x, y, z.
    bump_centres_mm, bump_vectors_mm: (bump, 3) smooth displacements of bump_width_mm (bump,).
    folds, gyri, texture: float32 (z, y, x) positive factors on a grid of FIELD_SPACING_MM over the anatomy's box, on
        the share of fluid, the share of grey matter and the signal.
    """

    anatomy: Anatomy
    scale: Array
    bump_centres_mm: Array
    bump_vectors_mm: Array
    bump_widths_mm: Array
    folds: Array
    gyri: Array
    texture: Array


def make_head(anatomy: Anatomy, seed: int) -> Head:
    """Return the head of person `seed`: sizes within 3 %, shapes within a few mm, sulci and texture of their own."""
    rng = np.random.default_rng([seed, 1])
    low, high = anatomy.bounds_mm
    shape = tuple(int(n) for n in np.ceil((high - low) / FIELD_SPACING_MM)[::-1] + 1)
    return Head(
        anatomy,
        1 + np.clip(rng.normal(0, SCALE_SPREAD, 3), -2 * SCALE_SPREAD, 2 * SCALE_SPREAD),
        rng.uniform((-60, -80, -50), (60, 80, 70), (N_BUMPS, 3)),
        np.clip(rng.normal(0, BUMP_MM, (N_BUMPS, 3)), -2 * BUMP_MM, 2 * BUMP_MM),
        rng.uniform(22, 40, N_BUMPS),
        (FLUID_PRIOR * np.exp(FOLD_STRENGTH * _noise(rng, shape, FOLD_WIDTH_MM))).astype(np.float32),
        np.exp(FOLD_STRENGTH * _noise(rng, shape, FOLD_WIDTH_MM)).astype(np.float32),
        (1 + TEXTURE * _noise(rng, shape, 2.0) + TEXTURE * _noise(rng, shape, 12.0)).astype(np.float32),
    )


def _noise(rng: np.random.Generator, shape: tuple[int, ...], width_mm: float) -> Array:
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), width_mm / FIELD_SPACING_MM)
    return noise / noise.std()


def to_atlas(head: Head, points: Array) -> Array:
    """Return where in the atlas the tissue at `points` comes from: float32 (3, …), LPS mm, both."""
    out = np.empty(points.shape, np.float32)
    for axis in range(3):
        out[axis] = points[axis] / np.float32(head.scale[axis])
    for centre, vector, width in zip(head.bump_centres_mm, head.bump_vectors_mm, head.bump_widths_mm, strict=True):
        weight = bump(points, centre, float(width))
        for axis in range(3):
            out[axis] -= np.float32(vector[axis]) * weight
    return out


def bump(points: Array, centre_mm: Array, width_mm: float) -> Array:
    """Return exp(-r²/2w²) around a centre, float32 (…), for points (3, …) in mm."""
    square = sum((points[axis] - np.float32(centre_mm[axis])) ** 2 for axis in range(3))
    return np.exp(square * np.float32(-0.5 / width_mm**2))


def sample(volume: Array, points: Array, origin_mm: tuple[float, float, float], spacing_mm: float) -> Array:
    """Return a volume (z, y, x) at points (3, …) LPS mm by linear interpolation, float32 (…), 0 outside."""
    index = np.stack([(points[axis] - np.float32(origin_mm[axis])) / np.float32(spacing_mm) for axis in (2, 1, 0)])
    return ndimage.map_coordinates(volume, index, np.float32, order=1, mode="constant")


def tissue_fractions(head: Head, points: Array) -> Array:
    """Return float32 (tissue, n), the share of each of STORED_TISSUES at points (3, n) of the atlas, sharpened.

    An average's fraction is a probability; its cube, normalised, is near 0 or 1 away from a boundary and keeps the
    boundary where the probabilities are equal. Bone is what is left inside the head, air included: both are silent.
    """
    anatomy = head.anatomy
    out = np.zeros((len(STORED_TISSUES), points.shape[1]), np.float32)
    inside = _occupied(anatomy, points)
    near = points[:, inside]
    share = np.empty((len(STORED_TISSUES), near.shape[1]), np.float32)
    for tissue, volume in enumerate(anatomy.fractions[:BONE]):
        share[tissue] = sample(volume, near, anatomy.origin_mm, anatomy.spacing_mm)
    share[:BONE] /= FULL
    share[BONE] = np.maximum(1 - share[:BONE].sum(axis=0), 0)
    np.multiply(share, share * share, out=share)
    share[STORED_TISSUES.index("fluid")] *= sample(head.folds, near, anatomy.origin_mm, FIELD_SPACING_MM)
    share[STORED_TISSUES.index("gm")] *= sample(head.gyri, near, anatomy.origin_mm, FIELD_SPACING_MM)
    share /= np.maximum(share.sum(axis=0), np.float32(1e-6))
    out[:, inside] = share
    return out


def _occupied(anatomy: Anatomy, points: Array) -> Array:
    """Return bool (n,): which points lie in a block that holds tissue, or beside one."""
    blocks = anatomy.blocks
    index = []
    for axis, n in zip((2, 1, 0), blocks.shape, strict=True):
        place = (points[axis] - np.float32(anatomy.origin_mm[axis])) / np.float32(anatomy.spacing_mm * BLOCK)
        index.append(np.clip(place + 1, 0, n - 1).astype(np.intp))
    return blocks[index[0], index[1], index[2]]
