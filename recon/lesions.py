"""Urgent findings for the simulated head: what is put where, and the truth about it in numbers.

A lesion is made of parts, each a tissue inside a shape given by a formula, and may push the brain aside. Places and
sizes are those of common disease (Caplan's Stroke: middle cerebral artery wedges, lacunes in the deep nuclei; Qureshi
et al., N Engl J Med 344:1450, 2001: deep and lobar bleeding), drawn by a seed. They are simulated: a figure measured on
them says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from recon.contrast import LESION_TISSUES, Tissue
from recon.errors import ScanError
from recon.head import FULL, STORED_TISSUES, Head, bump, sample, tissue_fractions, to_atlas

FINDINGS = ("none", "infarct", "bleed", "mass")
BLOOD_STAGES = ("hyperacute", "acute", "early subacute", "late subacute")
WINDOW_MM = 14.0  # the brain moves freely this far from the skull
GRID_MM = 4.0


class Shape(Protocol):
    """A closed surface given by a formula."""

    @property
    def centre_mm(self) -> tuple[float, float, float]:
        """A point that all of it lies within `reach_mm` of, LPS."""

    @property
    def reach_mm(self) -> float:
        """How far from `centre_mm` it can extend."""

    def depth(self, points: Array) -> Array:
        """Return how deep inside the shape points (3, …) lie, mm, negative outside; a fair guess is enough."""


@dataclass(frozen=True, eq=False)
class Ripple:
    """A surface's roughness: waves (wave, 3) in rad/mm with phases, of `height_mm` together."""

    waves: Array
    phases: Array
    height_mm: float

    def at(self, points: Array) -> Array:
        """Return the roughness in mm at points (3, n)."""
        angle = np.tensordot(self.waves, points, 1) + self.phases[:, None]
        return np.float32(self.height_mm / np.sqrt(len(self.waves))) * np.cos(angle).sum(axis=0)


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """A rough ellipsoid; `axes` float32 (3, 3) maps an offset in mm to the unit ball."""

    centre_mm: tuple[float, float, float]
    reach_mm: float
    axes: Array
    radius_mm: float
    ripple: Ripple

    def depth(self, points: Array) -> Array:
        offset = points - np.asarray(self.centre_mm, np.float32)[:, None]
        radius = np.linalg.norm(np.tensordot(self.axes, offset, 1), axis=0)
        return (1 - radius) * np.float32(self.radius_mm) + self.ripple.at(points)


@dataclass(frozen=True, eq=False)
class Wedge:
    """What one artery feeds: a rough cone from `centre_mm` along `direction` to the surface of the brain."""

    centre_mm: tuple[float, float, float]
    reach_mm: float
    direction: tuple[float, float, float]
    half_angle: float
    start_mm: float
    ripple: Ripple

    def depth(self, points: Array) -> Array:
        offset = points - np.asarray(self.centre_mm, np.float32)[:, None]
        radius = np.linalg.norm(offset, axis=0)
        along = np.tensordot(np.asarray(self.direction, np.float32), offset, 1)
        angle = np.arccos(np.clip(along / np.maximum(radius, 1e-3), -1, 1))
        side = radius * np.sin(np.clip(np.float32(self.half_angle) - angle, -1.5, 1.5))
        ends = np.minimum(radius - np.float32(self.start_mm), np.float32(self.reach_mm) - radius)
        return np.minimum(side, ends) + self.ripple.at(points)


@dataclass(frozen=True, eq=False)
class Part:
    """One tissue of a lesion, laid over the head's and earlier parts'.

    edge_mm: the width over which it fades. hosts: how much of each healthy tissue it takes the place of.
    is_core: True where it belongs to the finding itself, False for what surrounds it (oedema).
    """

    tissue: Tissue
    shape: Shape
    edge_mm: float
    hosts: dict[str, float]
    is_core: bool = True

    def coverage(self, points: Array, fractions: Array) -> Array:
        """Return float32 (n,), 0 to 1, at points (3, n) whose healthy tissue is `fractions` (tissue, n)."""
        out = np.zeros(points.shape[1], np.float32)
        centre = np.asarray(self.shape.centre_mm, np.float32)
        near = (np.abs(points - centre[:, None]) < self.shape.reach_mm * 1.3 + 2 * self.edge_mm).all(axis=0)
        if near.any():
            step = np.clip(0.5 + self.shape.depth(points[:, near]) / self.edge_mm, 0, 1)
            host = sum(share * fractions[STORED_TISSUES.index(name)][near] for name, share in self.hosts.items())
            out[near] = step * step * (3 - 2 * step) * np.minimum(host, 1)
        return out


@dataclass(frozen=True, eq=False)
class Displacement:
    """The brain pushed along x: shift_mm at `centre_mm`, fading over width_mm and towards the skull (`window`)."""

    shift_mm: float
    centre_mm: tuple[float, float, float]
    width_mm: float
    window: Array
    origin_mm: tuple[float, float, float]

    def at(self, points: Array) -> Array:
        """Return the displacement in x, mm, of the tissue now at points (3, …)."""
        push = bump(points, np.asarray(self.centre_mm), self.width_mm)
        return np.float32(self.shift_mm) * push * sample(self.window, points, self.origin_mm, GRID_MM)


@dataclass(frozen=True, eq=False)
class Lesion:
    """A finding in one head: its parts in the order they are laid, and what it pushes aside."""

    finding: str
    label: str
    parts: tuple[Part, ...]
    displacement: Displacement | None = None
    bloom_hz: float = 0.0  # how much faster signal dephases at the finding's surface (1/T2', gradient echo)

    def core(self) -> Part:
        """Return the outermost part of the finding itself."""
        return next(part for part in self.parts if part.is_core)


@dataclass(frozen=True)
class LesionTruth:
    """The numbers behind a lesion: ml, LPS mm, and the largest displacement of the midline in mm."""

    volume_ml: float
    oedema_ml: float
    centre_mm: tuple[float, float, float]
    midline_shift_mm: float


def healthy_fractions(head: Head, lesion: Lesion | None, points: Array) -> tuple[Array, Array]:
    """Return tissue fractions (tissue, n) at points (3, n) LPS mm, displaced by a lesion, and their atlas points."""
    moved = points
    if lesion is not None and lesion.displacement is not None:
        moved = points.copy()
        moved[0] -= lesion.displacement.at(points)
    origin = to_atlas(head, moved)
    return tissue_fractions(head, origin), origin


def core_fraction(lesion: Lesion, points: Array, fractions: Array) -> Array:
    """Return float32 (n,): how much of points (3, n) is the finding itself (without oedema)."""
    out = np.zeros(points.shape[1], np.float32)
    for part in lesion.parts:
        cover = part.coverage(points, fractions)
        out = out * (1 - cover) + cover if part.is_core else out * (1 - cover)
    return out


def measure(head: Head, lesion: Lesion) -> LesionTruth:
    """Return the truth about a lesion, integrated over a grid of 1 mm around it.

    Raises ScanError if nothing of it lies in the brain.
    """
    grid = _grid_around(lesion)
    fractions, _ = healthy_fractions(head, lesion, grid)
    core = core_fraction(lesion, grid, fractions)
    volume = float(core.sum(dtype=np.float64))
    if volume <= 0:
        raise ScanError(f"a {lesion.finding} of 0 ml: no part of it lies in the brain; choose another seed")
    around = np.zeros_like(core)
    for part in lesion.parts:
        if not part.is_core:
            around = np.maximum(around, part.coverage(grid, fractions))
    oedema = float((around * (1 - core)).sum(dtype=np.float64))
    x, y, z = (float(value) for value in (grid.astype(np.float64) * core).sum(axis=1) / volume)
    return LesionTruth(volume / 1000, oedema / 1000, (x, y, z), midline_shift(lesion))


def _grid_around(lesion: Lesion) -> Array:
    """Return float32 (3, n): the points of a 1 mm grid in a box that holds all parts, found on a coarse one first."""
    reach = max(part.shape.reach_mm * 1.3 + 2 * part.edge_mm for part in lesion.parts)
    steps = np.arange(-reach, reach + GRID_MM, GRID_MM, dtype=np.float32)
    coarse = np.stack(np.meshgrid(steps, steps, steps, indexing="ij")).reshape(3, -1)
    coarse += np.asarray(lesion.core().shape.centre_mm, np.float32)[:, None]
    near = np.zeros(coarse.shape[1], bool)
    for part in lesion.parts:
        near |= part.shape.depth(coarse) > -part.edge_mm - 2 * GRID_MM
    low, high = coarse[:, near].min(axis=1), coarse[:, near].max(axis=1)
    axes = [np.arange(a, b + 1, dtype=np.float32) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)


def midline_shift(lesion: Lesion) -> float:
    """Return how far the mid-sagittal plane is pushed at most, mm: the fixed point of p = m + u(p)."""
    if lesion.displacement is None:
        return 0.0
    y, z = np.meshgrid(np.arange(-70, 71, 2, dtype=np.float32), np.arange(-30, 61, 2, dtype=np.float32))
    points = np.stack([np.zeros_like(y), y, z])
    for _ in range(30):
        points[0] = lesion.displacement.at(points)
    return float(np.abs(points[0]).max())


def place_lesion(head: Head, finding: str, seed: int) -> Lesion | None:
    """Return a lesion of one of FINDINGS in `head`, or None for "none"; the seed draws its kind, place, size and side.

    Raises ScanError for a finding that is not one of them.
    """
    rng = np.random.default_rng([seed, 2])
    side = float(rng.choice([-1.0, 1.0]))
    if finding == "none":
        return None
    if finding == "infarct":
        return _infarct(rng, side)
    if finding == "bleed":
        return _bleed(head, rng, side)
    if finding == "mass":
        return _mass(head, rng, side)
    raise ScanError(f"no finding called {finding!r}; one of {', '.join(FINDINGS)} is right")


def _ripple(rng: np.random.Generator, height_mm: float, wavelength_mm: float) -> Ripple:
    waves = rng.normal(0, 1, (8, 3))
    waves *= (2 * np.pi / (wavelength_mm * rng.uniform(0.7, 1.6, 8)) / np.linalg.norm(waves, axis=1))[:, None]
    return Ripple(waves.astype(np.float32), rng.uniform(0, 2 * np.pi, 8).astype(np.float32), height_mm)


def _ellipsoid(
    rng: np.random.Generator,
    centre: Array,
    radius_mm: float,
    rough: float,
    stretch: tuple[float, float, float] = (1, 1, 1),
) -> Ellipsoid:
    turn, _ = np.linalg.qr(np.eye(3) + 0.3 * rng.normal(0, 1, (3, 3)))
    semi = radius_mm * np.asarray(stretch) * rng.uniform(0.85, 1.15, 3)
    axes = (np.diag(1 / semi) @ turn.T).astype(np.float32)
    x, y, z = (float(value) for value in centre)
    return Ellipsoid(
        (x, y, z), float(semi.max()), axes, float(semi.mean()), _ripple(rng, rough * radius_mm, 1.3 * radius_mm)
    )


def _infarct(rng: np.random.Generator, side: float) -> Lesion:
    tissue = LESION_TISSUES["acute infarct"]
    hosts = {"gm": 1.0, "wm": 0.95}
    kind = rng.choice(["territorial", "branch", "lacunar"], p=[0.45, 0.3, 0.25])
    if kind == "lacunar":
        place = rng.permutation([(13, 18, 9), (26, 0, 3), (23, 12, 26), (5, 26, -33)])[0]
        centre = place * (side, 1, 1) + rng.normal(0, 1.5, 3)
        shape: Shape = _ellipsoid(rng, centre, float(rng.uniform(4.5, 8)), 0.12, (1, 1.25, 1))
        return Lesion("infarct", "lacunar infarct", (Part(tissue, shape, 2.0, hosts),))
    wide = kind == "territorial"
    direction = np.array([side, rng.uniform(-0.6, 0.8), rng.uniform(-0.15, 0.6)])
    direction /= np.linalg.norm(direction)
    apex = np.array([22 * side, 2 + rng.normal(0, 4), 10 + rng.normal(0, 4)])
    angle = float(np.radians(rng.uniform(26, 40) if wide else rng.uniform(11, 18)))
    start = float(rng.uniform(4, 10) if wide else rng.uniform(20, 28))
    x, y, z = (float(value) for value in direction)
    shape = Wedge(
        (float(apex[0]), float(apex[1]), float(apex[2])), 75.0, (x, y, z), angle, start, _ripple(rng, 3.0, 18)
    )
    label = "middle cerebral artery infarct" if wide else "branch infarct"
    return Lesion("infarct", label, (Part(tissue, shape, 4.0, hosts),))


def _bleed(head: Head, rng: np.random.Generator, side: float) -> Lesion:
    stage = str(rng.choice(BLOOD_STAGES, p=[0.15, 0.45, 0.25, 0.15]))
    place, small, large = (((28, 2, 4), 10, 18), ((15, 18, 9), 7, 12), ((36, 42, 26), 10, 20), ((34, -38, 18), 10, 20))[
        rng.integers(4)
    ]
    radius = float(rng.uniform(small, large))
    centre = np.array(place) * (side, 1, 1) + rng.normal(0, 3, 3)
    anywhere = {"gm": 1.0, "wm": 1.0, "fluid": 1.0}
    clot = _ellipsoid(rng, centre, radius, 0.10, (1, 1.35, 1.1))
    inner = Ellipsoid(clot.centre_mm, clot.reach_mm, clot.axes, clot.radius_mm, clot.ripple)
    rim = LESION_TISSUES["haemosiderin" if stage == "late subacute" else "acute blood"]
    oedema = _ellipsoid(rng, centre, radius + float(rng.uniform(3, 7)), 0.15, (1, 1.3, 1.1))
    parts = (
        Part(LESION_TISSUES["vasogenic oedema"], oedema, 6.0, {"gm": 0.5, "wm": 0.8}, is_core=False),
        Part(rim, clot, 1.5, anywhere),
        Part(LESION_TISSUES[f"{stage} blood"], _shrunk(inner, 2.5), 2.0, anywhere),
    )
    push = _displacement(head, centre, side, 0.3 * radius - 1.5) if radius > 12 else None
    return Lesion("bleed", f"{stage} haematoma", parts, push, bloom_hz=120.0)


def _mass(head: Head, rng: np.random.Generator, side: float) -> Lesion:
    place = rng.permutation([(30, -34, 24), (38, 8, 6), (33, 44, 28), (28, -20, 32)])[0]
    centre = place * (side, 1, 1) + rng.normal(0, 4, 3)
    radius = float(rng.uniform(14, 22))
    tumour = _ellipsoid(rng, centre, radius, 0.12)
    necrosis = _ellipsoid(rng, centre + rng.normal(0, 2, 3), radius * float(rng.uniform(0.4, 0.65)), 0.18)
    halo = _ellipsoid(rng, centre, radius + float(rng.uniform(10, 16)), 0.22, (1, 1.25, 1))
    anywhere = {"gm": 1.0, "wm": 1.0, "fluid": 1.0}
    parts = (
        Part(LESION_TISSUES["vasogenic oedema"], halo, 7.0, {"gm": 0.25, "wm": 0.9}, is_core=False),
        Part(LESION_TISSUES["solid tumour"], tumour, 3.0, anywhere),
        Part(LESION_TISSUES["necrosis"], necrosis, 3.0, anywhere),
    )
    return Lesion(
        "mass", "intra-axial mass with oedema", parts, _displacement(head, centre, side, float(rng.uniform(6, 13)))
    )


def _shrunk(shape: Ellipsoid, by_mm: float) -> Ellipsoid:
    smaller = max(shape.radius_mm - by_mm, 1.0)
    axes = shape.axes * np.float32(shape.radius_mm / smaller)
    return Ellipsoid(shape.centre_mm, shape.reach_mm, axes, smaller, shape.ripple)


def _displacement(head: Head, centre: Array, side: float, shift_mm: float) -> Displacement:
    """Push away from the lesion's side, most halfway between lesion and midline, nothing at the skull.

    The width keeps the mapping one to one: the gradient stays below shift / width × exp(-1/2) < 0.4.
    """
    anatomy = head.anatomy
    step = round(GRID_MM / anatomy.spacing_mm)
    inside = anatomy.fractions[: STORED_TISSUES.index("fluid") + 1, ::step, ::step, ::step].sum(axis=0, dtype=np.int32)
    brain = ndimage.binary_opening(inside > FULL // 2, iterations=2)  # drops the eyes
    depth = ndimage.distance_transform_edt(brain, sampling=GRID_MM)
    ease = np.clip(depth / WINDOW_MM, 0, 1)
    window = ndimage.gaussian_filter(ease * ease * (3 - 2 * ease), 1.0).astype(np.float32)
    middle = (float(centre[0]) * 0.4, float(centre[1]) * 0.7, float(centre[2]) * 0.8 + 2)
    return Displacement(-side * shift_mm, middle, 26.0, window, anatomy.origin_mm)


def lesion_signal(
    value: Array, lesion: Lesion, points: Array, fractions: Array, tissue_signal: dict[Tissue, float]
) -> Array:
    """Return signal float32 (n,) with the lesion's parts laid over the healthy head's `value`."""
    out = value
    for part in lesion.parts:
        cover = part.coverage(points, fractions)
        out = out * (1 - cover) + np.float32(tissue_signal[part.tissue]) * cover
    return out


def bloom(lesion: Lesion, points: Array) -> Array:
    """Return the extra dephasing rate 1/T2' in 1/s around blood, float32 (n,): it falls off over 2.5 mm outside."""
    rate = np.zeros(points.shape[1], np.float32)
    if lesion.bloom_hz > 0:
        shape = lesion.core().shape
        centre = np.asarray(shape.centre_mm, np.float32)
        near = (np.abs(points - centre[:, None]) < shape.reach_mm * 1.3 + 12).all(axis=0)
        outside = np.maximum(-shape.depth(points[:, near]), 0)
        rate[near] = np.float32(lesion.bloom_hz) * np.exp(-outside / np.float32(2.5))
    return rate
