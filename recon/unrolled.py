"""Reconstruction by an unrolled network: k-space and coil maps to what the network is given, and its answer back.

The network (its mathematics: `export/network.py`) alternates between a learned correction and the least-squares
problem of the measured lines. Here that problem is put into real matrices and images that any inference runtime takes,
scaled to values around 1, so that images follow their k-space in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recon.arrays import Array, array_module, to_host
from recon.errors import AcquisitionError, ModelError, ShapeError
from recon.fourier import to_image
from recon.network import Network, TrainedRange
from recon.prior import learn_prior
from recon.sampling import GRID, Sampling, describe_sampling, padded, real_form, separate
from recon.scan import CoilMaps, KSpace
from recon.sense import keep_measured

INPUTS = (
    "adjoint",
    "classical",
    "aliases",
    "support",
    "coarse",
    "rows",
    "resample",
    "missing",
    "variance",
    "sigma",
    "measured",
)
SHARED = ("rows", "resample", "missing")  # the same for all planes of a batch
PEAK_PERCENTILE = 99.5
MIN_PEAK_SIGMA = 4.0  # an image that is all noise is not scaled up beyond this
VARIANCE_RANGE = (0.1, 1e7)  # of the detail, in noise variances
SIGMA_RANGE = (1e-3, 0.25)  # of the peak: what the network is told lies in it
BATCH_VOXELS = 220_000  # of the planes that are given to the network at a time, so that memory stays bounded


def refusal(kspace: KSpace, n_coils: int, trained: TrainedRange) -> str:
    """Return why the network must not reconstruct `kspace`, seen by `n_coils` virtual coils; "" where it may.

    Every reason names what was found and what the network was trained for.
    """
    n_slices, _, n_y, n_x = kspace.samples.shape
    sides = {"lines": n_y, **({"partitions": n_slices} if kspace.slice_encoded else {"columns": n_x})}
    low, high = trained.matrix
    for name, n in sides.items():
        if not low <= n <= high:
            return f"the matrix has {n} {name}; the network was trained for {low} to {high}"
    if n_coils > trained.coils:
        return f"{n_coils} virtual coils; the network was trained for up to {trained.coils:g}"
    try:
        axes = _phase_lines(kspace)
    except AcquisitionError as error:
        return str(error)
    n_calibration = 0 if kspace.calibration is None else kspace.calibration.shape[2]
    for measured in axes:
        found = outside_range(measured, n_calibration, trained)
        if found:
            return found
    return ""


def _phase_lines(kspace: KSpace) -> list[Array]:
    """Return which lines were measured, bool (ky), and which partitions, bool (kz), of a separable 3-D scan."""
    if kspace.slice_encoded:
        along_z, along_y = separate(kspace.averages)
        return [along_y > 0, along_z > 0]
    if not (kspace.averages == kspace.averages[0]).all():
        raise AcquisitionError("the slices of one image were sampled differently; the network needs them alike")
    return [kspace.measured[0]]


def outside_range(measured: Array, n_calibration: int, trained: TrainedRange) -> str:
    """Return what keeps lines `measured`, bool (ky), from the trained range; "" where nothing does.

    n_calibration: how many calibration lines there are; they matter only where lines were left out.
    """
    n, found = len(measured), np.flatnonzero(measured)
    if not len(found):
        return "no line was measured"
    extent = (found[-1] + 1 - found[0]) / n
    if extent < trained.measured_extent or not found[0] <= n // 2 <= found[-1]:
        return (
            f"the measured lines span {extent:.0%} of k-space; "
            f"the network was trained for at least {trained.measured_extent:.0%}"
        )
    inside = measured[found[0] : found[-1] + 1]
    if inside.all():
        return ""
    if n_calibration < trained.calibration_lines:
        return f"{n_calibration} calibration lines; the network was trained for at least {trained.calibration_lines:g}"
    centre = n // 2 - found[0]
    below = int(np.argmin(inside[centre::-1])) if not inside[: centre + 1].all() else centre + 1
    above = int(np.argmin(inside[centre:])) if not inside[centre:].all() else len(inside) - centre
    n_central = max(below + above - 1, 0) if inside[centre] else 0
    acceleration = (len(inside) - n_central) / max(int(inside.sum()) - n_central, 1)
    if acceleration > trained.acceleration + 0.5:
        return f"acceleration {acceleration:.1f}; the network was trained for up to {trained.acceleration:g}"
    return ""


def reconstruct_unrolled(network: Network, kspace: KSpace, maps: CoilMaps, classical: Array) -> Array:
    """Return the network's image, complex64 (slice, y, x), in units of the noise's standard deviation.

    The lines that were measured stay as they are: the network has its say in the others alone.

    kspace: within the network's trained range (`refusal`); its slices go through the network a few at a time. maps: on
    the same grid. classical: the image of `recon.sense.cg_sense`, complex64 (slice, y, x), to start from.
    All are of one module (NumPy or CuPy), which the network's inputs and the image follow.
    Doubling samples and noise doubles the image. Raises ShapeError if the grids differ; BackendError from the network.
    """
    return keep_measured(kspace, maps, estimate_unrolled(network, kspace, maps, classical))


def estimate_unrolled(network: Network, kspace: KSpace, maps: CoilMaps, classical: Array) -> Array:
    """Return what the network itself says, complex64 (slice, y, x): `reconstruct_unrolled` before measured lines.

    What it says of lines that it was not given is the same in both.
    """
    batches = prepare_batches(kspace, maps, classical)
    parts = [unprepare(network.run(each.inputs)["image"], each) for each in batches]
    planes = array_module(classical).concatenate(parts)
    return planes.transpose(2, 1, 0).copy() if kspace.slice_encoded else planes


def run_on_nothing(network: Network) -> None:
    """Run `network` once on an empty scan of its smallest matrix, so that its first scan finds it warm.

    Raises BackendError where the run fails, ModelError where its answer is not the empty image that it must be.
    """
    n = network.card.trained_range.matrix[0]
    nothing = np.zeros((1, 1, n, n), np.complex64)
    averages = (np.arange(n) % 2 == 0).astype(np.uint16)[None]
    kspace = KSpace(nothing, averages, 1.0, True, nothing[:, :, :32])
    image = reconstruct_unrolled(network, kspace, CoilMaps(np.ones_like(nothing)), nothing[:, 0])
    if np.abs(image).max() > 1:  # standard deviations of the noise
        raise ModelError("the network makes an image of an empty scan; its weights are not usable")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network's inputs for planes that share their sampling, and what turns its output back.

    A plane is a slice (y, x), or for a 3-D scan that is undersampled along z a cut (y, z) at one x. All are float32, of
    the module of the k-space that they were made of (NumPy or CuPy):
    adjoint (plane, 2, y, x): Aᴴ W of the measured lines, real and imaginary.
    classical (plane, 2, y, x): the image to start from.
    aliases (plane, 2, R, R, y / R · x): Aᴴ W A of the lattice between the R voxels that fold onto each other.
    support (plane, 1, y, x): 1 where coils see anything, 0 elsewhere.
    coarse (plane, 2, coarse y, coil, x): coil maps on the grid of the lines that are not in the lattice.
    rows, resample: as in `Sampling`. missing (2 kz, 2 x): real form of the Fourier rows not measured along the columns.
    variance (plane, 1, y, x): of the image's detail as `recon.prior` expects it, in noise variances.
    sigma, measured (plane, 1, 1, 1): noise of a coil sample in units of the peak; share of lines that were measured.
    scale: float32 (plane): units of `KSpace` per unit of the network. shape: (y, x) before padding.
    """

    inputs: dict[str, Array]
    scale: Array
    shape: tuple[int, int]


def prepare(kspace: KSpace, maps: CoilMaps, classical: Array) -> Prepared:
    """Return the network's inputs for all planes in one batch; see `Prepared` and `reconstruct_unrolled`."""
    (whole,) = prepare_batches(kspace, maps, classical, None)
    return whole


def prepare_batches(
    kspace: KSpace, maps: CoilMaps, classical: Array, voxels: int | None = BATCH_VOXELS
) -> Iterator[Prepared]:
    """Yield the network's inputs for planes of at most `voxels` together, and at least one plane (None: all at once).

    Each plane is divided by a bright level of its classical image, so that the network sees values around 1.
    Raises ShapeError where the grids differ, AcquisitionError for planes that were sampled differently.
    """
    if maps.maps.shape != kspace.samples.shape:
        raise ShapeError("coil maps", maps.maps.shape, kspace.samples.shape)
    n_slices, _, n_lines, n_columns = kspace.samples.shape
    if classical.shape != (n_slices, n_lines, n_columns):
        raise ShapeError("classical image", classical.shape, (n_slices, n_lines, n_columns))
    _phase_lines(kspace)
    xp = array_module(classical)
    variance = learn_prior(kspace, classical).variance
    if kspace.slice_encoded:
        along_z, along_y = separate(kspace.averages)
        sampling = describe_sampling(along_y, may_fold=False, xp=xp)
        missing = _missing(along_z)
        share = float((along_y > 0).mean() * (along_z > 0).mean())
        weighted = kspace.samples * xp.asarray(kspace.averages, xp.float32)[:, None, :, None]
        adjoint = (maps.maps.conj() * to_image(weighted, (0, 2))).sum(1).transpose(2, 1, 0)
        classical, variance = classical.transpose(2, 1, 0), variance.transpose(2, 1, 0)
        planes = maps.maps.transpose(3, 1, 2, 0)
        levels = np.full(n_columns, noise_level(kspace.samples.reshape(1, -1, n_columns), kspace.noise_is_measured))
    else:
        sampling = describe_sampling(kspace.averages[0], xp=xp)
        missing = np.zeros((2, 2 * padded(n_columns)), np.float32)
        share = float(kspace.measured[0].mean())
        adjoint = None
        planes = maps.maps
        levels = np.array([noise_level(each, kspace.noise_is_measured) for each in kspace.samples])
    missing, levels = xp.asarray(missing), xp.asarray(levels)
    n_planes, _, n_y, n_x = planes.shape
    step = n_planes if voxels is None else max(1, voxels // (padded(n_y) * padded(n_x)))
    for start in range(0, n_planes, step):
        chosen = slice(start, start + step)
        coarse = sampling.coarse_maps(planes[chosen])
        own = sampling.adjoint(kspace.samples[chosen], planes[chosen], coarse) if adjoint is None else adjoint[chosen]
        known = _Known(levels[chosen], classical[chosen], variance[chosen], share)
        yield _prepare_planes(own, planes[chosen], coarse, sampling, missing, known)


class _Known(NamedTuple):
    """What is known of planes: noise levels (plane), classical image and variance (plane, y, x), share of lines."""

    levels: Array
    classical: Array
    variance: Array
    share: float


def _prepare_planes(
    adjoint: Array, maps: Array, coarse: Array, sampling: Sampling, missing: Array, known: _Known
) -> Prepared:
    xp = array_module(maps)
    n_planes, _, n_y, n_x = maps.shape
    peaks = xp.percentile(xp.abs(known.classical).reshape(n_planes, -1), PEAK_PERCENTILE, axis=1)
    scale = xp.maximum(peaks, MIN_PEAK_SIGMA * known.levels).astype(xp.float32)
    sigma = xp.clip(known.levels / scale, *SIGMA_RANGE).astype(xp.float32)
    variance = xp.clip(known.variance / known.levels[:, None, None] ** 2, *VARIANCE_RANGE).astype(xp.float32)
    power = (maps.real**2 + maps.imag**2).sum(1)
    n_aliases = len(sampling.lattice)
    aliases = _pad(sampling.alias_matrices(maps, power), (5,))
    inputs = {
        "adjoint": _pad(_pairs(adjoint / scale[:, None, None]), (2, 3)),
        "classical": _pad(_pairs(known.classical / scale[:, None, None]), (2, 3)),
        "aliases": aliases.reshape(n_planes, 2, n_aliases, n_aliases, -1),
        "support": _pad((power > 0.25).astype(xp.float32)[:, None], (2, 3)),
        "coarse": _pad(_pairs(coarse.transpose(0, 2, 1, 3)), (4,)),
        "rows": sampling.rows,
        "resample": sampling.resample,
        "missing": missing,
        "variance": _pad(variance[:, None], (2, 3), 1),
        "sigma": sigma.reshape(-1, 1, 1, 1),
        "measured": xp.full((n_planes, 1, 1, 1), known.share, xp.float32),
    }
    return Prepared(inputs, scale, (n_y, n_x))


def unprepare(image: Array, prepared: Prepared) -> Array:
    """Return the network's image, float32 (plane, 2, y, x), as complex64 (plane, y, x) in the units of `KSpace`."""
    xp = array_module(image)
    n_y, n_x = prepared.shape
    y = padded(n_y) // 2 - n_y // 2
    x = padded(n_x) // 2 - n_x // 2
    part = image[:, :, y : y + n_y, x : x + n_x]
    out = xp.empty((len(part), n_y, n_x), xp.complex64)
    out.real, out.imag = part[:, 0], part[:, 1]
    return out * prepared.scale[:, None, None]


def noise_level(samples: Array, is_measured: bool) -> float:
    """Return the standard deviation of the noise in `samples` (coil, ky, x), zero where not measured, in their unit.

    1 where it was measured. Otherwise the level that whitening assumed holds signal too; the columns beside the head
    hold none, so the quietest of them tell it (the two real multi-coil scans gain 0.3 to 0.8 dB by it at R = 4 and 6).
    """
    lines = samples[:, samples.any((0, 2))]
    if is_measured or not lines.size:
        return 1.0
    columns = to_host((lines.real**2 + lines.imag**2).mean((0, 1)))  # few numbers: the rest is the host's
    columns = columns[columns > 0]
    smooth = np.convolve(columns, np.ones(3) / 3, mode="valid") if len(columns) > 8 else columns
    return float(np.clip(np.sqrt(np.percentile(smooth, 4)), 1e-3, 1))


def _missing(along_z: Array) -> Array:
    """Return the real form of the Fourier rows not measured along z, float32 (2 kz, 2 padded z), on the host."""
    n = len(along_z)
    lines = np.flatnonzero(along_z == 0) - n // 2
    rows = np.zeros((max(len(lines), 1), padded(n)), complex)
    start = padded(n) // 2 - n // 2
    rows[: len(lines), start : start + n] = np.exp(-2j * np.pi / n * np.outer(lines, np.arange(n) - n // 2)) / np.sqrt(
        n
    )
    return real_form(rows)


def _pairs(array: Array) -> Array:
    """Return a complex array (plane, …) as float32 (plane, 2, …), real and imaginary part."""
    xp = array_module(array)
    return xp.stack((array.real, array.imag), 1).astype(xp.float32, copy=False)


def _pad(array: Array, axes: tuple[int, ...], fill: float = 0) -> Array:
    """Return `array`, contiguous, with `fill` around `axes` up to multiples of `GRID`, n // 2 moving to the middle."""
    xp = array_module(array)
    width = [(0, 0)] * array.ndim
    for axis in axes:
        n = array.shape[axis]
        before = padded(n) // 2 - n // 2
        width[axis] = (before, padded(n) - n - before)
    return xp.pad(array, width, constant_values=fill) if any(sum(w) for w in width) else xp.ascontiguousarray(array)


assert GRID == 8, "the network halves an image three times"
