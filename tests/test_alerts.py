"""Alerts as an emergency desk meets them: from a scan to an answer, over a crash, in three languages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge.audit import TRAIL, verify
from edge.child import DaemonProcess
from edge.client import AlertClient
from edge.command import main
from edge.rawfile import open_raw
from edge.replay import stream_file
from edge.watch import Board

WAIT_S = 60.0
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("alerts")
    with DaemonProcess(folder / "state", folder / "log", module="benchmarks.flagging") as process:
        yield process


def scan_it(small_scan: Path, process: DaemonProcess) -> None:
    assert stream_file(open_raw(small_scan), "127.0.0.1", process.port, answer_s=WAIT_S).problem == ""


def open_alerts(client: AlertClient, n: int) -> list[dict[str, Any]]:
    until = time.monotonic() + WAIT_S
    found: dict[str, dict[str, Any]] = {}
    while len(found) < n:
        assert time.monotonic() < until, f"{n} alerts were awaited, {len(found)} came"
        message = client.receive(0.5)
        if message is not None and message["op"] == "alert" and message["state"] == "open":
            found[message["alert_id"]] = message
    return list(found.values())


def test_a_flagged_scan_alerts_and_is_answered_from_the_command_line(
    daemon: DaemonProcess, small_scan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan_it(small_scan, daemon)
    with AlertClient(daemon.alerts, "desk") as client:
        (alert,) = open_alerts(client, 1)
        times = alert["times"]
        assert times["acquisition_end"] <= times["triage_end"] == times["raised"] <= alert["sent"]
        assert times["reconstruction_end"] <= times["triage_end"]
        assert len(alert["exam"]["exam_key"]) == 24
        assert set(alert["exam"]) <= {"exam_key", "patient_key"}
        assert main(["ack", alert["alert_id"], "--by", "Dr Who", "--to", daemon.alerts]) == 0
        assert "acknowledged at" in capsys.readouterr().out
        assert main(["ack", alert["alert_id"], "--by", "Dr No", "--to", daemon.alerts, "--name", "other"]) == 1
        assert "already" in capsys.readouterr().err
        kinds = [event["kind"] for event in client.snapshot(0) if event["kind"] not in ("heartbeat", "image")]
        assert kinds[-5:] == ["quality", "findings", "alert", "scan.done", "alert.acknowledged"]
    assert main(["watch", "--json", "--seconds", "1.5", "--to", daemon.alerts]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["by"] for line in lines if line["op"] == "alert"] == ["Dr Who"]
    assert main(["watch", "--seconds", "1", "--to", daemon.alerts]) == 0
    assert "Dr Who" in capsys.readouterr().out


def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ack", "X", "--by", "me", "--to", "tcp://127.0.0.1:9", "--wait", "0.5"]) == 1
    assert "nobody answered" in capsys.readouterr().err
    assert main(["watch", "--seconds", "0.5", "--to", "tcp://127.0.0.1:9"]) == 0
    assert "NO CONNECTION" in capsys.readouterr().out


def test_an_alert_outlives_its_daemon_and_comes_to_a_client_that_stayed(tmp_path: Path, small_scan: Path) -> None:
    state, log = tmp_path / "state", tmp_path / "log"
    with DaemonProcess(state, log, module="benchmarks.flagging") as process:
        scan_it(small_scan, process)
        with AlertClient(process.alerts, "desk") as client:
            (alert,) = open_alerts(client, 1)
            process.kill()
            fixed = ["--alerts", process.alerts]
            with DaemonProcess(state, log, fixed, module="benchmarks.flagging"):
                seq = alert["seq"]
                (again,) = open_alerts(client, 1)
                assert (again["alert_id"], again["seq"]) == (alert["alert_id"], seq)
                client.ack(alert["alert_id"], "me")
                events = client.snapshot(0)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert sum(event["kind"] == "alert" for event in events) == 1


def test_no_name_number_or_date_of_a_patient_is_in_alert_event_audit_or_log(
    daemon: DaemonProcess, small_scan: Path
) -> None:
    raw = open_raw(small_scan)
    begin, end = raw.header.index(b"<subjectInformation>"), raw.header.index(b"</subjectInformation>")
    planted = (
        b"<subjectInformation><patientName>Zebrowski^Planted</patientName><patientID>PID778899</patientID>"
        b"<patientBirthdate>1951-03-07</patientBirthdate><patientGender>F</patientGender>"
    )
    raw = replace(raw, header=raw.header[:begin] + planted + raw.header[end:])
    assert stream_file(raw, "127.0.0.1", daemon.port, answer_s=WAIT_S).problem == ""
    with AlertClient(daemon.alerts, "desk") as client:
        alerts = [alert for alert in open_alerts(client, 1) if "patient_key" in alert["exam"]]
        client.ack(alerts[0]["alert_id"], "me")
        events = client.snapshot(0)
    state = daemon.state
    said = {
        "alerts": json.dumps(alerts),
        "events": json.dumps(events),
        "audit": (state / TRAIL).read_text(),
        "log": (state.parent / "log").read_text(),
        "report": "".join(path.read_text() for path in state.glob("results/*/report.json")),
        "ledger": (state / "ledger.sqlite").read_bytes().decode("latin-1")
        + (state / "ledger.sqlite-wal").read_bytes().decode("latin-1"),
    }
    for place, text in said.items():
        assert len(text) > 100, place
        for secret in ("Zebrowski", "Planted", "PID778899", "1951-03-07", "19510307"):
            assert secret not in text, (place, secret)
    assert verify(state / TRAIL)[1] == ""


def example(daemon: DaemonProcess, command: list[str], small_scan: Path, **options: Any) -> str:
    scan_it(small_scan, daemon)
    done = subprocess.run(
        [*command, daemon.alerts, "an example"], capture_output=True, text=True, timeout=WAIT_S, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_node_example_hears_and_takes_an_alert(daemon: DaemonProcess, small_scan: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node is not installed")
    root = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "NODE_PATH": root}
    found = subprocess.run(["node", "-e", "require('zeromq')"], env=environment, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("node's zeromq is not installed: npm install -g zeromq")
    out = example(daemon, ["node", str(EXAMPLES / "alerts.mjs")], small_scan, env=environment)
    assert "infarct 0.9" in out
    assert "taken by an example" in out


def test_the_cpp_example_hears_and_takes_an_alert(daemon: DaemonProcess, small_scan: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None or not Path("/usr/include/zmq.hpp").exists():
        pytest.skip("g++ or cppzmq is not installed: apt install g++ libzmq3-dev cppzmq-dev")
    program = str(tmp_path / "alerts")
    subprocess.run(["g++", "-std=c++17", str(EXAMPLES / "alerts.cpp"), "-lzmq", "-o", program], check=True)
    out = example(daemon, [program], small_scan)
    assert "infarct" in out
    assert "taken by an example" in out


def test_the_board_shows_an_alert_once_and_never_opens_it_again() -> None:
    now = [0.0]
    board = Board(lambda: now[0])
    alert = {
        "op": "alert", "alert_id": "A", "state": "open", "level": 0, "group": "g", "due_in_s": 30.0, "seq": 1,
        "finding": "mass", "acr_category": 2, "probability": None, "quality": {"verdict": None}, "evidence": None,
        "exam": {}, "times": {"raised": "2026-11-25T10:00:00.000Z"}, "by": "", "acknowledged_at": "",
    }  # fmt: skip
    assert board.take(alert)
    assert not board.take(alert)
    assert board.take({**alert, "level": 1})
    now[0] = 10.0
    assert "20 s left" in _text(board)
    assert board.take({"op": "acknowledged", "alert_id": "A", "by": "me", "at": "2026-11-25T10:00:09.000Z"})
    assert not board.take(alert)
    assert "taken by me at 10:00:09" in _text(board)
    for n in range(300):
        board.take({**alert, "alert_id": str(n)})
    assert len(board.alerts) == 200


def _text(board: Board) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=sys.stderr)
    console.print(board.table(True))
    return console.export_text()
