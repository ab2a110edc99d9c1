"""The simulated scanner: a head and a protocol in, readouts in scan order and the truth about them out.

What is simulated: signal by sequence and tissue, slice profile, receive coils, phase and dephasing near air and blood,
truncation of k-space (the object is drawn at twice the acquired resolution), wrap-around, readout oversampling,
correlated noise, movement, sparks and lost lines. What is not: flow, chemical shift, echo-planar distortion, and blur
along the echo train.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import fft, interpolate, ndimage

from recon.arrays import Array, closed
from recon.contrast import LESION_TISSUES, TISSUES, Sequence, Tissue, signal
from recon.errors import ShapeError
from recon.fourier import resize_centred, to_image
from recon.head import FIELD_SPACING_MM, STORED_TISSUES, Head, bump, sample
from recon.lesions import Lesion, bloom, core_fraction, healthy_fractions, lesion_signal
from recon.protocol import OVERSAMPLING, Line, Protocol, geometry, lines, slice_order
from recon.receive import draw_noise, helmet, noise_covariance, sensitivities
from recon.scan import Acquisition, Geometry, ImageKey, Role

FINENESS = 2  # drawn samples per acquired one, each way
PROFILE = ((-0.48, 0.12), (-0.24, 0.25), (0.0, 0.26), (0.24, 0.25), (0.48, 0.12))  # place in thicknesses, weight
COARSE_MM = 7.0  # coils and phase are smooth: computed this finely, then interpolated by cubic splines
DWELL_US = 2.5
N_NOISE_READOUTS = 4
NECK_MM = (-98.0, -68.0)  # the transmit field ends here: nothing, then everything, is excited
AIR_MM = ((0.0, -35.0, -40.0), (57.0, 28.0, -52.0), (-57.0, 28.0, -52.0))  # sinuses and mastoids
AIR_WIDTH_MM = 13.0
AIR_DEPHASING_HZ = 55.0
AIR_PHASE_RAD_MS = 0.12


@dataclass(frozen=True, eq=False)
class SliceScan:
    """One slice as scanned, and the truth about it.

    readouts: in scan order. image: float32 (y, x), the noise-free root-sum-of-squares over coils of the fully sampled
    slice with the head at rest. lesion: bool (y, x), where more than half of a voxel is the finding. maps: complex64
    (coil, y, x), sensitivities with a sum of abs² over coil of 1.
    """

    index: int
    readouts: tuple[Acquisition, ...]
    image: Array
    lesion: Array
    maps: Array

    def __post_init__(self) -> None:
        if self.maps.shape[1:] != self.image.shape or self.lesion.shape != self.image.shape:
            raise ShapeError("truth of a slice", self.maps.shape, ("coil", *self.image.shape))
        for name in ("image", "lesion", "maps"):
            object.__setattr__(self, name, closed(getattr(self, name)))


class Plane(NamedTuple):
    """A slice to draw: where its sample (0, 0) lies, its axes (unit, LPS), and its positions in mm along them."""

    centre_mm: Array
    row_dir: Array
    col_dir: Array
    normal: Array
    y_mm: Array
    x_mm: Array
    y_start: int  # of the drawn samples against the one at the centre
    x_start: int

    def points(self, y_mm: Array, x_mm: Array, offset_mm: float = 0.0) -> Array:
        """Return float32 (3, y, x), LPS mm."""
        start = self.centre_mm + offset_mm * self.normal
        grid = start[:, None, None] + self.col_dir[:, None, None] * y_mm[:, None] + self.row_dir[:, None, None] * x_mm
        return grid.astype(np.float32)


def scan(head: Head, protocol: Protocol, lesion: Lesion | None = None) -> Iterator[Acquisition]:
    """Yield the readouts of a scan in order: noise first, then slice by slice."""
    yield from noise_readouts(protocol)
    for index in slice_order(protocol):
        yield from scan_slice(head, protocol, index, lesion).readouts


def noise_sigma(protocol: Protocol) -> float:
    """Return the standard deviation of the noise in one coil (mean over coils), real part, in the readouts' units."""
    return signal(TISSUES["wm"], protocol.contrast) / protocol.snr


def noise_readouts(protocol: Protocol) -> tuple[Acquisition, ...]:
    """Return the readouts taken without excitation, from which the covariance of the coils is measured."""
    covariance = noise_covariance(helmet(protocol.n_coils), protocol.seed)
    rng = np.random.default_rng([protocol.seed, 4])
    n_samples = OVERSAMPLING * protocol.matrix[1]
    return tuple(
        Acquisition(
            draw_noise(rng, covariance, n_samples, noise_sigma(protocol)),
            Role.NOISE,
            ImageKey(0, 0, 0, 0, 0, 0),
            0,
            sample_time_us=DWELL_US,
            time_stamp=number,
        )
        for number in range(N_NOISE_READOUTS)
    )


def scan_slice(head: Head, protocol: Protocol, index: int, lesion: Lesion | None = None) -> SliceScan:
    """Return slice `index` as scanned, with its truth; the same arguments always give the same bytes."""
    stack = geometry(protocol)
    plane = _plane(head, protocol, stack, index)
    coils = _coarse_coils(plane, protocol)
    phase = _phase(protocol, plane, index)
    still, core = _draw(head, lesion, protocol, plane, None)
    kspace = _measure(still * phase, coils, plane, protocol)

    coil_images = resize_centred(to_image(kspace, (1, 2)), 2, protocol.matrix[1])
    image = np.sqrt((np.abs(coil_images) ** 2).sum(axis=0)).astype(np.float32)
    maps = _coil_maps(coils, stack, protocol)
    mask = _to_voxels(core, plane, protocol) > 0.5

    if protocol.motion_mm > 0 or protocol.motion_deg > 0:
        moved, _ = _draw(head, lesion, protocol, plane, _movement(protocol))
        order = lines(protocol)
        late = [line.row for line in order[round(protocol.motion_onset * len(order)) :]]
        kspace[:, late] = _measure(moved * phase, coils, plane, protocol)[:, late]
    return SliceScan(index, tuple(_readouts(kspace, protocol, stack, index)), image, mask, maps)


def _plane(head: Head, protocol: Protocol, stack: Geometry, index: int) -> Plane:
    """Return the samples to draw in slice `index`: all that the head can reach, inside the field of view or not."""
    row, col = np.asarray(stack.row_dir), np.asarray(stack.col_dir)
    _, dy, dx = stack.spacing_mm
    ny, nx = protocol.matrix
    centre = stack.origin_mm[index] + row * (nx // 2) * dx + col * (ny // 2) * dy
    low, high = head.anatomy.bounds_mm
    corners = np.array(np.meshgrid(*zip(low * 1.07, high * 1.07, strict=True))).reshape(3, -1) - centre[:, None]
    ranges = []
    for direction, step in ((col, dy / FINENESS), (row, dx / FINENESS)):
        reach = direction @ corners
        ranges.append(np.arange(math.floor(reach.min() / step), math.ceil(reach.max() / step) + 1))
    y, x = ranges
    return Plane(centre, row, col, np.cross(row, col), y * dy / FINENESS, x * dx / FINENESS, int(y[0]), int(x[0]))


def _draw(
    head: Head, lesion: Lesion | None, protocol: Protocol, plane: Plane, movement: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """Return the slice's signal and its share of the finding, float32 (y, x), averaged over the slice profile."""
    shape = (len(plane.y_mm), len(plane.x_mm))
    value, core = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    healthy = np.array([signal(TISSUES[name], protocol.contrast) for name in STORED_TISSUES], np.float32)
    changed = {tissue: signal(tissue, protocol.contrast) for tissue in LESION_TISSUES.values()}
    for place, weight in PROFILE:
        scanner = plane.points(plane.y_mm, plane.x_mm, place * protocol.thickness_mm).reshape(3, -1)
        points = scanner
        if movement is not None:
            turn, shift = movement
            points = (turn @ (scanner - shift[:, None])).astype(np.float32)
        part, finding = _signal_at(head, lesion, protocol, points, healthy, changed)
        part *= np.clip((scanner[2] - NECK_MM[0]) / (NECK_MM[1] - NECK_MM[0]), 0, 1)
        value += np.float32(weight) * part.reshape(shape)
        core += np.float32(weight) * finding.reshape(shape)
    return value, core


def _signal_at(
    head: Head, lesion: Lesion | None, protocol: Protocol, points: Array, healthy: Array, changed: dict[Tissue, float]
) -> tuple[Array, Array]:
    """Return the magnitude of the signal and the share of the finding at points (3, n) of the head."""
    fractions, origin = healthy_fractions(head, lesion, points)
    value = healthy @ fractions
    core = np.zeros_like(value)
    rate = np.zeros_like(value)
    if lesion is not None:
        value = lesion_signal(value, lesion, points, fractions, changed)
        core = core_fraction(lesion, points, fractions)
    value = value * sample(head.texture, origin, head.anatomy.origin_mm, FIELD_SPACING_MM)
    if protocol.contrast.sequence is Sequence.GRADIENT_ECHO:
        if lesion is not None:
            rate += bloom(lesion, points)
        for centre in AIR_MM:
            rate += np.float32(AIR_DEPHASING_HZ) * bump(points, np.asarray(centre), AIR_WIDTH_MM)
        value = value * np.exp(rate * np.float32(-protocol.contrast.te_ms / 1000))
    return value, core


def _movement(protocol: Protocol) -> tuple[Array, Array]:
    """Return the rotation (3, 3) and shift (3,) that take a scanner point to the point of the moved head."""
    rng = np.random.default_rng([protocol.seed, 5])
    axis, direction = rng.normal(0, 1, 3), rng.normal(0, 1, 3)
    axis, direction = axis / np.linalg.norm(axis), direction / np.linalg.norm(direction)
    angle = math.radians(protocol.motion_deg)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross  # Rodrigues' formula
    return turn, protocol.motion_mm * direction


class Coils(NamedTuple):
    """Sensitivities on a coarse grid of a slice: complex64 (coil, y, x), and the grid's positions in mm."""

    y_mm: Array
    x_mm: Array
    values: Array

    def at(self, y_mm: Array, x_mm: Array) -> Iterator[Array]:
        """Yield each coil's sensitivity, complex64 (y, x), by cubic splines."""
        to_y = _spline(self.y_mm, y_mm).astype(np.complex64)  # one type throughout keeps the products in BLAS
        to_x = _spline(self.x_mm, x_mm).T.astype(np.complex64)
        for coil in self.values:
            yield to_y @ coil @ to_x


def _coarse_coils(plane: Plane, protocol: Protocol) -> Coils:
    y, x = _coarse(plane.y_mm), _coarse(plane.x_mm)
    points = np.moveaxis(plane.points(y, x), 0, -1).astype(np.float64)
    return Coils(y, x, sensitivities(helmet(protocol.n_coils), points).astype(np.complex64))


def _coarse(fine: Array) -> Array:
    return np.linspace(fine[0], fine[-1], max(4, math.ceil((fine[-1] - fine[0]) / COARSE_MM) + 1))


def _spline(coarse: Array, fine: Array) -> Array:
    """Return the matrix that interpolates values on `coarse` to `fine`, float32 (fine, coarse)."""
    return interpolate.make_interp_spline(coarse, np.eye(len(coarse)), k=3)(fine).astype(np.float32)


def _phase(protocol: Protocol, plane: Plane, index: int) -> Array:
    """Return the magnetisation's phase factor, complex64 (y, x): smooth, steeper near air at long TE."""
    rng = np.random.default_rng([protocol.seed, 6])
    terms = rng.normal(0, 1, 9)
    y, x = _coarse(plane.y_mm), _coarse(plane.x_mm)
    points = plane.points(y, x)
    px, py, pz = points / np.float32(100)
    radians = terms[0] + 0.6 * (terms[1] * px + terms[2] * py + terms[3] * pz)
    radians = radians + 0.5 * (terms[4] * px * py + terms[5] * px * px + terms[6] * py * py + terms[7] * pz * px)
    if protocol.contrast.sequence is Sequence.GRADIENT_ECHO:
        for centre in AIR_MM:
            radians = radians + AIR_PHASE_RAD_MS * protocol.contrast.te_ms * bump(
                points, np.asarray(centre), AIR_WIDTH_MM
            )
    if protocol.contrast.sequence is Sequence.DIFFUSION:  # each shot has a phase ramp from pulsation
        ramp = np.random.default_rng([protocol.seed, 7, index]).normal(0, 1, 3)
        radians = radians + ramp[0] + 1.5 * (ramp[1] * px + ramp[2] * py)
    fine = _spline(y, plane.y_mm) @ radians.astype(np.float32) @ _spline(x, plane.x_mm).T
    return np.exp(1j * fine).astype(np.complex64)


def _measure(drawn: Array, coils: Coils, plane: Plane, protocol: Protocol) -> Array:
    """Return noise-free k-space complex64 (coil, y, kx with oversampling) of a drawn slice, all lines.

    The drawn samples repeat with the field of view (the readout's is OVERSAMPLING times the image's), which is what
    sampling k-space at its reciprocal does; then only the acquired frequencies are kept.
    """
    ny, nx = protocol.matrix[0], OVERSAMPLING * protocol.matrix[1]
    big_y, big_x = FINENESS * ny, FINENESS * nx
    scale = np.float32(math.sqrt(ny * nx / (big_y * big_x)))
    out = np.empty((len(coils.values), ny, nx), np.complex64)
    for number, coil in enumerate(coils.at(plane.y_mm, plane.x_mm)):
        rows = _fold(drawn * coil, plane.x_start, big_x, 1)
        rows = resize_centred(_to_kspace(rows, 1), 1, nx)
        out[number] = resize_centred(_to_kspace(_fold(rows, plane.y_start, big_y, 0), 0), 0, ny) * scale
    return out


def _to_kspace(array: Array, axis: int) -> Array:
    """Return the centred orthonormal transform of an array whose position 0 is at index 0 along `axis`."""
    return fft.fftshift(fft.fft(array, axis=axis, norm="ortho"), axes=axis)


def _fold(array: Array, start: int, period: int, axis: int) -> Array:
    """Return samples at positions start, start + 1, … added up modulo `period`, position 0 at index 0."""
    shape = list(array.shape)
    shape[axis] = period
    out = np.zeros(shape, array.dtype)
    n = array.shape[axis]
    source, target = np.moveaxis(array, axis, 0), np.moveaxis(out, axis, 0)
    done = 0
    while done < n:
        place = (start + done) % period
        take = min(period - place, n - done)
        target[place : place + take] += source[done : done + take]
        done += take
    return out


def _coil_maps(coils: Coils, stack: Geometry, protocol: Protocol) -> Array:
    """Return the sensitivities at the voxels' centres, complex64 (coil, y, x), with a sum of abs² of 1."""
    _, dy, dx = stack.spacing_mm
    ny, nx = protocol.matrix
    y = np.clip((np.arange(ny) - ny // 2) * dy, coils.y_mm[0], coils.y_mm[-1])  # held beyond the drawn box, in air
    x = np.clip((np.arange(nx) - nx // 2) * dx, coils.x_mm[0], coils.x_mm[-1])
    maps = np.stack(list(coils.at(y, x)))
    return maps / np.sqrt((np.abs(maps) ** 2).sum(axis=0))


def _to_voxels(drawn: Array, plane: Plane, protocol: Protocol) -> Array:
    """Return drawn samples averaged over each voxel, float32 (y, x)."""
    kernel = np.array([0.25, 0.5, 0.25], np.float32)  # a voxel's middle sample and half of its neighbours
    smooth = ndimage.convolve1d(ndimage.convolve1d(drawn, kernel, 0, mode="constant"), kernel, 1, mode="constant")
    out = np.zeros(protocol.matrix, np.float32)
    index = []
    for n, start, size in (
        (protocol.matrix[0], plane.y_start, len(plane.y_mm)),
        (protocol.matrix[1], plane.x_start, len(plane.x_mm)),
    ):
        place = (np.arange(n) - n // 2) * FINENESS - start
        index.append((np.flatnonzero((place >= 0) & (place < size)), place[(place >= 0) & (place < size)]))
    (to_y, from_y), (to_x, from_x) = index
    out[np.ix_(to_y, to_x)] = smooth[np.ix_(from_y, from_x)]
    return out


def _readouts(kspace: Array, protocol: Protocol, stack: Geometry, index: int) -> Iterator[Acquisition]:
    """Yield one slice's readouts: noise added, sparks struck, lost lines left out, flags set."""
    order = slice_order(protocol)
    rng = np.random.default_rng([protocol.seed, 8, index])
    covariance = noise_covariance(helmet(protocol.n_coils), protocol.seed)
    spikes, missing = _faults(protocol)
    todo = [(line, average) for line in lines(protocol) for average in range(protocol.n_averages)]
    nx = OVERSAMPLING * protocol.matrix[1]
    skipped = nx - protocol.n_samples
    peak = float(np.abs(kspace).max())
    _, dy, dx = stack.spacing_mm
    ny = protocol.matrix[0]
    row, col = np.asarray(stack.row_dir), np.asarray(stack.col_dir)
    position = stack.origin_mm[index] + row * (protocol.matrix[1] // 2) * dx + col * (ny // 2) * dy
    start_tick = order.index(index) * len(todo)
    for number, (line, average) in enumerate(todo):
        samples = kspace[:, line.row, skipped:] + draw_noise(rng, covariance, protocol.n_samples, noise_sigma(protocol))
        if (index, number) in spikes:
            samples[:, rng.integers(protocol.n_samples)] += 0.25 * peak * np.exp(2j * np.pi * rng.random())
        if (index, number) in missing:
            continue
        last = number == len(todo) - 1
        yield Acquisition(
            samples,
            line.role,
            ImageKey(0, index, 0, 0, 0, 0),
            line.row - protocol.first_row,
            average=average,
            center_sample=nx // 2 - skipped,
            last_in_slice=last,
            last_in_repetition=last and index == order[-1],
            last_in_measurement=last and index == order[-1],
            sample_time_us=DWELL_US,
            time_stamp=N_NOISE_READOUTS + start_tick + number,
            position_mm=_triple(position),
            read_dir=stack.row_dir,
            phase_dir=stack.col_dir,
            slice_dir=stack.normal,
        )


def _triple(vector: Array) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])


def _faults(protocol: Protocol) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Return which readouts (slice, number in the slice) have a spike, and which are lost.

    Lost ones are never the last of a slice, whose flag ends it, nor calibration lines, which nothing can do without.
    """
    rng = np.random.default_rng([protocol.seed, 9])
    per_slice = [line for line in lines(protocol) for _ in range(protocol.n_averages)]
    every = [(index, number) for index in range(protocol.n_slices) for number in range(len(per_slice))]
    can_go = [place for place in every if _can_be_lost(per_slice, place[1])]
    spikes = rng.permutation(len(every))[: protocol.n_spikes]
    missing = rng.permutation(len(can_go))[: protocol.n_missing]
    return {every[i] for i in spikes}, {can_go[i] for i in missing}


def _can_be_lost(per_slice: list[Line], number: int) -> bool:
    return number < len(per_slice) - 1 and per_slice[number].role is Role.IMAGING
