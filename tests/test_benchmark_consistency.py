"""The benchmark of the measures at its smallest size: simulated scans with each fault, and the figures made of rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.consistency import FAULTS, ORDERS, Row, acquisition_order, simulate, summarise, true_error
from export.slices import Slice


def _source() -> Slice:
    y, x = np.linspace(-1, 1, 120)[:, None], np.linspace(-1, 1, 120)
    pixels = 180 * (y**2 + x**2 < 0.8) + 60 * (np.sin(9 * y) * np.cos(7 * x) > 0.3) * (y**2 + x**2 < 0.6)
    return Slice(pixels.astype(np.uint8), (2.0, 2.0), "nobody", "none", "phantom", 1.0)


@pytest.mark.parametrize("order", ORDERS)
def test_every_measured_line_has_its_turn(order: str) -> None:
    measured = np.zeros(40, bool)
    measured[1::3] = True
    ranks = acquisition_order(measured, order)
    assert sorted(ranks[measured]) == list(range(int(measured.sum())))
    assert (ranks[~measured] == -1).all()


@pytest.mark.parametrize("fault", sorted(set(FAULTS)))
def test_a_fault_makes_the_image_worse(fault: str) -> None:
    scan = simulate(np.random.default_rng(3), _source(), 4, "two passes", fault)
    clean = simulate(np.random.default_rng(3), _source(), 4, "two passes", "none")
    error, rest = (true_error(np.abs(each.start.image[0]), each.truths) for each in (scan, clean))
    assert scan.about["fault"] == fault
    assert error > rest or fault == "none"


def test_figures_are_made_of_rows() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(30):
        fault, error = FAULTS[number % 10], float(rng.uniform(0.02, 0.4))
        values = {"held_out": error * 1.1, "inconsistency": float(fault == "motion")}
        about = {"fault": fault, "order": ORDERS[number % 4], "onset": 10}
        rows.append(Row(about, error, error / 2, values, 11 if fault == "motion" else None, 40, (1.0, 0.4, 0.1)))
    found = summarise(rows)
    assert found["spearman"]["held_out"]["all"] == pytest.approx(1)
    assert found["motion"]["all"]["auroc against clean"] == 1
    assert found["motion"]["all"]["onset within 5 % of the lines, of those told"] == 1
    assert found["share of the reconstruction, every second slice thorough"] == pytest.approx(0.25)
    json.dumps(found, allow_nan=False)
