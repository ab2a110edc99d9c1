"""From held-out scores to a probability that means what it says, and to an operating point."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from recon.arrays import Array
from triage.card import Decision


def fit_decision(scores: Array, is_positive: Array) -> Decision:
    """Return the temperature scaling (with a shift) of greatest likelihood and the operating point on it.

    scores: float (case,), log odds. is_positive: bool (case,). Targets lie a little inside 0 and 1, so that it stays
    finite; a score that says nothing gives nearly the prevalence for all. Raises ValueError where a class is missing.
    Source: Platt, Advances in Large Margin Classifiers (2000), with the Newton steps of Lin et al., Machine Learning
    68:267 (2007); Guo et al., ICML 2017, for the temperature.
    """
    positive = np.asarray(is_positive, bool)
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        raise ValueError("cases with and without the finding are needed for a calibration")
    target = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    design = np.stack([np.asarray(scores, np.float64), np.ones(len(positive))], 1)
    weights = np.array([0.0, np.log((n_positive + 1) / (n_negative + 1))])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -500, 500)))
        gradient = design.T @ (p - target)
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    slope, offset = max(float(weights[0]), 1e-3), float(weights[1])
    probability = 1 / (1 + np.exp(-np.clip(slope * design[:, 0] + offset, -30, 30)))
    return Decision(slope, offset, choose_threshold(probability, positive))


def choose_threshold(probability: Array, is_positive: Array) -> float:
    """Return the threshold at which the lesser of sensitivity and specificity is greatest.

    Half way to the next lower probability, so that it does not sit on one of the cases that it was chosen on.
    """
    p, positive = np.asarray(probability, np.float64), np.asarray(is_positive, bool)
    levels = np.unique(p)
    below = np.concatenate([[0.0], levels[:-1]])
    sensitivity = 1 - np.searchsorted(np.sort(p[positive]), levels) / positive.sum()
    specificity = np.searchsorted(np.sort(p[~positive]), levels) / (~positive).sum()
    best = int(np.minimum(sensitivity, specificity).argmax())
    return float((below[best] + levels[best]) / 2)


N_HALVINGS = 50
Choice = Callable[[Array, Array], Callable[[Array], Array]]


def cross_fitted(scores: Array, is_positive: Array, groups: Array, choose: Choice) -> Array:
    """Return what is said of each case by what was chosen on other patients: float64 (case,), the mean over halvings.

    scores: float (case,). is_positive: bool (case,). groups: (case,), the patient. choose: from scores and classes of
    one half of the patients to what is said of scores, say whether they are flagged. Each halving is used both ways.
    Patients with the finding, without it and with both kinds of cases are halved apart. NaN throughout where a class
    has fewer than two patients: nothing can then be chosen on others.
    """
    names, of_group = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    positive = np.asarray(is_positive, bool)
    kind = np.array([2 * positive[of_group == g].any() + (~positive[of_group == g]).any() for g in range(len(names))])
    rng = np.random.default_rng(0)
    total, n = np.zeros(len(scores)), 0
    for _ in range(N_HALVINGS):
        order = rng.permutation(len(names))
        order = order[np.argsort(kind[order], kind="stable")]
        is_first = np.empty(len(names), bool)
        is_first[order] = np.arange(len(order)) % 2 == rng.integers(2)
        first = is_first[of_group]
        if any(len(np.unique(positive[half])) < 2 for half in (first, ~first)):
            continue
        for known in (first, ~first):
            total[~known] += choose(scores[known], positive[known])(scores[~known])
        n += 1
    return total / n if n else np.full(len(scores), np.nan)


def expected_calibration_error(probability: Array, is_positive: Array, n_bins: int = 10) -> float:
    """Return the mean difference between probability and frequency over bins of equally many cases."""
    order = np.argsort(probability)
    bins = [each for each in np.array_split(order, n_bins) if each.size]
    gaps = [abs(float(probability[each].mean()) - float(is_positive[each].mean())) * each.size for each in bins]
    return float(sum(gaps) / len(order))
