"""Measures against limits: reasons, levels, thresholds that follow the scan, and cards that cannot be read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from recon.consistency import SliceMeasures, ranked
from recon.errors import ModelError
from recon.judge import slice_reasons, suspicion, worst
from recon.limits import Limits, completed, covariates, for_many, read_limits
from recon.quality import Level
from recon.scan import ImageKey

KNOWN = {"noise_known": 1.0, "coverage": 0.25, "noise": 0.01}


def section(**changes: Any) -> dict[str, Any]:
    """A card's section: motion is usually 0.1 and errors are in proportion to what was not measured."""
    motion = {
        "measure": "inconsistency",
        "noise_known": True,
        "coefficients": [math.log(0.1), 0, 0],
        "spread": 0.5,
        "floor": 1e-6,
    }
    hidden = {
        "measure": "held_out",
        "noise_known": True,
        "coefficients": [math.log(0.02), 1.0, 0],
        "spread": 0.2,
        "floor": 1e-6,
    }
    limits = [{**motion, "degraded": 3.0, "untrusted": 5.0}, {**hidden, "degraded": 3.0, "untrusted": None}]
    familiar = {"mean": [1.0, 2.0], "precision": [[4.0, 0.0], [0.0, 1.0]]}
    return {"limits": limits, "familiar": familiar, **changes}


@pytest.fixture
def limits() -> Limits:
    return read_limits(section())


def measured(number: int, onset: int | None = None, **values: float) -> tuple[ImageKey, SliceMeasures]:
    return ImageKey(0, number, 0, 0, 0, 0), SliceMeasures({**KNOWN, **values}, onset, None)


def reasons(limits: Limits, *slices: tuple[ImageKey, SliceMeasures]) -> list[Any]:
    return slice_reasons(dict(slices), limits, {key: np.arange(100, 140) for key, _ in slices})


def test_a_usual_slice_gives_no_reason(limits: Limits) -> None:
    assert reasons(limits, measured(0, inconsistency=0.1, held_out=0.08)) == []


def test_motion_says_where_it_begins_and_how_grave_it_is(limits: Limits) -> None:
    mild, grave = (0.1 * math.exp(0.5 * spreads) for spreads in (4, 6))
    (reason,) = reasons(limits, measured(3, 10, inconsistency=mild))
    assert (reason.code, reason.level, reason.slices) == ("motion", Level.DEGRADED, (3,))
    assert reason.lines == tuple(range(110, 140))
    assert "from its 11th of 40 lines on" in reason.words
    assert reason.threshold == pytest.approx(0.1 * math.exp(1.5))
    (reason,) = reasons(limits, measured(3, 10, inconsistency=grave))
    assert reason.level is Level.UNTRUSTED


def test_a_threshold_follows_how_much_was_measured(limits: Limits) -> None:
    key, sparse = measured(0, held_out=0.1)
    dense = SliceMeasures({**sparse.values, "coverage": 1.0}, None, None)
    assert reasons(limits, (key, sparse)) == []
    assert reasons(limits, (key, dense))[0].code == "held-out-lines"


def test_the_worst_of_many_slices_needs_to_be_worse(limits: Limits) -> None:
    value = 0.1 * math.exp(0.5 * 3.2)
    one = [measured(0, inconsistency=value)]
    many = [*one, *(measured(number, inconsistency=0.1) for number in range(1, 40))]
    assert reasons(limits, *one)
    assert not reasons(limits, *many)
    assert for_many(3.0, 40) > for_many(3.0, 2) > for_many(3.0, 1) == 3.0
    assert for_many(math.inf, 9) == math.inf


def test_a_reason_names_all_slices_and_the_gravest_comes_first(limits: Limits) -> None:
    found = reasons(
        limits,
        measured(0, inconsistency=0.1, held_out=1.0),
        measured(1, inconsistency=9.0, held_out=1.2),
    )
    assert [each.code for each in found] == ["motion", "held-out-lines"]
    assert found[1].slices == (0, 1)
    assert "slice 1, the worst of 2" in found[1].words


def test_without_a_limit_for_such_scans_nothing_is_said(limits: Limits) -> None:
    key, usual = measured(0, inconsistency=9.0)
    unknown = SliceMeasures({**usual.values, "noise_known": 0.0}, None, None)
    assert reasons(limits, (key, unknown)) == []
    assert suspicion(unknown.values, limits) == 0


def test_novelty_stands_for_features(limits: Limits) -> None:
    values = completed({"feature_0": 1.5, "feature_1": 4.0, "ghost": 0.1}, limits)
    assert values == {"ghost": 0.1, "novelty": pytest.approx(math.sqrt(4 * 0.25 + 4.0))}
    assert "novelty" not in completed({"feature_0": 1.0}, limits)


def test_odds_weigh_all_measures_together() -> None:
    content = section()
    content["odds"] = {"measures": ["inconsistency", "held_out"], "weights": [1.0, 0.5, 0, 0, 0, -2.0, 0, 0, 0]}
    content["odds"]["error_weights"] = [0.0, 0, 0, 0, 1.0, 0, 0, 0, 0]
    content["limits"] += [
        {"measure": "odds", "noise_known": True, "coefficients": [0, 0, 0], "spread": 1, "degraded": 1, "untrusted": 4}
        | {"floor": 1e-9}
    ]
    limits = read_limits(content)
    at = {**KNOWN, "inconsistency": 0.1 * math.exp(1.25), "held_out": 0.08}  # 2.5 spreads, no reason alone
    assert suspicion(at, limits) == pytest.approx(2.5 + 0.5 * 1.0 - 2.0)
    assert suspicion({}, limits) == 0
    assert completed(at, limits)["expected_error"] == pytest.approx(0.08)
    (reason,) = reasons(limits, measured(0, inconsistency=0.1 * math.exp(1.45), held_out=0.08))
    assert (reason.code, reason.level) == ("doubtful", Level.DEGRADED)
    content["odds"]["weights"] = [1.0]
    with pytest.raises(ModelError, match="weights"):
        read_limits(content)


def test_the_worst_of_each_measure_is_reported(limits: Limits) -> None:
    found = worst(dict([measured(0, inconsistency=0.2, snr=30.0), measured(1, inconsistency=0.1, snr=20.0)]), limits)
    assert found["inconsistency"] == 0.2
    assert found["snr"] == 20.0


def test_values_that_are_missing_or_nought_have_covariates() -> None:
    assert covariates({}) == (1.0, -0.0, math.log(0.01))
    assert all(math.isfinite(number) for number in covariates({"coverage": 0.0, "noise": 0.0}))


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": [{"measure": "ghost"}]},
        {"limits": None},
        {"familiar": {"mean": [1.0], "precision": [[1.0, 0.0], [0.0, 1.0]]}},
        {"familiar": {}},
    ],
)
def test_a_section_that_cannot_be_read_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="quality section"):
        read_limits(section(**changes))


def test_a_spread_of_nought_is_refused() -> None:
    content = section()
    content["limits"][0]["spread"] = 0
    with pytest.raises(ModelError, match="do not fit"):
        read_limits(content)


def test_lines_are_ranked_in_the_order_in_which_they_came() -> None:
    ranks, numbers = ranked(np.array([7, -1, 3, 12]))
    assert ranks.tolist() == [1, -1, 0, 2]
    assert numbers.tolist() == [3, 7, 12]
