"""Is anything lost when daemon or worker are killed? `python -m benchmarks.durability --kills 100`.

Streams a small simulated scan again and again, kills -9 the daemon or its worker at a random readout or up to a second
later, while images are being made (the daemon is then started again), and checks every scan: complete ones must equal
the undisturbed image bit for bit, interrupted ones must be kept, marked, and equal it in every slice that they give.
Prints one JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.record import make_record, write_record
from edge.child import DaemonProcess
from edge.rawfile import RawFile, open_raw
from edge.replay import stream_file
from edge.simulate import simulate_file
from recon.arrays import Array
from recon.errors import ScanError
from recon.protocol import Protocol

_WAIT_S = 120.0


def main() -> None:
    """Run the kills and print what became of the scans."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.durability", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how many scans are disturbed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which readouts (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as progress:
        folder = Path(name)
        protocol = Protocol(matrix=(96, 96), n_slices=6, n_coils=4, acceleration=2, n_calibration=16)
        simulate_file(folder / "scan.h5", protocol, "none", 0)
        raw = open_raw(folder / "scan.h5")
        truth = _undisturbed(raw, folder / "undisturbed")
        for number in progress.track(range(args.kills), description="kills"):
            victim = rng.choice(("daemon", "worker"))
            deadly = rng.randrange(len(raw.heads))
            counts[f"{victim} killed"] += 1
            counts[_disturbed(raw, folder / str(number), victim, deadly, rng.choice((0.0, rng.random())), truth)] += 1
    write_record(make_record("durability", {"kills": args.kills, "seed": args.seed}, dict(counts)), args.json)
    if counts["lost"] or counts["different"]:
        raise SystemExit("a scan was lost or came out different")


def _undisturbed(raw: RawFile, folder: Path) -> Array:
    folder.mkdir()
    with DaemonProcess(folder / "state", folder / "log") as daemon:
        stream_file(raw, "127.0.0.1", daemon.port)
    return np.load(next((folder / "state").glob("results/*/volume.npy")))


def _disturbed(raw: RawFile, folder: Path, victim: str, deadly: int, pause_s: float, truth: Array) -> str:
    """Stream, kill, start again where need be, and say what became of the scan."""
    folder.mkdir()
    count = iter(range(len(raw.heads)))
    with DaemonProcess(folder / "state", folder / "log") as daemon:

        def on_readout() -> None:
            if next(count) == deadly:
                timer.start()

        def kill() -> None:
            worker = daemon.worker_pid()
            if victim == "daemon":
                daemon.kill()
            elif worker is not None:
                os.kill(worker, signal.SIGKILL)

        timer = threading.Timer(pause_s, kill)
        with suppress(ScanError):
            stream_file(raw, "127.0.0.1", daemon.port, on_readout=on_readout, answer_s=_WAIT_S)
        timer.join()
        if victim == "worker":
            return _outcome(folder / "state", truth)
    with DaemonProcess(folder / "state", folder / "log"):
        return _outcome(folder / "state", truth)


def _outcome(state: Path, truth: Array) -> str:
    if not any((state / "spool").glob("*/raw.mrd")):
        return "killed before its first byte came"
    until = time.monotonic() + _WAIT_S
    rows: list[tuple[Any, ...]] = []
    while time.monotonic() < until:
        with closing(sqlite3.connect(state / "ledger.sqlite")) as db:
            rows = db.execute("SELECT scan_id, state, ending FROM scans").fetchall()
        if rows and rows[0][1] in ("done", "failed"):
            break
        time.sleep(0.05)
    if len(rows) != 1 or rows[0][1] not in ("done", "failed"):
        return "lost"
    if rows[0][1] == "failed":  # not even the header had come
        return "interrupted, kept and marked" if rows[0][2] == "interrupted" else "different"
    folder = state / "results" / rows[0][0]
    report = json.loads((folder / "report.json").read_text())
    planes = np.load(folder / "volume.npy") if (folder / "volume.npy").exists() else truth[:0]
    if rows[0][2] == "complete":
        return "complete, equal bit for bit" if np.array_equal(planes, truth) else "different"
    same = all(any(np.array_equal(plane, whole) for whole in truth) for plane in planes)
    marked = report["ending"] == "interrupted" and report["quality"]["verdict"] == "degraded"
    return "interrupted, kept and marked" if same and marked else "different"


if __name__ == "__main__":
    main()
