"""The triage benchmark at its smallest size, and the statistics that it quotes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import benchmarks.triage
from benchmarks.diagnostic import area_under_curve, proportion
from benchmarks.foreign import foreign, spoiled, spoiled_otherwise
from benchmarks.queue_harm import Desk, check, waits
from benchmarks.triage_held_out import held_out_figures
from benchmarks.triage_scans import Row, summary
from tests.fake_triage import fake_model, head
from triage.assess import Tools
from triage.gate import Gate


def test_intervals_are_those_of_the_books() -> None:
    exact = proportion(61, 65)  # the anchors' 94 % (85 to 98)
    assert (exact["low"], exact["high"]) == (pytest.approx(0.850, abs=5e-4), pytest.approx(0.983, abs=5e-4))
    assert proportion(0, 10)["low"] == 0
    assert proportion(10, 10)["high"] == 1
    rng = np.random.default_rng(0)
    score = np.concatenate([rng.normal(1, 1, 300), rng.normal(0, 1, 300)])
    area = area_under_curve(score, np.arange(600) < 300)
    assert area["value"] == pytest.approx(0.76, abs=0.04)
    assert area["low"] < area["value"] < area["high"]
    perfect = area_under_curve(np.arange(6.0), np.arange(6) > 2)
    assert perfect["value"] == 1.0


def test_the_queue_is_the_known_one() -> None:
    found = waits(Desk(0.1, 0.8, 0.9, 0.9))
    minutes = [round(found[name], 1) for name in ("first_come", "diseased", "without", "missed")]
    assert minutes == [40.0, 13.1, 43.0, 46.7]
    assert all(each["difference"] < 0.1 for each in check(20_000)[:2])


def test_foreign_images_are_many_and_finite() -> None:
    rng = np.random.default_rng(0)
    found = [*foreign(rng), *spoiled(head(5), rng), *spoiled_otherwise(head(5), rng)]
    assert len({name for name, _ in found}) == len(found) >= 35
    assert all(np.isfinite(volume.data).all() for _, volume in found)


def test_no_quoted_point_lies_below_the_cards_floor() -> None:
    model = fake_model()
    card = model.card.contrasts["flair"]
    shut = replace(card, exam=replace(card.exam, floor=1e6), one_slice=replace(card.one_slice, floor=1e6))
    shut_model = replace(model, card=replace(model.card, contrasts={"flair": shut}))
    usual, floored = (held_out_figures([each])["infarct on flair"] for each in (model, shut_model))
    for kind in [each for each in ("slice", "exam") if usual[each]]:
        assert usual[kind]["sensitivity"]["hits"] > 0
        assert floored[kind]["sensitivity"]["hits"] == 0
        assert floored[kind]["specificity"]["value"] == 1.0
        assert floored[kind]["auc"] == usual[kind]["auc"]


def scanned(kind: str, acceleration: int, state: str, probability: float | None, verdict: str = "trusted") -> Row:
    row = {"seed": 1, "kind": kind, "contrast": "flair", "snr": 25.0, "acceleration": acceleration}
    return {
        **row,
        "verdict": verdict,
        "states": {"infarct": state},
        "probability": {"infarct": probability},
        "triage_s": 1.0,
    }


def test_scans_are_summed_up_by_acceleration_and_flips_are_those_of_trusted_ones() -> None:
    rows = [
        scanned("infarct", 1, "flagged", 0.9),
        scanned("infarct", 2, "not flagged", 0.1),
        scanned("infarct", 4, "not flagged", 0.1, "degraded"),
        scanned("infarct", 8, "not assessed", None),
        scanned("none", 1, "not flagged", 0.1),
        scanned("none", 2, "not flagged", 0.1),
        scanned("none", 4, "flagged", 0.6),
        scanned("none", 8, "not assessed", 0.3),
        scanned("bleed", 1, "flagged", 0.6),
        scanned("bleed", 2, "flagged", 0.6),
    ]
    found = summary([{**row, "states": {**row["states"], "haemorrhage": "not assessed"},
                      "probability": {**row["probability"], "haemorrhage": None}} for row in rows])  # fmt: skip
    cells = found["by_finding"]["infarct on flair"]
    assert [cells[f"R {r}"]["sensitivity"]["hits"] for r in (1, 2, 4, 8)] == [1, 0, 0, 0]
    assert [cells[f"R {r}, SNR 25"]["specificity"]["hits"] for r in (1, 2, 4, 8)] == [1, 1, 0, 1]
    assert cells["R 8"]["not_flagged"]["hits"] == 0
    assert cells["R 8"]["not_assessed"]["hits"] == 2
    assert cells["R 1"]["flagged_where_another_is"]["value"] == 1.0
    assert (cells["SNR 25"]["sensitivity"]["n"], cells["SNR 25"]["specificity"]["n"]) == (4, 4)
    flips = found["flips"]
    assert (flips["all"]["hits"], flips["all"]["n"]) == (2, 4)  # neither degraded nor not assessed ones count
    assert {(row["kind"], row["acceleration"]) for row in flips["rows"]} == {("infarct", 2), ("none", 4)}
    assert len(found["wrong"]) == 5


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = Tools((fake_model(), fake_model("mass", ("t1ce",))), Gate({}, 0.0, 0.0))
    monkeypatch.setattr(benchmarks.triage, "open_tools", lambda folder: (tools, ()))
    parts = ["held_out", "coverage", "patients", "false_alarms", "foreign", "queue", "cost"]
    words = [
        "--quick",
        "--data",
        str(tmp_path / "none"),
        "--json",
        str(tmp_path / "r.json"),
        "--png",
        str(tmp_path / "r.png"),
    ]
    monkeypatch.setattr(sys, "argv", ["triage", *words, "--parts", *parts])
    benchmarks.triage.main()
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert set(parts) <= set(results)
    assert results["foreign"]["not_flagged"] == 0
    assert results["foreign"]["not_assessed"]["value"] == 1.0
    assert results["held_out"]["infarct on flair"]["slice"]["auc"]["value"] > 0.95
    with Image.open(tmp_path / "r.png") as chart:
        assert chart.width == 1240
