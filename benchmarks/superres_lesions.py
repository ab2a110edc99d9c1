"""Does super-resolution hide lesions, or make some up? Small lesions put into held-out heads, and heads without any.

*Detectability*: a matched observer looks at places with and without a lesion, in independent noise, in the input (zero-
filled to the same grid) and in the super-resolved volume. Its answer is the area under its ROC curve: 0.5 is chance.
Lesions are round, 1 to 10 mm, brighter or darker than their surroundings; dots of 2 mm and no signal stand for
microbleeds.

*False structures*: blobs of the super-resolved image that stand out as a lesion would, where neither the truth nor the
input has anything of half that strength within 2 mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.stats import beta

from benchmarks.superres_cases import NAMES, NOISE, sinc, upright, volume_of
from export.superres_data import cut_k_space, held_out_patients, load_heads
from recon.arrays import Array
from recon.superres import super_resolve
from recon.superres_card import Refiner

DIAMETERS_MM = (1.0, 2.0, 3.0, 5.0, 10.0)
CONTRAST = {"bright": 0.15, "dark": -0.15, "microbleed": -1.0}  # of the scale; a microbleed takes all signal away
MICROBLEED_MM = 2.0
SITES = 24  # lesions of one kind and size in one head
REACH_MM = 8.0  # of the observer's window beyond the lesion
LESION_FREE = ("dep01", "dep13")
BLOB_MM = 1.5  # standard deviation of the difference of Gaussians that finds blobs
STANDS_OUT = 0.15  # contrast of a 3 mm lesion that a blob must match
NEAR_MM = 2.0
DRAWS = 2000


class Site(NamedTuple):
    """A place in a slice, in fine voxels."""

    slice: int
    y: float
    x: float


def detectability(data: Path, refiner: Refiner, n_sites: int = SITES, noise: float = NOISE) -> list[dict[str, Any]]:
    """Return one row for each kind and size, over all held-out heads."""
    kinds = [(kind, mm) for kind in ("bright", "dark") for mm in DIAMETERS_MM] + [("microbleed", MICROBLEED_MM)]
    rows = []
    for number, (kind, mm) in enumerate(kinds):
        answers: dict[str, list[Array]] = {"input": [], "network": []}
        for head_number, head in enumerate(load_heads(data, "val")):
            rng = np.random.default_rng([6, number, head_number])
            stack, spacing = upright(head)
            planes = np.ascontiguousarray(_even(stack[[int(f * len(stack)) for f in (0.45, 0.52, 0.6)]]))
            sites = list(_sites(rng, planes, n_sites, mm / spacing[1]))
            shape = _shapes(planes.shape, sites, mm, spacing[1:])
            level = planes if kind == "microbleed" else np.ones_like(planes)
            signal = CONTRAST[kind] * shape * level
            pair = []
            for truth in (planes + signal, planes):
                measured = np.stack([cut_k_space(rng, np.clip(plane, 0, None), noise) for plane in truth])
                volume = volume_of(measured, (spacing[0], 2 * spacing[1], 2 * spacing[2]))
                made = super_resolve(volume, refiner, NAMES[head.contrast])
                pair.append({"input": sinc(measured), "network": made.volume.data})
            for method, each in answers.items():
                each.append(_observed(pair[0][method], pair[1][method], signal, sites, mm, spacing[1]))
        seen = {method: np.concatenate(each) for method, each in answers.items()}  # (site, with or without)
        rows.append({"kind": kind, "diameter_mm": mm, "n": len(seen["input"]), **_compared(seen)})
    return rows


def _sites(rng: np.random.Generator, planes: Array, n: int, diameter: float) -> Iterator[Site]:
    """Yield up to `n` places inside the brain, apart from each other."""
    apart = diameter + 8
    taken: list[Site] = []
    inside = np.argwhere(np.stack([ndimage.binary_erosion(p > 0.2, iterations=6) for p in planes]))
    for k in rng.permutation(len(inside))[: 40 * n]:
        z, y, x = (int(v) for v in inside[k])
        if all(s.slice != z or np.hypot(s.y - y, s.x - x) > apart for s in taken):
            taken.append(Site(z, y + float(rng.uniform(-0.5, 0.5)), x + float(rng.uniform(-0.5, 0.5))))
            yield taken[-1]
        if len(taken) == n:
            return


def _shapes(shape: tuple[int, ...], sites: list[Site], mm: float, spacing: tuple[float, ...]) -> Array:
    """Return float64 (slice, y, x): the share of each voxel that lesions of `mm` fill."""
    out = np.zeros(shape)
    y, x = np.mgrid[: shape[1], : shape[2]]
    for site in sites:
        far = np.hypot((y - site.y) * spacing[0], (x - site.x) * spacing[1])
        out[site.slice] = np.maximum(out[site.slice], np.clip((mm / 2 - far) / spacing[0] + 0.5, 0, 1))
    return out


def _observed(present: Array, absent: Array, signal: Array, sites: list[Site], mm: float, step: float) -> Array:
    """Return the observer's answers (site, 2), with a lesion and without.

    Its template at each site is the lesion as drawn, less its mean over the window.
    """
    reach = int(np.ceil((mm / 2 + REACH_MM / 2) / step))
    out = []
    for site in sites:
        y, x = round(site.y), round(site.x)
        window = (
            site.slice,
            slice(max(0, y - reach), y + reach + 1),
            slice(max(0, x - reach), x + reach + 1),
        )
        template = signal[window] - signal[window].mean()
        size = float(np.linalg.norm(template)) or 1.0
        out.append([float((image[window] * template).sum()) / size for image in (present, absent)])
    return np.array(out)


def _compared(seen: dict[str, Array]) -> dict[str, Any]:
    """Return both areas under the curve and the interval of their difference, by bootstrap over sites."""
    rng = np.random.default_rng(1)
    n = len(seen["input"])
    drawn = []
    for _ in range(DRAWS):
        chosen = rng.integers(n, size=n)
        drawn.append(auc(seen["network"][chosen]) - auc(seen["input"][chosen]))
    areas = {method: auc(each) for method, each in seen.items()}
    return {
        **{method: round(area, 4) for method, area in areas.items()},
        "difference": round(areas["network"] - areas["input"], 4),
        "difference_95": [round(float(v), 4) for v in np.percentile(drawn, (2.5, 97.5))],
    }


def auc(answers: Array) -> float:
    """Return the area under the ROC curve of `answers` (site, with or without a lesion)."""
    order = np.sort(answers[:, 1])
    below = np.searchsorted(order, answers[:, 0], "left") + np.searchsorted(order, answers[:, 0], "right")
    return float(below.mean() / 2 / len(order))


def false_structures(data: Path, refiner: Refiner, n_patients: int, noise: float = NOISE) -> dict[str, Any]:
    """Count what stands out in super-resolved heads and is in neither truth nor input.

    Heads: the held-out T1w ones that have no lesion, eight slices each, and one slice each of `n_patients` stroke
    patients who were not learned from (their lesions are in the truth, and count for nothing).
    """
    found, by_sinc, n = 0, 0, 0
    for number, (planes, spacing, contrast) in enumerate(_heads(data, n_patients)):
        rng = np.random.default_rng([8, number])
        measured = np.stack([cut_k_space(rng, plane, noise) for plane in planes])
        volume = volume_of(measured, (spacing[0], 2 * spacing[1], 2 * spacing[2]))
        made = super_resolve(volume, refiner, contrast).volume.data
        plain = sinc(measured)
        found += count_new(made, [planes, plain], spacing[1])
        by_sinc += count_new(plain, [planes], spacing[1])
        n += 1
    low = float(beta.ppf(0.025, found, n - found + 1)) if 0 < found < n else 0.0
    high = float(beta.ppf(0.975, min(found, n - 1) + 1, n - min(found, n - 1)))
    return {
        "volumes": n,
        "found": found,
        "sinc": by_sinc,
        "per_100": round(100 * found / max(n, 1), 3),
        "per_100_95": [round(100 * low, 3), round(100 * high, 3)],
    }


def _heads(data: Path, n_patients: int) -> Iterator[tuple[Array, tuple[float, float, float], str]]:
    for head in load_heads(data, "val"):
        if head.subject in LESION_FREE:
            stack, spacing = upright(head)
            places = np.linspace(0.3, 0.7, 8)
            yield _even(stack[[int(f * len(stack)) for f in places]]), spacing, NAMES[head.contrast]
    slices = [each for each in held_out_patients(data) if each.source == "stroke_flair"]
    for each in slices[:: max(1, len(slices) // max(n_patients, 1))][:n_patients]:
        plane = each.pixels.astype(np.float32)
        yield _even(plane[None] / np.float32(np.percentile(plane, 99.5))), (5.0, *each.spacing_mm), "flair"


def count_new(image: Array, others: list[Array], step_mm: float) -> int:
    """Return how many blobs of `image` (slice, y, x) stand out where no image of `others` has half as much nearby."""
    sigma, near = BLOB_MM / step_mm, int(np.ceil(NEAR_MM / step_mm))
    least = STANDS_OUT * _lesion_response(step_mm)
    n = 0
    for z in range(len(image)):
        inside = ndimage.binary_erosion(others[0][z] > 0.15, iterations=max(3, round(4 / step_mm)))
        own = _blobs(image[z], sigma)
        for sign in (1, -1):
            peaks = (sign * own == ndimage.maximum_filter(sign * own, 2 * near + 1)) & (sign * own > least) & inside
            known = np.zeros_like(inside)
            for other in others:
                known |= ndimage.maximum_filter(sign * _blobs(other[z], sigma), 2 * near + 1) > least / 2
            n += int((peaks & ~known).sum())
    return n


def _blobs(plane: Array, sigma: float) -> Array:
    return np.asarray(ndimage.gaussian_filter(plane, sigma / 1.6) - ndimage.gaussian_filter(plane, 1.6 * sigma))


def _lesion_response(step_mm: float) -> float:
    """Return the peak of `_blobs` at a lesion of 3 mm whose contrast is 1."""
    y, x = np.mgrid[-20:21, -20:21] * step_mm
    return float(_blobs((np.hypot(y, x) <= 1.5).astype(float), BLOB_MM / step_mm).max())


def _even(stack: Array) -> Array:
    return np.ascontiguousarray(stack[:, : stack.shape[1] // 2 * 2, : stack.shape[2] // 2 * 2])
