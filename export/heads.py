"""Simulated heads drawn straight to images, every contrast of one head at once, with the truth that measurements need.

No coils, no k-space: what is measured on an image does not depend on how it was sampled, and a head costs seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from export.anatomy import ASSET
from recon.arrays import Array
from recon.contrast import CONTRASTS, LESION_TISSUES, TISSUES, Contrast, Tissue, signal
from recon.contrast import Sequence as Kind
from recon.head import FIELD_SPACING_MM, FULL, STORED_TISSUES, Anatomy, Head, bump, sample, tissue_fractions, to_atlas
from recon.lesions import Displacement, Lesion, bloom, core_fraction, lesion_signal, place_lesion
from recon.scan import Geometry
from triage.ventricles import FRONT_MM, FluidAtlas

FLUID = STORED_TISSUES.index("fluid")
SUBSLICES = 2
ATLAS_STEP = 2
FAR_MM = 14.0  # the midline is looked for this far from the middle


@dataclass(frozen=True)
class Layout:
    """How a drawn head is cut: axial planes, tilted about the ear-to-ear axis and turned in the plane.

    sizes in mm; tilt and turn in degrees; shift of the stack along its normal.
    """

    n_slices: int = 22
    distance_mm: float = 6.0
    thickness_mm: float = 5.0
    step_mm: float = 1.4
    tilt_deg: float = 0.0
    turn_deg: float = 0.0
    shift_mm: float = 0.0
    matrix: tuple[int, int] = (168, 144)

    def geometry(self) -> Geometry:
        """Return where the voxels lie."""
        tilt, turn = np.radians(self.tilt_deg), np.radians(self.turn_deg)
        row = np.array([np.cos(turn), np.sin(turn), 0.0])
        col = np.array([-np.sin(turn) * np.cos(tilt), np.cos(turn) * np.cos(tilt), np.sin(tilt)])
        normal = np.cross(row, col)
        along = (np.arange(self.n_slices) - (self.n_slices - 1) / 2) * self.distance_mm + self.shift_mm
        centres = np.array([0.0, 14.0, 8.0]) + along[:, None] * normal
        spacing = (self.distance_mm, self.step_mm, self.step_mm)
        return Geometry.from_centres(centres, row.tolist(), col.tolist(), self.matrix, spacing, self.thickness_mm)


@dataclass(frozen=True)
class Swelling:
    """Ventricles of another size: the head around `centre_mm` is magnified by 1 / (1 - share), fading over width_mm."""

    share: float
    centre_mm: tuple[float, float, float] = (0.0, 8.0, 14.0)
    width_mm: float = 34.0

    def origin(self, points: Array) -> Array:
        """Return where the tissue at points (3, …) comes from in the head without the swelling."""
        weight = np.float32(self.share) * bump(points, np.asarray(self.centre_mm), self.width_mm)
        centre = np.asarray(self.centre_mm, np.float32).reshape(3, *[1] * (points.ndim - 1))
        return points - (points - centre) * weight


@dataclass(frozen=True, eq=False)
class Drawn:
    """One head: magnitude images float32 (slice, y, x) by contrast, without noise, and the truth.

    ventricles: float32 (slice, y, x), the share of each voxel that is lateral ventricle. core: the same of the lesion.
    volume_ml: of the lateral ventricles. index: greatest width of their frontal horns over that of the inner skull.
    shift_mm: signed, to the patient's left positive: how far the middle of the brain lies off its own rim at most.
    """

    images: dict[str, Array]
    geometry: Geometry
    ventricles: Array
    core: Array
    volume_ml: float
    index: float
    shift_mm: float


def load_anatomy() -> Anatomy:
    """Return the head that ships with the package."""
    with np.load(ASSET, allow_pickle=False) as asset:
        half, levels, spacing = asset["fractions"], int(asset["levels"]), float(asset["spacing_mm"])
        x, y, z = (float(v) for v in asset["origin_mm"])
    whole = np.concatenate([half[..., :0:-1], half], axis=-1) * np.uint8(FULL // levels)
    return Anatomy(whole, (x - spacing * (half.shape[-1] - 1), y, z), spacing)


def lateral_ventricles(anatomy: Anatomy) -> Array:
    """Return uint8 (z, y, x), 255 where the average head's fluid belongs to the lateral ventricles, not cisterns."""
    fluid = anatomy.fractions[FLUID] > 60
    inside = anatomy.fractions[: FLUID + 1].astype(np.int32).sum(axis=0) > 128
    inside = ndimage.binary_fill_holes(ndimage.binary_opening(inside, iterations=3))
    deep = ndimage.distance_transform_edt(inside) * anatomy.spacing_mm > 14
    sure = (anatomy.fractions[FLUID] > 128) & deep
    parts, n = ndimage.label(sure)
    sizes = ndimage.sum_labels(sure, parts, range(1, n + 1))
    middle = np.array([np.ptp(np.flatnonzero((parts == k + 1).any(axis=(0, 1)))) for k in np.argsort(-sizes)[:3]])
    heights = [np.flatnonzero((parts == k + 1).any(axis=(1, 2))) for k in np.argsort(-sizes)[:3]]
    # of the largest parts the lateral ventricles are the one that spans both sides and least height
    best = min(range(3), key=lambda i: len(heights[i]) if middle[i] > 40 else 10_000)
    body = parts == np.argsort(-sizes)[best] + 1
    return (ndimage.binary_dilation(body, iterations=3) & fluid | body).astype(np.uint8) * 255


def draw(
    head: Head,
    ventricles: Array,
    layout: Layout,
    lesion: Lesion | None = None,
    swelling: Swelling | None = None,
    contrasts: Sequence[str] = tuple(CONTRASTS),
) -> Drawn:
    """Return the images of one head; ventricles: of `lateral_ventricles`."""
    geometry = layout.geometry()
    ny, nx = layout.matrix
    y, x = np.arange(ny) * layout.step_mm, np.arange(nx) * layout.step_mm
    row, col, normal = (np.asarray(v) for v in (geometry.row_dir, geometry.col_dir, geometry.normal))
    plane = col[:, None, None] * y[:, None] + row[:, None, None] * x
    shape = (layout.n_slices, ny, nx)
    images = {name: np.zeros(shape, np.float32) for name in contrasts}
    truth = np.zeros((4, *shape), np.float32)
    tissues = (*TISSUES.values(), *LESION_TISSUES.values())
    signals = {name: {tissue: signal(tissue, CONTRASTS[name]) for tissue in tissues} for name in contrasts}
    offsets = (np.arange(SUBSLICES) - (SUBSLICES - 1) / 2) * layout.thickness_mm / SUBSLICES
    for number in range(layout.n_slices):
        for offset in offsets:
            points = (geometry.origin_mm[number] + offset * normal)[:, None, None] + plane
            values, found = _signals(
                head, ventricles, points.reshape(3, -1).astype(np.float32), lesion, swelling, signals
            )
            for name in contrasts:
                images[name][number] += values[name].reshape(ny, nx) / SUBSLICES
            truth[:, number] += found.reshape(4, ny, nx) / SUBSLICES
    share, core, front, inside = truth
    volume = float(share.sum(dtype=np.float64)) * layout.distance_mm * layout.step_mm**2 / 1000
    horns = [_span(each.sum(axis=0) >= 2) for each in (share > 0.5) & (front > 0.5)]
    skull = max(_span(row) for each in inside > 0.5 for row in each)
    return Drawn(images, geometry, share, core, volume, max(horns) / max(skull, 1), _midline_shift(head, lesion))


def _span(is_there: Array) -> int:
    """Return from the first to the last True, in pixels."""
    places = np.flatnonzero(is_there)
    return int(np.ptp(places)) + 1 if places.size else 0


def _signals(
    head: Head,
    ventricles: Array,
    points: Array,
    lesion: Lesion | None,
    swelling: Swelling | None,
    signals: dict[str, dict[Tissue, float]],
) -> tuple[dict[str, Array], Array]:
    """Return the signal by contrast, and the truth (4, n): ventricle, lesion, in front, inside the skull; 0 to 1."""
    moved = points
    if lesion is not None and lesion.displacement is not None:
        moved = points.copy()
        moved[0] -= lesion.displacement.at(points)
    if swelling is not None:
        moved = swelling.origin(moved)
    atlas = to_atlas(head, moved)
    fractions = tissue_fractions(head, atlas)
    place = sample(ventricles, atlas, head.anatomy.origin_mm, head.anatomy.spacing_mm) > 127
    texture = sample(head.texture, atlas, head.anatomy.origin_mm, FIELD_SPACING_MM)
    inner = core_fraction(lesion, points, fractions) if lesion is not None else np.zeros(points.shape[1], np.float32)
    rate = bloom(lesion, points) if lesion is not None else None
    out = {}
    for name, of in signals.items():
        value = np.tensordot(np.array([of[TISSUES[t]] for t in STORED_TISSUES], np.float32), fractions, 1)
        if lesion is not None:
            value = lesion_signal(value, lesion, points, fractions, of)
        contrast: Contrast = CONTRASTS[name]
        if rate is not None and contrast.sequence is Kind.GRADIENT_ECHO:
            value = value * np.exp(-rate * np.float32(contrast.te_ms * 1e-3))
        out[name] = value * texture
    front = atlas[1] < FRONT_MM
    return out, np.stack([fractions[FLUID] * place, inner, front, fractions[: FLUID + 1].sum(axis=0)])


def _midline_shift(head: Head, lesion: Lesion | None) -> float:
    """Return the truth: the mid-sagittal surface, off the plane through its rim, at most, mm, signed."""
    ys, zs = np.arange(-90.0, 110.0, 2.0), np.arange(-12.0, 76.0, 4.0)
    xs = np.arange(-FAR_MM * 2, FAR_MM * 2 + 0.1, 0.5)
    z, y, x = np.meshgrid(zs, ys, xs, indexing="ij")
    points = np.stack([x, y, z]).reshape(3, -1).astype(np.float32)
    moved = points.copy()
    if lesion is not None and lesion.displacement is not None:
        moved[0] -= lesion.displacement.at(points)
    atlas = to_atlas(head, moved)
    across = atlas[0].reshape(x.shape)
    surface = xs[np.abs(across).argmin(axis=2)]
    order = np.abs(across).argmin(axis=2)[..., None]
    surface = surface - np.take_along_axis(across, order, 2)[..., 0]  # to below the grid
    brain = sum(
        sample(head.anatomy.fractions[t], atlas, head.anatomy.origin_mm, head.anatomy.spacing_mm) for t in (0, 1, FLUID)
    ).reshape(x.shape)
    inside = np.take_along_axis(brain, order, 2)[..., 0] > 127
    depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=(4.0, 2.0))[1:-1, 1:-1]
    rim = inside & (depth <= 5)
    rim[:1] = False  # the cut through the brain's lower half is no rim
    yy, zz = np.meshgrid(ys, zs)
    design = np.stack([np.ones(rim.sum()), yy[rim], zz[rim]], 1)
    fit = np.linalg.lstsq(design, surface[rim], rcond=None)[0]
    off = surface - (fit[0] + fit[1] * yy + fit[2] * zz)
    middle = inside & (depth > 20)
    return float(off[middle][np.abs(off[middle]).argmax()])


def shifted(head: Head, rng: np.random.Generator, most_mm: float) -> Lesion:
    """Return a mass in `head` that pushes the brain by anything from nothing to about `most_mm`."""
    lesion = place_lesion(head, "mass", int(rng.integers(2**31)))
    assert lesion is not None
    assert lesion.displacement is not None
    old = lesion.displacement
    side = np.sign(old.shift_mm)
    width = float(rng.uniform(26, 36))
    push = min(float(rng.uniform(0, most_mm)), 0.62 * width)  # the mapping stays one to one
    return replace(lesion, displacement=Displacement(side * push, old.centre_mm, width, old.window, old.origin_mm))


def fluid_atlas(anatomy: Anatomy) -> FluidAtlas:
    """Return where an average head's fluid lies, for `triage.ventricles`, on a grid of 2 mm."""
    ventricles = lateral_ventricles(anatomy) > 0
    fluid = anatomy.fractions[FLUID]
    other = (fluid > 110) & ~ndimage.binary_dilation(ventricles, iterations=2)
    away = ndimage.distance_transform_edt(~ventricles) * anatomy.spacing_mm
    nearer = np.clip(ndimage.distance_transform_edt(~other) * anatomy.spacing_mm - away, -60, 60)
    sparse = (slice(None, None, ATLAS_STEP),) * 3
    return FluidAtlas(
        ndimage.uniform_filter(fluid.astype(np.float32), ATLAS_STEP)[sparse].astype(np.uint8),
        nearer[sparse].astype(np.int8),
        np.clip(away, 0, 254)[sparse].astype(np.uint8),
        anatomy.origin_mm,
        ATLAS_STEP * anatomy.spacing_mm,
    )
