"""Ship a triage network: `python -m export.triage_card --checkpoint FILE --planes DIR --out DIR [--folds FILE...]`.

Writes model.onnx, card.json, CARD.md and calibration.npz (scores of held-out cases and what inputs look like), after
checking that ONNX Runtime computes what PyTorch does. Every figure in the card is measured here, with the ONNX file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.onnx import OPSET
from export.slices import SETS
from export.triage_checks import check
from export.triage_composites import composites, joined
from export.triage_images import Plane, load
from export.triage_likeness import fit_likeness
from export.triage_onnx import check_triage, open_triage, write_triage
from export.triage_page import write_page
from export.triage_pool import is_training
from export.triage_statistics import (
    EXAM_SPECIFICITY,
    auc,
    balanced_threshold,
    calibration_error_by_others,
    count,
    fit,
    flagged_by_others,
    proportion,
    sigmoid,
    summary,
    words,
)
from export.triage_train import load_triage
from export.triage_validation import Case, Cases, evaluate, held_out, visibility, volumes_without
from recon.arrays import Array
from triage.card import CALIBRATION, EVIDENCE
from triage.preprocess import SIZE, STEP_MM
from triage.score import VIEW

VERSION = "2"
ABOVE = 0.01  # logit above the highest score of a real volume without the finding
STEPS = (100, 200, 400, 1000, 2000)  # mm²
FINDING = {"infarct": "infarct", "infarct-dwi": "infarct", "haemorrhage": "haemorrhage", "mass": "mass"}
CONTRASTS = {
    "infarct": {"flair": "real"},
    "infarct-dwi": {"dwi": "simulated"},
    "haemorrhage": {"swi": "simulated", "flair": "simulated"},
    "mass": {"t1ce": "real", "t1": "simulated", "t2": "simulated", "flair": "simulated"},
}
LIMITS = {
    "infarct": [
        "outlines hold acute and chronic infarcts; the network does not tell them apart",
        "trained on one axial level of each patient; other levels through other heads, simulated and real",
        "no healthy controls: slices without a finding come from patients with a stroke elsewhere",
        "some outlined infarcts cannot be seen on FLAIR at all",
    ],
    "mass": [
        "post-contrast T1w: trained and tested on outlined tumours; no patient without one, so the specificity is that "
        "of T1w heads without contrast agent",
        "T1w, T2w and FLAIR: simulated masses only",
        "neighbouring slices of one patient were kept together by blocks of numbers, not by identity",
    ],
    "haemorrhage": ["simulated bleeding only: no patient's haemorrhage was seen in training or testing"],
    "infarct-dwi": [
        "simulated contrast and infarcts only: no diffusion-weighted scan was seen in training or testing",
        "trace-weighted images of b about 1000 s/mm² are meant; no use is made of the diffusion coefficient",
    ],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the model folder."""
    parser = argparse.ArgumentParser(prog="python -m export.triage_card", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="or a model.onnx, card beside it"
    )
    parser.add_argument("--planes", type=Path, required=True, metavar="DIR", help="made by export.triage_images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--folds", type=Path, nargs="*", default=[], metavar="FILE", help="checkpoints of --fold runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    network, checkpoint = load_triage(args.checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "model.onnx"
    write_triage(network, path)
    planes = load([each for each in sorted(args.planes.glob("*.npz")) if "part" not in each.name])
    with_image = [each for each in planes if each.image.shape == SIZE]
    difference = check_triage(network, path, np.stack([each.image for each in with_image[:3]]).astype(np.float32))
    session = open_triage(path)
    name = str(checkpoint["finding"])
    arrays: dict[str, Array] = {}
    contrasts = {
        contrast: _contrast(session, name, contrast, evidence, args.planes, planes, arrays)
        for contrast, evidence in CONTRASTS[name].items()
    }
    np.savez_compressed(args.out / CALIBRATION, **arrays)
    card: dict[str, Any] = {
        "name": f"scanside-{name}",
        "version": VERSION,
        "task": f"{FINDING[name]} on {', '.join(CONTRASTS[name])}: axial planes to a map of where it lies",
        "sha256": _sha256(path),
        "files": {path.name: path.stat().st_size},
        "finding": FINDING[name],
        "plane": "axial",
        "step_mm": STEP_MM,
        "size": list(SIZE),
        "opset": OPSET,
        "inputs": {"planes": ["plane", 2, *VIEW]},
        "outputs": {"lesion": ["plane", 1, *VIEW], "features": ["plane", int(checkpoint["widths"][-1])]},
        "parity_with_pytorch": float(f"{difference:.1e}"),
        "network": {"widths": list(checkpoint["widths"]), "parameters": sum(p.numel() for p in network.parameters())},
        "training": {k: checkpoint[k] for k in ("minutes", "step", "batch", "seed")},
        "data": _data(name, planes),
        "calibration": {"file": CALIBRATION, "sha256": _sha256(args.out / CALIBRATION)},
        "contrasts": contrasts,
        "limits": [
            *LIMITS[name],
            "axial planes only; children, neonates, implants and earlier surgery were not looked at",
            "a finding smaller than 100 mm² in every slice is not asked for",
        ],
        "not_for": "diagnosis",
    }
    if args.folds:
        card["cross_validation"] = cross_validate(args.folds, args.planes, args.out)
    (args.out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(card, args.out / "CARD.md")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _contrast(
    session: Any, name: str, contrast: str, evidence: str, folder: Path, planes: list[Plane], arrays: dict[str, Array]
) -> dict[str, Any]:
    """Return a contrast's part of the card; its calibration goes into `arrays`."""
    assert evidence in EVIDENCE
    cases = held_out(name, contrast, folder)
    results, features = evaluate(session, cases)
    is_real = ~results.is_simulated & ~results.is_exam
    published = is_real & (results.factor == 0)
    slices = results.where(published) if evidence == "real" else results.where(~results.is_exam)
    if evidence == "real" and slices.is_positive.all():  # tumours alone: heads without one are another set's
        slices = results.where(published | (~results.is_exam & ~results.is_positive))
    exams = composites(results)
    highest = {is_other: _highest(session, volumes_without(contrast, planes, is_other)) for is_other in (False, True)}
    floor = max(float(each.max(initial=-np.inf)) for each in highest.values()) + ABOVE
    one, exam = _decision(slices, 0.0), _decision(exams, EXAM_SPECIFICITY, floor)
    n_planes = [len(each.images) for each in cases]
    is_plain = np.repeat([not each.is_simulated or each.group.startswith("head-") for each in cases], n_planes)
    if contrast in ("swi", "dwi") or not is_plain.any():  # there is nothing else
        is_plain[:] = True
    images = np.concatenate([each.images for each in cases])[is_plain]
    features = features[is_plain]
    likeness = fit_likeness(session, name, contrast, planes, images, features, arrays)
    kept = published | (results.is_simulated & ~results.is_exam & (evidence == "simulated"))
    if evidence == "real" and not (published & ~results.is_positive).any():
        kept |= ~results.is_exam & ~results.is_positive
    saved = joined(results.where(kept), exams)
    for field in ("score", "area_mm2"):
        arrays[f"{contrast}.{field}"] = getattr(saved, field).astype(np.float32)
    for field in ("is_positive", "is_exam", "is_simulated"):
        arrays[f"{contrast}.{field}"] = getattr(saved, field)
    arrays[f"{contrast}.group"] = np.unique(saved.group, return_inverse=True)[1].astype(np.int32)
    out: dict[str, Any] = {"evidence": evidence, "slice": one, "exam": exam, **likeness}
    laid = "patients' slices in simulated heads" if (exams.is_positive & ~exams.is_simulated).any() else "simulated"
    if (~exams.is_positive & ~exams.is_simulated).any() and laid == "simulated":
        laid = "simulated; without: patients' slices in simulated heads"
    out["metrics"] = {
        "slices": {"of": _of(slices), **_summary(slices, slices, 0.0)},
        "exams": {"of": laid, **_summary(exams, exams, EXAM_SPECIFICITY, floor)},
    }
    if (~exams.is_simulated).any():
        heads = results.where(results.is_exam)
        out["metrics"]["simulated_exams"] = {"of": "simulated", **_summary(heads, exams, EXAM_SPECIFICITY, floor)}
    if len(highest[False]):
        chosen = balanced_threshold(exams.score, exams.is_positive, EXAM_SPECIFICITY)
        without_others = max(chosen, float(highest[False].max()) + ABOVE)
        out["volumes_without"] = {
            "training": len(highest[False]),
            "set_the_point": floor > chosen,
            "held_out": len(highest[True]),
            "held_out_flagged": int((highest[True] >= without_others).sum()),
        }
    if evidence == "real":
        simulated = results.where(results.is_simulated & ~results.is_exam)
        out["metrics"]["simulated_slices"] = {"of": "simulated", **_summary(simulated, slices, 0.0)}
        out["metrics"]["reconstructed"] = _by_factor(results.where(is_real & (results.factor > 0)), slices)
        out["checks"] = check(session, cases)
    return out


def _highest(session: Any, volumes: list[Case]) -> Array:
    """Return the score of each volume, float64 (volume,)."""
    return evaluate(session, volumes)[0].score if volumes else np.empty(0)


def _of(slices: Cases) -> str:
    """Return whose slices these are, in words."""
    real = ~slices.is_simulated
    if real[slices.is_positive].any():
        return "patients"
    return "simulated; without: patients, too" if real[~slices.is_positive].any() else "simulated"


def _decision(cases: Cases, least_specificity: float, floor: float = -np.inf) -> dict[str, float]:
    """Return slope, offset and threshold as the card has them, from all held-out cases; no point below `floor`."""
    slope, offset = fit(cases.score, cases.is_positive)
    threshold = max(balanced_threshold(cases.score, cases.is_positive, least_specificity), floor)
    found = {"slope": slope, "offset": offset, "threshold": sigmoid(slope * threshold + offset)}
    if np.isfinite(floor):
        found["floor"] = floor
    return {name: round(value, 5) for name, value in found.items()}


def _summary(cases: Cases, chosen_on: Cases, least_specificity: float, floor: float = -np.inf) -> dict[str, Any]:
    """Return the figures of cases at operating points that were chosen on other patients among `chosen_on`."""
    if cases is chosen_on:
        flagged = flagged_by_others(cases.score, cases.is_positive, cases.group, least_specificity, floor)
    else:
        flagged = _flagged(cases, chosen_on, least_specificity, floor)
    out = summary(cases.score, cases.is_positive, cases.area_mm2, flagged, STEPS)
    if cases is chosen_on and np.isfinite(flagged).all():
        error = calibration_error_by_others(cases.score, cases.is_positive, cases.group)
        out["calibration_error"] = round(error, 4)
    inside, dice = cases.peak_inside[cases.is_positive], cases.dice[cases.is_positive]
    if len(inside):
        out["peak_inside"] = words(proportion(int(np.nansum(inside)), len(inside)))
        out["median_dice"] = round(float(np.nanmedian(dice)), 3)
    return out


def _flagged(cases: Cases, chosen_on: Cases, least_specificity: float, floor: float = -np.inf) -> Array:
    """Return whether cases of another kind are flagged, each at the point of the patients that are not its own."""
    out = np.empty(len(cases.score))
    group, known = np.array(cases.group), np.array(chosen_on.group)
    for name in np.unique(group):
        others = known != name
        threshold = balanced_threshold(chosen_on.score[others], chosen_on.is_positive[others], least_specificity)
        out[group == name] = cases.score[group == name] >= max(threshold, floor)
    return out


def _by_factor(cases: Cases, chosen_on: Cases) -> list[dict[str, Any]]:
    """Return the results of reconstructed slices by acceleration."""
    found = []
    for low, high in ((1, 2), (2, 4), (4, 6), (6, 9)):
        chosen = cases.where((cases.factor >= low) & (cases.factor < high))
        if len(chosen.score) > 5:
            found.append({"acceleration": [low, high - 1], **_summary(chosen, chosen_on, 0.0)})
    return found


def _data(name: str, planes: list[Plane]) -> list[dict[str, Any]]:
    """Return what was trained on, by set."""
    wanted = {
        "infarct": ("stroke_flair", "brain"),
        "mass": ("tumour_t1c", "stroke_flair", "brain"),
        "haemorrhage": ("stroke_flair", "brain"),
        "infarct-dwi": ("brain", "shapes"),
    }[name]
    extra = {"shapes": ("outlines of infarcts from OpenNeuro ds004889 (Absher 2024)", "CC0")}
    found = []
    for source in wanted:
        members = [each for each in planes if each.label.source == source]
        training = [each for each in members if is_training(each, "")]
        what, licence = {**SETS, **extra}[source]
        found.append(
            {
                "set": source,
                "what": what,
                "licence": licence,
                "subjects": len({each.label.group for each in training}),
                "planes": len(training),
                "held_out_subjects": len({each.label.group for each in members} - {e.label.group for e in training}),
            }
        )
    heads = [each for each in planes if each.label.source == "heads"]
    found.append(
        {
            "set": "heads",
            "what": "simulated whole heads on the ICBM 152 average (recon.scanner)",
            "licence": "ICBM 152 licence beside the asset",
            "subjects": len({each.label.group for each in heads}),
            "planes": len(heads),
            "held_out_subjects": len({each.label.group for each in planes if each.label.source == "exams"}),
        }
    )
    return found


def cross_validate(checkpoints: list[Path], folder: Path, out: Path) -> dict[str, Any]:
    """Return the results of networks on the patients that each was not trained on, pooled, as published.

    A network's operating point comes from the half of its own left-out patients that a quoted one is not in.
    """
    folds, seen = [], []
    for path in checkpoints:
        network, checkpoint = load_triage(path)
        write_triage(network, out / "fold.onnx")
        cases = held_out(str(checkpoint["finding"]), "flair", folder, str(checkpoint["fold"]))
        real = [each for each in cases if not each.is_simulated and each.factor == 0]
        folds.append(evaluate(open_triage(out / "fold.onnx"), real)[0])
        (out / "fold.onnx").unlink()
        seen += [visibility(each) for each in real]
    score = np.concatenate([each.score for each in folds])
    is_positive = np.concatenate([each.is_positive for each in folds])
    area = np.concatenate([each.area_mm2 for each in folds])
    flagged = np.concatenate([flagged_by_others(each.score, each.is_positive, each.group) for each in folds])
    found: dict[str, Any] = {"folds": len(folds), **summary(score, is_positive, area, flagged, STEPS)}
    found["auc"] = words(auc(score[is_positive], score[~is_positive]))
    found["auc_by_fold"] = [round(auc(f.score[f.is_positive], f.score[~f.is_positive])[0], 4) for f in folds]
    dice = np.concatenate([each.dice for each in folds])[is_positive]
    inside = np.concatenate([each.peak_inside for each in folds])[is_positive]
    found["median_dice"] = round(float(np.median(dice)), 3)
    found["peak_inside"] = words(proportion(int(inside.sum()), len(inside)))
    contrast = np.array(seen)[is_positive]
    steps = []
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, np.inf)):
        chosen = (contrast >= low) & (contrast < high)
        if chosen.any() and np.isfinite(flagged).all():
            hits = count(flagged[is_positive][chosen])
            found_here = {"from": low, "cases": int(chosen.sum())}
            steps.append({**found_here, "sensitivity": words(proportion(hits, int(chosen.sum())))})
    found["by_visibility"] = steps
    return found


if __name__ == "__main__":
    main()
