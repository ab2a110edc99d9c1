"""What measures of a slice usually are in clean scans, and from where on they say that something is wrong.

The numbers come from a calibration run on simulated scans of training subjects (`export.calibrate_quality`) and are
stored with the network's card. A measure's usual value follows how the scan was read: the logarithm is linear in the
logarithms of the share of lines that were not measured and of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from recon.arrays import Array
from recon.errors import ModelError

FEATURE = "feature_"  # measures of this name describe what kind of image it is, and make up "novelty"
NOVELTY = "novelty"
ODDS = "odds"
ERROR = "expected_error"
EXPECTED = "held_out"  # the measure that estimates the image's error
FALSE_ALARMS = 0.002  # of one measure in one slice, at which thresholds are set
_NORMAL = NormalDist()
_LEAST, _MOST, _BEND = -3.0, 12.0, 1.5  # deviations: those beyond count as these, and from the bend on they weigh anew


@dataclass(frozen=True)
class Limit:
    """One measure of clean scans, and when it is not clean any more.

    coefficients: of 1, of log(1 / coverage) and of log noise, for the mean of log measure. spread: its standard
    deviation about that. degraded, untrusted: from how many spreads on; untrusted is infinite where a measure alone
    never says so. floor: smaller values are taken for it, as their logarithm says nothing.
    """

    coefficients: tuple[float, float, float]
    spread: float
    degraded: float
    untrusted: float
    floor: float = 1e-9

    def deviation(self, value: float, values: Mapping[str, float]) -> float:
        """Return how many spreads a value lies above what is usual for a scan with `values`."""
        return (math.log(max(value, self.floor)) - self._usual(values)) / self.spread

    def at(self, deviation: float, values: Mapping[str, float]) -> float:
        """Return the value that lies `deviation` spreads above what is usual."""
        return math.exp(self._usual(values) + deviation * self.spread)

    def _usual(self, values: Mapping[str, float]) -> float:
        return float(np.dot(self.coefficients, covariates(values)))


@dataclass(frozen=True, eq=False)
class Limits:
    """Limits by measure, of scans whose noise was measured and of the others; what familiar features are.

    by_measure: by name, and whether the noise was measured. mean, precision: float (feature), (feature, feature).
    measures, weights, error_weights: what the logarithms of the odds that an image is spoiled, and of its relative
    error, are made of, see `evidence`.
    """

    by_measure: Mapping[tuple[str, bool], Limit]
    mean: Array
    precision: Array
    measures: tuple[str, ...] = ()
    weights: Array | None = None
    error_weights: Array | None = None

    def of(self, measure: str, values: Mapping[str, float]) -> Limit | None:
        """Return the limit that a measure has in a scan with `values`; None where it has none."""
        return self.by_measure.get((measure, values.get("noise_known", 0.0) > 0.5))


def covariates(values: Mapping[str, float]) -> tuple[float, float, float]:
    """Return what a measure's usual value follows, for a slice with `values`."""
    coverage = min(max(values.get("coverage", 1.0), 1e-3), 1.0)
    return 1.0, -math.log(coverage), math.log(max(values.get("noise", 0.01), 1e-5))


def completed(values: Mapping[str, float], limits: Limits) -> dict[str, float]:
    """Return measures with "novelty" in place of the features, "odds" and "expected_error" where there are weights.

    Novelty is the Mahalanobis distance of a slice's features from familiar ones; the odds, by logistic regression of
    all measures together, are those that the image is more than 20 % worse than the same scan without a fault; the
    expected error, by linear regression, is that of the magnitude inside the head, relative.
    """
    features = np.array([value for name, value in sorted(values.items()) if name.startswith(FEATURE)])
    out = {name: value for name, value in values.items() if not name.startswith(FEATURE)}
    if features.shape == limits.mean.shape:
        away = features - limits.mean
        out[NOVELTY] = float(np.sqrt(max(away @ limits.precision @ away, 0.0)))
    if limits.weights is not None and limits.error_weights is not None:
        weighed = evidence(out, limits)
        out[ODDS] = float(np.exp(np.clip(weighed @ limits.weights, -20, 20)))
        out[ERROR] = float(np.exp(np.clip(weighed @ limits.error_weights, -10, 2)))
    return out


def evidence(values: Mapping[str, float], limits: Limits) -> Array:
    """Return what the odds weigh, float.

    It is of each of `limits.measures` its deviation and the part of it beyond a bend, nought where it was not taken;
    the logarithm of the expected error; what usual values follow; whether the noise is known.
    """
    out: list[float] = []
    for measure in limits.measures:
        limit = limits.of(measure, values)
        is_known = measure in values and limit is not None
        away = limit.deviation(values[measure], values) if is_known and limit is not None else 0.0
        away = min(max(away, _LEAST), _MOST)
        out += [away, max(away - _BEND, 0.0)]
    expected = math.log(max(values.get(EXPECTED, 0.05), 1e-3))
    return np.array([*out, expected, *covariates(values), values.get("noise_known", 0.0)])


def for_many(deviation: float, n: int) -> float:
    """Return the deviation that the worst of `n` slices passes as seldom as one slice passes `deviation`.

    Bonferroni's bound, in the tail of a normal distribution.
    """
    if n <= 1 or not math.isfinite(deviation):
        return deviation
    share = _NORMAL.inv_cdf(1 - FALSE_ALARMS / n) - _NORMAL.inv_cdf(1 - FALSE_ALARMS)
    return deviation + share


def read_limits(content: Mapping[str, Any]) -> Limits:
    """Return the limits in the `quality` section of a card; raise ModelError that says what cannot be read."""
    try:
        by_measure = {
            (str(each["measure"]), bool(each["noise_known"])): Limit(
                tuple(float(number) for number in each["coefficients"]),  # type: ignore[arg-type]
                float(each["spread"]),
                float(each["degraded"]),
                math.inf if each["untrusted"] is None else float(each["untrusted"]),
                float(each["floor"]),
            )
            for each in content["limits"]
        }
        pooled = content.get("odds")
        measures = () if pooled is None else tuple(str(name) for name in pooled["measures"])
        weights = None if pooled is None else np.array(pooled["weights"], float)
        error_weights = None if pooled is None else np.array(pooled["error_weights"], float)
        familiar = content["familiar"]
        mean, precision = np.array(familiar["mean"], float), np.array(familiar["precision"], float)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the model card's quality section cannot be read: {error}") from error
    if precision.shape != (len(mean), len(mean)) or any(
        min(each.spread, each.floor) <= 0 or len(each.coefficients) != 3 for each in by_measure.values()
    ):
        raise ModelError("the model card's quality section has numbers that do not fit together")
    if any(each is not None and each.shape != (2 * len(measures) + 5,) for each in (weights, error_weights)):
        raise ModelError("the model card's quality section has weights that do not fit its measures")
    return Limits(by_measure, mean, precision, measures, weights, error_weights)
