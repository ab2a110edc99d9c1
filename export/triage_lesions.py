"""Findings drawn into planes of real anatomy: masses, bleeding and infarcts, and what is mistaken for them.

Planes have the brain's median at 1 (`triage.preprocess`). Signal follows the textbook order of tissues for each
contrast (blood: Bradley, Radiology 189:15, 1993; tumours: Osborn's Brain, 2018) with wide random ranges; nothing here
is a measurement, and networks that learned from it are marked as simulated.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from export.triage_augment import brain_of, is_stripped, smooth_noise
from recon.arrays import Array

TISSUE = 0.35
SCALP_MM = 9.0  # of a head that still has it, with the skull
CAVITIES = 0.35  # of drawn infarcts on FLAIR


def blob(rng: np.random.Generator, shape: tuple[int, int], centre: Array, radius: float, rough: float = 0.2) -> Array:
    """Return how deep inside a rough ellipse pixels lie, in mm, negative outside: float32 (y, x)."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    turn = rng.uniform(0, np.pi)
    c, s = np.cos(turn), np.sin(turn)
    stretch = np.exp(rng.normal(0, 0.2))
    v, u = y - centre[0], x - centre[1]
    distance = np.hypot((c * v + s * u) * stretch, (c * u - s * v) / stretch)
    n = int(np.clip(2 * max(shape) / (2.0 * radius), 3, 40))
    return (radius * (1 + rough * smooth_noise(rng, shape, n)) - distance).astype(np.float32)


def cover(depth: Array, edge_mm: float) -> Array:
    """Return float32 coverage, 0 to 1, of a shape whose edge fades over `edge_mm`."""
    return np.clip(0.5 + depth / edge_mm, 0, 1).astype(np.float32)


def place_in(rng: np.random.Generator, image: Array, margin_mm: float) -> Array | None:
    """Return a pixel (y, x) of tissue some way inside the head; None where there is none."""
    small = image[::4, ::4]
    margin_mm = margin_mm if is_stripped(image) else margin_mm + SCALP_MM
    depth = 4 * ndimage.distance_transform_edt(np.pad(ndimage.binary_fill_holes(small > TISSUE), 1))[1:-1, 1:-1]
    there = np.argwhere((depth > margin_mm) & (small > TISSUE))
    return None if not len(there) else 4.0 * there[rng.integers(len(there))] + rng.uniform(0, 4, 2)


def push(image: Array, centre: Array, radius: float, shift: float) -> Array:
    """Return a plane whose tissue was pushed away from a place, most at `radius`, nothing far away or at the skull."""
    y, x = np.ogrid[: image.shape[0], : image.shape[1]]
    v, u = y - centre[0], x - centre[1]
    distance = np.hypot(v, u) + 1e-3
    head = ndimage.binary_fill_holes(image[::4, ::4] > 0.15)
    edge = 4 * ndimage.distance_transform_edt(np.pad(head, 1))[1:-1, 1:-1].astype(np.float32)
    ease = np.clip(np.kron(ndimage.gaussian_filter(edge, 1), np.ones((4, 4), np.float32)) / 22 - 0.35, 0, 1)
    size = shift * np.exp(-(((distance - radius) / (1.6 * radius + 12)) ** 2)) * np.minimum(distance / radius, 1) * ease
    rows = np.clip(y - size * v / distance, 0, image.shape[0] - 1)
    columns = np.clip(x - size * u / distance, 0, image.shape[1] - 1)
    return np.asarray(ndimage.map_coordinates(image, [rows, columns], order=1), np.float32)


def texture(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Array:
    """Return factors around 1 that vary over a few mm."""
    return np.exp(np.float32(size) * smooth_noise(rng, shape, int(rng.integers(15, 50))))


def insert_mass(rng: np.random.Generator, image: Array, contrast: str) -> tuple[Array, Array] | None:
    """Return a plane with a tumour, its oedema and its pressure, and the tumour's mask; None without a place."""
    radius = float(np.exp(rng.uniform(np.log(6), np.log(26))))
    centre = place_in(rng, image, rng.choice([14, 22, 30]))
    if centre is None:
        return None
    shape = image.shape
    out = push(image, centre, radius, float(rng.uniform(0.1, 0.5) * radius)) if rng.random() < 0.85 else image
    tumour = blob(rng, shape, centre, radius, rng.uniform(0.08, 0.3))
    host = np.clip((out - 0.25) / 0.3, 0, 1)
    wide = float(rng.uniform(0, 16)) if rng.random() < 0.8 else 0.0
    if wide > 2:
        halo = cover(blob(rng, shape, centre + rng.normal(0, 3, 2), radius + wide, 0.3), 5.0)
        matter = host * np.clip(1.15 - 0.5 * smooth_noise(rng, shape, 25), 0, 1)
        level = {"t1": (0.62, 0.9), "t1ce": (0.62, 0.9), "t2": (1.4, 2.4), "flair": (1.25, 2.1)}[contrast]
        out = out * (1 + halo * matter * np.float32(rng.uniform(*level) - 1))
    solid = {"t1": (0.6, 1.0), "t1ce": (1.25, 2.6), "t2": (1.1, 2.2), "flair": (0.9, 1.9)}[contrast]
    body = cover(tumour, rng.uniform(1.5, 5)) * np.clip(host + 0.5, 0, 1)
    out = out + body * (rng.uniform(*solid) * texture(rng, shape, rng.uniform(0.02, 0.2)) - out)
    if rng.random() < 0.6 and radius > 7:  # necrosis, with a rim of what is alive
        inner = blob(rng, shape, centre + rng.normal(0, 0.12 * radius, 2), radius * rng.uniform(0.35, 0.85), 0.2)
        dead = {"t1": (0.3, 0.7), "t1ce": (0.3, 0.8), "t2": (1.6, 3.2), "flair": (0.35, 1.8)}[contrast]
        out = out + cover(np.minimum(inner, tumour - 1.5), 3.0) * (rng.uniform(*dead) - out)
    return np.maximum(out, 0).astype(np.float32), (tumour > 0) & brain_of(image)


def insert_bleed(rng: np.random.Generator, image: Array, contrast: str) -> tuple[Array, Array] | None:
    """Return a plane with a haematoma of any stage, and its mask; None without a place. contrast: "swi" or "flair"."""
    radius = float(np.exp(rng.uniform(np.log(3.5), np.log(22))))
    centre = place_in(rng, image, rng.choice([10, 18, 28]))
    if centre is None:
        return None
    shape = image.shape
    out = push(image, centre, radius, rng.uniform(0.05, 0.3) * radius) if radius > 9 else image
    clot = blob(rng, shape, centre, radius, rng.uniform(0.06, 0.25))
    host = np.clip((out - 0.2) / 0.3, 0, 1)
    around = cover(blob(rng, shape, centre, radius + rng.uniform(2, 8), 0.25), 4.0) * host
    stage = int(rng.choice(4, p=[0.2, 0.4, 0.2, 0.2]))  # hyperacute, acute, early and late subacute
    grain = texture(rng, shape, rng.uniform(0.02, 0.25))
    if contrast == "swi":
        out = out * (1 + around * np.float32(rng.uniform(0.0, 0.4)))
        bloom = rng.uniform(0.5, 3.5)
        core = ((0.5, 1.3), (0.0, 0.35), (0.05, 0.5), (0.6, 1.6))[stage]
        out = out * (1 - cover(clot + bloom, rng.uniform(1.5, 4)) * np.float32(rng.uniform(0.7, 1.0)))
        if stage != 1:
            out = out + cover(clot - rng.uniform(1.5, 3), 2.5) * (rng.uniform(*core) * grain - out)
        mask = clot + 0.6 * bloom > 0
    else:
        out = out * (1 + around * np.float32(rng.uniform(0.15, 0.9)))
        core = ((1.1, 1.7), (0.25, 0.8), (0.3, 0.9), (1.4, 2.6))[stage]
        rim = rng.uniform(0.25, 0.75) if stage in (0, 3) else rng.uniform(0.25, 0.9)
        out = out + cover(clot, 2.0) * (rim - out)
        out = out + cover(clot - rng.uniform(1, 2.5), 2.0) * (rng.uniform(*core) * grain - out)
        mask = clot > 0
    return np.maximum(out, 0).astype(np.float32), mask & brain_of(image)


def to_gradient_echo(rng: np.random.Generator, image: Array, contrast: str) -> Array:
    """Return what a T2* or susceptibility-weighted scan of the same head might look like: no finding in it."""
    fluid = rng.uniform(0.8, 1.7)
    knots = {
        "t1": ((0, 0.0), (0.25, fluid), (0.55, rng.uniform(0.95, 1.25)), (0.85, rng.uniform(0.95, 1.2)),
               (1.15, rng.uniform(0.8, 1.0)), (4, rng.uniform(0.5, 1.2))),
        "t2": ((0, 0.0), (0.7, rng.uniform(0.75, 0.95)), (1.1, 1.0), (1.8, 0.5 + 0.5 * fluid), (4, fluid)),
        "flair": ((0, 0.0), (0.2, rng.uniform(0.7, 1.2)), (0.5, rng.uniform(0.8, 1.1)), (0.9, rng.uniform(0.8, 1.0)),
                  (1.2, 1.1), (4, 1.6)),
    }[contrast if contrast in ("t1", "t2") else "flair"]  # fmt: skip
    x, f = zip(*knots, strict=True)
    out = np.interp(image, x, f).astype(np.float32) * np.clip(image / 0.15, 0, 1)
    return np.asarray(drop_out(rng, out), np.float32)


def drop_out(rng: np.random.Generator, image: Array) -> Array:
    """Return a plane with what is dark on gradient echoes without being a bleed: air, veins, calcium, microbleeds."""
    shape = image.shape
    head = brain_of(image)
    if not head.any():
        return image
    rows, columns = np.flatnonzero(head.any(1)), np.flatnonzero(head.any(0))
    out = image.copy()
    for _ in range(int(rng.integers(0, 3))):  # sinuses and mastoids: at the outside, in front or at the sides
        side = rng.random()
        if side < 0.5:
            centre = np.array([rows[0] + rng.uniform(-6, 16), columns.mean() + rng.normal(0, 14)])
        else:
            centre = np.array([rows.mean() + rng.normal(10, 18), rng.choice(columns[[0, -1]]) + rng.normal(0, 6)])
        out = out * (1 - cover(blob(rng, shape, centre, rng.uniform(5, 20), 0.3), rng.uniform(4, 14)))
    for _ in range(int(rng.integers(0, 7))):  # veins: thin, long
        start = place_in(rng, image, 4)
        if start is not None:
            out = out * (1 - _vein(rng, shape, start) * np.float32(rng.uniform(0.3, 0.9)))
    if rng.random() < 0.4:  # iron and calcium in the deep nuclei: both sides alike
        middle = columns.mean()
        y, x = rows.mean() + rng.normal(-4, 6), rng.uniform(12, 26)
        depth = rng.uniform(0.15, 0.8)
        for sign in (-1, 1):
            spot = blob(rng, shape, np.array([y + rng.normal(0, 1), middle + sign * x]), rng.uniform(2, 8), 0.2)
            out = out * (1 - cover(spot, 3.0) * np.float32(depth))
    if rng.random() < 0.15:  # the pineal gland
        spot = blob(rng, shape, np.array([rows.mean() + rng.normal(8, 4), columns.mean()]), rng.uniform(1.5, 4), 0.1)
        out = out * (1 - cover(spot, 2.0) * np.float32(rng.uniform(0.5, 1)))
    for _ in range(int(rng.integers(0, 3)) if rng.random() < 0.3 else 0):  # too small to be urgent
        start = place_in(rng, image, 6)
        if start is not None:
            out = out * (1 - cover(blob(rng, shape, start, rng.uniform(1, 2.2), 0.1), 1.5))
    return out


def _vein(rng: np.random.Generator, shape: tuple[int, int], start: Array) -> Array:
    """Return a thin curve, float32 (y, x)."""
    steps = np.arange(0, rng.uniform(10, 45), 0.7)
    bend = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.1, len(steps)))
    path = start + np.cumsum(np.stack((np.sin(bend), np.cos(bend)), 1) * 0.7, 0)
    drawn = np.zeros(shape, np.float32)
    inside = ((path > 0) & (path < np.array(shape) - 1)).all(1)
    drawn[tuple(np.round(path[inside]).astype(int).T)] = 1
    width = rng.uniform(0.5, 1.1)
    return np.asarray(np.clip(ndimage.gaussian_filter(drawn, width) * 2.2 * width, 0, 1), np.float32)


def to_diffusion(rng: np.random.Generator, image: Array, contrast: str) -> Array:
    """Return what a diffusion-weighted scan (b = 1000 s/mm²) of the same head might look like: no finding in it."""
    fluid = rng.uniform(0.08, 0.4)
    grey = rng.uniform(1.0, 1.3)
    knots = {
        "t1": ((0, 0.0), (0.3, fluid), (0.6, 0.9), (0.85, grey), (1.15, 0.95), (1.6, 0.8), (4, 0.4)),
        "t2": ((0, 0.0), (0.7, 0.9), (1.0, 1.0), (1.35, grey), (1.9, 0.7), (2.4, fluid), (4, fluid)),
        "flair": ((0, 0.0), (0.4, fluid), (0.75, 0.8), (0.95, 0.97), (1.1, grey), (1.5, grey + 0.1), (4, grey + 0.3)),
    }[contrast if contrast in ("t1", "t2") else "flair"]
    x, f = zip(*knots, strict=True)
    out = np.interp(image, x, f).astype(np.float32)
    head = brain_of(image)
    rim = ndimage.gaussian_filter((ndimage.binary_erosion(head, iterations=9)).astype(np.float32), 2.0)
    if not (image == 0).mean() > 0.3:  # the scalp's fat is suppressed
        out = out * (rim + (1 - rim) * np.float32(rng.uniform(0.1, 0.7)))
    if rng.random() < 0.5:  # old or vasogenic: brighter by T2 alone
        for _ in range(int(rng.integers(1, 4))):
            centre = place_in(rng, image, 12)
            if centre is not None:
                patch = cover(blob(rng, image.shape, centre, rng.uniform(3, 14), 0.35), 5.0)
                out = out * (1 + patch * np.float32(rng.uniform(-0.5, 0.28)))
    return echo_planar(rng, out, head)


def echo_planar(rng: np.random.Generator, image: Array, head: Array) -> Array:
    """Return a plane stretched along y near air, where signal piles up, with bright edges."""
    rows, columns = np.flatnonzero(head.any(1)), np.flatnonzero(head.any(0))
    if not len(rows):
        return image
    y, x = np.ogrid[: image.shape[0], : image.shape[1]]
    shift = np.float32(rng.uniform(0, 2.5)) * smooth_noise(rng, image.shape, 2)
    for _ in range(int(rng.integers(0, 4))):
        centre = np.array([rng.choice([rows[0], rows.mean(), rows[-1]]), rng.choice(columns[[0, -1]])])
        if rng.random() < 0.5:
            centre = np.array([rows[0] + rng.uniform(-4, 10), columns.mean() + rng.normal(0, 16)])
        width = rng.uniform(5, 14)
        shift = shift + np.float32(rng.normal(0, 6)) * np.exp(
            -((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / np.float32(2 * width**2)
        )
    squeeze = np.clip(1 + np.gradient(shift, axis=0), 0.2, 3.0)
    grid = np.broadcast_to(x, image.shape)
    moved = ndimage.map_coordinates(image, [np.clip(y + shift, 0, image.shape[0] - 1), grid], order=1) * squeeze
    return np.asarray(moved, np.float32)


def insert_infarct(rng: np.random.Generator, image: Array, shape_mask: Array) -> tuple[Array, Array] | None:
    """Return a diffusion-weighted plane with an acute infarct of a patient's shape, and its mask; None if hardly any.

    shape_mask: bool (y, x), an infarct's outline in an upright, centred head.
    """
    seen = _placed(rng, image, shape_mask)
    mask = seen > 0.5
    if mask.sum() < 12:
        return None
    gain = np.float32(rng.uniform(0.45, 2.2))
    return (image * (1 + seen * gain * _patchy(rng, image))).astype(np.float32), mask


def insert_old_or_new_infarct(rng: np.random.Generator, image: Array, shape_mask: Array) -> tuple[Array, Array] | None:
    """Return a FLAIR plane with an infarct of a patient's shape, and its mask; None if hardly any.

    Bright, or, as often as CAVITIES says, a cavity as dark as fluid within a bright rim: what old ones become.
    shape_mask: bool (y, x), an infarct's outline in an upright, centred head.
    """
    seen = _placed(rng, image, shape_mask)
    mask = seen > 0.5
    if mask.sum() < 12:
        return None
    bright = image * (1 + seen * np.float32(rng.uniform(0.2, 0.9)) * _patchy(rng, image))
    if rng.random() >= CAVITIES:
        return bright.astype(np.float32), mask
    rim_mm = rng.uniform(0.5, 4.0)
    deep = np.clip((ndimage.distance_transform_edt(mask) - rim_mm) / 1.5, 0, 1)
    level = rng.uniform(0.05, 0.45) * np.clip(1 + 0.3 * smooth_noise(rng, image.shape, 12), 0.3, 2)
    return (bright * (1 - deep) + level * deep).astype(np.float32), mask


def _placed(rng: np.random.Generator, image: Array, shape_mask: Array) -> Array:
    """Return how much of each pixel an infarct of a patient's shape takes, 0 to 1, where there is brain."""
    if rng.random() < 0.5:
        shape_mask = shape_mask[:, ::-1]
    moved = np.roll(shape_mask, tuple(rng.normal(0, 6, 2).astype(int)), (0, 1))
    soft = ndimage.gaussian_filter(moved.astype(np.float32), rng.uniform(0.7, 2.0))
    inside = brain_of(image)
    if not is_stripped(image):
        inside = ndimage.binary_erosion(inside, iterations=int(SCALP_MM))
    return np.asarray(soft * np.clip((image - 0.4) / 0.3, 0, 1) * inside)


def _patchy(rng: np.random.Generator, image: Array) -> Array:
    return np.clip(1 + 0.25 * smooth_noise(rng, image.shape, int(rng.integers(8, 40))), 0.4, 1.5)


def coarsen(rng: np.random.Generator, image: Array, mm: tuple[float, float]) -> Array:
    """Return a plane as acquired with larger pixels (mm), noise and magnitudes included, on its own grid again."""
    n = [max(8, int(m / rng.uniform(*mm))) for m in image.shape]
    spectrum = np.fft.fftshift(np.fft.fft2(image))
    start = [(m - k) // 2 for m, k in zip(image.shape, n, strict=True)]
    window = tuple(slice(s, s + k) for s, k in zip(start, n, strict=True))
    kept = np.zeros_like(spectrum)
    kept[window] = spectrum[window]
    sigma = np.exp(rng.uniform(np.log(0.015), np.log(0.15))) * image.size / np.sqrt(np.prod(n))
    kept[window] += sigma * (rng.standard_normal(n) + 1j * rng.standard_normal(n))
    return np.abs(np.fft.ifft2(np.fft.ifftshift(kept))).astype(np.float32)
