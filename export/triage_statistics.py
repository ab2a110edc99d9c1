"""How well scores tell two classes apart, with intervals, and what a score means as a probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

from recon.arrays import Array
from triage.calibration import cross_fitted

LEVEL = 0.95
EXAM_SPECIFICITY = 0.9  # at least: one false alarm in ten exams
N_BINS = 8  # of a calibration curve


def auc(positive: Array, negative: Array) -> tuple[float, float, float]:
    """Return the area under the ROC curve and its 95 % interval on the logit scale.

    Source: DeLong et al., Biometrics 44:837 (1988); Sun & Xu, IEEE Signal Process Lett 21:1389 (2014).
    """
    m, n = len(positive), len(negative)
    ranks = stats.rankdata(np.concatenate((positive, negative)))
    above = (ranks[:m] - stats.rankdata(positive)) / n
    below = 1 - (ranks[m:] - stats.rankdata(negative)) / m
    area = float(above.mean())
    variance = above.var(ddof=1) / m + below.var(ddof=1) / n if min(m, n) > 1 else 0.0
    inside = min(max(area, 1e-4), 1 - 1e-4)
    width = stats.norm.ppf(0.5 + LEVEL / 2) * np.sqrt(variance) / (inside * (1 - inside))
    middle = np.log(inside / (1 - inside))
    low, high = (float(1 / (1 + np.exp(-v))) for v in (middle - width, middle + width))
    return area, low, high


def proportion(hits: int, n: int) -> tuple[float, float, float]:
    """Return hits / n and Clopper and Pearson's 95 % interval."""
    tail = (1 - LEVEL) / 2
    low = float(stats.beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return hits / max(n, 1), low, high


def fit(score: Array, is_positive: Array) -> tuple[float, float]:
    """Return slope and offset of the most likely logistic curve, the classes weighed alike: a prevalence of one half.

    Targets are a little inside of 0 and 1 (Platt 1999), so that a perfect separation keeps finite numbers.
    """
    n = np.array([(~is_positive).sum(), is_positive.sum()])
    target = np.where(is_positive, (n[1] + 1) / (n[1] + 2), 1 / (n[0] + 2))
    weight = np.where(is_positive, 1 / n[1], 1 / n[0])

    def cost(x: Array) -> float:
        z = x[0] * score + x[1]
        return float((weight * (np.logaddexp(0, z) - target * z)).sum())

    found = optimize.minimize(cost, np.array([1.0, 0.0]), method="Nelder-Mead", options={"maxiter": 2000})
    slope, offset = (float(v) for v in found.x)
    return max(slope, 1e-3), offset


def balanced_threshold(score: Array, is_positive: Array, least_specificity: float = 0.0) -> float:
    """Return the score above which the lesser of sensitivity and specificity is greatest.

    least_specificity: thresholds below it are not looked at.
    """
    places = np.unique(score)
    places = np.concatenate((places[:1] - 1, (places[1:] + places[:-1]) / 2, places[-1:] + 1))
    positive, negative = np.sort(score[is_positive]), np.sort(score[~is_positive])
    sensitivity = 1 - np.searchsorted(positive, places) / max(len(positive), 1)
    specificity = np.searchsorted(negative, places) / max(len(negative), 1)
    value = np.minimum(sensitivity, specificity) + 1e-3 * (sensitivity + specificity)
    value[specificity < least_specificity] = -1
    return float(places[int(np.argmax(value))])


def sigmoid(x: float) -> float:
    """Return the logistic function."""
    return float(1 / (1 + np.exp(-x)))


def words(found: tuple[float, float, float]) -> list[float]:
    """Return a value and its interval as a card has them."""
    return [round(each, 4) for each in found]


def flagged_by_others(
    score: Array, is_positive: Array, group: Sequence[str], least_specificity: float = 0.0, floor: float = -np.inf
) -> Array:
    """Return how often each case is at or above an operating point chosen on other patients, float64 (case,).

    floor: no point is below this score.
    """

    def choose(known: Array, classes: Array) -> Callable[[Array], Array]:
        threshold = max(balanced_threshold(known, classes, least_specificity), floor)
        return lambda new: (new >= threshold).astype(float)

    return cross_fitted(score, is_positive, np.array(group), choose)


def probabilities_by_others(score: Array, is_positive: Array, group: Sequence[str]) -> Array:
    """Return the calibrated probability of each case by curves that were fitted to other patients, float64 (case,)."""

    def choose(known: Array, classes: Array) -> Callable[[Array], Array]:
        slope, offset = fit(known, classes)
        return lambda new: 1 / (1 + np.exp(-np.clip(slope * new + offset, -30, 30)))

    return cross_fitted(score, is_positive, np.array(group), choose)


def calibration_error_by_others(score: Array, is_positive: Array, group: Sequence[str]) -> float:
    """Return the expected calibration error, at a prevalence of one half, of curves fitted to other patients."""
    probability = probabilities_by_others(score, is_positive, group)
    weight = np.where(is_positive, 0.5 / max(is_positive.sum(), 1), 0.5 / max((~is_positive).sum(), 1))
    off = weight * (probability - is_positive)
    return sum(abs(float(off[each].sum())) for each in np.array_split(np.argsort(probability), N_BINS))


def count(share: Array) -> int:
    """Return how many cases shares add up to, rounded down."""
    return int(np.floor(float(share.sum()) + 1e-6))


def summary(score: Array, is_positive: Array, area: Array, flagged: Array, steps: tuple[int, ...]) -> dict[str, Any]:
    """Return AUC, sensitivity and specificity, and sensitivity by the finding's area in mm².

    flagged: float (case,), 0 to 1, as `flagged_by_others` gives it; NaN where nothing could be chosen on others: there
    is then no sensitivity or specificity to quote.
    """
    positive, negative = score[is_positive], score[~is_positive]
    is_known = bool(np.isfinite(flagged).all())
    out: dict[str, Any] = {"positive": len(positive), "negative": len(negative)}
    if len(positive) and len(negative):
        out["auc"] = words(auc(positive, negative))
    if len(positive) and is_known:
        out["sensitivity"] = words(proportion(count(flagged[is_positive]), len(positive)))
    if len(negative) and is_known:
        out["specificity"] = words(proportion(count(1 - flagged[~is_positive]), len(negative)))
    sizes = []
    for low, high in zip(steps, (*steps[1:], 10**9), strict=True):
        inside = is_positive & (area >= low) & (area < high)
        if inside.any() and is_known:
            found = proportion(count(flagged[inside]), int(inside.sum()))
            sizes.append({"from_mm2": low, "cases": int(inside.sum()), "sensitivity": words(found)})
    out["by_size"] = sizes
    return out
