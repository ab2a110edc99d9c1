"""Held-out cases for each triage network, and what it makes of them.

Real cases are slices of patients left out of training. Simulated ones are drawn by the training recipe itself from
planes of held-out subjects, with outlines of held-out patients. Exams are all planes of a held-out volume or of a
simulated head that no training saw; an exam's score is its planes' largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from export.triage_augment import look, move, paste
from export.triage_images import Plane, load
from export.triage_lesions import coarsen, insert_bleed, insert_infarct, insert_mass, to_diffusion, to_gradient_echo
from export.triage_onnx import run_triage
from export.triage_pool import MIN_AREA, is_training
from export.triage_recipes import GLIOMA
from recon.arrays import Array
from triage.preprocess import SIZE
from triage.score import plane_scores, probabilities

HEAD_FINDINGS = {"infarct": "infarct", "infarct-dwi": "infarct", "haemorrhage": "bleed", "mass": "mass"}
HEAD_CONTRASTS = {"flair": "flair", "dwi": "dwi", "swi": "t2star", "t1": "t1", "t2": "t2"}
DRAWS = 3  # exams made of each held-out volume, with the finding and without
SLICES = 160  # simulated slices a contrast


@dataclass(frozen=True, eq=False)
class Cases:
    """Results: one row a case. area_mm2: the largest in a slice. peak_inside: the map's peak lies in the outline.

    dice: of the map at one half, in cases with the finding. factor: R, 0 for images as published.
    """

    score: Array
    is_positive: Array
    is_exam: Array
    is_simulated: Array
    area_mm2: Array
    factor: Array
    group: list[str]
    peak_inside: Array
    dice: Array

    def where(self, chosen: Array) -> Cases:
        """Return some of the cases."""
        groups = [name for name, kept in zip(self.group, chosen, strict=True) if kept]
        arrays = {name: getattr(self, name)[chosen] for name in self.__dataclass_fields__ if name != "group"}
        return Cases(group=groups, **arrays)


@dataclass(frozen=True, eq=False)
class Case:
    """Planes float32 (n, y, x) of one slice or exam, and the finding in each, bool (n, y, x)."""

    images: Array
    masks: Array
    is_exam: bool
    is_simulated: bool
    group: str
    factor: int = 0


def evaluate(session: Any, cases: list[Case]) -> tuple[Cases, Array]:
    """Return the results of cases, and the network's features of all their planes (plane, k)."""
    rows: list[tuple[float, ...]] = []
    features = []
    for case in cases:
        logits, seen = run_triage(session, case.images)
        features.append(seen)
        area = case.masks.sum((1, 2))
        best = int(np.argmax(plane_scores(logits)))
        maps = probabilities(logits[:, 0])
        peak_inside, dice = np.nan, np.nan
        if area.any():
            shown = best if not case.is_exam else int(np.argmax(area))
            smooth = ndimage.uniform_filter(maps[shown], 7)
            place = np.unravel_index(int(smooth.argmax()), smooth.shape)
            peak_inside = float(case.masks[shown][place])
            found = maps[shown] > 0.5
            dice = 2 * float((found & case.masks[shown]).sum()) / max(float(found.sum() + case.masks[shown].sum()), 1)
        rows.append((float(plane_scores(logits).max()), float(area.max()), peak_inside, dice))
    score, area, inside, dice = np.array(rows).T
    return Cases(
        score,
        area > 0,
        np.array([each.is_exam for each in cases]),
        np.array([each.is_simulated for each in cases]),
        area,
        np.array([each.factor for each in cases]),
        [each.group for each in cases],
        inside,
        dice,
    ), np.concatenate(features)


def held_out(finding: str, contrast: str, folder: Path, fold: str = "", seed: int = 7) -> list[Case]:
    """Return the held-out cases of a network's contrast."""
    rng = np.random.default_rng([seed, sum(contrast.encode())])
    planes = [each for each in _planes(folder) if not is_training(each, fold)]
    cases: list[Case] = []
    if (finding, contrast) == ("infarct", "flair"):
        cases += [_slice(each) for each in planes if each.label.source == "stroke_flair" and _is_clear(each)]
    if finding in ("haemorrhage", "mass") and contrast == "flair":  # nobody's infarct is either
        patients = [each for each in planes if each.label.source == "stroke_flair" and each.label.factor == 0]
        cases += [replace(_slice(each), masks=np.zeros((1, *SIZE), bool)) for each in patients]
    if (finding, contrast) == ("mass", "t1ce"):
        cases += [_slice(each) for each in planes if each.label.source == "tumour_t1c"]
    cases += _simulated(rng, finding, contrast, planes)
    cases += exams_of(finding, HEAD_CONTRASTS.get(contrast, ""), planes)
    return cases


def visibility(case: Case) -> float:
    """Return how far a slice's finding stands out: its brightness against a ring around it, in the ring's scatter.

    NaN without a finding.
    """
    image, mask = case.images[0], case.masks[0]
    ring = ndimage.binary_dilation(mask, iterations=12) & ~ndimage.binary_dilation(mask, iterations=3) & (image > 0.4)
    if not mask.any() or ring.sum() < 20:
        return float("nan")
    scatter = 1.4826 * np.median(np.abs(image[ring] - np.median(image[ring])))
    return float(abs(np.median(image[mask]) - np.median(image[ring])) / max(scatter, 1e-3))


def _planes(folder: Path) -> list[Plane]:
    return load([path for path in sorted(folder.glob("*.npz")) if "part" not in path.name])


def _is_clear(plane: Plane) -> bool:
    return not plane.mask.any() or plane.mask.sum() >= MIN_AREA


def _slice(plane: Plane) -> Case:
    image = plane.image.astype(np.float32)
    return Case(image[None], plane.mask[None], False, False, plane.label.group, plane.label.factor)


def exams_of(finding: str, contrast: str, planes: list[Plane]) -> list[Case]:
    """Return whole simulated heads with the finding or with none; other findings are not this network's to judge."""
    by_group: dict[str, list[Plane]] = {}
    for each in planes:
        wanted = each.label.source == "exams" and each.label.contrast == contrast
        if wanted and each.label.finding in ("none", HEAD_FINDINGS[finding]):
            by_group.setdefault(each.label.group, []).append(each)
    cases = []
    for group, members in by_group.items():
        masks = np.stack([each.mask for each in members])
        if members[0].label.finding != "none" and masks.sum((1, 2)).max() < MIN_AREA:
            continue
        images = np.stack([each.image for each in members]).astype(np.float32)
        cases.append(Case(images, masks, True, True, group, members[0].label.factor))
    return cases


def volumes_without(contrast: str, planes: list[Plane], is_held_out: bool = False) -> list[Case]:
    """Return the real volumes of training subjects, or of others; the glioma is left out: nothing urgent is in them."""
    by_group: dict[str, list[Plane]] = {}
    for each in planes:
        label = each.label
        is_one = label.source == "volumes" and label.contrast == contrast and label.group != GLIOMA
        if is_one and is_training(each, "") == (not is_held_out):
            by_group.setdefault(label.group, []).append(each)
    cases = []
    for group, members in by_group.items():
        images = np.stack([each.image for each in members]).astype(np.float32)
        cases.append(Case(images, np.zeros(images.shape, bool), True, False, group))
    return cases


Inserter = Callable[[np.random.Generator, Array], tuple[Array, Array] | None]


def _simulated(rng: np.random.Generator, finding: str, contrast: str, planes: list[Plane]) -> list[Case]:
    """Return slices and exams of held-out subjects with simulated findings and without any."""
    shapes = [each.mask for each in planes if each.label.source == "shapes"]
    sources = {"flair": ("flair",), "t1": ("t1",), "t2": ("t2",), "t1ce": ("t1",)}.get(contrast, ("t1", "t2", "flair"))
    volumes: dict[tuple[str, str], list[Plane]] = {}
    for each in planes:
        if each.label.source == "brain" and each.label.contrast in sources and each.label.factor == 0:
            volumes.setdefault((each.label.group, each.label.contrast), []).append(each)
    if finding == "infarct":
        donors = [each for each in planes if each.label.source == "stroke_flair" and each.mask.sum() >= MIN_AREA]
        insert = _pasting(donors)
    else:
        insert = _inserting(finding, contrast, shapes)
    cases = []
    for (group, shown), members in volumes.items():
        for _ in range(DRAWS):
            for has_finding in (False, True):
                case = _exam(rng, contrast, shown, members, insert if has_finding else None)
                if case is not None:
                    cases.append(Case(*case, True, True, group))
    everything = [(each, shown) for (_, shown), members in volumes.items() for each in members]
    for number in range(SLICES if everything else 0):
        plane, shown = everything[int(rng.integers(len(everything)))]
        made = _made(rng, contrast, shown, plane, insert if number % 2 else None)
        if made is not None and (not made[1].any() or made[1].sum() >= MIN_AREA):
            cases.append(Case(made[0][None], made[1][None], False, True, plane.label.group))
    return cases


def _exam(
    rng: np.random.Generator, contrast: str, shown: str, members: list[Plane], insert: Inserter | None
) -> tuple[Array, Array] | None:
    """Return planes and masks of an exam; the finding, if any, lies in one plane of the middle half."""
    chosen = int(rng.integers(len(members) // 4, 3 * len(members) // 4))
    images, masks = [], []
    for number, each in enumerate(members):
        made = _made(rng, contrast, shown, each, insert if number == chosen else None)
        if made is None or (number == chosen and insert is not None and made[1].sum() < MIN_AREA):
            return None
        images.append(made[0])
        masks.append(made[1])
    return np.stack(images), np.stack(masks)


def _made(
    rng: np.random.Generator, contrast: str, shown: str, plane: Plane, insert: Inserter | None
) -> tuple[Array, Array] | None:
    """Return a plane in the network's contrast with a finding, or without one; None where none could be inserted."""
    image, mask = made_of(rng, contrast, shown, plane.image.astype(np.float32)), np.zeros(SIZE, bool)
    if insert is not None:
        made = insert(rng, image)
        if made is None:
            return None
        image, mask = made
    if contrast == "dwi":
        image = coarsen(rng, image, (1.5, 3.0))
    image, mask = move(rng, image, mask)
    return look(rng, image), mask


def made_of(rng: np.random.Generator, contrast: str, shown: str, image: Array) -> Array:
    """Return a plane of the contrast `shown` as a network's contrast shows it; simulated where there is no real one."""
    if contrast == shown or contrast not in ("dwi", "swi") or shown not in ("t1", "t2", "flair"):
        return image
    return to_diffusion(rng, image, shown) if contrast == "dwi" else to_gradient_echo(rng, image, shown)


def _pasting(donors: list[Plane]) -> Inserter:
    def insert(rng: np.random.Generator, image: Array) -> tuple[Array, Array] | None:
        donor = donors[int(rng.integers(len(donors)))]
        return paste(rng, image, np.zeros(image.shape, bool), donor.image.astype(np.float32), donor.mask)

    return insert


def _inserting(finding: str, contrast: str, shapes: list[Array]) -> Inserter:
    def insert(rng: np.random.Generator, image: Array) -> tuple[Array, Array] | None:
        if finding == "mass":
            return insert_mass(rng, image, contrast)
        if finding == "haemorrhage":
            return insert_bleed(rng, image, contrast)
        return insert_infarct(rng, image, shapes[int(rng.integers(len(shapes)))])

    return insert
