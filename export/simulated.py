"""Undersampled scans simulated from real magnitude images: what the reconstruction network is trained and tested on.

A magnitude image is given a contrast, a place in the field of view, small structures, a phase and coils; its k-space is
cut, noise is added to the lines that are measured, and coil maps are estimated from the noisy calibration lines as at
run time. The target is the noise-free coil combination. The readout is never undersampled, so a sample may keep a few
columns of the image without changing the problem along the lines.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from export.slices import Slice
from recon.arrays import Array
from recon.coils import estimate_maps
from recon.compress import choose_n_virtual, compress, compression_matrix
from recon.errors import AcquisitionError
from recon.fourier import resize_centred, to_image, to_kspace
from recon.receive import Loop, loop_field
from recon.scan import CoilMaps, KSpace
from recon.sense import cg_sense
from recon.unrolled import Prepared, prepare

FINENESS = 2  # drawn samples per acquired one, each way
MAX_COILS = 8  # virtual coils
COIL_GRID = 20
N_SEGMENTS = 12
UNIT_LOOP = Loop((0.0, 0.0, 0.0), (0.0, 0.0, 1.0), 1.0)
NOISE_ERROR_SHARE = 0.35  # of scans
MAP_ERROR_SHARE = 0.4  # of scans
MAP_ERROR = 0.06  # at most, relative
FIELD_MM = 235.0  # typical field of view: turns structure sizes into voxels


@dataclass(frozen=True)
class Draw:
    """What a simulated scan may be: the ranges that samples are drawn from.

    sizes: of the lines, each a multiple of 8. n_columns: kept of the image, None for all.
    """

    sizes: tuple[int, ...] = (96, 112, 120, 128, 144, 160, 168, 192, 200, 216, 224, 240, 256, 288, 320)
    n_columns: int | None = 64
    accelerations: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 4, 4, 4, 5, 5, 6, 6, 6, 7, 8, 8)
    acs: tuple[int, int] = (12, 32)
    sigma: tuple[float, float] = (0.0015, 0.12)
    coils: tuple[int, ...] = (1, 1, 1, 2, 3, 4, 4, 5, 6, 8, 8, 12, 16)
    lattice_share: float = 0.8
    partial_share: float = 0.1
    phantom_share: float = 0.04  # ellipses instead of anatomy
    blank_share: float = 0.02  # noise alone


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared scan and its truth.

    target: complex64 (slice, y, x), noise-free, in the network's scale. kspace, maps and classical are what `prepared`
    was made of.
    lesion: bool (slice, y, x), the small structures. acceleration and n_acs: of the mask.
    """

    prepared: Prepared
    kspace: KSpace
    maps: CoilMaps
    classical: Array
    target: Array
    lesion: Array
    acceleration: int
    n_acs: int


def draw_sample(
    rng: np.random.Generator,
    source: Slice,
    draw: Draw,
    sizes: tuple[int, int] | None = None,
    mask_rng: np.random.Generator | None = None,
) -> Sample:
    """Return one simulated scan of `source`; draws again where its calibration lines give no maps.

    sizes: (y, x), drawn where None. mask_rng: draws the mask, for samples that must share theirs (with `sizes`).
    """
    n_y, n_x = sizes or (int(rng.choice(draw.sizes)), int(rng.choice(draw.sizes)))
    n_coils = int(rng.choice(draw.coils))
    measured, acceleration, n_acs = draw_mask(mask_rng or rng, n_y, draw, n_coils)
    while True:
        kind = rng.random()
        image, lesion = draw_image(rng, _phantom(rng) if kind < draw.phantom_share else source, (n_y, n_x))
        if kind > 1 - draw.blank_share:
            image, lesion = np.zeros_like(image), np.zeros_like(lesion)
        coils = draw_coils(rng, n_coils, image.shape)
        sigma = _log_uniform(rng, *draw.sigma)
        with suppress(AcquisitionError):
            return acquire(rng, image, coils, measured, sigma, draw.n_columns, lesion, (acceleration, n_acs))


def acquire(
    rng: np.random.Generator,
    image: Array,
    coils: Array,
    measured: Array,
    sigma: float,
    n_columns: int | None = None,
    lesion: Array | None = None,
    pattern: tuple[int, int] = (1, 0),
) -> Sample:
    """Return the scan of a fine image by `coils` on its grid, see `see`: lines `measured`, noise `sigma` of the peak.

    pattern: acceleration and calibration lines, for the record.
    Raises AcquisitionError where the calibration lines give no maps.
    """
    seen = see(image, coils)
    _, n_y, n_x = seen.shape
    peak = float(np.percentile(np.sqrt((np.abs(seen) ** 2).sum(0)), 99.5)) or 1.0
    clean = to_kspace(seen, (1,)) / np.float32(sigma * peak)  # noise variance 1 from here on
    noise = rng.standard_normal((2, *clean.shape), np.float32) * _noise_scale(rng, len(clean))
    samples = np.where(measured[:, None], clean + noise[0] + 1j * noise[1], 0).astype(np.complex64)
    lines = _central_lines(measured)
    calibration = samples[None, :, lines]
    n_virtual = min(choose_n_virtual(calibration), MAX_COILS)
    matrix = compression_matrix(calibration, n_virtual)
    calibration = compress(calibration, matrix)
    maps = _disturb(rng, estimate_maps(calibration, n_y).maps)
    columns = slice(None)
    if n_columns is not None and n_columns < n_x:
        columns = _draw_columns(rng, np.abs(seen).sum((0, 1)), n_columns)
    kspace = KSpace(
        compress(samples[None], matrix)[..., columns],
        measured[None].astype(np.uint16),
        1.0,
        True,
        calibration[..., columns],
    )
    kept = CoilMaps(np.ascontiguousarray(maps[..., columns]))
    classical = cg_sense(kspace, kept)
    prepared = prepare(kspace, kept, classical)
    truth = compress(to_image(clean, (1,))[None, ..., columns], matrix)
    target = (kept.maps.conj() * truth).sum(1) / prepared.scale[:, None, None]
    lesion = np.zeros((n_y, n_x), bool) if lesion is None else lesion
    return Sample(prepared, kspace, kept, classical, target.astype(np.complex64), lesion[None, :, columns], *pattern)


def _noise_scale(rng: np.random.Generator, n_coils: int) -> Array:
    """Return the noise of each coil's real part, float32 (coil, 1, 1): sometimes not what whitening made of it.

    A level that was estimated holds signal too, so that the noise is mostly lower than is said, and no coil's own.
    """
    scale = np.full((n_coils, 1, 1), 0.5**0.5)
    if rng.random() < NOISE_ERROR_SHARE:
        scale *= np.exp(rng.uniform(-0.9, 0.2)) * np.exp(rng.normal(0, 0.2, scale.shape))
    return scale.astype(np.float32)


def _disturb(rng: np.random.Generator, maps: Array) -> Array:
    """Return `maps`, sometimes with smooth errors of a few per cent, of unit norm again where they were."""
    if maps.shape[1] == 1 or rng.random() > MAP_ERROR_SHARE:
        return maps
    size = np.float32(rng.uniform(0, MAP_ERROR))
    errors = [_smooth_noise(rng, maps.shape[2:], 4) + 1j * _smooth_noise(rng, maps.shape[2:], 4) for _ in maps[0]]
    wrong = maps * (1 + size * np.asarray(errors, np.complex64))
    norm = np.sqrt((np.abs(wrong) ** 2).sum(1, keepdims=True))
    return wrong / np.where(norm > 0, norm, 1)


def _central_lines(measured: Array) -> slice:
    """The contiguous measured lines around the centre, at most 32."""
    centre = len(measured) // 2
    below = above = 0
    while below < 16 and measured[centre - below - 1]:
        below += 1
    while above < 16 and centre + above < len(measured) and measured[centre + above]:
        above += 1
    half = min(below, above)
    return slice(centre - half, centre + half)


def _draw_columns(rng: np.random.Generator, profile: Array, n: int) -> slice:
    """Columns that mostly hold something."""
    start = int(rng.integers(0, len(profile) - n + 1))
    for _ in range(4):
        if profile[start : start + n].sum() > 0.6 * n * profile.mean():
            break
        start = int(rng.integers(0, len(profile) - n + 1))
    return slice(start, start + n)


def draw_mask(rng: np.random.Generator, n_y: int, draw: Draw, n_coils: int) -> tuple[Array, int, int]:
    """Return which lines are measured, bool (ky), the acceleration and the number of calibration lines."""
    most = {1: 3, 2: 5, 3: 6}.get(n_coils, 8)
    acceleration = min(int(rng.choice(draw.accelerations)), most)
    n_acs = int(rng.integers(draw.acs[0], draw.acs[1] + 1))
    measured = np.zeros(n_y, bool)
    if rng.random() < draw.lattice_share:
        measured[int(rng.integers(acceleration)) :: acceleration] = True
    else:
        places = np.abs(np.arange(n_y) - n_y // 2) / (n_y / 2)
        density = 1 / (0.15 + places ** rng.uniform(0.3, 2)) if rng.random() < 0.6 else np.ones(n_y)
        chosen = rng.choice(n_y, max(n_y // acceleration, 2), replace=False, p=density / density.sum())
        measured[chosen] = True
    if rng.random() < draw.partial_share:
        cut = int(n_y * rng.uniform(0, 0.375))
        measured[:cut] = False
        if rng.random() < 0.5:
            measured = measured[::-1].copy()
    measured[n_y // 2 - n_acs // 2 : n_y // 2 - n_acs // 2 + n_acs] = True
    return measured, acceleration, n_acs


def draw_image(rng: np.random.Generator, source: Slice, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Return a complex image of `source` as placed in the field of view, and its small structures.

    The image is `FINENESS` times as fine as a scan of `shape` (y, x), the structures are bool (y, x) of that scan.
    """
    fine = (FINENESS * shape[0], FINENESS * shape[1])
    pixels = _recontrast(rng, source.pixels.astype(np.float32) / 255)
    if rng.random() < 0.5:
        pixels = pixels.T
        spacing = source.spacing_mm[::-1]
    else:
        spacing = source.spacing_mm
    if rng.random() < 0.5:
        pixels = pixels[::-1]
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    extent = np.array(pixels.shape) * spacing  # mm
    angle = rng.normal(0, 12) if rng.random() < 0.7 else 0.0
    fill = rng.uniform(0.62, 1.02)  # of the field of view, along the tighter axis
    field = np.array([extent.max() / fill] * 2) * rng.uniform(0.92, 1.08, 2)
    if rng.random() < 0.4:  # a rectangular field, tight along the lines
        field[0] = max(field[0] * rng.uniform(0.7, 1), extent[0] * 0.97)
    shift = rng.normal(0, 0.02, 2) * field
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array([[c, -s], [s, c]])
    step = field / fine
    matrix = (turn * step[None]) / np.array(spacing)[:, None]
    centre = (np.array(pixels.shape) - 1) / 2
    offset = centre - matrix @ (np.array(fine) // 2) + shift / spacing
    drawn = ndimage.affine_transform(pixels, matrix, offset, fine, np.float32, order=1, mode="constant")
    lesion = np.zeros(fine, np.float32)
    if rng.random() < 0.5:
        drawn, lesion = insert_structures(rng, drawn, int(rng.integers(1, 5)))
    if rng.random() < 0.15:
        drawn = drawn * _smooth_field(rng, fine, 0.3)
    return drawn * draw_phase(rng, drawn), lesion[::FINENESS, ::FINENESS] > 0.5


def see(image: Array, coils: Array) -> Array:
    """Return what coils see of a fine image when only a scan's part of k-space is measured: complex64 (coil, y, x).

    coils: complex64 (coil, y, x) on the image's grid. The cut comes after the coils, as in a scanner: no maps on the
    coarse grid explain the lines exactly.
    """
    n_y, n_x = (n // FINENESS for n in image.shape)
    rows = to_image(resize_centred(to_kspace(coils * image, (2,)), 2, n_x), (2,))
    return to_image(resize_centred(to_kspace(rows, (1,)), 1, n_y), (1,)) / np.float32(FINENESS)


def _phantom(rng: np.random.Generator) -> Slice:
    """Return ellipses on nothing, as a slice: no anatomy to be learned from it."""
    y, x = (np.linspace(-1, 1, 240, dtype=np.float32) for _ in range(2))
    pixels = np.zeros((240, 240), np.float32)
    for number in range(int(rng.integers(2, 14))):
        centre = rng.uniform(-0.6, 0.6, 2) if number else np.zeros(2)
        radius = rng.uniform(0.03, 0.35, 2) if number else rng.uniform(0.6, 0.95, 2)
        inside = ((y[:, None] - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
        pixels[inside] = rng.uniform(0, 255)
    return Slice(pixels.astype(np.uint8), (1.0, 1.0), "phantom", "none", "phantom", 0.0)


def _recontrast(rng: np.random.Generator, pixels: Array) -> Array:
    """Another contrast of the same anatomy: a gamma, and sometimes a smooth curve that need not be monotone."""
    pixels = pixels ** np.float32(rng.uniform(0.7, 1.5))
    if rng.random() < 0.25:
        knots = np.concatenate([[0], rng.uniform(0.05, 1.0, 5)])
        pixels = np.interp(pixels, np.linspace(0, 1, 6), knots).astype(np.float32)
    return pixels


def insert_structures(
    rng: np.random.Generator, image: Array, n: int, mm: tuple[float, float] = (3, 10)
) -> tuple[Array, Array]:
    """Return `image` (y, x) with `n` bright or dark ellipses of `mm` across inside the head, and their coverage."""
    inside = np.argwhere(image > 0.25 * np.percentile(image, 98))
    cover = np.zeros_like(image)
    out = image.copy()
    per_mm = max(image.shape) / FIELD_MM
    for _ in range(n if len(inside) else 0):
        y, x = inside[rng.integers(len(inside))]
        radius = rng.uniform(*mm, 2) * per_mm / 2
        reach = int(np.ceil(radius.max())) + 2
        rows = np.arange(max(0, y - reach), min(image.shape[0], y + reach + 1))
        columns = np.arange(max(0, x - reach), min(image.shape[1], x + reach + 1))
        distance = np.hypot((rows[:, None] - y) / radius[0], (columns[None] - x) / radius[1])
        soft = np.clip((1 - distance) * radius.mean() + 0.5, 0, 1).astype(np.float32)
        window = np.ix_(rows, columns)
        level = out[y, x] * rng.uniform(1.15, 1.9) if rng.random() < 0.6 else out[y, x] * rng.uniform(0.2, 0.85)
        out[window] += soft * (np.float32(level) - out[window]) * np.float32(rng.uniform(0.6, 1))
        cover[window] = np.maximum(cover[window], soft)
    return out, cover


def draw_phase(rng: np.random.Generator, image: Array) -> Array:
    """Return a phase factor for a magnitude image, complex64 (y, x).

    A constant and a smooth part; often steep places as near air, a rim of fat with a phase of its own, and a phase that
    follows the tissue, as gradient echoes have them.
    """
    shape = image.shape
    phase = _smooth_noise(rng, shape, int(rng.integers(2, 5))) * rng.choice([0.3, 1.0, 2.0, 4.0])
    ramp = rng.normal(0, 1.5, 2)
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    phase = phase + np.float32(ramp[0]) * y[:, None] + np.float32(ramp[1]) * x + rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:
        phase = phase + _smooth_noise(rng, shape, int(rng.integers(6, 16))) * rng.uniform(0.1, 0.6)
    if rng.random() < 0.15:
        phase = phase + _smooth_noise(rng, shape, int(rng.integers(20, 48))) * rng.uniform(0.05, 0.4)
    if rng.random() < 0.3:
        centre, width = rng.uniform(-0.8, 0.8, 2), rng.uniform(0.1, 0.3)
        distance = (y[:, None] - centre[0]) ** 2 + (x - centre[1]) ** 2
        phase = phase + rng.normal(0, 4) * np.exp(-distance / (2 * width**2))
    if rng.random() < 0.5:
        phase = phase + _rim(image, rng.uniform(4, 14)) * (rng.uniform(-np.pi, np.pi) + _smooth_noise(rng, shape, 3))
    if rng.random() < 0.4:
        phase = phase + rng.normal(0, 0.7) * image / max(float(np.percentile(image, 98)), 1e-6)
    return np.exp(1j * phase.astype(np.float32)).astype(np.complex64)


def _rim(image: Array, width_mm: float) -> Array:
    """Return 1 within `width_mm` of the outside of the head in a magnitude image, 0 elsewhere, float32 (y, x)."""
    step = 4
    small = image[::step, ::step]
    head = ndimage.binary_fill_holes(ndimage.binary_opening(small > 0.1 * np.percentile(image, 98)))
    depth = ndimage.distance_transform_edt(head) * (step * FIELD_MM / max(image.shape))
    rim = np.repeat(np.repeat(head & (depth < width_mm), step, 0), step, 1)
    return rim[: image.shape[0], : image.shape[1]].astype(np.float32)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], n: int) -> Array:
    """Return smooth noise of about unit size, float32 (y, x), with `n` + 3 knots each way."""
    knots = rng.standard_normal((n + 3, n + 3)).astype(np.float32)
    return _spline(n + 3, shape[0]) @ knots @ _spline(n + 3, shape[1]).T


def _smooth_field(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Array:
    return np.exp(size * _smooth_noise(rng, shape, 2))


def _spline(n_knots: int, n: int) -> Array:
    """Return uniform cubic B-spline weights, float32 (n, n_knots)."""
    place = np.linspace(0, n_knots - 3 - 1e-6, n)
    left = np.floor(place).astype(int)
    t = place - left
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    out = np.zeros((n, n_knots), np.float32)
    for step, weight in enumerate(weights):
        out[np.arange(n), left + step] += (weight / 6).astype(np.float32)
    return out


def draw_coils(rng: np.random.Generator, n_coils: int, shape: tuple[int, int]) -> Array:
    """Return complex64 (coil, y, x): loops anywhere around the head, by Biot-Savart; one coil is sometimes uniform."""
    if n_coils == 1 and rng.random() < 0.5:
        return np.ones((1, *shape), np.complex64)
    y, x = (np.linspace(-1, 1, COIL_GRID) for _ in shape)
    points = np.zeros((COIL_GRID, COIL_GRID, 3))
    points[..., 0], points[..., 1] = x, y[:, None]
    reach = rng.uniform(1.02, 1.5)
    radius = rng.uniform(0.25, 0.8)
    angle = 2 * np.pi * (np.arange(n_coils) + rng.uniform(-0.3, 0.3, n_coils)) / n_coils + rng.uniform(0, 2 * np.pi)
    height = rng.normal(0, 0.5 if n_coils > 4 else 0.2, n_coils)
    outwards = np.stack((np.cos(angle), np.sin(angle), height), 1)
    centres = outwards * reach * rng.uniform(0.95, 1.1, (n_coils, 1))
    frames = np.stack([_frame(rng, each) for each in outwards])  # rows: two directions in the loop's plane, its normal
    local = np.einsum("cij,yxcj->cyxi", frames, points[:, :, None] - centres) / radius
    fields = np.einsum("cij,cyxi->cyxj", frames, loop_field(UNIT_LOOP, local, N_SEGMENTS))
    seen = fields @ np.linalg.qr(rng.standard_normal((3, 3)))[0][:, :2] @ [1, -1j]  # the main field points anywhere
    gain = rng.uniform(0.7, 1.3, n_coils) * np.exp(2j * np.pi * rng.random(n_coils))
    coarse = (seen * gain[:, None, None]).astype(np.complex64)
    coarse /= np.sqrt((np.abs(coarse) ** 2).sum(0)).mean()
    along_y, along_x = (_spline(COIL_GRID, n).astype(np.complex64) for n in shape)
    return along_y @ coarse @ along_x.T


def _frame(rng: np.random.Generator, outwards: Array) -> Array:
    """Return three directions at right angles (3, 3), the last about `outwards`."""
    normal = outwards + rng.normal(0, 0.1, 3)
    return np.linalg.qr(np.stack((normal, *rng.standard_normal((2, 3))), 1))[0].T[::-1]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
