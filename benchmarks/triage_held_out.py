"""Figures of a network's held-out cases: accuracy at its operating point, by size, calibration, conformal coverage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.diagnostic import area_under_curve, proportion
from export.triage_statistics import EXAM_SPECIFICITY, count, flagged_by_others, probabilities_by_others
from recon.arrays import Array
from triage.assess import TriageModel
from triage.calibration import expected_calibration_error
from triage.card import Calibration
from triage.conformal import HeldOut, conformal_set
from triage.findings import ABSENT, PRESENT

AREAS_MM2 = (0, 50, 100, 200, 500, 1000, 100_000)
ALPHAS = (0.05, 0.1, 0.2)


def held_out_figures(models: Sequence[TriageModel]) -> dict[str, Any]:
    """Return by "finding on contrast": AUC, sensitivity and specificity of slices and exams, by size, calibration.

    Operating points and probabilities come from other patients than those that they are quoted for; exams' points are
    not below the card's floor, as the one that ships is not.
    """
    out = {}
    for model in models:
        for contrast, card in model.card.contrasts.items():
            cases = model.calibrations[contrast]
            slices, exams = ~cases.is_exam, cases.is_exam
            use = slices if slices.any() else exams
            names = [str(each) for each in cases.group[use]]
            probability = probabilities_by_others(cases.score[use], cases.is_positive[use], names)
            is_known = bool(np.isfinite(probability).all())
            out[f"{model.card.finding} on {contrast}"] = {
                "model": model.name,
                "evidence": card.evidence,
                "slice": figures(cases, slices, 0.0, card.one_slice.floor),
                "exam": figures(cases, exams, EXAM_SPECIFICITY, card.exam.floor),
                "by_area": by_area(cases, slices, 0.0, card.one_slice.floor)
                if slices.any()
                else by_area(cases, exams, EXAM_SPECIFICITY, card.exam.floor),
                "calibration": calibration_curve(probability, cases.is_positive[use]) if is_known else [],
                "calibration_error": expected_calibration_error(probability, cases.is_positive[use])
                if is_known
                else None,
            }
    return out


def figures(cases: Calibration, use: Array, least_specificity: float, floor: float) -> dict[str, Any] | None:
    """Return AUC, and sensitivity and specificity at others' operating points; None where there are no such cases."""
    if not use.any():
        return None
    score, positive = cases.score[use], cases.is_positive[use]
    flagged = flagged_by_others(score, positive, [str(each) for each in cases.group[use]], least_specificity, floor)
    n = (int(positive.sum()), int((~positive).sum())) if np.isfinite(flagged).all() else (0, 0)
    return {
        "auc": area_under_curve(score, positive),
        "sensitivity": proportion(count(flagged[positive]) if n[0] else 0, n[0]),
        "specificity": proportion(count(1 - flagged[~positive]) if n[1] else 0, n[1]),
        "simulated_cases": int(cases.is_simulated[use].sum()),
    }


def by_area(cases: Calibration, use: Array, least_specificity: float, floor: float) -> list[dict[str, Any]]:
    """Return the sensitivity by the finding's largest area in a slice."""
    score, positive, area = cases.score[use], cases.is_positive[use], cases.area_mm2[use]
    flagged = flagged_by_others(score, positive, [str(each) for each in cases.group[use]], least_specificity, floor)
    if not np.isfinite(flagged).all():
        return []
    return [
        {"mm2": f"{low} to {high}" if high < AREAS_MM2[-1] else f"over {low}",
         **proportion(count(flagged[inside]), int(inside.sum()))}
        for low, high in pairwise(AREAS_MM2)
        if (inside := positive & (area >= low) & (area < high)).any()
    ]  # fmt: skip


def calibration_curve(probability: Array, positive: Array, n_bins: int = 8) -> list[tuple[float, float, int]]:
    """Return mean probability, share of positives and number of cases, of bins of equally many cases."""
    bins = [each for each in np.array_split(np.argsort(probability), n_bins) if each.size]
    return [(float(probability[each].mean()), float(positive[each].mean()), int(each.size)) for each in bins]


def coverage(models: Sequence[TriageModel], n_splits: int) -> dict[str, Any]:
    """Return how often conformal sets hold the truth over random halves of the held-out cases, by class and alpha."""
    out: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for model in models:
        for contrast in model.card.contrasts:
            cases = model.calibrations[contrast]
            use = ~cases.is_exam if (~cases.is_exam).any() else cases.is_exam
            present, absent = cases.score[use & cases.is_positive], cases.score[use & ~cases.is_positive]
            if min(len(present), len(absent)) >= 10:
                rows = [_split(present, absent, alpha, n_splits, rng) for alpha in ALPHAS]
                out[f"{model.card.finding} on {contrast}"] = rows
    return out


def _split(present: Array, absent: Array, alpha: float, n_splits: int, rng: np.random.Generator) -> dict[str, Any]:
    kept: dict[str, list[float]] = {PRESENT: [], ABSENT: []}
    sizes: list[int] = []
    for _ in range(n_splits):
        known, new = [], {}
        for name, score in ((PRESENT, present), (ABSENT, absent)):
            order = rng.permutation(len(score))
            known.append(score[order[: len(score) // 2]])
            new[name] = score[order[len(score) // 2 :]][:150]
        reference = HeldOut(*known)
        for name, scores in new.items():
            sets = [conformal_set(float(score), reference, alpha) for score in scores]
            kept[name].append(float(np.mean([name in each for each in sets])))
            sizes += [len(each) for each in sets]
    found: dict[str, Any] = {"alpha": alpha, "splits": n_splits, "ambiguous": float(np.mean(np.array(sizes) == 2))}
    for name, score in ((PRESENT, present), (ABSENT, absent)):
        mean, error = float(np.mean(kept[name])), float(np.std(kept[name]) / np.sqrt(n_splits))
        found[name] = {"coverage": mean, "standard_error": error, "cases": len(score),
                       "is_kept": mean >= 1 - alpha - 2 * error - 1e-9}  # fmt: skip
    return found
