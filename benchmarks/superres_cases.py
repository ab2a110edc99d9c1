"""Held-out heads measured coarsely, the ways to make them finer, and how far each way's result is from the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks.scores import compare, head_mask, hfen, matched
from export.superres_data import Head, cut_k_space, held_out_patients, load_heads, make_thick
from export.superres_likeness import simulated_slices
from recon.arrays import Array
from recon.fine_grid import band_axis
from recon.fourier import resize_centred, to_image, to_kspace
from recon.scan import Geometry, Provenance, Volume
from recon.superres import SuperResolved, place, super_resolve
from recon.superres_card import Refiner

NOISE = 0.005  # of the image's scale, beside what the truth itself has
CORRELATION = 0.5  # at the ring where a spectrum ends: half of each ring's structure is the truth's
RING_WIDTH = 0.05  # of the highest measured frequency
NAMES = {"T1w": "t1", "T1w-Gd": "t1ce", "T2w": "t2", "FLAIR": "flair", "PDw": "pd"}
PATIENTS = {"stroke_flair": "FLAIR", "tumour_t1c": "T1w-Gd"}
_SIDES = (((0, 1, 0), (0, 0, -1)), ((1, 0, 0), (0, 0, -1)), ((1, 0, 0), (0, 1, 0)))  # along a row, down a column: LPS
RIDGE, PATCH, N_DIRECTIONS, STRENGTHS = 1e-3, 7, 8, (0.5, 0.8, 0.95)  # of the self-taught detail


@dataclass(frozen=True, eq=False)
class Case:
    """Truth and what was measured of it: `truth` float32 (slice, y, x) on the fine grid, `measured` the coarse one."""

    name: str
    subject: str
    contrast: str
    kind: str  # "real", "patients", "simulated" or "raw"
    truth: Array
    measured: Volume
    slice_axis: int | None = None  # of real heads, whose slices come as (x, y) of right, anterior, superior voxels


def volume_of(
    data: Array, spacing_mm: tuple[float, float, float], thickness_mm: float | None = None, axis: int = 2
) -> Volume:
    """Return `data` (slice, y, x) as a volume that was measured: sagittal, coronal, axial for `axis` 0, 1, 2."""
    row, col = _SIDES[axis]
    origin = np.arange(len(data))[:, None] * spacing_mm[0] * np.cross(row, col)
    geometry = Geometry(origin, row, col, spacing_mm, thickness_mm or spacing_mm[0])
    return Volume(data, geometry, Provenance("sense", "benchmark"))


def real_cases(data: Path, most_slices: int, noise: float = NOISE) -> Iterator[Case]:
    """Yield every held-out volume, its k-space cut to half within the plane."""
    for number, head in enumerate(load_heads(data, "val")):
        stack, spacing = upright(head)
        rng = np.random.default_rng([3, number])
        truth = _even(stack[_middle(len(stack), most_slices)])
        measured = np.stack([cut_k_space(rng, plane, noise) for plane in truth])
        volume = volume_of(measured, (spacing[0], 2 * spacing[1], 2 * spacing[2]))
        axis = 2 if head.is_isotropic else head.slice_axis
        yield Case(f"{head.subject} {head.contrast}", head.subject, head.contrast, "real", truth, volume, axis)


def simulated_cases(n_heads: int, noise: float = NOISE) -> Iterator[Case]:
    """Yield simulated heads in four contrasts, proton density among them: of that no real volume is at hand."""
    order = ("T1w", "T2w", "FLAIR", "PDw")
    found: dict[tuple[str, str], list[Array]] = {}
    spacing = (1.0, 1.0)
    places = (0.4, 0.6)
    for count, (name, image, spacing) in enumerate(simulated_slices(n_heads, 41, places, 256)):  # noqa: B007
        contrast = order[count // len(places) % len(order)]
        found.setdefault((name, contrast), []).append(image)
    for number, ((name, contrast), planes) in enumerate(found.items()):
        rng = np.random.default_rng([4, number])
        truth = np.stack(planes)
        truth = truth / np.float32(np.percentile(truth, 99.5))
        measured = np.stack([cut_k_space(rng, plane, noise) for plane in truth])
        volume = volume_of(measured, (5.0, 2 * spacing[0], 2 * spacing[1]))
        yield Case(f"simulated {name} {contrast}", name, contrast, "simulated", truth, volume)


def patient_cases(data: Path, n_each: int, noise: float = NOISE) -> Iterator[Case]:
    """Yield single slices of stroke and tumour patients that were not learned from.

    Both sets' makers resampled their slices: a spectrum that ends early leaves less to recover.
    """
    found = held_out_patients(data)
    for source, contrast in PATIENTS.items():
        own = [each for each in found if each.source == source]
        for number, each in enumerate(own[:: max(1, len(own) // n_each)][:n_each]):
            plane = each.pixels.astype(np.float32)
            truth = _even(plane[None] / np.float32(np.percentile(plane, 99.5)))
            measured = cut_k_space(np.random.default_rng([6, number]), truth[0], noise)[None]
            volume = volume_of(measured, (5.0, 2 * each.spacing_mm[0], 2 * each.spacing_mm[1]))
            yield Case(f"{source} {number} {contrast}", each.subject, contrast, "patients", truth, volume)


def through_cases(data: Path, n_thin: int, most_slices: int, noise: float = NOISE) -> Iterator[Case]:
    """Yield every isotropic held-out volume, its slices `n_thin` times thicker and its k-space cut to half."""
    for number, head in enumerate(load_heads(data, "val")):
        if not head.is_isotropic:
            continue
        stack, spacing = upright(head)
        rng = np.random.default_rng([5, number, n_thin])
        n = most_slices * n_thin
        first = max(0, int(0.55 * len(stack)) - n // 2)
        truth = _even(stack[first : first + n])
        thick = make_thick(rng, truth.reshape(len(truth), -1), n_thin, 0.0, width=1.0).reshape(-1, *truth.shape[1:])
        measured = np.stack([cut_k_space(rng, plane, noise) for plane in thick])
        volume = volume_of(measured, (n_thin * spacing[0], 2 * spacing[1], 2 * spacing[2]))
        yield Case(f"{head.subject} {head.contrast}", head.subject, head.contrast, "real", truth, volume)


def upright(head: Head) -> tuple[Array, tuple[float, float, float]]:
    """Return slices across the thickest voxels, axial where there is no thickest, scaled to 1, and the voxel in mm."""
    axis = 2 if head.is_isotropic else head.slice_axis
    stack = np.moveaxis(head.voxels, axis, 0).astype(np.float32)
    y_mm, x_mm = (head.spacing_mm[i] for i in range(3) if i != axis)
    return stack / np.float32(np.percentile(stack, 99.5)), (head.spacing_mm[axis], y_mm, x_mm)


def _middle(n: int, most: int) -> Array:
    return np.unique(np.linspace(0.25 * n, 0.75 * n, min(most, n)).astype(int))


def _even(stack: Array) -> Array:
    return np.ascontiguousarray(stack[:, : stack.shape[1] // 2 * 2, : stack.shape[2] // 2 * 2])


def make_all(case: Case, refiner: Refiner) -> tuple[dict[str, Array], SuperResolved]:
    """Return the case's volume on the truth's grid by method, float32 (slice, y, x), and the network's with all that
    is said of it. Raises AcquisitionError where it is refused.
    """
    measured = case.measured.data
    made = super_resolve(case.measured, refiner, NAMES[case.contrast])
    volumes = {
        "sinc": sinc(measured),
        "cubic": cubic(measured),
        "self-taught": self_taught(measured),
        "network": made.volume.data,
    }
    return volumes, made


def sinc(measured: Array) -> Array:
    """Return slices (slice, y, x) with k-space zero-filled to twice the size."""
    return place(measured, band_axis(measured.shape[1]), band_axis(measured.shape[2])).astype(np.float32)


def cubic(measured: Array) -> Array:
    """Return slices interpolated by cubic splines at the fine voxels' places."""
    y, x = np.meshgrid(*((np.arange(2 * n) - n % 2) / 2 for n in measured.shape[1:]), indexing="ij")
    return np.stack([ndimage.map_coordinates(plane, (y, x), order=3, mode="grid-wrap") for plane in measured]).astype(
        np.float32
    )


def self_taught(measured: Array) -> Array:
    """Return slices with detail that the scan teaches itself, no other image; what was measured is put back.

    The scan's own k-space, cut once more, shows which detail belongs to which surroundings: patches are sorted by the
    direction and strength of their gradient, and each sort has a filter of its own, by ridge regression.
    Sources: the idea of Zhao et al., IEEE TMI 40:805 (2021) (SMORE), with the filters of Romano et al., IEEE TCI 3:110
    (2017) (RAISR).
    """
    ny, nx = (n // 4 * 4 for n in measured.shape[1:])
    own = measured[:, :ny, :nx]
    centre = resize_centred(resize_centred(to_kspace(own.astype(np.complex64), (1, 2)), 1, ny // 2), 2, nx // 2)
    blurred = sinc(np.abs(to_image(centre, (1, 2))).astype(np.float32) / 2)
    placed = sinc(measured)
    strengths = np.quantile(_gradient(blurred)[1], STRENGTHS)
    sorts, wanted, inputs = _sorts(blurred, strengths), own - blurred, _patches(blurred)
    here, outputs = _sorts(placed, strengths), _patches(placed)
    added = np.zeros(placed.size)
    for sort in range(N_DIRECTIONS * (len(STRENGTHS) + 1)):
        known, asked = sorts.ravel() == sort, here.ravel() == sort
        if known.sum() < 4 * PATCH**2 or not asked.any():
            continue
        gram = inputs[known].T @ inputs[known]
        ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        added[asked] = outputs[asked] @ np.linalg.solve(gram + ridge, inputs[known].T @ wanted.ravel()[known])
    y, x = band_axis(measured.shape[1]), band_axis(measured.shape[2])
    by, bx = y.basis[: y.size], x.basis[: x.size]
    whole = added.reshape(placed.shape)
    return (placed + whole - by @ (by.T @ whole @ bx) @ bx.T).astype(np.float32)


def _gradient(stack: Array) -> tuple[Array, Array]:
    """Return the direction of each voxel's gradient, 0 to π, and its strength."""
    y, x = (ndimage.gaussian_filter(stack, (0, 1, 1), order=order) for order in ((0, 1, 0), (0, 0, 1)))
    return np.mod(np.arctan2(y, x), np.pi), np.hypot(y, x)


def _sorts(stack: Array, strengths: Array) -> Array:
    direction, strength = _gradient(stack)
    angle = np.minimum((direction / np.pi * N_DIRECTIONS).astype(int), N_DIRECTIONS - 1)
    return np.asarray(angle * (len(strengths) + 1) + np.searchsorted(strengths, strength))


def _patches(stack: Array) -> Array:
    """Return (voxel, PATCH²) differences from the centre of every voxel's surroundings."""
    reach = PATCH // 2
    padded = np.pad(stack, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (PATCH, PATCH), axis=(1, 2))
    flat = windows.reshape(-1, PATCH * PATCH)
    return np.asarray(flat - flat[:, PATCH * PATCH // 2, None], np.float32)


def judge(truth: Array, volume: Array, mask: Array) -> dict[str, float]:
    """Return PSNR, SSIM and HFEN inside the head, and where the spectrum ends.

    cut_off: the ring at which correlation falls below 0.5. cut_off_seventh: below 1/7, the usual threshold between two
    halves of a data set. cut_off_axes: below 0.5 within 15° of the axes, where the measured square ends at 1 exactly.
    """
    scores = compare(truth, volume, mask)
    rings = ring_correlation(truth, volume, mask)
    return {
        "psnr": round(scores.psnr, 3),
        "ssim": round(scores.ssim, 5),
        "hfen": round(hfen(truth, volume, mask), 5),
        "cut_off": round(cut_off(*rings), 3),
        "cut_off_seventh": round(cut_off(*rings, level=1 / 7), 3),
        "cut_off_axes": round(cut_off(*ring_correlation(truth, volume, mask, along_axes=True)), 3),
    }


def slice_psnr(truth: Array, volume: Array, mask: Array) -> Array:
    """Return the PSNR of each slice, dB, peak and scale those of the whole volume."""
    peak = float(np.percentile(truth[mask], 99.9))
    error = (matched(truth, volume, mask) - truth) ** 2
    return np.array([10 * np.log10(peak**2 / e[m].mean()) for e, m in zip(error, mask, strict=True) if m.any()])


def ring_correlation(truth: Array, volume: Array, mask: Array, along_axes: bool = False) -> tuple[Array, Array]:
    """Return the rings' radii, in units of the highest measured frequency, and the correlation of spectra in each.

    Of slices (slice, y, x) on the fine grid, inside the head with a soft edge; all slices together. along_axes: only
    within 15° of either axis.
    Source: Saxton & Baumeister, J Microsc 127:127 (1982).
    """
    soft = np.stack([ndimage.gaussian_filter(each.astype(float), 2) for each in mask])
    a, b = (to_kspace((each * soft).astype(np.complex128), (1, 2)) for each in (truth, volume))
    ny, nx = truth.shape[1:]
    y, x = (np.arange(ny) - ny // 2) / (ny / 4), (np.arange(nx) - nx // 2) / (nx / 4)
    ring = (np.hypot(y[:, None], x) / RING_WIDTH).astype(int)
    n = int(2 / RING_WIDTH)
    inside = ring < n
    if along_axes:
        steep = np.abs(np.arctan2(y[:, None], x))
        inside &= np.minimum(np.minimum(steep, np.pi - steep), np.abs(steep - np.pi / 2)) < np.deg2rad(15)
    sums = [
        np.bincount(ring[inside], part.sum(0)[inside], n)
        for part in ((a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2)
    ]
    correlation = sums[0] / np.maximum(np.sqrt(sums[1] * sums[2]), 1e-30)
    return (np.arange(n) + 0.5) * RING_WIDTH, correlation


def cut_off(radii: Array, correlation: Array, level: float = CORRELATION) -> float:
    """Return the radius beyond 0.5 at which `correlation` first falls below `level`; the last one if it never does."""
    below = np.flatnonzero((correlation < level) & (radii > 0.5))
    if not len(below):
        return float(radii[-1])
    k = int(below[0])
    before, after = correlation[k - 1], correlation[k]
    return float(radii[k - 1] + (radii[k] - radii[k - 1]) * (before - level) / max(before - after, 1e-12))


def row_of(case: Case, volumes: Mapping[str, Array]) -> dict[str, Any]:
    """Return the scores of every method on a case."""
    mask = head_mask(case.truth)
    return {
        "name": case.name,
        "subject": case.subject,
        "contrast": case.contrast,
        "kind": case.kind,
        "slices": len(case.truth),
        **{method: judge(case.truth, volume, mask) for method, volume in volumes.items()},
        "gain_of_slices": (
            slice_psnr(case.truth, volumes["network"], mask) - slice_psnr(case.truth, volumes["sinc"], mask)
        )
        .round(3)
        .tolist(),
    }
