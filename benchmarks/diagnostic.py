"""Shares and areas under curves with their 95 % intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from recon.arrays import Array

LEVEL = 0.95


def proportion(hits: int, n: int) -> dict[str, Any]:
    """Return hits of n with the exact interval. Source: Clopper & Pearson, Biometrika 26:404 (1934)."""
    tail = (1 - LEVEL) / 2
    low = float(stats.beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return {"hits": hits, "n": n, "value": hits / n if n else None, "low": low, "high": high if n else 1.0}


def area_under_curve(score: Array, is_positive: Array) -> dict[str, Any]:
    """Return the area under the ROC curve with DeLong's interval, on the log odds scale so that it stays below 1.

    Source: DeLong et al., Biometrics 44:837 (1988), by midranks (Sun & Xu, IEEE Signal Process Lett 21:1389, 2014).
    """
    positive, negative = score[is_positive], score[~is_positive]
    m, n = len(positive), len(negative)
    if m < 2 or n < 2:
        return {"value": None, "low": None, "high": None, "positives": m, "negatives": n}
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    among_positive, among_negative = stats.rankdata(positive), stats.rankdata(negative)
    area = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    v10 = (ranks[:m] - among_positive) / n
    v01 = 1 - (ranks[m:] - among_negative) / m
    error = float(np.sqrt(v10.var(ddof=1) / m + v01.var(ddof=1) / n))
    if not 0 < area < 1 or error == 0:
        return {"value": area, "low": area, "high": area, "positives": m, "negatives": n}
    half = stats.norm.ppf((1 + LEVEL) / 2) * error / (area * (1 - area))
    middle = np.log(area / (1 - area))
    low, high = (float(1 / (1 + np.exp(-(middle + sign * half)))) for sign in (-1, 1))
    return {"value": area, "low": low, "high": high, "positives": m, "negatives": n}
