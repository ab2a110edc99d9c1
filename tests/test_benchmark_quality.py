"""The quality benchmark: its scores on cases that are known, its comparisons, and its smallest run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.bart import WAVELET, best_wavelet
from benchmarks.cases import SHAPES, subject_case
from benchmarks.ours import kspaces
from benchmarks.scores import hfen, retention
from edge.intake import to_acquisition
from edge.recon_file import readouts
from export.slices import Slice
from recon.arrays import Array
from recon.fourier import to_image, to_kspace
from recon.scan import Role

needs_bart = pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")


def _head(n: int = 64) -> Array:
    y, x = np.meshgrid(*[np.arange(n) - n // 2] * 2, indexing="ij")
    return ((1.0 + 0.1 * np.sin(x / 2)) * (np.hypot(y, x) < 0.4 * n))[None]


def test_hfen_is_zero_for_the_same_image_at_any_scale_and_one_for_none() -> None:
    head = _head()
    assert hfen(head, head) == 0
    assert hfen(head, 7.5 * head) == pytest.approx(0, abs=1e-12)
    assert hfen(head, 0 * head) == 1


def test_hfen_sees_edges_but_not_smooth_shading() -> None:
    head = _head()
    brain = np.zeros(head.shape, bool)
    brain[0, 16:48, 16:48] = True
    noise = np.random.default_rng(0).standard_normal(head.shape)
    shading = np.sin(2 * np.pi * np.arange(64) / 64)[:, None] * np.ones((1, 64, 64))
    fine, smooth = (head + 5 * error / np.linalg.norm(error) for error in (noise, shading))
    assert hfen(head, fine, brain) > 10 * hfen(head, smooth, brain)


def _with_structures(*levels: float) -> tuple[Array, Array]:
    """Return a uniform head with a 4×4 structure for each level, and where they are."""
    head, places = (_head() > 0).astype(float), np.zeros((1, 64, 64), bool)
    for number, level in enumerate(levels):
        where = np.s_[0, 30:34, 16 + 12 * number : 20 + 12 * number]
        head[where] = level
        places[where] = True
    return head, places


def test_retention_is_the_share_of_contrast_that_is_left() -> None:
    true, places = _with_structures(1.4, 0.5)
    assert retention(true, true, places) == pytest.approx(1)
    for share in (0.0, 0.6, 1.3):
        found, _ = _with_structures(1 + 0.4 * share, 1 - 0.5 * share)
        assert retention(true, 3 * found, places) == pytest.approx(share, abs=0.01)  # the scale hides a little


def test_retention_is_the_median_and_leaves_out_what_does_not_stand_out() -> None:
    true, places = _with_structures(1.5, 0.5, 1.02)
    found, _ = _with_structures(1.4, 0.7, 1.2)  # 80 %, 60 %, and one with too little contrast to judge
    assert retention(true, found, places) == pytest.approx(0.7, abs=0.03)
    faint, place = _with_structures(1.02)
    assert retention(faint, faint, place) is None


def test_a_simulated_subject_is_its_noise_free_image_with_the_noise_that_is_said(tmp_path: Path) -> None:
    disc = (255 * (_head(160)[0] > 0)).astype(np.uint8)
    source = Slice(disc, (1.2, 1.2), "somebody", "T1w", "brain", 1.0)
    case = subject_case(source, 1, tmp_path)
    kspace = kspaces(case.raw)[0]
    assert case.reference.shape == (1, *SHAPES[1])
    assert case.structures is not None
    assert case.structures.any()
    roles = [to_acquisition(readout.header, readout.samples).role for readout in readouts(case.raw)]
    assert roles[:5] == [Role.NOISE] * 4 + [Role.IMAGING]
    level = case.about["sigma"] * np.percentile(case.reference, 99.5)
    beside = np.moveaxis(to_image(kspace, (2, 3)), 1, 0)[:, case.reference < 0.1 * level]
    assert (np.abs(beside) ** 2).mean() == pytest.approx(level**2, rel=0.05)
    (tmp_path / "again").mkdir()
    again = subject_case(source, 1, tmp_path / "again")
    np.testing.assert_array_equal(again.reference, case.reference)


def _rows(scan: str, **psnr: float) -> list[dict[str, Any]]:
    names = {"zero": "zero-filled", "l2": "BART l2", "wavelet": "BART wavelet"}
    shared = {"scan": scan, "kind": "simulated", "acceleration": 4, "acs": 24, "ssim": 0.9, "nmse": 0.01, "hfen": 0.1}
    return [{**shared, "method": names.get(m, m), "psnr": p, "retention": None} for m, p in psnr.items()]


def test_the_network_is_held_against_the_better_of_bart_and_against_our_own() -> None:
    rows = _rows("a", zero=20, l2=30, wavelet=32, classical=31, network=33)
    rows += _rows("b", zero=20, l2=30, wavelet=29, classical=28, network=29)
    compared = quality.compare_pairs(rows)
    found = {(c["scan"], c["ours"], c["peer"]): c["gain"] for c in compared if c["measure"] == "psnr"}
    assert found == {
        ("a", "network", "BART best"): 1,
        ("a", "network", "classical"): 2,
        ("a", "network", "zero-filled"): 13,
        ("a", "classical", "BART best"): -1,
        ("a", "classical", "zero-filled"): 11,
        ("b", "network", "BART best"): -1,
        ("b", "network", "classical"): 1,
        ("b", "network", "zero-filled"): 9,
        ("b", "classical", "BART best"): -2,
        ("b", "classical", "zero-filled"): 8,
    }
    first = quality.gains(compared)[0]
    assert (first["ours"], first["peer"], first["measure"]) == ("network", "BART best", "psnr")
    assert (first["n"], first["n_worse"], first["mean_gain"]) == (2, 1, 0)
    assert first["interval_95"] == [-1, 1]
    without = quality.compare_pairs(_rows("a", zero=20, l2=30, wavelet=32, classical=31))
    assert {c["ours"] for c in without} == {"classical"}


def test_retention_counts_by_its_distance_from_one() -> None:
    assert quality.GOODNESS["retention"](1.1) == pytest.approx(quality.GOODNESS["retention"](0.9))
    assert quality.GOODNESS["hfen"](0.1) > quality.GOODNESS["hfen"](0.2)


def test_the_interval_holds_the_mean_and_narrows_with_more_subjects() -> None:
    values = np.random.default_rng(1).standard_normal(100) + 2
    low, high = quality.interval(values)
    few = quality.interval(values[:10])
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)
    assert few[1] - few[0] > high - low


@pytest.mark.peer
@needs_bart
@pytest.mark.parametrize("shape", [(32, 32), (33, 35)])
def test_barts_wavelet_image_of_a_full_scan_is_the_image(shape: tuple[int, int]) -> None:
    y, x = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    image = (100 + y) * ((y / 11) ** 2 + (x / 9) ** 2 < 1)
    kspace = to_kspace(image.astype(np.complex64), (0, 1))[None, None]
    volume, strength, _ = best_wavelet(kspace, 24, lambda found: -np.abs(found).sum(), WAVELET[:2])
    assert strength in WAVELET[:2]
    scale = np.vdot(volume[0], image) / np.vdot(volume[0], volume[0])
    assert np.linalg.norm(scale * volume[0] - image) < 0.02 * np.linalg.norm(image)


@pytest.mark.peer
@needs_bart
def test_the_smallest_run_without_data_scores_a_simulated_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _run(tmp_path, monkeypatch, tmp_path / "absent")
    rows = {row["method"]: row for row in record["results"]["rows"]}
    assert record["results"]["scans"][0]["scan"] == "simulated_head"
    assert {"zero-filled", "BART l2", "BART wavelet", "classical"} <= set(rows)
    assert set(quality.METHODS) == set(rows) | set(record["results"]["left_out"])
    assert rows["classical"]["psnr"] > rows["zero-filled"]["psnr"] + 3
    assert rows["classical"]["hfen"] < rows["zero-filled"]["hfen"]
    assert rows["classical"]["retention"] == pytest.approx(1, abs=0.1)
    assert (tmp_path / "pictures" / "simulated_head_R2_acs16.png").is_file()


@pytest.mark.real_data
@pytest.mark.peer
@needs_bart
@pytest.mark.skipif(not quality.REAL.exists(), reason="no real scans here")
def test_the_smallest_run_with_data_scores_a_real_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _run(tmp_path, monkeypatch, quality.REAL.parent)
    assert {row["kind"] for row in record["results"]["rows"]} == {"real"}
    assert all(row["retention"] is None for row in record["results"]["rows"])
    assert record["results"]["gains"]
    assert "interval_95" not in record["results"]["gains"][0]


def _run(folder: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> Any:
    words = f"quality --quick --data {data} --acs 16 --out {folder / 'record.json'} --pictures {folder / 'pictures'}"
    monkeypatch.setattr(sys, "argv", words.split())
    quality.main()
    return json.loads((folder / "record.json").read_text())
