"""What a triage network may be asked, and what its answers mean: the card beside its weights, and held-out scores.

The card says how a score becomes a probability and where the operating point lies; the calibration holds the scores of
patients that no training saw, from which a site's own conformal sets are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recon.arrays import Array, closed
from recon.errors import ModelError, ShapeError
from triage.findings import LABELS

EVIDENCE = ("real", "simulated")
CALIBRATION = "calibration.npz"


@dataclass(frozen=True)
class Decision:
    """A score's probability is sigmoid(slope · score + offset); from `threshold` on it is flagged.

    floor: the score below which no operating point was allowed, on whatever cases it was chosen.
    """

    slope: float
    offset: float
    threshold: float
    floor: float = -np.inf

    def probability(self, score: float) -> float:
        """Return the calibrated probability, 0 to 1."""
        return float(1 / (1 + np.exp(-np.clip(self.slope * score + self.offset, -30, 30))))


@dataclass(frozen=True)
class ContrastCard:
    """What holds for one contrast.

    evidence: "real" where patients' lesions of this contrast were trained on and tested, else "simulated".
    one_slice: for a single slice. exam: for the largest score of all planes of an exam.
    ood_limit: likeness distance (`triage/likeness.py`) above which the input is not like what was trained on.
    """

    evidence: str
    one_slice: Decision
    exam: Decision
    ood_limit: float


@dataclass(frozen=True)
class TriageCard:
    """A triage network's card, as far as it matters at run time.

    finding: one of LABELS. plane: how slices must lie. step_mm, size: of its input planes.
    contrasts: by the names "t1", "t1ce", "t2", "flair", "dwi" and "swi" (also T2*).
    calibration_sha256: of `calibration.npz` beside the card.
    """

    name: str
    version: str
    sha256: str
    finding: str
    plane: str
    step_mm: float
    size: tuple[int, int]
    contrasts: Mapping[str, ContrastCard]
    calibration_sha256: str


@dataclass(frozen=True, eq=False)
class Calibration:
    """Held-out results of one contrast, and what inputs of it look like.

    score: float64 (case,). is_positive: bool (case,). is_exam: bool (case,), True for whole exams (largest score of
    their planes), False for single slices. is_simulated: bool (case,), True where the finding (or, for cases without
    one, the head) was simulated. area_mm2: float (case,), the finding's largest area in a slice, 0 without one.
    group: int (case,), the same for all cases of one patient.
    ood_mean (feature,), ood_precision (feature, feature): of the training inputs' features, see `triage/likeness.py`.
    """

    score: Array
    is_positive: Array
    is_exam: Array
    is_simulated: Array
    area_mm2: Array
    group: Array
    ood_mean: Array
    ood_precision: Array

    def __post_init__(self) -> None:
        n = len(self.score)
        for name in ("is_positive", "is_exam", "is_simulated", "area_mm2", "group"):
            if getattr(self, name).shape != (n,):
                raise ShapeError(name, getattr(self, name).shape, (n,))
        n_features = len(self.ood_mean)
        if self.ood_precision.shape != (n_features, n_features):
            raise ShapeError("ood_precision", self.ood_precision.shape, (n_features, n_features))
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, closed(getattr(self, name)))


def read_triage_card(content: Mapping[str, Any]) -> TriageCard:
    """Return the card in the JSON of `card.json`; raise ModelError that names what is missing or wrong."""
    try:
        height, width = content["size"]
        card = TriageCard(
            str(content["name"]),
            str(content["version"]),
            str(content["sha256"]),
            str(content["finding"]),
            str(content["plane"]),
            float(content["step_mm"]),
            (int(height), int(width)),
            {str(name): _contrast(each) for name, each in content["contrasts"].items()},
            str(content["calibration"]["sha256"]),
        )
    except KeyError as error:
        raise ModelError(f"the triage card has no {error.args[0]!r}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"the triage card cannot be read: {error}") from error
    if card.finding not in LABELS:
        raise ModelError(f"the triage card's finding is {card.finding!r}; one of {', '.join(LABELS)} is right")
    for name, each in card.contrasts.items():
        if each.evidence not in EVIDENCE:
            raise ModelError(f"the evidence of {name} is {each.evidence!r}; one of {', '.join(EVIDENCE)} is right")
    return card


def _contrast(content: Mapping[str, Any]) -> ContrastCard:
    return ContrastCard(
        str(content["evidence"]),
        _decision(content["slice"]),
        _decision(content["exam"]),
        float(content["ood_limit"]),
    )


def _decision(content: Mapping[str, Any]) -> Decision:
    floor = float(content.get("floor", -np.inf))
    return Decision(float(content["slope"]), float(content["offset"]), float(content["threshold"]), floor)


def read_calibration(arrays: Mapping[str, Array], contrast: str) -> Calibration:
    """Return the calibration of one contrast in the arrays of `calibration.npz`, named "contrast.field".

    Raises ModelError where one is missing.
    """
    try:
        return Calibration(**{name: arrays[f"{contrast}.{name}"] for name in Calibration.__dataclass_fields__})
    except KeyError as error:
        raise ModelError(f"the calibration has no {error.args[0]!r}") from error
