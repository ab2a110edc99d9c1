"""Three states: what is flagged, what earns *not flagged*, and everything that is not assessed, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recon.arrays import Array
from recon.scan import Geometry, Volume
from tests.fake_triage import Brightness, fake_model, head
from triage.assess import Assessed, Site, Tools, assess_series, fuse
from triage.calibration import choose_threshold, cross_fitted, expected_calibration_error, fit_decision
from triage.conformal import HeldOut, conformal_set, held_out, p_values
from triage.findings import ABSENT, LABELS, PRESENT, Finding, Findings, Measurement, State, not_assessed
from triage.gate import Gate
from triage.preprocess import Planes

SITE = Site(("infarct",))
TOOLS = Tools((fake_model(),))


def states(assessed: Assessed) -> dict[str, State]:
    return {each.label: each.state for each in assessed.findings.findings}


def reason(assessed: Assessed, label: str = "infarct") -> str:
    return next(each.reason for each in assessed.findings.findings if each.label == label)


# --- calibration and conformal sets -----------------------------------------------------------------------------------


def test_a_decision_gives_the_probabilities_that_made_the_cases() -> None:
    rng = np.random.default_rng(0)
    score = rng.normal(0, 2, 20_000)
    truth = rng.random(score.size) < 1 / (1 + np.exp(-(0.7 * score - 0.5)))
    decision = fit_decision(score, truth)
    assert decision.slope == pytest.approx(0.7, abs=0.03)
    assert decision.offset == pytest.approx(-0.5, abs=0.05)
    probability = 1 / (1 + np.exp(-(decision.slope * score + decision.offset)))
    assert expected_calibration_error(probability, truth) < 0.02


def test_a_perfect_score_stays_finite_and_one_class_is_refused() -> None:
    decision = fit_decision(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True]))
    assert np.isfinite([decision.slope, decision.offset]).all()
    assert 0 < decision.probability(-2) < decision.threshold < decision.probability(1) < 1
    with pytest.raises(ValueError, match="with and without"):
        fit_decision(np.ones(3), np.ones(3, bool))


def test_what_is_quoted_was_chosen_on_other_patients() -> None:
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(60), 2)
    positive = np.repeat(np.arange(60) % 2 == 0, 2)
    score = rng.normal(0, 1, 120)  # says nothing

    def choose(known: Array, classes: Array) -> Callable[[Array], Array]:
        assert 25 < len(known) < 95
        assert classes.any()
        assert not classes.all()
        best = max(np.unique(known), key=lambda t: (known[classes] >= t).mean() + (known[~classes] < t).mean())
        return lambda new: (new >= best).astype(float)

    flagged = cross_fitted(score, positive, groups, choose)
    assert flagged[positive].mean() + (1 - flagged[~positive]).mean() == pytest.approx(1, abs=0.12)
    assert np.isnan(cross_fitted(score, positive, positive, choose)).all()  # one patient a class
    halves: list[set[int]] = []

    def note(known: Array, classes: Array) -> Callable[[Array], Array]:
        halves.append({int(each) // 2 for each in known})
        return np.zeros_like

    cross_fitted(np.arange(120.0), positive, groups, note)
    assert all(first.isdisjoint(second) for first, second in zip(halves[::2], halves[1::2], strict=True))


def test_the_threshold_balances_both_errors() -> None:
    probability = np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
    positive = np.array([False, False, True, False, True, True])
    threshold = choose_threshold(probability, positive)
    flagged = probability >= threshold
    assert flagged[positive].mean() >= 2 / 3
    assert (~flagged[~positive]).mean() >= 2 / 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.1, 0.2]), st.integers(20, 80))
def test_conformal_sets_keep_the_truth_as_often_as_promised(seed: int, alpha: float, n: int) -> None:
    rng = np.random.default_rng(seed)
    kept = []
    for _ in range(40):
        present, absent = rng.normal(1, 1, n + 20), rng.normal(-1, 1, n + 20)
        cases = HeldOut(present[:n], absent[:n])
        kept += [PRESENT in conformal_set(score, cases, alpha) for score in present[n:]]
        kept += [ABSENT in conformal_set(score, cases, alpha) for score in absent[n:]]
    # cases of one draw share their held-out ones: a standard error by draws, generously
    assert np.mean(kept) >= 1 - alpha - 4 * np.sqrt(alpha * (1 - alpha) / 40 / n) - 0.02


def test_p_values_count_the_new_case_too() -> None:
    cases = HeldOut(np.array([1.0, 2.0, 3.0]), np.array([-3.0, -2.0, -1.0]))
    assert p_values(10, cases) == (1.0, 0.25)
    assert p_values(-10, cases) == (0.25, 1.0)
    assert conformal_set(2.5, cases, 0.3) == (PRESENT,)
    assert conformal_set(-2.5, cases, 0.3) == (ABSENT,)
    assert conformal_set(0.0, cases, 0.3) == ()
    assert conformal_set(0.0, cases, 0.2) == (PRESENT, ABSENT)


def test_an_empty_set_keeps_the_finding_where_it_is_the_likelier_answer_and_never_its_absence() -> None:
    cases = HeldOut(np.arange(3.0, 23.0), np.arange(-50.0, 0.0))
    assert conformal_set(3.5, cases, 0.1) == (PRESENT,)  # 2 of 21 with the finding score as little, 1 of 51 as much
    assert conformal_set(2.5, cases, 0.1) == (PRESENT,)
    few = HeldOut(np.arange(3.0, 53.0), np.arange(-20.0, 0.0))
    assert conformal_set(2.5, few, 0.1) == ()


def test_a_single_slice_is_compared_with_slices() -> None:
    calibration = TOOLS.models[0].calibrations["flair"]
    shifted = replace(calibration, score=np.where(calibration.is_exam, calibration.score + 3, calibration.score))
    assert held_out(shifted, True).absent.max() == pytest.approx(held_out(shifted, False).absent.max() + 3)


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_bright_spot_is_flagged_with_its_place_size_and_side() -> None:
    assessed = assess_series(head(lesion=2.6), "flair", TOOLS, SITE)
    (finding,) = assessed.findings.findings
    assert finding.state is State.FLAGGED
    assert finding.conformal == (PRESENT,)
    assert (finding.contrast, finding.evidence, finding.model, finding.alpha) == (
        "flair",
        "simulated",
        "fake-infarct 1",
        0.1,
    )
    assert finding.probability is not None
    assert finding.probability > 0.9
    assert finding.key_slice in range(4, 10)
    assert finding.box_mm is not None
    low, high = np.array(finding.box_mm)
    assert (low < (42, 18, 0)).all()
    assert (high > (42, 18, 0)).all()
    assert ((high - low) < (45, 45, 60)).all()
    volume = assessed.findings.measurements["infarct_volume_ml"]
    assert volume.side == "left"
    assert "not measured" in volume.reason
    assert volume.value == finding.volume_ml
    assert set(assessed.maps) == {"infarct"}
    assert assessed.maps["infarct"].shape == head().data.shape


def test_nothing_bright_is_not_flagged_and_has_no_place() -> None:
    (finding,) = assess_series(head(), "flair", TOOLS, SITE).findings.findings
    assert finding.state is State.NOT_FLAGGED
    assert finding.conformal == (ABSENT,)
    assert finding.box_mm is finding.key_slice is finding.volume_ml is None


def test_one_slice_is_a_volume() -> None:
    for lesion, state in ((2.6, State.FLAGGED), (0.0, State.NOT_FLAGGED)):
        assert states(assess_series(head(1, lesion), "flair", TOOLS, SITE)) == {"infarct": state}


def test_what_was_not_measured_is_refused_by_its_type() -> None:
    network = Brightness()
    tools = Tools(tuple(fake_model(label, network=network) for label in LABELS))
    assessed = assess_series(head(lesion=2.6, is_measured=False), "flair", tools, Site())
    assert set(states(assessed).values()) == {State.NOT_ASSESSED}
    assert "synthetic" in reason(assessed)
    assert network.n_runs == 0


@pytest.mark.parametrize(
    ("contrast", "tools", "words"),
    [
        ("", TOOLS, "contrast is not known"),
        ("t2", TOOLS, "no suitable contrast: infarct is looked for on flair"),
        ("flair", Tools(()), "no network for infarct"),
        ("flair", Tools((fake_model(network=Brightness(fails=True)),)), "failed: backend"),
        ("flair", Tools((fake_model(network=Brightness(feature=99.0)),)), "unlike the images"),
        ("flair", Tools((fake_model(present=(-20.0, 6.0), absent=(-20.0, 8.0)),)), "ambiguous"),
        ("flair", Tools((fake_model(present=(6.0, 8.0), absent=(-20, -15)),)), "neither"),
        ("flair", Tools((fake_model(present=(-20.0, 8.0), absent=(-40, -30)),)), "below the operating point"),
    ],
)
def test_why_not_assessed(contrast: str, tools: Tools, words: str) -> None:
    assessed = assess_series(head(), contrast, tools, SITE)
    assert states(assessed) == {"infarct": State.NOT_ASSESSED}
    assert words in reason(assessed)


def test_noise_air_and_broken_voxels_are_not_assessed() -> None:
    volume = head()
    noise = np.abs(np.random.default_rng(0).standard_normal(volume.data.shape)).astype(np.float32)
    broken = volume.data.copy()
    broken[3, 4, 5] = np.nan
    for data in (np.zeros_like(volume.data), broken):
        assert states(assess_series(replace(volume, data=data), "flair", TOOLS, SITE)) == {
            "infarct": State.NOT_ASSESSED
        }
    assert states(assess_series(replace(volume, data=noise), "flair", TOOLS, SITE))["infarct"] is not State.NOT_FLAGGED


def test_a_doubtful_label_rules_nothing_out_and_may_still_be_flagged() -> None:
    class Doubtful(Gate):
        def look(self, planes: Planes, contrast: str) -> tuple[str, str]:
            return "", "labelled flair, and looks nearly as much like t2"

    tools = Tools((fake_model(),), Doubtful({}, 0.0, 0.0))
    clear, lesion = (assess_series(head(lesion=level), "flair", tools, SITE) for level in (0.0, 3.0))
    assert states(clear) == {"infarct": State.NOT_ASSESSED}
    assert reason(clear) == "labelled flair, and looks nearly as much like t2"
    assert states(lesion) == {"infarct": State.FLAGGED}


def test_too_little_of_a_head_is_never_not_flagged() -> None:
    site = replace(SITE, min_coverage_mm=60.0)
    assert states(assess_series(head(14), "flair", TOOLS, site)) == {"infarct": State.NOT_FLAGGED}
    few = assess_series(head(4), "flair", TOOLS, site)
    assert states(few) == {"infarct": State.NOT_ASSESSED}
    assert "24 mm" in reason(few)
    assert states(assess_series(head(4, 2.6), "flair", TOOLS, site)) == {"infarct": State.FLAGGED}


def test_slices_of_another_direction_are_not_asked_about() -> None:
    volume = head()
    g = volume.geometry
    turned = Geometry(g.origin_mm[:, [0, 2, 1]], (1, 0, 0), (0, 0, -1), g.spacing_mm, g.thickness_mm)
    assert "coronal" in reason(assess_series(Volume(volume.data, turned, volume.provenance), "flair", TOOLS, SITE))


# --- several series of one exam ---------------------------------------------------------------------------------------


def answer(contrast: str, state: State, conformal: tuple[str, ...] = (), why: str = "") -> Assessed:
    finding = Finding("infarct", state, why, conformal=conformal, contrast=contrast)
    size = {"infarct_volume_ml": Measurement(1.0)} if state is State.FLAGGED else {}
    return Assessed(contrast, Findings((finding,), {"midline_shift_mm": Measurement(2.0, reason=contrast), **size}))


def test_the_best_contrast_answers() -> None:
    exam = [answer("flair", State.NOT_FLAGGED, (ABSENT,)), answer("dwi", State.FLAGGED, (PRESENT, ABSENT))]
    (finding,) = fuse(exam, ("infarct",)).findings
    assert (finding.contrast, finding.state) == ("dwi", State.FLAGGED)
    exam = [answer("flair", State.FLAGGED, (PRESENT, ABSENT)), answer("dwi", State.NOT_FLAGGED, (ABSENT,))]
    (finding,) = fuse(exam, ("infarct",)).findings
    assert (finding.contrast, finding.state) == ("dwi", State.NOT_FLAGGED)


def test_a_clear_flag_is_never_lost() -> None:
    exam = [answer("dwi", State.NOT_FLAGGED, (ABSENT,)), answer("flair", State.FLAGGED, (PRESENT,))]
    fused = fuse(exam, ("infarct",))
    assert (fused.findings[0].contrast, fused.findings[0].state) == ("flair", State.FLAGGED)
    assert fused.measurements["midline_shift_mm"].reason == "flair"
    assert fused.measurements["infarct_volume_ml"].value == 1.0


def test_where_no_series_could_be_assessed_every_reason_is_given() -> None:
    exam = [answer("t1", State.NOT_ASSESSED, why="no network"), answer("dwi", State.NOT_ASSESSED, why="noise")]
    (finding,) = fuse(exam, ("infarct",)).findings
    assert finding.state is State.NOT_ASSESSED
    assert finding.reason == "dwi: noise; t1: no network"
    assert fuse([], ("mass",)).findings[0].state is State.NOT_ASSESSED


def test_not_assessed_holds_every_finding() -> None:
    assert [each.label for each in not_assessed("x").findings] == list(LABELS)
