"""Do eight scanners at once, for ten minutes, lose anything, fill memory, or wait for each other?

One scanner streams scan after scan for a while, alone; then several do, beginning at moments of a scan's length that
are drawn by chance (`--seed`), as scanners know nothing of each other: evenly spaced begins would finish the slices of
several at the same moment, again and again, or never. How many images others' met is in the record. An image's time is
from the sending of its last readout until the scanner holds it whole. At the end every stream is compared with the
spool, every image and `scan.done` is counted, and the events' numbers must have no gap. Memory (of each process's own)
is sampled every second. A clinical sequence reads some 20 lines a second, averaged over slices.

Says how long findings came behind the verdict, and how busy the processors were: where they were saturated, waiting is
what they were asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chart import Bars, ChartPanel, Segment, counted, number, write_chart
from benchmarks.figures import new_parser, new_progress, origin
from benchmarks.record import make_record, write_record
from benchmarks.sender import EncodedScan, Sent, encode_scan, send_scan
from benchmarks.server import HOST, MeasuredDaemon, own_mib
from edge.live import SERIES_NAMES
from edge.rawfile import open_raw
from edge.simulate import simulate_file
from recon.errors import DeliveryError, ScanError
from recon.protocol import Protocol

_EPILOG = """examples:
  python -m benchmarks.soak --json soak.json                 8 scanners for 10 minutes, after one for 3
  python -m benchmarks.soak --workers 1 --json soak.json     and with one process that reconstructs
  python -m benchmarks.soak --minutes 1 --alone 1 --rate 60  to see that it works

Exit code 1: something was lost."""


def main() -> None:
    """Run both parts; print or write one JSON record."""
    parser = new_parser("soak", __doc__, _EPILOG)
    parser.add_argument("--scanners", type=int, default=8, metavar="N", help="at once (%(default)s)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="reconstruct, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of when scanners begin (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="of all at once (%(default)g)")
    parser.add_argument("--alone", type=float, default=3.0, metavar="M", help="of one before them (%(default)g)")
    parser.add_argument("--rate", type=float, default=20.0, metavar="N", help="lines a second of each (%(default)g)")
    parser.add_argument("--matrix", type=int, default=256, metavar="N", help="of the simulated scan (%(default)s)")
    parser.add_argument("--coils", type=int, default=8, metavar="N", help="of the simulated scan (%(default)s)")
    parser.add_argument("--slices", type=int, default=12, metavar="N", help="of the simulated scan (%(default)s)")
    parser.add_argument("--acceleration", type=int, default=2, metavar="R", help="of it (%(default)s)")
    parser.add_argument("--no-triage", action="store_true", help="without triage networks")
    args = parser.parse_args()
    if args.quick:
        args.scanners, args.minutes, args.alone, args.rate = 2, 0.05, 0.05, 400.0
        args.matrix, args.coils, args.slices = 64, 4, 2
    try:
        record = measure(args)
    except ScanError as error:
        raise SystemExit(f"benchmarks.soak: {error}") from error
    if args.png:
        draw(record, args.png)
    write_record(record, args.json)
    if any(record["results"]["lost"].values()):
        raise SystemExit("something was lost")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the record; raises ScanError where the daemon does not serve."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.h5"
        protocol = Protocol(
            matrix=(args.matrix, args.matrix),
            n_slices=args.slices,
            n_coils=args.coils,
            acceleration=args.acceleration,
        )
        simulate_file(path, protocol)
        scan = encode_scan(open_raw(path))
    settings = f"[worker]\nprocesses = {args.workers}\n"
    settings += '[triage]\nmodels = "/nowhere"\n' if args.no_triage else ""
    with MeasuredDaemon(settings) as daemon, new_progress() as progress:
        task = progress.add_task("scans", total=None)

        def tick() -> None:
            progress.advance(task)

        with ThreadPoolExecutor(args.workers) as pool:  # they are ready, and pages are in memory
            list(pool.map(lambda _: send_scan(scan, HOST, daemon.port), range(args.workers)))
        daemon.events.wait_for(0, args.workers, "scan.done")
        begin = daemon.events.position()
        alone = Shift(daemon, scan, 1, args.alone * 60, args.rate, args.seed, tick)
        together = Shift(daemon, scan, args.scanners, args.minutes * 60, args.rate, args.seed, tick)
        with suppress(DeliveryError):  # what does not come is counted
            daemon.events.wait_for(begin, len(alone.sent + together.sent), "scan.done", "scan.failed", timeout_s=60.0)
        time.sleep(1.0)
        lost = _lost(daemon, scan, alone.sent + together.sent, begin, args.workers)
        triage_s = _triage_s(daemon, begin)
    names = ("scanners", "workers", "seed", "minutes", "alone", "rate", "acceleration", "no_triage", "quick")
    about = {"readouts": scan.n_readouts, "bytes": scan.n_bytes, "images": len(scan.lasts)}
    results = {"alone": alone.summary(), "together": together.summary(), "triage_s": triage_s, "lost": lost}
    results["p95_ratio"] = {
        series: round(p95 / one, 2)
        for series, p95 in results["together"]["p95_s"].items()
        if (one := results["alone"]["p95_s"].get(series))
    }
    return make_record("soak", {name: getattr(args, name) for name in names} | {"scan": about}, results)


class Shift:
    """Some scanners at work for some time, and what was seen of them."""

    def __init__(
        self, daemon: MeasuredDaemon, scan: EncodedScan, n: int, seconds: float, rate: float, seed: int, tick: Any
    ) -> None:
        """Work; returns when the last scan was answered. Each scanner finishes the scan that it is at."""
        self.sent: list[Sent] = []
        self._scan, self._failures = scan, Counter[str]()
        self._memory: dict[str, list[tuple[float, float]]] = {}
        self._done = threading.Event()
        begun, begin = time.monotonic(), daemon.events.position()
        cpu = _cpu_s(daemon.pids())
        watch = threading.Thread(target=self._watch, args=(daemon, begun), daemon=True)
        watch.start()
        begins = np.random.default_rng(seed).uniform(0, scan.n_readouts / rate, n)
        begins -= begins.min()

        def scanner(number: int) -> None:
            time.sleep(begins[number])
            while time.monotonic() - begun < seconds:
                try:
                    self.sent.append(send_scan(scan, HOST, daemon.port, rate=rate))
                except DeliveryError as error:
                    self._failures[str(error)] += 1
                tick()

        threads = [threading.Thread(target=scanner, args=(number,)) for number in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._wall_s = time.monotonic() - begun
        self._cpu_s = {name: spent - cpu.get(name, 0.0) for name, spent in _cpu_s(daemon.pids()).items()}
        self._images = [event.header for event in daemon.events.since(begin, "image")]
        self._done.set()
        watch.join()

    def summary(self) -> dict[str, Any]:
        """Return times of images, memory over time and what the processors did."""
        waits: dict[str, list[float]] = {}
        for each in self.sent:
            for place, series, at_s in each.image_s:
                waits.setdefault(SERIES_NAMES.get(series, str(series)), []).append(at_s - each.last_readout_s[place])
        return {
            "scans": len(self.sent),
            "wall_s": round(self._wall_s, 1),
            "problems": dict(self._failures + Counter(each.problem for each in self.sent if each.problem)),
            "images": {series: len(found) for series, found in waits.items()},
            **{f"p{q}_s": {name: round(float(np.percentile(v, q)), 3) for name, v in waits.items()} for q in (50, 95)},
            "p95_parts_s": self._parts(),
            "met": self._met(),
            "busy_cores": {name: round(spent / self._wall_s, 2) for name, spent in self._cpu_s.items()},
            "cores": os.cpu_count(),
            "memory_mib": {name: _course(samples) for name, samples in self._memory.items()},
        }

    def _parts(self) -> dict[str, dict[str, float]]:
        """Return for how long images waited for a worker, were made, and waited for the daemon, p95 by series."""
        moments = ("spooled", "begun", "made", "sent")
        rows: dict[str, list[list[float]]] = {}
        for header in self._images:
            at = header["moments_s"]
            if at["spooled"] is not None:
                rows.setdefault(header["series"], []).append([at[name] for name in moments])
        names = ("wait", "make", "publish")
        return {
            series: dict(zip(names, np.percentile(np.diff(each), 95, axis=0).round(3).tolist(), strict=True))
            for series, each in rows.items()
        }

    def _met(self) -> dict[str, dict[str, float]]:
        """Return by series: the share of images that were wanted while another scan's was, and p95 of both kinds.

        Wanted is an image from its last line's being on disk until it is sent.
        """
        number = {each: n for n, each in enumerate({header["scan_id"] for header in self._images})}
        spans = {
            series: np.array([
                (header["moments_s"]["spooled"], header["moments_s"]["sent"], number[header["scan_id"]])
                for header in self._images
                if header["series"] == series and header["moments_s"]["spooled"] is not None
            ])
            for series in {header["series"] for header in self._images}
        }  # fmt: skip
        everything = np.concatenate(list(spans.values()))
        found = {}
        for series, rows in sorted(spans.items()):
            begins, ends, scans = rows.T[:, :, None]
            met = ((everything[:, 0] < ends) & (everything[:, 1] > begins) & (everything[:, 2] != scans)).any(1)
            took = rows[:, 1] - rows[:, 0]
            found[series] = {"share": round(float(met.mean()), 3)}
            for name, kind in (("p95_s", met), ("p95_s_of_others", ~met)):
                if kind.any():
                    found[series][name] = round(float(np.percentile(took[kind], 95)), 3)
        return found

    def _watch(self, daemon: MeasuredDaemon, begun: float) -> None:
        while not self._done.wait(1.0):
            for name, pid in daemon.pids().items():
                with suppress(OSError, StopIteration, ValueError):  # it may be ending
                    self._memory.setdefault(name, []).append((time.monotonic() - begun, own_mib(pid)))


def _course(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return how memory went: ten means over time, and MiB a minute over the second half (least squares)."""
    parts = np.array_split(np.array(samples), min(10, len(samples)))
    later = np.array(samples[len(samples) // 2 :])
    slope = float(np.polyfit(later[:, 0] / 60, later[:, 1], 1)[0]) if len(later) > 2 else None
    return {
        "means": [round(float(part[:, 1].mean()), 1) for part in parts],
        "max": round(max(mib for _, mib in samples), 1),
        "mib_per_minute": None if slope is None else round(slope, 2),
    }


def _triage_s(daemon: MeasuredDaemon, begin: int) -> dict[str, float]:
    """Return for how long scans waited for their findings once they had a verdict."""
    verdicts = {e.header["scan_id"]: e.at_s for e in daemon.events.since(begin, "quality") if not e.header.get("early")}
    waits = [e.at_s - verdicts[e.header["scan_id"]] for e in daemon.events.since(begin, "findings")]
    return {f"p{q}": round(float(np.percentile(waits, q)), 3) for q in (50, 95)} if waits else {}


def _lost(daemon: MeasuredDaemon, scan: EncodedScan, sent: Sequence[Sent], begin: int, n_before: int) -> dict[str, int]:
    """Return what is missing or other than what was sent. n_before: scans that nobody counts."""
    events = [event.header for event in daemon.events.since(begin)]
    done = [event for event in events if event["kind"] == "scan.done"]
    seqs = [event["seq"] for event in events]
    wanted = hashlib.sha256(scan.messages).digest()
    spooled = [hashlib.sha256(path.read_bytes()).digest() for path in daemon.state.glob("spool/*/raw.mrd")]
    return {
        "scans without an end": len(sent) - len(done),
        "scans that failed": sum(event["kind"] == "scan.failed" for event in events),
        "scans not answered whole": sum(bool(each.problem) for each in sent),
        "images that did not come back": sum(len(each.missing(scan)) for each in sent),
        "streams other than what was sent": sum(each != wanted for each in spooled),
        "streams missing": len(sent) + n_before - len(spooled),
        "events missing": seqs[-1] - seqs[0] + 1 - len(seqs),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw how long images took, alone and together, and how memory went."""
    shifts = {name: record["results"][name] for name in ("alone", "together")}
    n = {"alone": 1, "together": record["settings"]["scanners"]}
    panels: list[ChartPanel] = []
    for series in shifts["together"]["p95_s"]:
        found = {name: shift["p95_s"][series] for name, shift in shifts.items() if series in shift["p95_s"]}
        bars = [(counted(n[name], "scanner"), [Segment("s", 0.0, p95)]) for name, p95 in found.items()]
        notes = [f"{number(p95)} s" for p95 in found.values()]
        panels.append(Bars(f"From the last readout to the {series} image, p95", bars, "s", notes, legend=False))
    for name, course in shifts["together"]["memory_mib"].items():
        bars = [(f"part {k + 1}", [Segment("MiB", 0.0, mib)]) for k, mib in enumerate(course["means"])]
        notes = [f"{number(mib)} MiB" for mib in course["means"]]
        panels.append(Bars(f"Memory of the {name} over time", bars, "MiB", notes, legend=False))
    about = record["settings"]
    subtitle = f"{about['minutes']:g} minutes, {about['rate']:g} lines/s each, {about['scan']['readouts']} a scan"
    write_chart(path, "Soak", panels, subtitle, origin(record))


def _cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """Return the processor seconds that each process has used."""
    found = {}
    for name, pid in pids.items():
        with suppress(OSError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


if __name__ == "__main__":
    main()
