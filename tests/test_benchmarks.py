"""Each benchmark at its smallest size: it runs, and its record says what a reader needs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from benchmarks import durability, energy, gpu, intake, peers, speed, stability
from benchmarks.scores import compare
from tests.fake_network import FakeNetwork
from tests.test_power import hwmon


def test_intake_counts_what_it_sent() -> None:
    record = intake.measure(coils=2, samples=64, lengths=[300], n_reference=20)
    (stream,) = record["results"]["streams"]
    assert stream["readouts"] == 300
    assert stream["readouts_per_s"] > 0
    assert record["results"]["reference_style_sender"]["readouts"] == 20
    assert {"benchmark", "commit", "device", "versions", "settings"} <= set(record)


def test_durability_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["durability", "--kills", "2", "--seed", "3", "--json", str(path)])
    durability.main()
    results = json.loads(path.read_text())["results"]
    assert sum(results.values()) == 4  # two kills, two outcomes
    assert "lost" not in results
    assert "different" not in results


@pytest.mark.peer
@pytest.mark.skipif(
    not (shutil.which("bart") and shutil.which("ismrmrd_generate_cartesian_shepp_logan")),
    reason="bart or ismrmrd-tools is not installed",
)
@pytest.mark.parametrize("acceleration", [1, 2, 4])
def test_phantoms_come_out_no_worse_than_the_peers(acceleration: int) -> None:
    rows = peers.phantom(64, 4, acceleration)
    assert rows
    for row in rows:
        assert row["ours_nrmse"] <= row["peer_nrmse"], row


def test_scores_know_equal_scaled_and_different_volumes() -> None:
    rng = np.random.default_rng(0)
    reference = np.zeros((2, 48, 48))
    reference[:, 8:40, 8:40] = 1 + rng.random((2, 32, 32))
    same = compare(reference, 3 * reference)
    assert same.ssim == pytest.approx(1)
    assert same.nmse == pytest.approx(0, abs=1e-12)
    noisy = compare(reference, reference + 0.1 * rng.standard_normal(reference.shape))
    noisier = compare(reference, reference + 0.3 * rng.standard_normal(reference.shape))
    assert noisy.psnr > noisier.psnr + 6
    assert noisy.ssim > noisier.ssim


@pytest.mark.real_data
@pytest.mark.peer
@pytest.mark.skipif(not peers.REAL.exists() or not shutil.which("bart"), reason="no real scans, or no bart, here")
@pytest.mark.parametrize("name", ["pulseq_brain_16ch", "gpunufft_brain_4ch"])
def test_real_scans_come_out_no_worse_than_bart(name: str) -> None:
    (row,) = peers.real(peers.REAL / f"{name}.h5", 2, 24, None)
    assert row["ours_psnr"] >= row["peer_psnr"], row
    assert row["ours_ssim"] >= row["peer_ssim"], row


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("bart") is None, reason="bart is not installed")
def test_speed_times_every_contender_in_one_run() -> None:
    with Progress(disable=True) as progress:
        found = speed.measure_speed(progress, 96, 4, 1)
    rows = {row["method"]: row for row in found["rows"]}
    assert {"maps", "classical", speed.MAPS_NETWORK, speed.ALL, speed.BART, speed.SIGPY, speed.RUNTIME} <= set(rows)
    assert all(row["median_ms"] > 0 and row["peak_mib"] is not None for row in rows.values())
    assert found["ratios"]["BART / all of it"] == pytest.approx(
        rows[speed.BART]["median_ms"] / rows[speed.ALL]["median_ms"], rel=0.05
    )


def test_stability_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = stability.simulated_head(tmp_path, matrix=96, n_coils=4)
    monkeypatch.setattr(stability, "simulated_head", lambda folder, seed: head)
    monkeypatch.setattr(sys, "argv", ["stability", "--seeds", "1", "--out", str(tmp_path / "record.json")])
    stability.main()
    (found,) = json.loads((tmp_path / "record.json").read_text())["results"]
    assert [row["acceleration"] for row in found["by_acceleration"]] == list(stability.ACCELERATIONS)
    assert set(found["moved_by_1_percent"]) == set(found["kept_contrast"]) == {"2", "4", "6", "8"}


def test_a_machine_without_a_gpu_has_a_reason_in_every_row() -> None:
    with Progress(disable=True) as progress:
        rows = gpu.measure(progress, 96, 4, 1)["rows"]
    assert len(rows) == 5
    for row in rows:
        assert ("reason" in row) != (row.get("ssim", 0) > 0.999)


def test_energy_counts_each_way_with_each_meter(tmp_path: Path) -> None:
    hwmon(tmp_path, 0, {1: ("VDD_IN", 1000, 2000)})
    found = energy.measure(FakeNetwork(), 96, 4, 0.01, tmp_path)
    energy.show(found)
    assert found["meters"] == [{"source": "INA3221", "name": "VDD_IN"}]
    assert [row["way"] for row in found["rows"]] == ["idle", "classical", "network"]
    for row in found["rows"]:
        assert row["watts"] == pytest.approx(2.0, rel=0.05)  # rounded
    assert all(row["joules_per_slice"] > 0 for row in found["rows"][1:])


def test_energy_without_meters_is_unavailable_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = energy.Survey([], ["no INA3221 in hwmon", "no RAPL in powercap"])
    monkeypatch.setattr(energy, "look_for_meters", lambda root: nothing)
    path = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["energy", "--matrix", "96", "--seconds", "0", "--out", str(path)])
    energy.main()
    record = json.loads(path.read_text())
    assert record["results"] == {"meters": [], "unavailable": nothing.reasons, "rows": []}
    assert record["settings"]["model"]
