"""Receive coils around the head: sensitivities by Biot-Savart, and the noise they share.

By reciprocity a loop receives with the transverse field that a unit current in it would make: conj(Bx + i By) for a
main field along z (Hoult, Concepts Magn Reson 12:173, 2000). Loops are polygons of straight segments, each with the
closed form of its field (Hanson & Hirshman, Phys Plasmas 9:4410, 2002). Quasi-static: wavelength effects are left out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from recon.arrays import Array
from recon.errors import AcquisitionError, ShapeError

MAX_COILS = 32
MU0_4PI = 0.1  # T·mm/A × 1e6: fields come out in µT for a current of 1 A and lengths in mm
N_SEGMENTS = 32
HELMET_MM = (126.0, 146.0, 134.0)  # semi-axes: it clears an adult's scalp by 3-4 cm
CENTRE_MM = (0.0, 18.0, 0.0)  # of the head, LPS in the atlas' frame


@dataclass(frozen=True)
class Loop:
    """A circular coil: centre (mm, LPS), the unit normal of its plane, and its radius in mm."""

    centre_mm: tuple[float, float, float]
    normal: tuple[float, float, float]
    radius_mm: float


def helmet(n_coils: int) -> tuple[Loop, ...]:
    """Return 1 to 32 loops spread evenly over a helmet that is open at the face's lower half and the neck.

    Raises AcquisitionError for another number. Positions: a Fibonacci lattice on the sphere (González, Math Geosci
    42:49, 2010), cut off below; each loop is as large as its share of the surface allows, with a little overlap.
    """
    if not 1 <= n_coils <= MAX_COILS:
        raise AcquisitionError(f"{n_coils} coils: 1 to {MAX_COILS} can be simulated")
    if n_coils == 1:  # a single loop sees the transverse field of the whole head only from the side
        return (Loop((0.0, CENTRE_MM[1] + HELMET_MM[1], 0.0), (0.0, 1.0, 0.0), 120.0),)
    index = np.arange(n_coils) + 0.5
    height = 0.86 - 1.36 * index / n_coils  # cosine of the angle from the crown, down to below the ears
    angle = np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - height**2)
    unit = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)
    semi = np.asarray(HELMET_MM)
    normals = unit / semi
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    centres = unit * semi + CENTRE_MM
    radius = 1.15 * float(np.sqrt(2 * 1.36 / n_coils)) * float(semi.mean()) / 2**0.5
    radius = min(radius, 75.0)
    return tuple(
        Loop((float(c[0]), float(c[1]), float(c[2])), (float(n[0]), float(n[1]), float(n[2])), radius)
        for c, n in zip(centres, normals, strict=True)
    )


def loop_field(loop: Loop, points: Array, n_segments: int = N_SEGMENTS) -> Array:
    """Return the magnetic field of 1 A in a loop at points (…, 3) mm: float64 (…, 3), µT.

    The polygon has the circle's area. Points on the wire itself have no finite field and are kept 1 mm off.
    """
    points = np.asarray(points, np.float64)
    if points.shape[-1] != 3:
        raise ShapeError("points", points.shape, ("…", 3))
    normal = np.asarray(loop.normal)
    first = np.cross(normal, [1.0, 0, 0] if abs(normal[0]) < 0.7 else [0, 1.0, 0])
    first /= np.linalg.norm(first)
    second = np.cross(normal, first)
    turn = 2 * np.pi * np.arange(n_segments + 1) / n_segments
    radius = loop.radius_mm * np.sqrt(2 * np.pi / n_segments / np.sin(2 * np.pi / n_segments))
    corners = np.asarray(loop.centre_mm) + radius * (np.cos(turn)[:, None] * first + np.sin(turn)[:, None] * second)
    field = np.zeros_like(points)
    for start, end in itertools.pairwise(corners):
        a, b = points - start, points - end
        length_a, length_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
        product = length_a * length_b
        denominator = np.maximum(product * (product + (a * b).sum(axis=-1)), 1.0)
        field += (MU0_4PI * (length_a + length_b) / denominator)[..., None] * np.cross(a, b)
    return field


def sensitivities(loops: tuple[Loop, ...], points: Array) -> Array:
    """Return complex128 (coil, …) at points (…, 3) LPS mm, scaled so that the root-sum-of-squares at CENTRE_MM is 1."""
    everywhere = np.stack([_transverse(loop, points) for loop in loops])
    centre = np.stack([_transverse(loop, np.asarray(CENTRE_MM)) for loop in loops])
    return everywhere / np.sqrt((np.abs(centre) ** 2).sum())


def _transverse(loop: Loop, points: Array) -> Array:
    field = loop_field(loop, points)
    return field[..., 0] - 1j * field[..., 1]


def noise_covariance(loops: tuple[Loop, ...], seed: int) -> Array:
    """Return complex128 (coil, coil), Hermitian and positive definite, with coil noise levels within ±20 %.

    Neighbours share noise through the head: correlation falls off with distance from 0.5, with a phase of its own.
    Source: the size of measured correlations in 32-channel head arrays, Wiggins et al., Magn Reson Med 56:216 (2006).
    """
    rng = np.random.default_rng([seed, 3])
    centres = np.array([loop.centre_mm for loop in loops])
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    correlation = 0.5 * np.exp(-distance / 120)
    np.fill_diagonal(correlation, 1)
    phase = np.exp(1j * rng.uniform(0, 2 * np.pi, len(loops)))  # D C D* stays positive definite whatever the phases
    level = rng.uniform(0.8, 1.2, len(loops))
    scale = phase * level / np.sqrt((level**2).mean())
    return scale[:, None] * correlation * scale.conj()[None]


def draw_noise(rng: np.random.Generator, covariance: Array, n: int, sigma: float) -> Array:
    """Return complex64 (coil, n) noise: sigma² × `covariance` for each of the real and the imaginary part."""
    white = rng.standard_normal((len(covariance), n, 2)) @ np.array([1, 1j])
    return (sigma * (np.linalg.cholesky(covariance) @ white)).astype(np.complex64)
