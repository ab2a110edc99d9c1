"""The chaos benchmark at its smallest: it counts right, and a wall clock can be shifted alone."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from benchmarks.chaos_world import build_clock_shift
from tests.archive import needs_dcmtk

READ_CLOCKS = "import time; print(time.time(), time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME))"


def test_two_faults_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"daemon killed": 1, "desk disconnected": 1}
    monkeypatch.setattr(chaos, "_WEIGHTS", kinds)
    out = tmp_path / "chaos.json"
    monkeypatch.setattr(sys, "argv", ["chaos", "--faults", "2", "--scanners", "1", "--seed", "3", "--json", str(out)])
    chaos.main()
    results = json.loads(out.read_text())["results"]
    assert not any(results["lost"].values())
    assert sum(results["faults"].values()) == 2
    assert results["scans_done"] >= 1
    assert results["alerts"] == results["scans_done"]


@needs_dcmtk
def test_what_is_deleted_meanwhile_was_delivered_and_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chaos, "_WEIGHTS", {"triage killed": 1, "archive dead for a while": 1})
    out = tmp_path / "chaos.json"
    words = ["chaos", "--faults", "2", "--scanners", "1", "--retention", "--seed", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    chaos.main()
    results = json.loads(out.read_text())["results"]
    assert not any(results["lost"].values())
    assert results["scans_deleted"] >= 1
    assert results["alerts"] == results["scans_done"]


def test_worlds_are_added_up() -> None:
    one: dict[str, Any] = {"lost": {"a": 1}, "late": {"max": 0.5}, "left_out": ["x"], "only": 1}
    other: dict[str, Any] = {"lost": {"a": 2, "b": 3}, "late": {"max": None}, "left_out": []}
    assert chaos._together([one, other]) == {
        "lost": {"a": 3, "b": 3}, "late": {"max": 0.5}, "left_out": ["x"], "only": 1,
    }  # fmt: skip


def test_a_shifted_clock_moves_no_other(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    built = build_clock_shift(tmp_path)
    assert built is not None
    before, shift = built
    shift.write_bytes(struct.pack("=d", -86400.0))

    def clocks(command: list[str]) -> list[float]:
        done = subprocess.run([*command, sys.executable, "-c", READ_CLOCKS], capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    shifted, plain = clocks(before), clocks([])
    assert abs(plain[0] - shifted[0] - 86400.0) < 60
    assert 0 <= plain[1] - shifted[1] < 60
    assert 0 <= plain[2] - shifted[2] < 60
