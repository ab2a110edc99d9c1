"""How far the middle of the brain has moved: the line of best local symmetry against the line that the rim defines.

Along each row of a plane the place is looked for about which the near surroundings are most symmetric: the falx, the
septum and the ventricles show it on any contrast. At the front and the back the falx holds that line in place; off the
straight plane through those ends it is the midline's shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from recon.arrays import Array

STEP_MM = 0.5  # of the places that are tried
REACH_MM = 20  # a midline farther off than this is not found
NEAR_MM = 24  # what is compared on both sides
WEIGHT_MM = 10.0  # falls off away from the line: a lesion at the side should not decide
ROW_MM = 3  # rows are looked at together
ROWS_MM = 3.0  # and then once more, by a Gaussian of this width
PLANES_MM = 3.0
STRAY_COST = 0.006  # of leaving the neighbouring planes' place, by mm²
HELD_COST = 0.01  # of being off the middle at the front and back ends, by mm²
FREE_COST = 0.0006  # and between them
BEND_COST = 0.06  # of leaving the neighbouring row's place by 1 mm
RIM = 0.16  # the front and the back share of a plane's rows, which hold the straight plane
MIN_SURE = 0.5  # of the usual local symmetry: less says nothing of the place
MIN_AREA_MM2 = 4000
MIN_SHARE = 0.45  # of the largest plane's brain: others show too little of the midline
MIN_ROWS = 20


@dataclass(frozen=True, eq=False)
class Midline:
    """The middle of the brain as found.

    off_mm: float (plane, row of ROW_MM), how far off the straight plane through the rim, towards larger columns (the
    patient's left) positive; NaN where it was not found. shift_mm, plane: the greatest of it, averaged over a few mm,
    and where.
    symmetry: the mean local symmetry along the line, at most 1. scatter_mm: how far the rim is from a straight plane.
    """

    off_mm: Array
    shift_mm: float
    plane: int
    symmetry: float
    scatter_mm: float


def find_midline(images: Array, brain: Array, distance_mm: float) -> Midline | None:
    """Return the midline in axial planes of 1 mm, or None where too little of it is there.

    images: float32 (plane, y, x), the middle of the head in the middle column. brain: bool, the same shape.
    distance_mm: between planes.
    """
    area = brain.sum(axis=(1, 2))
    good = np.flatnonzero((area >= MIN_AREA_MM2) & (area >= MIN_SHARE * area.max()))
    if not good.size:
        return None
    match = _local_symmetry(images[good], brain[good])
    sigma = (min(PLANES_MM / distance_mm, 3.0) if len(good) > 1 else 0.0, ROWS_MM / ROW_MM, 0.0)
    match = ndimage.gaussian_filter(match, sigma, mode="nearest")
    inside = brain[good, ::ROW_MM].any(axis=2)[:, : match.shape[1]]
    places = (np.arange(match.shape[2]) - match.shape[2] // 2) * STEP_MM
    match = match - _leash(inside)[..., None] * places**2
    place, _ = _paths(match, inside)
    near = _median(place)  # of neighbouring planes: a path that jumped to another symmetric place comes back
    place, sure = _paths(match - STRAY_COST * (places - np.nan_to_num(near)[..., None]) ** 2, inside)
    return _against_rim(place, sure, good, len(images))


def _leash(inside: Array) -> Array:
    """Return float64 (plane, row): the cost by mm² of being off the middle, high where the falx holds the brain."""
    out = np.full(inside.shape, FREE_COST)
    for number, each in enumerate(inside):
        rows = np.flatnonzero(each)
        held = round(0.6 * RIM * len(rows))
        if held:
            out[number, rows[:held]] = out[number, rows[-held:]] = HELD_COST
    return out


def _paths(match: Array, inside: Array) -> tuple[Array, Array]:
    """Return the best place (mm) in each row of each plane, NaN outside, and how well it matches."""
    place = np.full(inside.shape, np.nan)
    sure = np.zeros(inside.shape)
    for number, each in enumerate(inside):
        rows = np.flatnonzero(each)
        if len(rows) >= MIN_ROWS:
            best = _cheapest_path(match[number, rows])
            place[number, rows] = (best - match.shape[2] // 2) * STEP_MM
            sure[number, rows] = match[number, rows, np.rint(best).astype(int)]
    return place, sure


def _median(place: Array) -> Array:
    """Return the median over neighbouring planes and rows, float64 (plane, row), NaN where none is known."""
    padded = np.pad(place, ((2, 2), (2, 2)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).reshape(*place.shape, -1)
    out = np.full(place.shape, np.nan)
    known = np.isfinite(place)
    out[known] = np.nanmedian(windows[known], axis=1)
    return out


def _local_symmetry(images: Array, brain: Array) -> Array:
    """Return float32 (plane, y, place): weighted correlation of both sides of each place, -1 to 1."""
    n_planes, n_y, n_x = images.shape
    n_rows = n_y // ROW_MM
    low = images[:, : n_rows * ROW_MM].reshape(n_planes, n_rows, ROW_MM, n_x).mean(axis=2)
    middle = (n_x - 1) / 2
    u = np.arange(0.5, NEAR_MM, 1.0)
    weight = np.exp(-0.5 * (u / WEIGHT_MM) ** 2).astype(np.float32)
    places = np.arange(-REACH_MM, REACH_MM + STEP_MM / 2, STEP_MM)
    out = np.zeros((n_planes, n_rows, len(places)), np.float32)
    inside = brain[:, ::ROW_MM].any(axis=2)[:, :n_rows]
    for number, place in enumerate(places):
        right = _columns(low, middle + place + u)
        left = _columns(low, middle + place - u)
        total = weight.sum()
        mean_r = (right * weight).sum(axis=2) / total
        mean_l = (left * weight).sum(axis=2) / total
        mean = ((mean_r + mean_l) / 2)[..., None]
        off_r, off_l = right - mean, left - mean
        power = 0.5 * ((off_r**2 + off_l**2) * weight).sum(axis=2) / total
        difference = 0.5 * ((right - left) ** 2 * weight).sum(axis=2) / total
        # 1 where both sides are equal; the constant keeps flat surroundings from meaning anything
        out[..., number] = (power - difference) / (power + 0.004) * inside
    return out


def _columns(images: Array, at: Array) -> Array:
    """Return float32 (plane, y, n): images at columns `at` (half or whole pixels), by linear interpolation."""
    low = np.floor(at).astype(int)
    share = (at - low).astype(np.float32)
    low = np.clip(low, 0, images.shape[2] - 2)
    return images[:, :, low] * (1 - share) + images[:, :, low + 1] * share


def _cheapest_path(match: Array) -> Array:
    """Return float64 (row,): the place in each row, by dynamic programming, refined between places."""
    n_rows, n_places = match.shape
    steps = np.arange(-4, 5)
    cost_of = BEND_COST * np.abs(steps) * STEP_MM + 0.02 * (steps * STEP_MM) ** 2
    total = np.empty((n_rows, n_places))
    came = np.zeros((n_rows, n_places), int)
    total[0] = -match[0]
    for row in range(1, n_rows):
        padded = np.pad(total[row - 1], 4, constant_values=np.inf)
        options = np.stack([padded[4 + s : 4 + s + n_places] + c for s, c in zip(steps, cost_of, strict=True)])
        chosen = options.argmin(axis=0)
        came[row] = np.arange(n_places) + steps[chosen]
        total[row] = options[chosen, np.arange(n_places)] - match[row]
    path = np.empty(n_rows, int)
    path[-1] = int(total[-1].argmin())
    for row in range(n_rows - 1, 0, -1):
        path[row - 1] = came[row, path[row]]
    inner = np.clip(path, 1, n_places - 2)
    rows = np.arange(n_rows)
    before, here, after = match[rows, inner - 1], match[rows, inner], match[rows, inner + 1]
    bend = before - 2 * here + after
    part = np.where(bend < -1e-6, 0.5 * (before - after) / np.where(bend < -1e-6, bend, -1), 0)
    return inner + np.clip(part, -0.5, 0.5)


def _against_rim(place: Array, sure: Array, good: Array, n_planes: int) -> Midline | None:
    known = np.isfinite(place)
    if not known.any():
        return None
    share = np.full(place.shape, np.nan)
    for k in range(len(place)):
        rows = np.flatnonzero(known[k])
        if rows.size:
            share[k, rows] = (rows - rows[0]) / max(rows[-1] - rows[0], 1)
    rim = known & ((share < RIM) | (share > 1 - RIM))
    n, r = np.nonzero(rim)
    columns = [np.ones(len(n)), (r - place.shape[1] / 2) / 30]
    if len(good) > 2:
        columns.append((good[n] - good.mean()) / 10)
    design = np.stack(columns, 1)
    values, weights = place[rim], np.clip(sure[rim], 0.05, 1)
    fit = np.zeros(design.shape[1])
    for _ in range(12):  # Huber: half of the lines may stray
        scaled = design * weights[:, None]
        fit = np.linalg.lstsq(scaled.T @ design, scaled.T @ values, rcond=None)[0]
        off = np.abs(values - design @ fit)
        weights = np.clip(sure[rim], 0.05, 1) / np.maximum(off, 0.7)
    scatter = float(np.median(np.abs(values - design @ fit)) * 1.48)
    every = [np.ones(place.shape), np.broadcast_to((np.arange(place.shape[1]) - place.shape[1] / 2) / 30, place.shape)]
    if len(good) > 2:
        every.append(np.broadcast_to(((good - good.mean()) / 10)[:, None], place.shape))
    off_mm = place - np.tensordot(fit, np.stack(every), 1)
    inner = known & (share >= RIM) & (share <= 1 - RIM)
    clear = np.where(inner, np.clip(sure - MIN_SURE * np.median(sure[inner]), 0, None), 0)
    smooth = _smooth(np.where(inner, off_mm, 0), clear)
    at = int(np.abs(smooth).argmax())
    shift = float(smooth.flat[at])
    whole = np.full((n_planes, place.shape[1]), np.nan)
    whole[good] = off_mm
    return Midline(whole, shift, int(good[at // smooth.shape[1]]), float(np.mean(sure[inner])), scatter)


def _smooth(values: Array, weight: Array) -> Array:
    """Return values averaged by weight over a few rows and planes; 0 where there is hardly any weight."""
    width = (0.6 if len(values) > 2 else 0.0, 1.5)
    there = ndimage.gaussian_filter(weight, width)
    smooth = ndimage.gaussian_filter(values * weight, width) / np.maximum(there, 1e-9)
    return np.where(there > 0.3 * np.median(there[there > 0]), smooth, 0)
