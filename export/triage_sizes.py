"""Fit how lesions' sizes scatter: `python -m export.triage_sizes --planes DIR` adds to what `triage.measure` reads.

What the shipped networks outline is compared with the truth: on contrasts learned from patients in held-out patients'
single slices, area by area with the expert's outline; elsewhere in simulated exams that no training saw, by volume.
A voxel counts from the level of LEVELS at which sizes, scaled, are off by least; a size is scaled so that it has no
bias over all cases, and its interval is the conformal one. How far that holds is tried on halves of the patients:
chosen and fitted on one, looked at on the other. Cases whose finding is not flagged, or is too small, are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.measurements import ASSETS, fit_spread
from export.triage_images import Plane, load
from export.triage_onnx import open_triage, run_triage
from export.triage_pool import MIN_AREA, is_training
from export.triage_validation import HEAD_CONTRASTS, exams_of
from recon.arrays import Array
from recon.contrast import CONTRASTS
from recon.protocol import Protocol, geometry
from triage.card import TriageCard, read_triage_card
from triage.measure import OUTLINE, Outline, Spread, outline
from triage.score import plane_scores, probabilities

MIN_ML = 1.0
MIN_CASES = 20  # below 19 a conformal interval of 95 % does not exist
FLOORS = {"volume_ml": 1.0, "diameter_mm": 3.0}
FLOOR_MM2 = 100.0
LEVELS = (OUTLINE, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)
N_HALVINGS = 50
SLICES = {"infarct": ("stroke-", "stroke_flair"), "mass": ("tumour-", "tumour_t1c")}  # patients': files and their set
STEPS_MM2 = (100, 400, 1000, 2000)


class Sizes(NamedTuple):
    """Cases with the finding: whose they are, true sizes float64 (case,) and those outlined (level, case), by name.

    found holds `extent_mm`, too, the planes in which a volume was outlined.
    is_slice: the volume is that of a slice 1 mm thick, so that 0.001 ml are 1 mm².
    """

    group: Array
    truth: dict[str, Array]
    found: dict[str, Array]
    is_slice: bool


def main() -> None:
    """Outline, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--planes", type=Path, nargs="+", required=True, metavar="DIR", help="made by export.triage_images"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of networks (default: the package's assets)")
    args = parser.parse_args()
    path = args.out / "measurement.json"
    content = json.loads(path.read_text("utf-8"))
    content["sizes"], content["levels"] = {}, {}
    for folder in sorted(each.parent for each in args.out.glob("*/card.json")):
        card = read_triage_card(json.loads((folder / "card.json").read_text("utf-8")))
        for contrast, of in card.contrasts.items():
            for size in FLOORS:
                content["spreads"].setdefault(f"{card.finding}_{size}", {}).pop(contrast, None)
            is_slice = of.evidence == "real"
            cases = sizes(folder, card, contrast, args.planes, is_slice)
            if len(cases.group) < MIN_CASES:
                continue
            level = best_level(cases)
            content["levels"].setdefault(card.finding, {})[contrast] = LEVELS[level]
            for size in FLOORS:
                name = f"{card.finding}_{size}"
                content["spreads"][name][contrast] = asdict(spread(cases, size, level))
                content["sizes"][f"{name} on {contrast}"] = found = tried(cases, size)
                print(name, contrast, LEVELS[level], found, flush=True)
            if is_slice:
                found = content["sizes"][f"{card.finding}_volume_ml on {contrast}"]
                found["by_area"] = by_area(cases, level)
                exams = sizes(folder, card, contrast, args.planes, False)
                if len(exams.group):
                    found["simulated_exams"] = volumes(exams, spread(cases, "volume_ml", level), level)
                    print(found, flush=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def sizes(folder: Path, card: TriageCard, contrast: str, planes: list[Path], is_slice: bool) -> Sizes:
    """Return true and outlined sizes of the held-out cases that are flagged."""
    session = open_triage(folder / "model.onnx")
    group: list[str] = []
    truths: list[Outline] = []
    founds: list[list[Outline | None]] = []
    of = card.contrasts[contrast]
    for name, images, masks, distance_mm in _cases(folder.name, contrast, planes, is_slice):
        truth = outline(masks.astype(np.float32), distance_mm, least_mm2=0)
        if truth is None or (not is_slice and truth.volume_ml < MIN_ML):
            continue
        logits = run_triage(session, images.astype(np.float32))[0]
        decision = of.one_slice if is_slice else of.exam
        if decision.probability(float(plane_scores(logits).max())) >= decision.threshold:
            maps = probabilities(logits[:, 0])
            group.append(name)
            truths.append(truth)
            founds.append([outline(maps, distance_mm, level) for level in LEVELS])
    found = {
        name: np.array([[0.0 if each is None else getattr(each, name) for each in case] for case in founds]).T
        for name in (*FLOORS, "extent_mm")
    }
    return Sizes(
        np.array(group), {name: np.array([getattr(e, name) for e in truths]) for name in FLOORS}, found, is_slice
    )


def _cases(model: str, contrast: str, planes: list[Path], is_slice: bool) -> Iterator[tuple[str, Array, Array, float]]:
    """Yield whose it is, planes and true outlines (plane, y, x), and mm between planes: 1 of a single slice."""
    if is_slice:
        files, source = SLICES[model]
        for each in _load(planes, f"{files}[0-9]*.npz"):
            is_one = each.label.source == source and each.label.factor == 0 and not is_training(each, "")
            if is_one and each.mask.sum() >= MIN_AREA:
                yield each.label.group, each.image[None], each.mask[None], 1.0
        return
    shown = HEAD_CONTRASTS.get(contrast)
    if shown is not None:
        distance_mm = geometry(Protocol(contrast=CONTRASTS[shown])).spacing_mm[0]
        for case in exams_of(model, shown, list(_load(planes, f"exams-{shown}-*.npz"))):
            if case.masks.any():
                yield case.group, case.images, case.masks, distance_mm


def _load(planes: list[Path], pattern: str) -> Iterator[Plane]:
    for path in sorted(each for folder in planes for each in folder.glob(pattern) if "part" not in each.name):
        yield from load([path])


def best_level(cases: Sizes, use: Array | slice = slice(None)) -> int:
    """Return the place in LEVELS at which volumes, scaled to have no bias, are off by least."""
    truth, found = cases.truth["volume_ml"][use], cases.found["volume_ml"][:, use]
    scaled = found * (truth.sum() / np.maximum(found.sum(1, keepdims=True), 1e-6))
    return int(np.abs(scaled - truth).mean(1).argmin())


def spread(cases: Sizes, size: str, level: int, use: Array | slice = slice(None)) -> Spread:
    """Return the spread of a size; that of slices' areas as one of volumes, whose planes err together."""
    is_area = cases.is_slice and size == "volume_ml"
    floor = FLOOR_MM2 / 1000 if is_area else FLOORS[size]
    found = fit_spread(cases.truth[size][use], cases.found[size][level, use], floor, is_total=True)
    return replace(found, floor=0.0, floor_mm2=1000 * floor) if is_area else found


def tried(cases: Sizes, size: str) -> dict[str, Any]:
    """Return bias and coverage on patients that level, scale and interval were not fitted on, means over halvings."""
    rng = np.random.default_rng(0)
    truth, names = cases.truth[size], np.unique(cases.group)
    bias, held, off, half = [], [], [], []
    for _ in range(N_HALVINGS):
        first = np.isin(cases.group, rng.permutation(names)[::2])
        for known, new in ((first, ~first), (~first, first)):
            level = best_level(cases, known)
            fitted = spread(cases, size, level, known)
            made = [fitted.measurement(each, 0.0, 1.0) for each in cases.found[size][level, new]]
            values = np.array([each.value for each in made], float)
            low, high = np.array([each.interval for each in made]).T
            bias.append(float((values - truth[new]).sum() / truth[new].sum()))
            held.append(float(((low <= truth[new]) & (truth[new] <= high)).mean()))
            off.append(float(np.abs(values - truth[new]).sum() / truth[new].sum()))
            half.append(float(np.median(high - values)))
    before = cases.found[size][0]
    unit = 1000 if cases.is_slice and size == "volume_ml" else 1
    return {
        "of": "patients' slices" if cases.is_slice else "simulated exams",
        "cases": len(truth),
        "patients": len(names),
        "mm2" if unit == 1000 else size.split("_")[1]: [round(unit * float(v), 1) for v in (truth.min(), truth.max())],
        "bias_at_one_half": round(float((before - truth).sum() / truth.sum()), 3),
        "off_at_one_half": round(float(np.abs(before - truth).sum() / truth.sum()), 3),
        "bias": round(float(np.mean(bias)), 3),
        "bias_of_halves": [round(float(v), 3) for v in np.percentile(bias, (5, 95))],
        "off": round(float(np.mean(off)), 3),
        "half_width": round(unit * float(np.mean(half)), 1),
        "held_by_95": round(float(np.mean(held)), 3),
    }


def volumes(exams: Sizes, fitted: Spread, level: int) -> dict[str, Any]:
    """Return how far the spread of patients' slices holds for whole volumes of simulated exams."""
    truth, found = exams.truth["volume_ml"], exams.found["volume_ml"][level]
    extent = exams.found["extent_mm"][level]
    made = [fitted.measurement(*each) for each in zip(found, np.zeros(len(found)), extent, strict=True)]
    held = [m.interval[0] <= t <= m.interval[1] for m, t in zip(made, truth, strict=True) if m.interval is not None]
    values = np.array([each.value for each in made], float)
    before = exams.found["volume_ml"][0]
    return {
        "exams": len(truth),
        "ml": [round(float(v), 1) for v in (truth.min(), truth.max())],
        "bias_at_one_half": round(float((before - truth).sum() / truth.sum()), 3),
        "bias": round(float((values - truth).sum() / truth.sum()), 3),
        "off": round(float(np.abs(values - truth).sum() / truth.sum()), 3),
        "half_width_ml": round(float(np.median([m.interval[1] - m.value for m in made if m.interval and m.value])), 1),
        "held": [int(sum(held)), len(held)],
    }


def by_area(cases: Sizes, level: int) -> list[dict[str, Any]]:
    """Return the bias of slices' areas by true area, scaled as shipped."""
    truth, found = 1000 * cases.truth["volume_ml"], 1000 * cases.found["volume_ml"][level]
    value = found * truth.sum() / found.sum()
    rows = []
    for low, high in zip(STEPS_MM2, (*STEPS_MM2[1:], np.inf), strict=True):
        some = (truth >= low) & (truth < high)
        if some.any():
            bias = float((value[some] - truth[some]).sum() / truth[some].sum())
            rows.append({"from_mm2": low, "cases": int(some.sum()), "bias": round(bias, 3)})
    return rows


if __name__ == "__main__":
    main()
