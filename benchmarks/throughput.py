"""How many scans and slices an hour does one daemon sustain, in how much memory, and how does cost grow?

One daemon, 1, 2, 4 and 8 scanners that send scan after scan without a pause, each waiting for its answer: the rate is
that of the whole, from the first byte to the last CLOSE. Memory is the largest that daemon and worker held of their
own meanwhile (files mapped from the spool do not count). Then one scanner, and coils, matrix and slices one at a time:
the seconds of a scan, from its first byte to CLOSE, are fitted by a power law, seconds = c · nᵉ, by least squares of
the logarithms; the residual says how well that describes it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.chart import Bars, ChartPanel, Curves, Segment, counted, stacked, write_chart
from benchmarks.figures import new_parser, new_progress, origin, spread
from benchmarks.record import make_record, write_record
from benchmarks.sender import EncodedScan, Sent, encode_scan, send_scan
from benchmarks.server import HOST, MeasuredDaemon, MemoryWatch
from edge.rawfile import open_raw
from edge.simulate import simulate_file
from recon.errors import DeliveryError
from recon.protocol import Protocol

AXES = {"coils": [4, 8, 16, 32], "matrix": [128, 192, 256, 320], "slices": [2, 4, 8, 16]}
QUICK_AXES = {"coils": [4, 8], "matrix": [96, 128], "slices": [1, 2]}
_EPILOG = """examples:
  python -m benchmarks.throughput --json throughput.json --png throughput.png
  python -m benchmarks.throughput --scanners 1 16 --matrix 320 --scans 10

Reading it: docs/performance.md."""


def main() -> None:
    """Measure as the command line says; print tables and one JSON record."""
    parser = new_parser("throughput", __doc__, _EPILOG)
    parser.add_argument("--scanners", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="%(default)s")
    parser.add_argument("--scans", type=int, default=4, metavar="N", help="of each scanner (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="scans for each cost (%(default)s)")
    parser.add_argument("--matrix", type=int, default=256, metavar="N", help="(%(default)s)")
    parser.add_argument("--coils", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--slices", type=int, default=6, metavar="N", help="(%(default)s)")
    parser.add_argument("--acceleration", type=int, default=4, metavar="R", help="(%(default)s)")
    args = parser.parse_args()
    if args.quick:
        args.scanners, args.scans, args.repeats, args.matrix, args.coils, args.slices = [1, 2], 1, 1, 96, 4, 2
    record = measure(args, QUICK_AXES if args.quick else AXES)
    _show(record)
    if args.png:
        draw(record, args.png)
    write_record(record, args.json)


def measure(args: argparse.Namespace, axes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the record: the rates at each number of scanners, and the cost along each of `axes`."""
    with new_progress() as progress, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_costs = sum(len(values) for values in axes.values())
        task = progress.add_task("scans", total=sum(args.scanners) * args.scans + n_costs * (args.repeats + 1))

        def tick() -> None:
            progress.advance(task)

        base = {"matrix": args.matrix, "coils": args.coils, "slices": args.slices}
        scan = encode(folder, args.acceleration, **base)
        rates = []
        for n in args.scanners:
            progress.update(task, description=counted(n, "scanner"))
            with MeasuredDaemon() as daemon:
                send_whole(scan, daemon.port)  # the worker is ready
                rates.append(sustain(daemon, scan, n, args.scans, tick))
        costs = {}
        with MeasuredDaemon() as daemon:
            send_whole(scan, daemon.port)
            for axis, values in axes.items():
                progress.update(task, description=f"cost by {axis}")
                scans = {value: encode(folder, args.acceleration, **{**base, axis: value}) for value in values}
                costs[axis] = grow(daemon.port, scans, args.repeats, tick)
    names = ("scanners", "scans", "repeats", "matrix", "coils", "slices", "acceleration", "quick")
    settings = {name: getattr(args, name) for name in names} | {"axes": dict(axes)}
    return make_record("throughput", settings, {"sustained": rates, "cost": costs})


def encode(folder: Path, acceleration: int, matrix: int, coils: int, slices: int) -> EncodedScan:
    """Return a simulated scan, ready to be sent."""
    path = folder / "scan.h5"
    protocol = Protocol(matrix=(matrix, matrix), n_slices=slices, n_coils=coils, acceleration=acceleration)
    simulate_file(path, protocol)
    return encode_scan(open_raw(path))


def send_whole(scan: EncodedScan, port: int) -> Sent:
    """Send a scan and return the answer; raises DeliveryError where it is not whole."""
    sent = send_scan(scan, HOST, port)
    if sent.problem or sent.missing(scan):
        raise DeliveryError(sent.problem or f"{len(sent.missing(scan))} images did not come back: {sent.texts[-1:]}")
    return sent


def sustain(daemon: MeasuredDaemon, scan: EncodedScan, n: int, scans: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Return rates and memory of `n` scanners that send `scans` scans each, one behind the other."""

    def scanner(_: int) -> list[Sent]:
        answers = []
        for _ in range(scans):
            answers.append(send_whole(scan, daemon.port))
            tick()
        return answers

    with MemoryWatch(daemon.pids) as memory, ThreadPoolExecutor(n) as pool:
        begin, begun_s = daemon.events.position(), time.monotonic()
        answers = [answer for each in pool.map(scanner, range(n)) for answer in each]
        daemon.events.wait_for(begin, len(answers), "scan.done", "scan.failed")  # their findings, too
        wall_s = time.monotonic() - begun_s
    per_h = 3600 * len(answers) / wall_s
    return {
        "scanners": n,
        "scans_per_h": round(per_h, 1),
        "slices_per_h": round(per_h * len(scan.lasts), 1),
        "wall_s": round(wall_s, 3),
        "scan": spread([answer.ended_s - answer.begun_s for answer in answers], "s"),
        "peak_mib": memory.peak_mib,
    }


def grow(port: int, scans: Mapping[int, EncodedScan], repeats: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Return the seconds of each scan, in turns, and the power law that fits their medians."""
    seconds: dict[int, list[float]] = {value: [] for value in scans}
    for number in range(repeats + 1):  # the first one warms up
        for value, scan in scans.items():
            sent = send_whole(scan, port)
            if number:
                seconds[value].append(sent.ended_s - sent.begun_s)
            tick()
    points = [{"value": value, **spread(each, "s")} for value, each in seconds.items()]
    return {"points": points, **power_law([(p["value"], p["p50_s"]) for p in points])}


def power_law(points: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Return exponent and factor of y = factor · x ** exponent by least squares of logarithms, and the residual.

    residual: the root mean square of log(y / fitted); 0.05 is about 5 %. None with fewer than three points.
    """
    x, y = np.log(np.asarray(points, float).T)
    exponent, offset = np.polyfit(x, y, 1)
    residual = float(np.sqrt(np.mean((y - exponent * x - offset) ** 2))) if len(points) > 2 else None
    return {
        "exponent": round(float(exponent), 3),
        "factor": float(f"{np.exp(offset):.4g}"),
        "residual": None if residual is None else round(residual, 4),
    }


def _processes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all processes that ran: workers are started as scans overlap."""
    return sorted({name for row in rows for name in row["peak_mib"]})


def _show(record: dict[str, Any]) -> None:
    console = Console(stderr=True, width=120)
    rows = record["results"]["sustained"]
    processes = _processes(rows)
    table = Table(title="one daemon, scanners that never pause")
    for heading in ("scanners", "scans/h", "slices/h", "a scan, median s", *(f"{name} MiB" for name in processes)):
        table.add_column(heading, justify="right")
    for row in rows:
        memory = [f"{row['peak_mib'].get(name, 0):.0f}" for name in processes]
        words = (f"{row['scans_per_h']:.0f}", f"{row['slices_per_h']:.0f}", f"{row['scan']['p50_s']:.2f}")
        table.add_row(str(row["scanners"]), *words, *memory)
    console.print(table)
    table = Table(title="cost of a scan, one scanner")
    for heading in ("by", "median s at", "exponent", "residual"):
        table.add_column(heading)
    for axis, cost in record["results"]["cost"].items():
        points = ", ".join(f"{p['value']}: {p['p50_s']:.2f}" for p in cost["points"])
        residual = "too few points" if cost["residual"] is None else f"{cost['residual']:.1%}"
        table.add_row(axis, points, f"{cost['exponent']:+.2f}", residual)
    console.print(table)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw slices an hour and memory by scanners, and cost by coils, matrix and slices with its exponent."""
    rows, costs = record["results"]["sustained"], record["results"]["cost"]
    rates = [(counted(r["scanners"], "scanner"), [Segment("slices/h", 0.0, r["slices_per_h"])]) for r in rows]
    notes = [f"{r['slices_per_h']:.0f} slices/h · {r['scans_per_h']:.0f} scans/h" for r in rows]
    memory: list[tuple[str, list[Segment]]] = []
    for r in rows:
        peaks = {name: r["peak_mib"].get(name, 0.0) for name in _processes(rows)}
        memory.append((counted(r["scanners"], "scanner"), stacked(peaks)))
    panels: list[ChartPanel] = [
        Bars("Sustained", rates, "slices/h", notes, legend=False),
        Bars("Memory of their own, peak", memory, "MiB", [f"{sum(p.length for p in m):.0f} MiB" for _, m in memory]),
        Curves(
            "Cost of a scan by coils, matrix and slices; the others stay as they are",
            {
                f"{axis}, n^{cost['exponent']:.2f}": [(p["value"], p["p50_s"]) for p in cost["points"]]
                for axis, cost in costs.items()
            },
            "coils, lines and columns of the matrix, or slices",
            "seconds a scan, median",
        ),
    ]
    s = record["settings"]
    about = f"{s['matrix']}×{s['matrix']}, {s['coils']} coils, {s['slices']} slices, R = {s['acceleration']}"
    write_chart(path, "Throughput", panels, about, origin(record))


if __name__ == "__main__":
    main()
