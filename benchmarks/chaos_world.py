"""The hospital around a daemon under `benchmarks.chaos`: a supervisor, scanners, a desk that answers, a listener.

Each runs in a thread and lives through whatever happens to the daemon.
"""

from __future__ import annotations

import json
import random
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from benchmarks.sender import EncodedScan, send_scan
from edge.child import DaemonProcess
from edge.client import AlertClient
from edge.wire import Subscriber
from recon.errors import ScanError

_HOST = "127.0.0.1"


def boot_s() -> float:
    """Return seconds since boot, the clock of deadlines."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Supervisor:
    """What systemd is: starts the daemon whenever it is not there, always on the same ports."""

    def __init__(self, folder: Path, state: Path, config: Path, before: Sequence[str]) -> None:
        self.state, self.log = state, folder / "log"
        self.ports = [free_port() for _ in range(3)]
        self.events, self.alerts = (f"tcp://{_HOST}:{port}" for port in self.ports[1:])
        self.n_starts = 0
        self.n_failed_starts = 0
        self.down: list[tuple[float, float]] = []  # since boot: from when to when nobody served
        self.rss_mib = 0.0
        self._arguments = ["--config", str(config), "--port", str(self.ports[0])]
        self._arguments += ["--events", self.events, "--alerts", self.alerts]
        self._before = before
        self._stop = threading.Event()
        self._process: DaemonProcess | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.wait_until_up()

    def wait_until_up(self) -> DaemonProcess:
        """Return the daemon once it serves."""
        while (process := self._process) is None or not process.is_alive:
            time.sleep(0.02)
        return process

    def stop(self) -> None:
        """End the daemon for good."""
        self._stop.set()
        self._thread.join()
        if self._process is not None:
            self._process.stop()

    def _run(self) -> None:
        down_since = boot_s()
        while not self._stop.is_set():
            process = self._process
            if process is not None and process.is_alive:
                self.rss_mib = max(self.rss_mib, _rss_mib(process.pid))
                time.sleep(0.02)
                continue
            if process is not None:
                self._process, down_since = None, boot_s()
            try:
                started = DaemonProcess(
                    self.state, self.log, self._arguments, module="benchmarks.flagging", before=self._before
                )
            except ScanError:
                self.n_failed_starts += 1
                time.sleep(0.2)
                continue
            self.n_starts += 1
            self.down.append((down_since, boot_s()))
            self._process = started


class Scanner:
    """Streams one scan again and again."""

    def __init__(self, scan: EncodedScan, supervisor: Supervisor, pause_s: float) -> None:
        self.counts: Counter[str] = Counter()
        self._scan, self._supervisor, self._pause_s = scan, supervisor, pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for_answer(self) -> None:
        """Return once another scan was answered whole, or after five minutes."""
        n, until = self.counts["answered"], time.monotonic() + 300.0
        while self.counts["answered"] == n and time.monotonic() < until:
            time.sleep(0.05)

    def stop(self) -> None:
        """End after the scan in flight."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s):
            try:
                sent = send_scan(self._scan, _HOST, self._supervisor.ports[0], answer_s=60.0)
            except (ScanError, OSError):
                self.counts["nobody there"] += 1
                continue
            is_refused = any(text.startswith("ERROR") for text in sent.texts)
            self.counts["disturbed" if sent.problem else "refused with a reason" if is_refused else "answered"] += 1


class Desk:
    """A person at a desk: acts once on each alert, answers most at once and some only when they are escalated."""

    def __init__(self, supervisor: Supervisor, share_late: float, seed: int) -> None:
        self.acted: Counter[str] = Counter()
        self.scans: dict[str, str] = {}  # alert: its scan
        self.answered: set[str] = set()
        self.escalations: list[dict[str, Any]] = []
        self.n_heard = 0
        self.reconnect = threading.Event()
        self.answer_all = threading.Event()
        self._supervisor, self._share_late, self._seed = supervisor, share_late, seed
        self._seen: set[tuple[str, int]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.reconnect.clear()
            with AlertClient(self._supervisor.alerts, "desk") as client:
                while not self._stop.is_set() and not self.reconnect.is_set():
                    message = client.receive(0.1)
                    if message is not None and message["op"] == "alert":
                        self._hear(client, message)

    def _hear(self, client: AlertClient, message: dict[str, Any]) -> None:
        self.n_heard += 1
        alert_id = message["alert_id"]
        if alert_id not in self.acted:
            self.acted[alert_id] += 1
            self.scans[alert_id] = message["scan_id"]
        if message["level"] and (alert_id, message["level"]) not in self._seen:
            self._seen.add((alert_id, message["level"]))
            self.escalations.append({"alert_id": alert_id, "level": message["level"], "heard_s": boot_s()})
        is_late = random.Random(f"{self._seed} {alert_id}").random() < self._share_late
        if is_late and not message["level"] and not self.answer_all.is_set():
            return
        with suppress(ScanError):  # it comes again
            client.ack(alert_id, "chaos", timeout_s=2.0)
            self.answered.add(alert_id)


class Ear:
    """A subscriber of events that fills its gaps by snapshots."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.seqs: set[int] = set()
        self.heard_s: dict[int, tuple[str, dict[str, Any], float]] = {}  # escalations by seq
        self.n_lost = 0
        self._subscriber = Subscriber(supervisor.events)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def heal(self, client: AlertClient) -> int:
        """Ask for what was lost; return how many events are still missing."""
        first, last = min(self.seqs), max(self.seqs)
        missing = set(range(first, last + 1)) - self.seqs
        self.n_lost += len(missing)
        if missing:
            self.seqs |= {event["seq"] for event in client.snapshot(min(missing) - 1, 60.0) if event["seq"] in missing}
        return len(set(range(first, last + 1)) - self.seqs)

    def stop(self) -> None:
        """Leave."""
        self._stop.set()
        self._thread.join()
        self._subscriber.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            event = self._subscriber.receive(0.1)
            if event is not None:
                header = event[0]
                self.seqs.add(header["seq"])
                if header["kind"] == "alert.escalated":
                    self.heard_s[header["seq"]] = (header["alert_id"], header, boot_s())


def rows(state: Path, sql: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query of the ledger."""
    with closing(sqlite3.connect(f"file:{state / 'ledger.sqlite'}?mode=ro", uri=True, timeout=30.0)) as db:
        return db.execute(sql).fetchall()


def events(state: Path) -> list[dict[str, Any]]:
    """Return all events of the ledger, with their numbers and kinds."""
    return [
        {**json.loads(fields), "seq": seq, "kind": kind}
        for seq, kind, fields in rows(state, "SELECT seq, kind, fields FROM events ORDER BY seq")
    ]


def build_clock_shift(folder: Path) -> tuple[list[str], Path] | None:
    """Return what starts a program whose wall clock follows a file, and the file; None without a C compiler."""
    source = Path(__file__).with_name("clock_shift.c")
    library, shift = folder / "clock_shift.so", folder / "shift"
    shift.write_bytes(bytes(8))
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ["env", f"LD_PRELOAD={library}", f"CLOCK_SHIFT={shift}"], shift


def free_port() -> int:
    """Return a port that nobody uses at present."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _rss_mib(pid: int) -> float:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20
    return 0.0
