"""How large the lateral ventricles are: fluid by its brightness, told from cisterns and sulci by where it lies.

An average head says which fluid is whose. It is laid over the planes by height, tilt, place and width of the brain, so
that brain fluid meets fluid. Then the volume is the sum of each voxel's share of fluid, which thick slices do not bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy import ndimage

from recon.arrays import Array, closed
from recon.errors import ShapeError

FLUID_IS = {"t1": "dark", "t1ce": "dark", "t2": "bright", "flair": "dark", "dwi": "dark"}  # beside white matter
COARSE = 4  # mm, of the search
SPARSE = 3  # of so many points one is looked at first
DEEP_MM = 10.0  # from the brain's surface: sulci are left out of the search
HORN_SHARE = 0.8  # of fluid in a voxel of the frontal horns
CORE_MM = 4.0  # fluid this near to the average ventricle is surely part of it
WIDTH_MM = 134.0  # of the average brain
FRONT_MM = 2.0  # LPS y of the average head: frontal horns lie before it
MIN_CONTRAST = 0.25  # between fluid and white matter, of the brain's median
MIN_MATCH = 0.35  # correlation of fluid with the average head's
MIN_PLANES = 8


@dataclass(frozen=True, eq=False)
class FluidAtlas:
    """Fluid of an average head. fluid: uint8 (z, y, x), its share, 255 for all. nearer: int8 (z, y, x), mm by which
    the lateral ventricles are nearer than other fluid. away: uint8 (z, y, x), mm from the lateral ventricles.
    origin_mm: LPS of voxel 0 as (x, y, z)."""

    fluid: Array
    nearer: Array
    away: Array
    origin_mm: tuple[float, float, float]
    spacing_mm: float

    def __post_init__(self) -> None:
        for name in ("fluid", "nearer", "away"):
            value = getattr(self, name)
            if value.shape != self.fluid.shape or value.ndim != 3:
                raise ShapeError(name, value.shape, self.fluid.shape)
            object.__setattr__(self, name, closed(value))


@dataclass(frozen=True, eq=False)
class Ventricles:
    """The lateral ventricles as found. share: float32 (plane, y, x), 0 to 1. volume_ml. index: width of the frontal
    horns over that of the brain. match: correlation with the average head's fluid."""

    share: Array
    volume_ml: float
    index: float
    match: float


@dataclass(frozen=True)
class _Place:
    """How planes lie in the average head: direction of their order, height (mm), tilt (radians), y (mm), scale."""

    direction: int
    height_mm: float
    tilt: float
    y_mm: float
    scale: float

    def points(self, plane: Array, y_mm: Array, x_mm: Array) -> tuple[Array, Array, Array]:
        """Return atlas x, y, z of points given by their distance from the middle plane, row and column (mm)."""
        along = self.direction * plane
        c, s = np.cos(self.tilt), np.sin(self.tilt)
        y = c * y_mm - s * along
        z = s * y_mm + c * along
        return x_mm * self.scale, y * self.scale + self.y_mm, z * self.scale + self.height_mm


def find_ventricles(
    images: Array, brain: Array, distance_mm: float, contrast: str, atlas: FluidAtlas
) -> Ventricles | str:
    """Return the lateral ventricles in axial planes of 1 mm, or in words why they cannot be measured.

    images: float32 (plane, y, x), the brain's median 1. brain: bool, the same shape. distance_mm: between planes.
    """
    if contrast not in FLUID_IS:
        return f"fluid does not stand out enough on {contrast}"
    area = brain.sum(axis=(1, 2))
    seen = np.flatnonzero(area > 3000)
    if (len(seen) < MIN_PLANES and distance_mm * len(seen) < 60) or not len(seen):
        return f"{len(seen)} slices with brain do not hold the ventricles; 60 mm of them are needed"
    images, brain = images[seen[0] : seen[-1] + 1], brain[seen[0] : seen[-1] + 1]
    is_bright = FLUID_IS[contrast] == "bright"
    fluid = _rough_share(images, brain, is_bright)
    place, match = _lay_over(fluid, brain, distance_mm, atlas)
    if match < MIN_MATCH:
        return f"the brain's fluid is not where it is in other heads (match {match:.2f}, {MIN_MATCH} is needed)"
    nearer, away, front = _laid(place, images.shape, distance_mm, atlas)
    found = _share(images, brain, nearer, away, is_bright)
    if isinstance(found, str):
        return found
    index = _index(found, front, away, brain)
    whole = np.zeros((seen[0], *found.shape[1:]), np.float32)
    share = np.concatenate([whole, found])
    return Ventricles(share, float(found.sum(dtype=np.float64)) * distance_mm / 1000, index, match)


def _rough_share(images: Array, brain: Array, is_bright: bool) -> Array:
    """Return float32 (plane, y, x): the share of fluid between the brain's median, 1, and its extreme."""
    values = images[brain]
    extreme = float(np.percentile(values, 99.5 if is_bright else 0.5))
    span = extreme - 1 if abs(extreme - 1) > 0.1 else (0.1 if is_bright else -0.1)
    return np.clip((images - 1) / span, 0, 1) * brain


def _lay_over(fluid: Array, brain: Array, distance_mm: float, atlas: FluidAtlas) -> tuple[_Place, float]:
    """Return the place at which the planes' fluid and the average head's correlate best, and how well."""
    n_planes, n_y, n_x = (fluid.shape[0], fluid.shape[1] // COARSE, fluid.shape[2] // COARSE)
    small = fluid[:, : n_y * COARSE, : n_x * COARSE].reshape(n_planes, n_y, COARSE, n_x, COARSE).mean(axis=(2, 4))
    inside = brain[:, COARSE // 2 :: COARSE, COARSE // 2 :: COARSE][:, :n_y, :n_x]
    deep = np.stack([ndimage.distance_transform_edt(np.pad(each, 1))[1:-1, 1:-1] for each in inside]) * COARSE > DEEP_MM
    plane, row, column = np.nonzero(deep)
    width = float(np.median(np.sort(inside.any(axis=1).sum(axis=1))[-5:])) * COARSE
    scale = WIDTH_MM / max(width, 60.0)
    away = (plane - (n_planes - 1) / 2) * distance_mm
    y, x = (row - (n_y - 1) / 2) * COARSE, (column - (n_x - 1) / 2) * COARSE
    values = small[plane, row, column]
    values = (values - values.mean()) / max(float(values.std()), 1e-6)
    blurred = ndimage.gaussian_filter(atlas.fluid.astype(np.float32), 1.5 / atlas.spacing_mm * 1.5)

    def match(place: _Place) -> float:
        seen = _look_up(blurred, place.points(away, y, x), atlas)
        spread = float(seen.std())
        return float((values * (seen - seen.mean())).mean() / spread) if spread > 1e-3 else -1.0

    grid = product((1, -1), np.arange(-60.0, 61.0, 8.0), np.radians([-10, 0, 10, 20]), (0.0, 10.0, 20.0))
    every, all_values = (away, y, x), values
    values, (away, y, x) = values[::SPARSE], (each[::SPARSE] for each in every)
    best = max((_Place(d, z, t, y0, scale) for d, z, t, y0 in grid), key=match)
    values, (away, y, x) = all_values, every
    for step in (4.0, 2.0, 1.0):
        steps = np.array([-step, 0, step])
        near = product(steps, np.radians(1.2 * steps), steps, 1 + 0.015 * steps)
        best = max((_beside(best, *each) for each in near), key=match)
    return best, match(best)


def _beside(place: _Place, height_mm: float, tilt: float, y_mm: float, scale: float) -> _Place:
    return replace(
        place,
        height_mm=place.height_mm + height_mm,
        tilt=place.tilt + tilt,
        y_mm=place.y_mm + y_mm,
        scale=place.scale * scale,
    )


def _look_up(volume: Array, points: tuple[Array, Array, Array], atlas: FluidAtlas) -> Array:
    index = [
        np.rint((at - origin) / atlas.spacing_mm).astype(int)
        for at, origin in zip(points[::-1], atlas.origin_mm[::-1], strict=True)
    ]
    inside = np.ones(index[0].shape, bool)
    for each, n in zip(index, volume.shape, strict=True):
        inside &= (each >= 0) & (each < n)
    clipped = tuple(np.clip(each, 0, n - 1) for each, n in zip(index, volume.shape, strict=True))
    return np.where(inside, volume[clipped], 0)


def _laid(place: _Place, shape: tuple[int, ...], distance_mm: float, atlas: FluidAtlas) -> tuple[Array, Array, Array]:
    """Return the atlas' `nearer` and `away`, and whether a voxel lies in front, on the planes' grid."""
    plane = (np.arange(shape[0]) - (shape[0] - 1) / 2)[:, None, None] * distance_mm
    y, x = (np.arange(n) - (n - 1) / 2 for n in shape[1:])
    points = place.points(plane, y[None, :, None], x[None, None, :])
    points = tuple(np.broadcast_to(each, shape) for each in points)  # type: ignore[assignment]
    nearer = _look_up(atlas.nearer, points, atlas)
    away = np.where(nearer == 0, 255, _look_up(atlas.away, points, atlas))
    return nearer, away, points[1] < FRONT_MM


def _share(images: Array, brain: Array, nearer: Array, away: Array, is_bright: bool) -> Array | str:
    """Return float32 (plane, y, x), each voxel's share of ventricle, or why there is none."""
    core = (away <= CORE_MM) & brain
    ring = (away > 6) & (away <= 14) & brain
    if core.sum() < 200 or ring.sum() < 200:
        return "the ventricles lie outside of the slices"
    tissue = float(np.median(images[ring]))
    fluid = float(np.percentile(images[core], 95 if is_bright else 5))
    if (fluid - tissue) * (1 if is_bright else -1) < MIN_CONTRAST:
        return f"fluid does not stand out: {fluid:.2f} beside {tissue:.2f} of the tissue around"
    share = np.clip((images - tissue) / (fluid - tissue), 0, 1.05).astype(np.float32)
    sure = (share > 0.5) & (nearer > 0) & brain
    parts, n = ndimage.label(sure, np.ones((3, 3, 3)))
    touching = np.unique(parts[core & sure])
    kept = np.isin(parts, touching[touching > 0])
    if not n or not kept.any():
        return "no fluid was found where the ventricles are"
    grown = ndimage.binary_dilation(kept, np.ones((1, 3, 3), bool)) & (nearer > 0) & brain
    return np.where(grown, share, 0)


def _index(share: Array, front: Array, away: Array, brain: Array) -> float:
    """Return the greatest width of the frontal horns in a plane over the greatest width of the brain in any.

    Horns are nearly all fluid, and touch the average head's ventricles in their plane: oedema beside them does not
    widen them.
    """
    horns = (share > HORN_SHARE) & front
    widths = [0]
    for each, near in zip(horns, away <= CORE_MM, strict=True):
        parts, _ = ndimage.label(each, np.ones((3, 3)))
        columns = np.flatnonzero(np.isin(parts, np.unique(parts[each & near])).sum(axis=0, where=each) >= 2)
        widths.append(int(np.ptp(columns)) + 1 if columns.size else 0)
    spans = [int(np.ptp(np.flatnonzero(row))) + 1 if row.any() else 0 for row in brain.any(axis=1)]
    return max(widths) / max(*spans, 1)
