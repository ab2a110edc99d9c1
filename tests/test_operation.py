"""What systemd, Prometheus and an operator see of the daemon."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from benchmarks import watchdog
from edge.audit import TRAIL
from edge.child import DaemonProcess
from edge.client import AlertClient
from edge.command import main
from edge.crew import Crew
from edge.ledger import Ledger
from edge.metrics import Metrics
from edge.rawfile import open_raw
from edge.reload import LIVE, take_over
from edge.replay import stream_file
from edge.settings import Settings

WAIT_S = 60.0
UNITS = Path(__file__).resolve().parents[1] / "systemd"


class Systemd:
    """The socket that a unit of Type=notify is told things by."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read)  # the kernel keeps ten messages, and the rest is dropped
        self._thread.start()

    def wait(self, word: str) -> str:
        """Return the next message that holds `word`."""
        until = time.monotonic() + WAIT_S
        while (left_s := until - time.monotonic()) > 0:
            said = self._heard.get(timeout=left_s)
            if word in said:
                return said
        raise AssertionError(f"{word} was awaited")

    def hears(self, word: str, for_s: float) -> bool:
        """Whether `word` comes within a time; older messages are dropped first."""
        with suppress(queue.Empty):
            while True:
                self._heard.get_nowait()
        until = time.monotonic() + for_s
        with suppress(queue.Empty):
            while (left_s := until - time.monotonic()) > 0:
                if word in self._heard.get(timeout=left_s):
                    return True
        return False

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
            wire.sendto(b"", str(self.path))
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        while said := self._socket.recv(4096):
            self._heard.put(said.decode())


def wait_until(found: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_systemd_prometheus_and_a_reload(tmp_path: Path, small_scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd = Systemd(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    config = tmp_path / "scanside.toml"
    config.write_text("[metrics]\naddress = '127.0.0.1:0'\n[events]\nheartbeat_s = 0.5\n")
    log = tmp_path / "log"
    arguments = ["--config", str(config)]
    with DaemonProcess(tmp_path / "state", log, arguments, module="benchmarks.flagging") as daemon:
        systemd.wait("READY=1")
        assert "scans" in systemd.wait("WATCHDOG=1")
        assert stream_file(open_raw(small_scan), "127.0.0.1", daemon.port, answer_s=WAIT_S).problem == ""
        port = int(log.read_text().split("metrics port=")[1].split()[0])
        page = ""

        def is_there() -> bool:
            nonlocal page
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as answer:
                page = answer.read().decode()
            return "scanside_alerts_open 1.0" in page

        wait_until(is_there)
        assert 'scanside_events_total{kind="scan.done"} 1.0' in page
        assert 'scanside_findings_total{finding="infarct",state="flagged"} 1.0' in page
        assert 'scanside_latency_seconds_count{series="classical"} 4.0' in page
        assert 'scanside_stage_seconds_count{stage="maps"}' in page

        # A reload takes over what it may, says what waits, and a mistake changes nothing.
        old = log.read_text().count("settings read again")
        config.write_text(config.read_text() + "[alerts]\ndeadline_s = 77\n[worker]\ntimeout_s = 99\n")
        os.kill(daemon.pid, signal.SIGHUP)
        systemd.wait("RELOADING=1")
        systemd.wait("READY=1")
        wait_until(lambda: log.read_text().count("settings read again") > old)
        assert "taken=alerts.deadline_s waiting=worker.timeout_s" in log.read_text()
        with AlertClient(daemon.alerts, "desk") as client:
            while (message := client.receive(1.0)) is None or message["op"] != "welcome":
                pass
            assert message["deadline_s"] == 77.0
        config.write_text("[alerts]\ndeadline_s = -1\n")
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: "settings not taken over" in log.read_text())

        # A hung pipeline feeds no watchdog.
        assert systemd.hears("WATCHDOG=1", 20.0)
        os.kill(daemon.pid, signal.SIGSTOP)
        assert not systemd.hears("WATCHDOG=1", 2.0)
        os.kill(daemon.pid, signal.SIGCONT)
        assert daemon.stop() == 0
        systemd.wait("STOPPING=1")
    systemd.close()
    what = [json.loads(line)["what"] for line in (tmp_path / "state" / TRAIL).read_text().splitlines()]
    assert [what[0], what[-1]] == ["start", "stop"]
    assert "settings" in what


def test_results_that_find_no_room_are_tried_again(tmp_path: Path, small_scan: Path) -> None:
    state, log = tmp_path / "state", tmp_path / "log"
    state.mkdir()
    (state / "results").write_text("in the way, as a full disk is")
    with DaemonProcess(state, log) as daemon:
        scanner = threading.Thread(
            target=lambda: stream_file(open_raw(small_scan), "127.0.0.1", daemon.port, answer_s=WAIT_S)
        )
        scanner.start()
        wait_until(lambda: "results not written" in log.read_text())
        (state / "results").unlink()
        wait_until(lambda: "scan done" in log.read_text())
        scanner.join()
    assert "scan failed" not in log.read_text().replace("__main__ scan failed", "")
    assert len(list(state.glob("results/*/report.json"))) == 1


def test_what_cannot_change_waits_for_a_restart() -> None:
    running = Settings()
    read = replace(
        running,
        state=Path("/elsewhere"),
        mrd=replace(running.mrd, port=1, allow=("10.0.0.1",)),
        disk=replace(running.disk, min_free_mib=7),
    )
    now, taken, waiting = take_over(running, read)
    assert (taken, waiting) == (["mrd.allow", "disk.min_free_mib"], ["state", "mrd.port"])
    assert (now.mrd.allow, now.mrd.port, now.disk.min_free_mib, now.state) == (("10.0.0.1",), 9002, 7, running.state)
    for key in LIVE:
        section, name = key.split(".")
        assert hasattr(getattr(running, section), name)


def test_gauges_and_counters_name_no_scan() -> None:
    metrics = Metrics()
    metrics.on_event("quality", {"scan_id": "SECRET", "verdict": None})
    metrics.on_event("quality", {"scan_id": "SECRET", "early": True})
    metrics.on_event("findings", {"scan_id": "SECRET", "findings": [{"finding": "mass", "state": "not assessed"}]})
    metrics.set_gauges(
        scans=1, series=7, worker=True, silent_s=0.5, triage=True, triage_waiting=8,
        triage_s=9.0, free_bytes=10, open_alerts=2, oldest_s=3.0, clients=1, audit=5,
        audit_is_broken=False, deliveries={("hl7", "dead"): 4}, archive_s={"pacs": 6.0},
    )  # fmt: skip
    metrics.on_incoming("refused")
    page = generate_latest(metrics.registry).decode()
    assert 'scanside_verdicts_total{verdict="none"} 1.0' in page
    assert 'scanside_incoming_objects_total{outcome="refused"} 1.0' in page
    assert "scanside_incoming_open 7.0" in page
    assert "scanside_triage_waiting 8.0" in page
    assert "scanside_triage_wait_seconds 9.0" in page
    assert 'scanside_deliveries{sink="hl7",state="dead"} 4.0' in page
    assert "SECRET" not in page
    metrics.close()


def test_the_ledger_is_copied_and_put_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, copy = tmp_path / "state", tmp_path / "copy.sqlite"
    state.mkdir()
    where = ["--state", str(state)]
    assert main(["ledger", "backup", str(copy), *where]) == 1
    ledger = Ledger(state / "ledger.sqlite")  # as a daemon has it open
    ledger.open_scan("A", "t")
    assert main(["ledger", "backup", str(copy), *where]) == 0
    assert copy.stat().st_mode & 0o777 == 0o600
    ledger.open_scan("B", "t")
    ledger.close()
    assert main(["ledger", "restore", str(copy), *where]) == 0
    with closing(sqlite3.connect(state / "ledger.sqlite")) as db:
        assert db.execute("SELECT scan_id FROM scans").fetchall() == [("A",)]
    with closing(sqlite3.connect(state / "ledger.sqlite.before")) as db:
        assert len(db.execute("SELECT scan_id FROM scans").fetchall()) == 2
    copy.write_bytes(b"nothing of the kind" * 100)
    assert main(["ledger", "restore", str(copy), *where]) == 1
    assert "no ledger" in capsys.readouterr().err
    again = Ledger(state / "ledger.sqlite")
    assert [row.scan_id for row in again.scans()] == ["A"]
    again.close()


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program that is there on every machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    for path in [*UNITS.glob("*.service"), *UNITS.glob("*.target")]:
        content = path.read_text().replace("/opt/scanside/venv/bin/scanside", "/bin/true")
        (tmp_path / path.name).write_text(content)
    return tmp_path


def test_units_are_as_systemd_wants_them(units: Path) -> None:
    paths = [str(path) for path in units.glob("scanside*")]
    assert len(paths) == 3
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "scanside" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("name", ["scanside.service", "scanside-engines.service"])
def test_units_expose_little(units: Path, name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=25", str(units / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr
    assert "Overall exposure level" in done.stdout


def test_a_worker_that_dies_as_it_starts_died_of_no_scan(caplog: pytest.LogCaptureFixture) -> None:
    deaths: list[str] = []
    starts: list[int] = []

    async def run() -> None:
        crew = Crew(
            {},
            30.0,
            lambda report, payload: None,
            lambda: None,
            lambda: deaths.append("counted"),
            on_false_start=starts.append,
        )
        task = asyncio.create_task(crew.run())  # without settings it dies at once
        for _ in range(int(WAIT_S / 0.05)):
            if "worker ended" in caplog.text:
                break
            await asyncio.sleep(0.05)
        await crew.stop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert "worker ended" in caplog.text
    assert not deaths
    assert starts[0] == 1


def test_the_unit_serves_a_scan_under_a_real_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "watchdog.json"
    monkeypatch.setattr(sys, "argv", ["watchdog", "--hangs", "0", "--json", str(out)])
    try:
        watchdog.main()
    except SystemExit as end:
        if "are needed" in str(end) or "must agree" in str(end):
            pytest.skip(str(end))
        raise
    results = json.loads(out.read_text())["results"]
    assert results["scan_served"]
    assert results["restarts"] == 0
