"""From any volume to the planes that triage networks look at: upright heads of one size, brightness and direction.

A plane is axial where the volume allows it: rows from anterior to posterior, columns from the patient's right to the
left, 1 mm, turned and shifted so that the middle of the head is the middle column. The second channel is the plane
mirrored there: the other hemisphere, against which a one-sided finding stands out. Training and run time share this.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from recon.arrays import Array, closed
from recon.errors import ShapeError
from recon.scan import Geometry

SIZE = (224, 192)  # of a plane: y, x
STEP_MM = 1.0
THIN_MM = 2.5  # closer slices are averaged into slabs, and may be turned into axial ones first
SLAB_MM = 4.0
COARSE_MM = 4.0  # where the head is looked for
HEAD_LEVEL = 0.15  # between background and bright tissue
EVEN = 5.0  # coarse pixels over which a head's brightness is evened out before its middle is looked for
UPRIGHT = 4e-5  # of the match, per squared degree: a head is rather upright than not
DEEP_MM = 12.0  # from the outside of the head: mostly brain, whether or not the skull was taken off
MIN_DEEP_MM2 = 1500.0  # less of it: no plane to look at
MAX_LEVEL = 4.0  # of the brain's median; brighter is cut
ANGLES = np.arange(-24.0, 24.1, 3.0)  # a head lies this much turned at most
BODY = np.array([(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])  # LPS directions of plane, y and x
NAMES = ("axial", "coronal", "sagittal")  # by the body axis that the slices' normal is nearest to


@dataclass(frozen=True, eq=False)
class Planes:
    """What a network is shown of a volume, and the way back.

    inputs: float32 (plane, 2, y, x): brightness over the median of the brain, 0 to MAX_LEVEL, and the same mirrored.
    is_usable: bool (plane,), False where there is hardly any head; `inputs` are 0 there.
    slice_of: int (plane,), the slice of the volume that the middle of each plane lies in; None where planes were
        made across slices.
    plane: "axial", "coronal" or "sagittal": how the planes lie. Thick slices stay as they are.
    symmetry: float32 (plane,), how alike the two halves of the head are, at most 1.
    distance_mm: between planes. is_slab: True where planes are averages of thin slices.
    """

    inputs: Array
    is_usable: Array
    slice_of: Array | None
    plane: str
    symmetry: Array
    distance_mm: float
    is_slab: bool
    _way: _Way

    def __post_init__(self) -> None:
        for name in ("inputs", "is_usable", "symmetry"):
            object.__setattr__(self, name, closed(getattr(self, name)))

    def to_planes(self, maps: Array) -> Array:
        """Return maps (slice, y, x) on the volume's grid as they lie in the planes, float32 (plane, y, x)."""
        stack = self._way.stack(maps)
        pairs = zip(stack, self._way.offsets, strict=True)
        return np.stack([ndimage.affine_transform(each, self._way.turn, o, SIZE, order=1) for each, o in pairs])

    def to_voxels(self, maps: Array) -> Array:
        """Return maps (plane, y, x) on the volume's own grid, float32 (slice, y, x), 0 outside of the planes."""
        if maps.shape != (len(self.inputs), *SIZE):
            raise ShapeError("maps", maps.shape, (len(self.inputs), *SIZE))
        return self._way.back(np.asarray(maps, np.float32))


@dataclass(frozen=True, eq=False)
class _Way:
    """How planes were made: axes of the volume in the order plane, y, x, their signs, weights of slices, turns.

    slabs: float32 (plane, slice). turn: (2, 2) and offsets: (plane, 2) take a pixel (y, x) to one of the stack.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    is_flipped: tuple[bool, ...]
    slabs: Array
    turn: Array
    offsets: Array

    def stack(self, data: Array) -> Array:
        """Return the volume's slices in the planes' order and direction, thin ones averaged."""
        turned = np.flip(data.transpose(self.order), tuple(np.flatnonzero(self.is_flipped)))
        if len(self.slabs) == len(turned) and np.array_equal(self.slabs, np.eye(len(turned))):
            return np.ascontiguousarray(turned, np.float32)
        return np.tensordot(self.slabs, turned.astype(np.float32), 1)

    def back(self, maps: Array) -> Array:
        shape = [self.shape[axis] for axis in self.order]
        inverse = np.linalg.inv(self.turn)
        out = np.empty((len(maps), *shape[1:]), np.float32)
        for number, offset in enumerate(self.offsets):
            out[number] = ndimage.affine_transform(maps[number], inverse, -inverse @ offset, shape[1:], order=1)
        if len(maps) != shape[0] or not np.array_equal(self.slabs, np.eye(shape[0])):
            out = np.tensordot((self.slabs > 0).T.astype(np.float32), out, 1)  # a slice lies in one slab
        flipped = np.flip(out, tuple(np.flatnonzero(self.is_flipped)))
        return np.ascontiguousarray(flipped.transpose(np.argsort(self.order)))


def prepare(data: Array, geometry: Geometry) -> Planes:
    """Return the planes of a volume.

    data: real (slice, y, x), magnitudes in any unit. geometry: where its voxels lie.

    Thin slices (below THIN_MM) are regrouped into axial slabs of about SLAB_MM whichever way they were acquired; thick
    ones are looked at as they are, since nothing lies between them: `plane` says how they lie, and a network that was
    trained on axial ones should not be asked about others. Where the orientation is not known the slices are taken for
    axial ones the right way round.
    Raises ShapeError where data and geometry are not of one volume.
    """
    if data.ndim != 3 or len(data) != geometry.n_slices or 0 in data.shape:
        raise ShapeError("volume", data.shape, (geometry.n_slices, "y", "x"))
    magnitude = np.nan_to_num(np.abs(data).astype(np.float32, copy=False))
    order, is_flipped, plane = _axes(geometry)
    spacing = [geometry.spacing_mm[axis] for axis in order]
    slabs, distance = _slabs(data.shape[order[0]], spacing[0])
    way = _Way(data.shape, order, is_flipped, slabs, np.eye(2), np.zeros((len(slabs), 2)))
    stack = way.stack(magnitude)
    step = np.array(spacing[1:])
    coarse, head = _find_heads(stack, step)
    angle, middles, symmetry = _find_middles(coarse, head)
    rotation = _rotation(angle)
    turn = (rotation * STEP_MM) / step[:, None]
    centre = (np.array(SIZE) - 1) / 2
    offsets = middles / step - turn @ centre
    level, is_usable = _levels(coarse, head)
    inputs = np.zeros((len(stack), 2, *SIZE), np.float32)
    blur = [0.45 * float(np.sqrt(max((STEP_MM / each) ** 2 - 1, 0))) for each in step]
    for number in np.flatnonzero(is_usable):
        image = ndimage.gaussian_filter(stack[number], blur) if max(blur) > 0.1 else stack[number]
        seen = ndimage.affine_transform(image, turn, offsets[number], SIZE, order=1)
        inputs[number, 0] = np.clip(seen / level[number], 0, MAX_LEVEL)
    inputs[:, 1] = inputs[:, 0, :, ::-1]
    is_slab = len(slabs) != data.shape[order[0]]
    slice_of = None
    if order[0] == 0:
        slice_of = np.round(slabs @ np.arange(len(data))).astype(int)
        slice_of = len(data) - 1 - slice_of if is_flipped[0] else slice_of
    final = _Way(data.shape, order, is_flipped, slabs, turn, offsets)
    return Planes(inputs, is_usable, slice_of, plane, symmetry, distance, is_slab, final)


def _axes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[bool, ...], str]:
    """Return the volume's axes in the order plane, y, x, which of them run the other way, and how the planes lie."""
    if not geometry.is_known:
        return (0, 1, 2), (False, False, False), NAMES[0]
    steps = geometry.affine()[:3, 2]
    normal = steps / max(float(np.linalg.norm(steps)), 1e-9)
    directions = np.stack([normal, geometry.col_dir, geometry.row_dir])  # of the axes slice, y, x
    along = directions @ BODY.T  # (axis of the volume, axis of the body)
    is_thin = geometry.n_slices > 1 and geometry.spacing_mm[0] < THIN_MM
    if is_thin:
        order = max(
            itertools.permutations(range(3)), key=lambda p: sum(abs(along[axis, i]) for i, axis in enumerate(p))
        )
        flips = tuple(bool(along[axis, i] < 0) for i, axis in enumerate(order))
        return tuple(order), flips, NAMES[0]
    lies = int(np.argmax(np.abs(along[0])))
    wanted = {0: BODY[[1, 2]], 1: np.array([(0.0, 0.0, -1.0), BODY[2]]), 2: np.array([(0.0, 0.0, -1.0), BODY[1]])}[lies]
    within = directions[1:] @ wanted.T
    straight = abs(within[0, 0]) + abs(within[1, 1]) >= abs(within[0, 1]) + abs(within[1, 0])
    order = (0, 1, 2) if straight else (0, 2, 1)
    flips = (False, *(bool(within[axis - 1, i] < 0) for i, axis in enumerate(order[1:])))
    return order, flips, NAMES[lies]


def _slabs(n_slices: int, spacing_mm: float) -> tuple[Array, float]:
    """Return the weights (plane, slice) that average thin slices, and the planes' distance in mm."""
    each = 1 if n_slices == 1 or spacing_mm >= THIN_MM else max(1, round(SLAB_MM / spacing_mm))
    n_planes = -(-n_slices // each)
    weights = np.zeros((n_planes, n_slices), np.float32)
    weights[np.arange(n_slices) // each, np.arange(n_slices)] = 1
    return weights / weights.sum(axis=1, keepdims=True), each * spacing_mm


def _find_heads(stack: Array, step: Array) -> tuple[Array, Array]:
    """Return the stack on a coarse grid of COARSE_MM, and where the head is in it: float32 and bool (plane, y, x)."""
    shape = np.maximum(np.ceil(np.array(stack.shape[1:]) * step / COARSE_MM), 8).astype(int)
    factor = COARSE_MM / step
    coarse = np.empty((len(stack), *shape), np.float32)
    for number, image in enumerate(stack):
        smooth = ndimage.gaussian_filter(image, 0.4 * factor)
        coarse[number] = ndimage.affine_transform(smooth, factor, (factor - 1) / 2, tuple(shape), order=1)
    low, high = np.percentile(coarse, [5, 98])
    head = coarse > low + HEAD_LEVEL * (high - low)
    for number, each in enumerate(head):
        filled = ndimage.binary_fill_holes(ndimage.binary_opening(each))
        parts, n_parts = ndimage.label(filled)
        if n_parts > 1:
            filled = parts == 1 + int(np.argmax(ndimage.sum_labels(filled, parts, range(1, n_parts + 1))))
        head[number] = filled
    return coarse, head


def _find_middles(coarse: Array, head: Array) -> tuple[float, Array, Array]:
    """Return how far the head is turned (degrees), the middle of each plane (plane, 2) in mm, and its symmetry.

    The turn is the median over planes, the line of middles is straight: one plane divides a head.
    """
    area = head.sum(axis=(1, 2)).astype(float)
    centre = np.array([ndimage.center_of_mass(each) if each.any() else (np.array(each.shape) - 1) / 2 for each in head])
    found = [_middle(_even(*pair), c) for pair, c in zip(zip(coarse, head, strict=True), centre, strict=True)]
    symmetry = np.array([each[2] for each in found], np.float32)
    good = area >= max(0.35 * area.max(), 1)
    if not good.any():
        return 0.0, (centre + 0.5) * COARSE_MM - 0.5 * STEP_MM, symmetry
    angle = float(np.median([each[0] for each, is_good in zip(found, good, strict=True) if is_good]))
    rotation = _rotation(angle)
    across = np.array(
        [(rotation.T @ (c + _rotation(a) @ (0, d)))[1] for c, (a, d, _) in zip(centre, found, strict=True)]
    )
    along = np.average((centre @ rotation)[:, 0], weights=area * good)
    places = np.arange(len(across))
    if good.sum() >= 5:
        slope, start = _straight(places[good], across[good])
        across = start + slope * places
    middles = np.stack([np.full(len(across), along), across], 1) @ rotation.T
    return angle, (middles + 0.5) * COARSE_MM - 0.5 * STEP_MM, symmetry


def _even(image: Array, inside: Array) -> Array:
    """Return a head without the shading of coils, which says nothing of where its middle is: 0 to 2, 0 outside."""
    around = ndimage.gaussian_filter(np.stack([image * inside, inside.astype(np.float32)]), (0, EVEN, EVEN))
    level = around[0] / np.maximum(around[1], 1e-6)
    return np.asarray(np.clip(image / np.maximum(level, 1e-12), 0, 2) * inside)


def _middle(image: Array, centre: Array) -> tuple[float, float, float]:
    """Return angle (degrees) and offset from `centre` (pixels) of the line about which an image is most symmetric.

    Each turned image is correlated with its own mirror image at every offset, by one transform along x.
    """
    n_y, n_x = (2 * n for n in image.shape)
    total = float((image**2).sum())
    if total == 0:
        return 0.0, 0.0, 0.0
    best = (0.0, 0.0, 0.0)
    middle = np.array([n_y // 2, n_x // 2], float)
    for angle in ANGLES:
        rotation = _rotation(float(angle))
        turned = ndimage.affine_transform(image, rotation, centre - rotation @ middle, (n_y, n_x), order=1)
        spectrum = np.fft.rfft(turned, 2 * n_x, axis=1)
        match = np.fft.irfft((spectrum**2).sum(axis=0), 2 * n_x)[: 2 * n_x - 1] / total
        peak = int(np.argmax(match))
        shift = 0.0
        if 0 < peak < len(match) - 1:
            left, here, right = match[peak - 1 : peak + 2]
            shift = float(0.5 * (left - right) / min(left - 2 * here + right, -1e-9))
        value = float(match[peak]) * (1 - UPRIGHT * float(angle) ** 2)
        if value > best[2]:
            best = (float(angle), (peak + shift) / 2 - middle[1], value)
    return best


def _straight(places: Array, values: Array) -> tuple[float, float]:
    """Return slope and start of a straight line, by the medians of Theil and Sen."""
    steps = places[:, None] - places[None]
    slopes = (values[:, None] - values[None])[steps > 0] / steps[steps > 0]
    slope = float(np.median(slopes))
    return slope, float(np.median(values - slope * places))


def _levels(coarse: Array, head: Array) -> tuple[Array, Array]:
    """Return the median brightness deep inside each head, float64 (plane,), and whether there is enough of it."""
    level, is_usable = np.ones(len(coarse)), np.zeros(len(coarse), bool)
    for number, (image, inside) in enumerate(zip(coarse, head, strict=True)):
        deep = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1] * COARSE_MM > DEEP_MM
        if deep.sum() * COARSE_MM**2 < MIN_DEEP_MM2:
            continue
        middle = float(np.median(image[deep]))
        if middle > 0:
            level[number], is_usable[number] = middle, True
    return level, is_usable


def _rotation(degrees: float) -> Array:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s], [s, c]])
