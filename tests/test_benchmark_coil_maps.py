"""The coil-map benchmark at its smallest size."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from benchmarks.coil_maps import measure, phantom, sine


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")
def test_all_methods_are_measured_and_judged() -> None:
    pytest.importorskip("sigpy")
    ticks: list[int] = []
    repeats = {"scanside": 1, "bart": 1, "sigpy": 1}
    results = measure(phantom(64, 4, 80), 2, 24, repeats, lambda: ticks.append(1))
    assert set(results) == {"scanside", "bart", "sigpy", "true"}
    assert len(ticks) == 6  # each once to warm up, once to be timed
    assert results["true"]["median_ms"] is None
    assert results["scanside"]["median_ms"] > 0
    assert results["scanside"]["sine"] < 0.03
    assert results["scanside"]["nrmse"] < 1.1 * results["true"]["nrmse"]


def test_the_sine_is_zero_for_maps_that_differ_in_phase_and_one_for_crossed_ones() -> None:
    maps = np.zeros((2, 3, 3), complex)
    maps[0] = 1
    where = np.ones((3, 3), bool)
    assert sine(1j * maps, maps, where) == 0
    assert sine(maps[::-1], maps, where) == 1
