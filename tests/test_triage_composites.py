"""Exams with patients' slices: what they are made of, that halves share nothing, and what a floor does."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: the factory's tests need it")
pytest.importorskip("onnx", reason="onnx is not installed: the factory's tests need it")

from export.triage_composites import SLICES, composites
from export.triage_images import Label, Plane
from export.triage_statistics import flagged_by_others
from export.triage_validation import Cases, volumes_without
from recon.arrays import Array
from triage.preprocess import SIZE


def cases(rng: np.random.Generator, n_with: int, n_without: int, n_heads: int) -> Cases:
    """Return patients' slices, then simulated heads, every other one with the finding, then a slice that is no case."""
    n = n_with + n_without
    is_positive = np.concatenate((np.arange(n) < n_with, np.arange(n_heads) % 2 == 0, [False]))
    is_exam = np.concatenate((np.zeros(n, bool), np.ones(n_heads, bool), [False]))
    group = [f"stroke-{k}" for k in range(n)] + [f"head-{k}" for k in range(n_heads)] + ["stroke-0"]
    score: Array = rng.normal(0, 1, len(group)) + 2 * is_positive
    factor = np.zeros(len(group), int)
    factor[-1] = 4
    nothing = np.zeros(len(group))
    return Cases(score, is_positive, is_exam, is_exam, 200.0 * is_positive, factor, group, nothing, nothing)


@pytest.mark.parametrize(("n_with", "n_without"), [(71, 46), (0, 117), (2, 2), (3, 1)])
def test_each_patient_is_an_exam_and_blocks_share_nobody(n_with: int, n_without: int) -> None:
    given = cases(np.random.default_rng(0), n_with, n_without, 20)
    made = composites(given)
    real = made.where(~made.is_simulated)
    assert len(real.score) == n_with + n_without
    assert int(real.is_positive.sum()) == n_with
    simulated = made.where(made.is_simulated)
    assert simulated.is_positive.all()  # heads without a finding are all in patients' company
    slices = given.where(~given.is_exam & (given.factor == 0))
    assert (real.score >= slices.score).all()
    parts = {float(each) for each in given.score}
    assert {float(each) for each in real.score} <= parts
    used: dict[str, set[float]] = {}
    for name, value in zip(real.group, real.score, strict=True):
        used.setdefault(name, set()).add(float(value))
    blocks = list(used.values())
    assert sum(map(len, blocks)) == len(set.union(*blocks))


def test_the_company_is_without_the_finding() -> None:
    rng = np.random.default_rng(1)
    given = cases(rng, 30, 30, 8)
    given.score[given.is_positive] += 100  # any of them in the company would show
    made = composites(given)
    assert made.score[~made.is_positive].max() < 50
    raised = made.score[:60] > given.score[:60]
    assert raised[30:].mean() > 1 - 1 / SLICES - 0.2


def test_without_patients_exams_stay_as_they_are() -> None:
    given = cases(np.random.default_rng(2), 5, 0, 6)  # tumours alone
    made = composites(given)
    np.testing.assert_array_equal(made.score, given.score[given.is_exam])


def test_no_point_lies_below_the_floor() -> None:
    rng = np.random.default_rng(3)
    score = np.concatenate((rng.normal(2, 1, 40), rng.normal(0, 1, 40)))
    is_positive = np.arange(80) < 40
    group = [str(k) for k in range(80)]
    free = flagged_by_others(score, is_positive, group)
    held = flagged_by_others(score, is_positive, group, floor=1.5)
    assert (held[score < 1.5] == 0).all()
    assert (held <= free).all()


def test_volumes_without_are_training_subjects_without_the_glioma() -> None:
    image, mask = np.ones(SIZE, np.float16), np.zeros(SIZE, bool)

    def plane(source: str, group: str, split: str, contrast: str = "flair") -> Plane:
        return Plane(image, mask, Label(source, group, split, contrast, "none"))

    planes = [plane("volumes", "msLong01", "train")] * 3 + [
        plane("volumes", "tcgaFG6692", "train"),
        plane("volumes", "msLong04", "val"),
        plane("volumes", "msLong03", "train", "t2"),
        plane("brain", "msLong03", "train"),
        plane("stroke_flair", "stroke-1", "train"),
    ]
    (found,) = volumes_without("flair", planes)
    assert (found.group, len(found.images), found.is_exam, found.is_simulated) == ("msLong01", 3, True, False)
    (other,) = volumes_without("flair", planes, is_held_out=True)
    assert other.group == "msLong04"
