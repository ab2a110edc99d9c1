"""The benchmark of the verdict: its figures from a table, and the whole of it at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ours import shipped_network
from benchmarks.trust import DATA, judge_share, main, tell
from export.calibrate_quality import scores
from export.trials import Setting, Subject, read
from export.verdict_trials import Row
from recon.limits import read_limits
from tests.test_verdict_trials import some_rows


def test_figures_are_those_of_the_table() -> None:
    limits = read_limits({"limits": [], "familiar": {"mean": [0.0] * 3, "precision": np.eye(3).tolist()}})
    rows = [
        Row(
            **{
                **row.__dict__,
                "level": "trusted" if row.fault == "clean" else "untrusted",
                "repeat": row.fault != "clean",
            }
        )
        for row in some_rows(20)
    ]
    lost = Row(**{**rows[1].__dict__, "fault": "not finite", "kinds": {"not-finite": 3}})
    told = tell([*rows, lost], scores([*rows, lost], limits), limits)
    assert told["scans"] == 20
    assert told["clean"]["called_out"] == told["clean"]["advised_to_repeat"] == 0
    assert told["hard_faults"]["not finite"] == {"of": 1, "caught": 1, "made_worse": 1, "caught_of_worse": 1}
    assert told["motion_3_mm_and_more"]["area"] == 1.0
    assert told["motion_3_mm_and_more"]["onset_within_5_percent"] == 1.0
    assert told["by_level"]["untrusted"]["median_error_over_clean"] == 4.0
    assert json.dumps(told, allow_nan=False)


def test_the_share_of_judging_is_of_the_work_it_judges() -> None:
    assert judge_share({"judge": 30.0, "maps": 20.0, "network": 80.0, "write": 500.0}) == 0.3
    assert judge_share({}) is None


def test_a_head_without_noise_readouts_has_none() -> None:
    setting = Setting((64, 64), 2, 2, 16, 0.01, "shots", False, False)
    image = np.ones((128, 128), np.complex64)
    stream = read(Subject(image, np.ones((2, 128, 128), np.complex64)), setting, 0)
    assert {each.role.value for each in stream.acquisitions} == {"imaging", "calibration and imaging"}


@pytest.mark.real_data
@pytest.mark.skipif(not (DATA / "brain").is_dir(), reason="no real images here")
def test_the_whole_at_its_smallest(tmp_path: Path) -> None:
    assert shipped_network() is not None
    arguments = ["--scans", "1", "--faults", "1", "--no-real", "--json", str(tmp_path / "trust.json")]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "trust.json").read_text("utf-8"))
    assert record["results"]["simulated"]["scans"] == 1
    assert record["results"]["simulated"]["with_faults"] == 1
