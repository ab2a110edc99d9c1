"""The command line as a stranger uses it: help that teaches, exit codes with a meaning, a demo that ends by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge.command import COMMANDS, main
from edge.doctor import triage_finding
from edge.ledger import Ledger
from edge.settings import Settings, TriageSettings


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in COMMANDS)
    assert "Not for diagnostic use" in said


@pytest.mark.parametrize("word", COMMANDS)
def test_each_command_has_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([word, "--help"])
    assert f"scanside {word}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["recon"], ["recon", "x.h5"], ["demo", "--finding", "cold"]])
def test_wrong_use_is_exit_code_2(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)


def test_recon_writes_what_it_promises(small_scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recon", str(small_scan), "--out", str(tmp_path)]) == 0
    volume = np.load(tmp_path / "volume.npy")
    assert (volume.shape, volume.dtype) == ((4, 64, 64), np.float32)
    np.testing.assert_array_equal(volume, np.load(tmp_path / "classical.npy"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == "sense"
    assert set(report["stage_ms"]) >= {"assemble", "maps", "classical", "write"}
    assert len(list((tmp_path / "dicom" / "classical").glob("*.dcm"))) == 4
    assert (tmp_path / "preview.png").stat().st_size > 1000
    assert "volume.npy" in capsys.readouterr().out
    # Near the truth: a reconstruction that fell to pieces would not correlate.
    truth = np.load(small_scan.with_suffix(".truth.npz"))["image"]
    assert np.corrcoef(truth.ravel(), volume.ravel())[0, 1] > 0.97


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--method", "network"], 1, "the network was trained for"),
        (["--accelerate", "0"], 2, "R ≥ 1"),
        (["--accelerate", "2"], 1, "undersampled"),
    ],
)
def test_recon_says_in_one_line_why_not(
    words: list[str], code: int, reason: str, small_scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recon", str(small_scan), "--out", str(tmp_path), *words]) == code
    said = capsys.readouterr().err.strip()
    assert reason in said
    assert "\n" not in said


def test_recon_of_what_is_no_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.h5"
    assert main(["recon", str(path), "--out", str(tmp_path)]) == 2
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert main(["recon", str(path), "--out", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_serve_and_doctor_name_a_wrong_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "x.toml"
    config.write_text("[mrd]\nprot = 1\n")
    assert main(["serve", "--config", str(config)]) == 2
    assert main(["doctor", "--config", str(config)]) == 2
    assert capsys.readouterr().err.count("mrd.prot") == 2


def test_doctor_names_the_triage_networks_and_what_waits_for_them(tmp_path: Path) -> None:
    found = triage_finding(Settings(), tmp_path)
    assert (found.level, found.words.count("scanside-")) == ("ok", 4)
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        ledger.db.execute("CREATE TABLE triage (scan_id TEXT)")
        ledger.db.execute("INSERT INTO triage VALUES ('A')")
    found = triage_finding(replace(Settings(), triage=TriageSettings(models=str(tmp_path))), tmp_path)
    assert found.level == "note"
    assert found.words.startswith("no network")
    assert found.words.endswith("1 scan waits for it")


def test_doctor_finds_a_state_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--state", "/proc/scanside"]) == 1
    assert "fault" in capsys.readouterr().out


def test_the_demo_ends_by_itself_and_leaves_everything_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "edge.command", "demo", "--out", str(out), "--rate", "max"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("preview.png", "scan.h5", "scan.truth.npz", "scan.truth.json", "results/report.json"):
        assert (out / name).is_file(), name
    assert len(list((out / "results" / "dicom" / "classical").glob("*.dcm"))) == 12
    findings = json.loads((out / "results" / "report.json").read_text("utf-8"))["findings"]
    assert {each["finding"]: each["state"] for each in findings}["mass"] == "flagged"  # what the head has
    assert "flagged" in done.stdout
    assert "Not for diagnostic use" in done.stdout
    truth = np.load(out / "scan.truth.npz")["image"]
    made = np.load(out / "results" / "volume.npy")
    made = made * (np.vdot(truth, made) / np.vdot(made, made))
    assert np.linalg.norm(made - truth) / np.linalg.norm(truth) < 0.08
