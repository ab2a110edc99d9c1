"""Exams in which patients' anatomy counts: held-out patients' slices laid among those of simulated heads.

An exam's score is that of its most suspicious plane, and simulated heads have no white-matter disease, no plaques and
no shrunken brain: an operating point from them alone lies too low for patients. Whole exams of patients are not at
hand; single slices of many are. An exam here is a simulated head without a finding in which SLICES planes are those of
held-out patients, all without the finding but at most one. Its score is the largest of its parts'. Slices of several
patients differ more than those of one, so that the largest of a few stands for the largest of one patient's many.

Patients and heads are dealt into blocks and exams are put together within them: what is chosen on some blocks is
quoted on others.
"""

from __future__ import annotations

import numpy as np

from export.triage_validation import Cases
from recon.arrays import Array

SLICES = 3
BLOCKS = 8
SEED = 5


def composites(cases: Cases) -> Cases:
    """Return the exams of `cases`, those of heads without a finding with patients' slices in them.

    cases: of slices and exams. Where there are no patients' slices, or no heads, the exams as they are.
    """
    exams = cases.where(cases.is_exam)
    slices = cases.where(~cases.is_exam & ~cases.is_simulated & (cases.factor == 0))
    is_head = ~exams.is_positive & np.array([name.startswith("head-") for name in exams.group], bool)
    if slices.is_positive.all() or not is_head.any():
        return exams
    rng = np.random.default_rng(SEED)
    block = _dealt(rng, slices)
    heads = rng.permutation(exams.score[is_head])
    score = slices.score.copy()
    for number in np.unique(block):
        members = np.flatnonzero(block == number)
        without = members[~slices.is_positive[members]]
        here = heads[number :: block.max() + 1]
        for place, each in enumerate(members):
            others = without[without != each]
            company = np.roll(others, -place)[: SLICES - 1]
            head = here[place % len(here) :][:1] if len(here) else here  # fewer heads than blocks
            score[each] = max([slices.score[each], *slices.score[company], *head])
    made = Cases(
        score,
        slices.is_positive,
        np.ones(len(score), bool),
        slices.is_simulated,
        slices.area_mm2,
        slices.factor,
        [f"block-{each}" for each in block],
        slices.peak_inside,
        slices.dice,
    )
    return joined(made, exams.where(~is_head))


def joined(one: Cases, other: Cases) -> Cases:
    """Return the cases of both."""
    names = [name for name in Cases.__dataclass_fields__ if name != "group"]
    arrays = {name: np.concatenate((getattr(one, name), getattr(other, name))) for name in names}
    return Cases(group=one.group + other.group, **arrays)


def _dealt(rng: np.random.Generator, slices: Cases) -> Array:
    """Return the block of each slice; patients without the finding are dealt first, so that all blocks have some."""
    group = np.array(slices.group)
    without = np.unique(group[~slices.is_positive])
    rest = np.setdiff1d(group, without)
    n = max(1, min(BLOCKS, len(without) // SLICES))
    order = [*rng.permutation(without), *rng.permutation(rest)]
    of = {name: number % n for number, name in enumerate(order)}
    return np.array([of[name] for name in slices.group])
