"""Simulated scans with faults: that they are what they say, and that thresholds can be set on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.calibrate_quality import fit, main, score, summary
from export.faults import INJECTED, inject
from export.roc import area, auroc, curve, draw
from export.slices import Slice
from export.trials import (
    KEY,
    ORDERS,
    Move,
    Setting,
    Stream,
    draw_subject,
    in_order,
    moved,
    pattern,
    read,
)
from export.verdict_trials import CLEAN, Row, load_rows, onset_errors, save_rows
from recon.assemble import Assembler
from recon.fourier import to_image
from recon.limits import read_limits
from recon.line_checks import LineChecks
from recon.line_faults import Kind
from recon.scan import Role

SETTING = Setting((96, 80), 4, 2, 16, 0.01, "sequential", True, False)


@pytest.fixture(scope="module")
def source() -> Slice:
    y, x = np.mgrid[-1:1:160j, -1:1:160j]
    pixels = np.where(x**2 / 0.5 + y**2 / 0.7 < 1, 120 + 60 * np.sin(7 * x) * np.cos(5 * y), 0)
    return Slice(pixels.astype(np.uint8), (1.2, 1.2), "someone", "T1w", "brain", 1.0)


@pytest.fixture(scope="module")
def clean(source: Slice) -> Stream:
    return read(draw_subject(np.random.default_rng(3), source, SETTING), SETTING, 1)


def kinds(stream: Stream) -> set[Kind]:
    checks = LineChecks(stream.scan)
    for number, readout in enumerate(stream.acquisitions):
        checks.add(readout, number)
    checks.complete(KEY)
    return {fault.kind for fault in checks.report().faults}


def test_a_clean_scan_is_what_it_says(clean: Stream) -> None:
    assembler = Assembler(clean.scan)
    done = [key for number, each in enumerate(clean.acquisitions) for key in assembler.add(each, number)]
    assert done == [KEY]
    lattice, central = pattern(SETTING)
    kspace = assembler.kspace(KEY)
    np.testing.assert_array_equal(kspace.measured[0], lattice | central)
    assert kspace.noise_is_measured
    assert kinds(clean) == set()
    numbers = assembler.order(KEY)[0]
    assert (np.diff(numbers[numbers >= 0]) == 1).all()
    assert numbers[numbers >= 0][0] == 4  # behind the noise readouts


def test_without_faults_and_fully_read_the_image_is_the_truth(source: Slice) -> None:
    setting = SETTING._replace(acceleration=1, sigma=1e-4)
    stream = read(draw_subject(np.random.default_rng(3), source, setting), setting, 1)
    lines = np.zeros((4, 96, 80), np.complex64)
    for each in stream.acquisitions:
        if each.role is Role.IMAGING:
            lines[:, each.step_1] = to_image(each.samples, (1,))[:, 40:120]
    image = np.sqrt((np.abs(to_image(lines, (1,))) ** 2).sum(0))
    assert np.linalg.norm(image - stream.truths[0]) < 0.01 * np.linalg.norm(image)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_reads_every_line_once(order: str) -> None:
    rows = np.arange(0, 90, 2)
    assert sorted(in_order(rows, order, 90).tolist()) == rows.tolist()


def test_a_step_leaves_the_lines_before_it_alone(source: Slice, clean: Stream) -> None:
    subject = draw_subject(np.random.default_rng(3), source, SETTING)
    spoiled = read(subject, SETTING, 1, Move((3.0, 2.0), 1.5, 20, "step"))
    assert spoiled.onset == 20
    assert len(spoiled.truths) == 2
    same = [bool((a.samples == b.samples).all()) for a, b in zip(clean.acquisitions, spoiled.acquisitions, strict=True)]
    assert same == [True] * 24 + [False] * (len(same) - 24)


@pytest.mark.parametrize(("kind", "n_poses"), [("step", 2), ("twitch", 2), ("drift", 4)])
def test_motions_have_their_poses(source: Slice, kind: str, n_poses: int) -> None:
    subject = draw_subject(np.random.default_rng(3), source, SETTING)
    assert len(read(subject, SETTING, 1, Move((3.0, 0.0), 1.0, 10, kind)).truths) == n_poses


def test_an_image_moves_by_the_millimetres_that_were_asked() -> None:
    image = np.zeros((200, 200), np.complex64)
    image[90:110, 60:70] = 1
    there = moved(image, (23.5, -11.75), 0.0)
    expected = np.roll(image, (20, -10), (0, 1))
    assert np.abs(there - expected).max() < 1e-4


@pytest.mark.parametrize("severity", [0, 1, 2])
@pytest.mark.parametrize("fault", INJECTED)
def test_a_fault_changes_readouts_and_nothing_else(clean: Stream, fault: str, severity: int) -> None:
    separate = SETTING._replace(separate=True)
    stream = clean
    if fault == "swapped coils":
        y = np.linspace(0, 1, 160)
        pixels = (200 * np.outer(y, y)).astype(np.uint8)
        subject = draw_subject(np.random.default_rng(1), Slice(pixels, (1, 1), "s", "T1w", "brain", 1), separate)
        stream = read(subject, separate, 1)
    spoiled = inject(fault, severity, list(stream.acquisitions), np.random.default_rng(severity))
    before = {id(each) for each in stream.acquisitions}
    assert any(id(each) not in before for each in spoiled) or len(spoiled) < len(stream.acquisitions)
    again = inject(fault, severity, list(stream.acquisitions), np.random.default_rng(severity))
    assert len(again) == len(spoiled)
    for a, b in zip(spoiled, again, strict=True):
        np.testing.assert_array_equal(a.samples, b.samples)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("spikes", Kind.SPIKE),
        ("dead coil", Kind.DEAD_COIL),
        ("wrong line numbers", Kind.DUPLICATE),
        ("not finite", Kind.NOT_FINITE),
        ("clipping", Kind.CLIPPED),
        ("gain jump", Kind.GAIN_JUMP),
        ("no calibration", Kind.CALIBRATION),
        ("interference", Kind.INTERFERENCE),
    ],
)
def test_the_gravest_faults_are_called_by_their_names(clean: Stream, fault: str, kind: Kind) -> None:
    spoiled = inject(fault, 2, list(clean.acquisitions), np.random.default_rng(5))
    assert kind in kinds(clean.changed(spoiled))


def some_rows(n: int = 60) -> list[Row]:
    """Clean scans whose measures scatter about what is usual, and moved ones whose motion stands out."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n):
        values = {
            "noise_known": 1.0,
            "coverage": 0.5,
            "noise": 0.01,
            "inconsistency": float(np.exp(rng.normal(-4, 0.3))),
            **{f"feature_{i}": float(rng.normal()) for i in range(3)},
        }
        about = (number, f"subject {number % 9}", "T1w", {"order": "shots"})
        rows.append(Row(*about, CLEAN, 0, 0.05, 0.05, "network", values))
        moved_values = {**values, "inconsistency": values["inconsistency"] * 60}
        rows.append(Row(*about, "motion", 1, 0.2, 0.05, "network", moved_values, onset=30, found=31, n_lines=60))
    return rows


def test_limits_are_fitted_to_clean_scans() -> None:
    rows = some_rows()
    section = fit(rows)
    limits = read_limits(json.loads(json.dumps(section)))
    motion = limits.by_measure["inconsistency", True]
    assert motion.spread == pytest.approx(0.3, rel=0.3)
    assert motion.degraded >= 3
    assert motion.untrusted < 14
    assert ("inconsistency", False) not in limits.by_measure
    told = summary(rows, limits)
    assert told["area"]["motion"]["area"] == 1.0
    assert told["clean_called_out"] <= 2  # of 60: the odds alone call out one or two in a hundred
    assert score(rows[1], limits) > 1 > score(rows[0], limits)
    assert [each["measure"] for each in section["limits"]].count("odds") == 2


def test_a_table_is_kept_and_read_again(tmp_path: Path) -> None:
    rows = some_rows(3)
    save_rows(rows, tmp_path / "rows.jsonl")
    assert load_rows(tmp_path / "rows.jsonl") == rows
    np.testing.assert_allclose(onset_errors(rows), [1 / 60] * 3)


def test_the_card_gets_its_section_and_keeps_the_rest(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[1] / "edge" / "assets" / "reconstruction" / "card.json"
    shutil.copy(source, tmp_path / "card.json")
    before = json.loads(source.read_text("utf-8"))
    save_rows(some_rows(), tmp_path / "rows.jsonl")
    arguments = ["--data", str(tmp_path), "--model", str(tmp_path), "--table", str(tmp_path / "rows.jsonl")]
    assert main([*arguments, "--no-picture"]) == 0
    after = json.loads((tmp_path / "card.json").read_text("utf-8"))
    assert {name: after[name] for name in before if name != "quality"} == {
        name: value for name, value in before.items() if name != "quality"
    }
    assert after["quality"]["calibration"]["scans"] == 60


def test_a_missing_card_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert "card.json" in capsys.readouterr().err


def test_areas_are_those_of_mann_and_whitney() -> None:
    assert auroc([2.0, 3.0], [1.0, 1.5]) == 1.0
    assert auroc([1.0, 1.0], [1.0, 1.0]) == 0.5
    assert np.isnan(auroc([], [1.0]))
    found = area([(0, 2.0), (1, 0.5), (2, 3.0)], [(0, 1.0), (1, 1.0), (2, 0.0)])
    assert found.low <= found.area <= found.high
    assert found.area == pytest.approx(7 / 9)
    false, true = curve([2.0, 3.0], [1.0, 2.5])
    assert false.tolist() == [0, 0, 0.5, 0.5, 1]
    assert true.tolist() == [0, 0.5, 0.5, 1, 1]


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw({"all": ([2.0, 3.0], [1.0, 2.5])}, tmp_path / "roc.png", "curves")
    assert (tmp_path / "roc.png").stat().st_size > 5000
