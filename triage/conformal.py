"""Class-conditional split-conformal sets: which answers a case may have, wrong for at most a share α of each class.

The guarantee: a new case that is exchangeable with the held-out cases of its own class has the true answer in its set
with probability 1 - α or more. Nothing is promised for other cases; `triage.gate` and `triage.likeness` are for those.
Source: Vovk et al., Algorithmic Learning in a Random World (2005), §4.5; Angelopoulos & Bates, arXiv 2107.07511.
"""

from __future__ import annotations

from dataclasses import dataclass

from recon.arrays import Array, closed
from recon.errors import ShapeError
from triage.card import Calibration
from triage.findings import ABSENT, PRESENT


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Scores of held-out cases with the finding, float64 (case,), and of those without: higher is more suspicious."""

    present: Array
    absent: Array

    def __post_init__(self) -> None:
        for name in ("present", "absent"):
            value = getattr(self, name)
            if value.ndim != 1:
                raise ShapeError(f"held-out scores, {name}", value.shape, ("case",))
            object.__setattr__(self, name, closed(value))


def held_out(calibration: Calibration, is_exam: bool) -> HeldOut:
    """Return the held-out cases that a single slice, or an exam of several, is compared with.

    Slices without the finding are no exams without it: of many slices the most suspicious one counts. With the finding
    a single slice is the harder case, and stands for exams too where there are none. Where no exams were held out the
    single slices serve, and nothing is promised.
    """
    positive, exam = calibration.is_positive, calibration.is_exam
    present = calibration.score[positive & (exam == is_exam)]
    absent = calibration.score[~positive & (exam == is_exam)]
    return HeldOut(
        present if len(present) else calibration.score[positive],
        absent if len(absent) else calibration.score[~positive],
    )


def p_values(score: float, cases: HeldOut) -> tuple[float, float]:
    """Return how usual a score is among cases with the finding, and among those without, each 0 to 1.

    The share of held-out cases of the class that fit it no better, the new one counted with them.
    """
    return (
        float((1 + (cases.present <= score).sum()) / (1 + cases.present.size)),
        float((1 + (cases.absent >= score).sum()) / (1 + cases.absent.size)),
    )


def conformal_set(score: float, cases: HeldOut, alpha: float) -> tuple[str, ...]:
    """Return which of PRESENT and ABSENT remain at level `alpha`; both: ambiguous; none: like neither class.

    Where none would remain and the score is less unusual with the finding than without, PRESENT stays: a set that
    grows keeps its promise. ABSENT is not given back like that.
    """
    found = p_values(score, cases)
    answers = tuple(answer for answer, p in zip((PRESENT, ABSENT), found, strict=True) if p > alpha)
    return (PRESENT,) if not answers and found[0] > found[1] else answers
