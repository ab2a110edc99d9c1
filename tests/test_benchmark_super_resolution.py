"""The super-resolution benchmark: its measures on cases that are known, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

pytest.importorskip("torch", reason="PyTorch is not installed (pip install 'scanside[train]')")

from benchmarks import super_resolution
from benchmarks.record import write_record
from benchmarks.superres_cases import cubic, cut_off, ring_correlation, self_taught, sinc, volume_of
from benchmarks.superres_lesions import auc, count_new
from edge.superres_model import open_refiner
from export import superres_page
from export.superres_page import card_page
from recon.arrays import Array

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def smooth(shape: tuple[int, ...] = (2, 64, 64)) -> Array:
    """Return smooth random slices, about 0 to 1."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), (0, 3, 3))
    return (0.5 + 0.15 * noise / noise.std()).astype(np.float32)


def test_the_spectrum_ends_where_noise_takes_over() -> None:
    truth = np.random.default_rng(1).standard_normal((4, 64, 64))
    kept = np.fft.ifft2(np.fft.fft2(truth) * (np.hypot(*np.meshgrid(*[np.fft.fftfreq(64) / 0.25] * 2)) < 1.2)).real
    mask = np.ones(truth.shape, bool)
    radii, correlation = ring_correlation(truth, kept, mask)
    assert cut_off(radii, correlation) == pytest.approx(1.2, abs=0.06)
    assert cut_off(*ring_correlation(truth, truth, mask)) == pytest.approx(2, abs=0.06)


@pytest.mark.parametrize("n", [32, 33])
def test_methods_agree_on_what_is_smooth(n: int) -> None:
    y, x = np.mgrid[:n, :n] / n
    image = (1 + 0.3 * np.sin(2 * np.pi * (y + 2 * x)))[None].astype(np.float32)
    plain = sinc(image)
    np.testing.assert_allclose(cubic(image), plain, atol=2e-3)
    np.testing.assert_allclose(self_taught(image), plain, atol=2e-2)


def test_area_under_the_curve() -> None:
    assert auc(np.array([[2.0, 0.0], [3.0, 1.0]])) == 1
    assert auc(np.array([[0.0, 2.0], [1.0, 3.0]])) == 0
    assert auc(np.zeros((4, 2))) == 0.5


def test_only_what_is_new_counts_as_a_false_structure() -> None:
    plain = smooth() * 0.1 + 0.5
    y, x = np.mgrid[:64, :64]
    dot = 0.4 * (np.hypot(y - 30, x - 33) < 2)
    assert count_new(plain + dot, [plain, plain], 1.0) == len(plain)
    assert count_new(plain - dot, [plain, plain], 1.0) == len(plain)
    assert count_new(plain + dot, [plain + dot, plain], 1.0) == 0
    assert count_new(plain, [plain, plain], 1.0) == 0


def test_noise_is_refused_and_next_to_nothing_would_be_added(tmp_path: Path) -> None:
    refiner = open_refiner()
    receiver = np.random.default_rng(0).standard_normal((2, 1, 64, 64))
    rows = {
        name: super_resolution._null(volume_of(data.astype(np.float32), (5, 2, 2)), refiner, "")
        for name, data in (
            ("noise", np.hypot(*receiver)),
            ("constant", np.ones((1, 64, 64))),
        )
    }
    assert all(row["refused"] for row in rows.values())
    assert all(row["share"] < 0.01 for row in rows.values())


def test_a_record_takes_new_milliseconds_of_its_own_weights_only(tmp_path: Path) -> None:
    refiner, path = open_refiner(), tmp_path / "record.json"
    results = {"model_sha256": refiner.card.sha256, "cost": {"median_ms": 1e6}}
    write_record({"results": results}, path)
    super_resolution.time_again(path, refiner, 1)
    found = json.loads(path.read_bytes())["results"]
    assert 0 < found["cost"]["median_ms"] < 1e6
    assert found["cost_when_busy"] == [{"median_ms": 1e6}]
    write_record({"results": {**results, "model_sha256": "another"}}, path)
    with pytest.raises(ValueError, match="other weights"):
        super_resolution.time_again(path, refiner, 1)


def test_the_card_takes_the_record_of_its_own_weights_only() -> None:
    trained = {"minutes": 1.0, "steps": 10, "volumes": 2, "subjects": 1, "single_slices": {"stroke_flair": 7},
               "sets": {"brain": {"what": "a set", "licence": "CC0"}}}  # fmt: skip
    card: dict[str, Any] = {
        "name": "n", "version": "1", "sha256": "a", "parameters": 5, "opset": 17, "limits": ["a limit"],
        "training": trained,
    }  # fmt: skip
    results = {
        "model_sha256": "a",
        "summary": [],
        "cost": {"slice": "s", "backend": "b", "n": 3, "median_ms": 1, "p95_ms": 2, "min_ms": 0.5, "load": [0.1]},
        "through_plane": [],
        "lesions": {
            "detectability": [],
            "false_structures": {"found": 0, "volumes": 3, "per_100_95": [0, 71], "sinc": 0},
        },
        "null_tests": [{"name": "noise", "refused": True, "share": 0.001}],
    }
    page = card_page(card, {"results": results, "at": "2024-01-02T00:00:00", "commit": "abc"})
    assert "Not for diagnostic use" in page
    assert "| noise | yes | 0.1 % |" in page
    assert "- a limit" in page
    assert "1 subjects and single slices of patients (7 of stroke_flair). Sets: a set, CC0." in page
    without = card_page(
        {**card, "training": {**trained, "single_slices": {}}},
        {"results": results, "at": "2024-01-02T00:00:00", "commit": "abc"},
    )
    assert "1 subjects. Sets: a set, CC0." in without
    short = {"contrast": "T1w", "psnr_gain": 0.5, "further": {"cut_off": 0.1}}
    assert len(superres_page._short([short])) == 2
    with pytest.raises(ValueError, match="other weights"):
        card_page({**card, "sha256": "b"}, {"results": results, "at": "", "commit": ""})


@pytest.mark.real_data
@pytest.mark.skipif(not (DATA / "brain" / "index.csv").is_file(), reason="the data folder is not there")
def test_held_out_heads_are_served_better_than_by_zero_filling() -> None:
    rows = super_resolution.in_plane(DATA, open_refiner(), 1, 0, None, 1)
    assert {row["contrast"] for row in rows} >= {"T1w", "T2w", "FLAIR", "T1w-Gd"}
    for row in rows:
        assert row["network"]["psnr"] > row["sinc"]["psnr"]
        assert row["in_band"] < 1e-5
