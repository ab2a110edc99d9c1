"""Fit how lesions' volumes scatter: `python -m export.triage_sizes --planes DIR` adds to what `triage.measure` reads.

Simulated exams that no training saw are outlined by the shipped networks. A volume is scaled so that it has no bias,
and its interval is the conformal one of these exams. How far that holds is tried on halves of the exams: fitted on one,
looked at on the other. Exams whose finding is not flagged, or below MIN_ML, are left out; so are contrasts whose
network learned from patients: simulated lesions do not tell how it outlines theirs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from export.measurements import ASSETS, fit_spread
from export.triage_images import load
from export.triage_onnx import open_triage, run_triage
from export.triage_validation import HEAD_CONTRASTS, exams_of
from recon.arrays import Array
from recon.contrast import CONTRASTS
from recon.protocol import Protocol, geometry
from triage.card import TriageCard, read_triage_card
from triage.measure import outline
from triage.score import plane_scores, probabilities

MIN_ML = 1.0
MIN_CASES = 8
FLOOR_ML = 1.0
N_HALVINGS = 50


def main() -> None:
    """Outline, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=Path, required=True, metavar="DIR", help="made by export.triage_images")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of networks (default: the package's assets)")
    args = parser.parse_args()
    path = args.out / "measurement.json"
    content = json.loads(path.read_text("utf-8"))
    content["sizes"] = {}
    for folder in sorted(each.parent for each in args.out.glob("*/card.json")):
        card = read_triage_card(json.loads((folder / "card.json").read_text("utf-8")))
        for contrast in card.contrasts:
            name = f"{card.finding}_volume_ml"
            content["spreads"].setdefault(name, {}).pop(contrast, None)
            if card.contrasts[contrast].evidence == "real":
                continue
            truth, found = volumes(folder, card, contrast, args.planes)
            if len(truth) >= MIN_CASES:
                content["spreads"][name][contrast] = asdict(fit_spread(truth, found, FLOOR_ML, is_total=True))
                content["sizes"][f"{name} on {contrast}"] = tried(truth, found)
                print(name, contrast, content["sizes"][f"{name} on {contrast}"], flush=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def volumes(folder: Path, card: TriageCard, contrast: str, planes: Path) -> tuple[Array, Array]:
    """Return true and outlined volumes, ml, of the simulated exams that are flagged."""
    shown = HEAD_CONTRASTS.get(contrast)
    if shown is None:
        return np.zeros(0), np.zeros(0)
    session = open_triage(folder / "model.onnx")
    distance_mm = geometry(Protocol(contrast=CONTRASTS[shown])).spacing_mm[0]
    members = [each for path in sorted(planes.glob(f"exams-{shown}-*.npz")) for each in load([path])]
    pairs = []
    for case in exams_of(folder.name, shown, members):
        truth = float(case.masks.sum()) * distance_mm / 1000
        if truth < MIN_ML:
            continue
        logits = run_triage(session, case.images)[0]
        decision = card.contrasts[contrast].exam
        found = outline(probabilities(logits[:, 0]), distance_mm)
        if found is not None and decision.probability(float(plane_scores(logits).max())) >= decision.threshold:
            pairs.append((truth, found.volume_ml))
    both = np.array(pairs).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def tried(truth: Array, found: Array) -> dict[str, Any]:
    """Return bias and coverage on exams that the scale and the interval were not fitted on, means over halvings."""
    rng = np.random.default_rng(0)
    bias, held = [], []
    for _ in range(N_HALVINGS):
        order = rng.permutation(len(truth))
        for known, new in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            spread = fit_spread(truth[known], found[known], FLOOR_ML, is_total=True)
            made = [spread.measurement(each, least=0.0) for each in found[new]]
            values = np.array([each.value for each in made], float)
            bias.append(float((values - truth[new]).sum() / truth[new].sum()))
            held += [
                each.interval[0] <= t <= each.interval[1]
                for each, t in zip(made, truth[new], strict=True)
                if each.interval
            ]
    return {
        "exams": len(truth),
        "ml": [round(float(truth.min()), 1), round(float(truth.max()), 1)],
        "bias_before": round(float((found - truth).sum() / truth.sum()), 3),
        "bias": round(float(np.mean(bias)), 3),
        "bias_of_halves": [round(float(v), 3) for v in np.percentile(bias, (5, 95))],
        "held_by_95": round(float(np.mean(held)), 3),
    }


if __name__ == "__main__":
    main()
