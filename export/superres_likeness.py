"""The heads that the super-resolution network knows, in numbers, and how far from them a head may be.

Real volumes of the training split, as they are and degraded, their contrast bent a little; simulated heads of the
contrasts that no real volume shows (proton density). The limit is what whole subjects keep that were left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.heads import load_anatomy
from export.superres_data import Head, altered, cut_k_space
from recon.arrays import Array
from recon.contrast import CONTRASTS, Contrast, Sequence
from recon.head import make_head
from recon.head_likeness import MIDDLE, Likeness, describe
from recon.protocol import Protocol
from recon.scanner import scan_slice
from recon.superres import image_scale, noise_level

PROTON_DENSITY = Contrast("pd", Sequence.SPIN_ECHO, 3000, 15)
SIMULATED: tuple[Contrast, ...] = (CONTRASTS["t1"], CONTRASTS["t2"], CONTRASTS["flair"], PROTON_DENSITY)
PER_VOLUME = 10
MOST_KEEP = 0.99  # share of left-out subjects' slices whose distance lies below the limit before its margin
MARGIN = 1.15
SPREAD_FLOOR = 0.05


@dataclass(frozen=True, eq=False)
class Known:
    """Described slices, float32 (slice, number), and whose each is."""

    numbers: Array
    subjects: tuple[str, ...]


def describe_heads(heads: list[Head], seed: int = 5) -> Known:
    """Return slices of real heads in every direction that a head is scanned in, sharp and degraded."""
    rng = np.random.default_rng(seed)
    found, subjects = [], []
    for head in heads:
        axes = (0, 1, 2) if head.is_isotropic else (head.slice_axis,)
        for axis in axes:
            stack = np.moveaxis(head.voxels, axis, 0)
            y_mm, x_mm = (head.spacing_mm[i] for i in range(3) if i != axis)
            for at in rng.uniform(*MIDDLE, PER_VOLUME):
                plane = stack[int(at * len(stack))].astype(np.float32)
                if (plane > 12).mean() < 0.05:
                    continue
                truth = altered(rng, plane)[: len(plane) // 2 * 2, : plane.shape[1] // 2 * 2]
                sharp = rng.random() < 0.4
                image = truth if sharp else cut_k_space(rng, truth, float(np.exp(rng.uniform(-6, -3))))
                spacing = (y_mm, x_mm) if sharp else (2 * y_mm, 2 * x_mm)
                found.append(describe(image, spacing, noise_level(image[None]) / image_scale(image)))
                subjects.append(head.subject)
    return Known(np.stack(found), tuple(subjects))


def describe_simulated(n_heads: int, seed: int = 9) -> Known:
    """Return slices of simulated heads in every contrast of `SIMULATED`."""
    found, subjects = [], []
    for name, image, spacing in simulated_slices(n_heads, seed, (0.35, 0.5, 0.65)):
        found.append(describe(image, spacing, noise_level(image[None]) / image_scale(image)))
        subjects.append(name)
    return Known(np.stack(found), tuple(subjects))


def simulated_slices(
    n_heads: int, seed: int, places: tuple[float, ...], matrix: int = 128
) -> Iterator[tuple[str, Array, tuple[float, float]]]:
    """Yield name, image (y, x) with some noise, and voxel in mm, of simulated heads."""
    anatomy = load_anatomy()
    rng = np.random.default_rng(seed)
    for number in range(n_heads):
        head = make_head(anatomy, seed * 1000 + number)
        for contrast in SIMULATED:
            protocol = Protocol(contrast=contrast, matrix=(matrix, matrix), n_coils=4, seed=number)
            spacing = (protocol.fov_mm[0] / matrix, protocol.fov_mm[1] / matrix)
            for place in places:
                image = scan_slice(head, protocol, int(place * protocol.n_slices)).image
                noise = rng.standard_normal((2, *image.shape)) * image_scale(image) * float(np.exp(rng.uniform(-6, -4)))
                yield f"head{number}", np.hypot(image + noise[0], noise[1]).astype(np.float32), spacing


def fit(real: Known, simulated: Known) -> Likeness:
    """Return the likeness whose limit left-out real subjects keep, with a margin."""
    numbers = np.concatenate((real.numbers, simulated.numbers))
    names = np.array((*real.subjects, *simulated.subjects))
    spread = np.maximum(numbers.std(axis=0), SPREAD_FLOOR)
    away = []
    for subject in dict.fromkeys(real.subjects):
        others = Likeness(numbers[names != subject], spread, 0.0)
        own = numbers[names == subject]
        away += [others.distance(each[None]) for each in own]
    limit = MARGIN * float(np.quantile(away, MOST_KEEP))
    return Likeness(numbers.astype(np.float32), spread.astype(np.float32), limit)


def write_likeness(likeness: Likeness, path: Path) -> None:
    """Write `likeness` as a NumPy archive."""
    np.savez(path, known=likeness.known, spread=likeness.spread, limit=np.float64(likeness.limit))
