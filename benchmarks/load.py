"""How many readouts a second does an MRD server take, and do its images come back?

Encodes a scan once and sends it with `sendall` in pieces of 1 MiB, from one or several scanners at a time, as fast as
the server takes it or at --rate readouts a second each. Works against any MRD v1 server (--to HOST:PORT); without --to
it starts this daemon for the occasion. Says how fast the bytes went and what came back; images that a server never sent
are counted as missing, not as a failure, as some servers send none. A scan of a few megabytes fits into the sockets'
buffers: the rate is then that of a copy into them, not of the server.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chart import Bars, Segment, counted, number, write_chart
from benchmarks.figures import new_parser, new_progress, origin, spread
from benchmarks.record import make_record, write_record
from benchmarks.sender import EncodedScan, Sent, encode_scan, send_scan
from benchmarks.server import HOST, MeasuredDaemon
from edge.rawfile import open_raw
from edge.simulate import simulate_file
from recon.errors import ScanError
from recon.protocol import Protocol

_EPILOG = """examples:
  python -m benchmarks.load                                   the daemon, 1, 2 and 4 scanners, a simulated scan
  python -m benchmarks.load --to 127.0.0.1:9002 --config default --file scan.h5
  python -m benchmarks.load --scanners 8 --rate 400           eight scanners at their own pace

Exit code 1: a scan was not taken, or its answer did not end with CLOSE."""


def main() -> None:
    """Send as the command line says; print a table and one JSON record."""
    parser = new_parser("load", __doc__, _EPILOG)
    parser.add_argument("--to", metavar="HOST:PORT", help="an MRD server that is running (default: one is started)")
    parser.add_argument("--file", type=Path, metavar="FILE", help="ISMRMRD .h5 or recorded stream (default: simulated)")
    parser.add_argument("--config", default="scanside", metavar="NAME", help="configuration to ask for (%(default)s)")
    parser.add_argument("--scanners", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="at once (%(default)s)")
    parser.add_argument("--rate", type=float, metavar="N", help="readouts a second of each scanner (default: no pause)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="scans of each scanner (%(default)s)")
    parser.add_argument("--matrix", type=int, default=256, metavar="N", help="of the simulated scan (%(default)s)")
    parser.add_argument("--coils", type=int, default=16, metavar="N", help="of the simulated scan (%(default)s)")
    parser.add_argument("--slices", type=int, default=8, metavar="N", help="of the simulated scan (%(default)s)")
    args = parser.parse_args()
    if args.quick:
        args.scanners, args.repeats, args.matrix, args.coils, args.slices = [1, 2], 1, 64, 4, 2
    host, port = address(parser, args.to)
    try:
        record = measure(args, host, port)
    except ScanError as error:
        raise SystemExit(f"benchmarks.load: {error}") from error
    _show(record)
    if args.png:
        draw(record, args.png)
    write_record(record, args.json)
    if any(row["problems"] for row in record["results"]):
        raise SystemExit(1)


def address(parser: argparse.ArgumentParser, to: str | None) -> tuple[str, int]:
    """Return host and port of `to`, ("", 0) for None; ends the program where it is neither."""
    if to is None:
        return "", 0
    host, _, port = to.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        parser.error(f"--to {to}: HOST:PORT is needed")
    return host.strip("[]"), int(port)


def measure(args: argparse.Namespace, host: str, port: int) -> dict[str, Any]:
    """Return the record; `host` "" starts a daemon. Raises ScanError where no server answers."""
    with ExitStack() as stack, new_progress() as progress:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = args.file
        if path is None:
            path = folder / "scan.h5"
            protocol = Protocol(matrix=(args.matrix, args.matrix), n_slices=args.slices, n_coils=args.coils)
            simulate_file(path, protocol)
        scan = encode_scan(open_raw(path), args.config)
        is_ours = not host
        if is_ours:
            host, port = HOST, stack.enter_context(MeasuredDaemon()).port
            send_scan(scan, host, port)  # the worker is ready, and pages are in memory
        task = progress.add_task("scans", total=sum(args.scanners) * args.repeats)
        rows = [
            burst(scan, host, port, n, args.repeats, args.rate, lambda: progress.advance(task)) for n in args.scanners
        ]
    names = ("scanners", "rate", "repeats", "config", "quick")
    settings = {name: getattr(args, name) for name in names} | {"server": "scanside" if is_ours else "another"}
    settings["scan"] = {"readouts": scan.n_readouts, "bytes": scan.n_bytes, "images": len(scan.lasts)}
    return make_record("load", settings, rows)


def burst(
    scan: EncodedScan, host: str, port: int, n: int, repeats: int, rate: float | None, tick: Callable[[], None]
) -> dict[str, Any]:
    """Send `scan` from `n` scanners at once, `repeats` times each, and return what was seen."""

    def scanner(_: int) -> list[Sent]:
        answers = []
        for _ in range(repeats):
            answers.append(send_scan(scan, host, port, rate=rate))
            tick()
        return answers

    with ThreadPoolExecutor(n) as pool:
        answers = [answer for each in pool.map(scanner, range(n)) for answer in each]
    return {"scanners": n, **summarise(scan, answers)}


def summarise(scan: EncodedScan, answers: Sequence[Sent]) -> dict[str, Any]:
    """Return rates of one scanner as samples, of all together, and what came back."""
    came: Counter[int] = Counter(series for answer in answers for _, series, _ in answer.image_s)
    wall_s = max(answer.sent_s for answer in answers) - min(answer.begun_s for answer in answers)
    return {
        "readouts": spread([scan.n_readouts / answer.sending_s for answer in answers], "per_s"),
        "bytes": spread([scan.n_bytes / answer.sending_s / 1e6 for answer in answers], "mb_per_s"),
        "sending_at_once": round(sum(answer.sending_s for answer in answers) / max(wall_s, 1e-9), 2),
        "answer": spread([answer.ended_s - answer.sent_s for answer in answers], "s"),
        "scans": len(answers),
        "images_by_series": {str(series): count for series, count in sorted(came.items())},
        "images_missing": sum(len(answer.missing(scan)) for answer in answers),
        "problems": dict(Counter(answer.problem for answer in answers if answer.problem)),
        "texts": sum(len(answer.texts) for answer in answers),  # not their words: another server may name a patient
    }


def _show(record: dict[str, Any]) -> None:
    console = Console(stderr=True, width=140)
    about = record["settings"]["scan"]
    table = Table(title=f"{about['readouts']} readouts, {about['bytes'] / 1e6:.1f} MB, {about['images']} images a scan")
    for heading in (
        "scanners",
        "readouts/s each",
        "MB/s each",
        "answer after, s",
        "images back",
        "missing",
        "problems",
    ):
        table.add_column(heading)
    for row in record["results"]:
        back = ", ".join(f"series {series}: {count}" for series, count in row["images_by_series"].items())
        problems = "; ".join(row["problems"])
        table.add_row(
            str(row["scanners"]),
            f"{row['readouts']['p50_per_s']:.0f}",
            f"{row['bytes']['p50_mb_per_s']:.1f}",
            f"{row['answer']['p50_s']:.2f}",
            back or "none",
            f"[{'red' if row['images_missing'] else 'green'}]{row['images_missing']}[/]",
            f"[red]{problems}[/]" if problems else "[green]none[/]",
        )
    console.print(table)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw how fast one scanner's bytes went, and how long the answer took, by the number of scanners."""
    rows = record["results"]
    panels = []
    for title, key, unit, column in (
        ("Sent by each scanner, median", "bytes", "MB/s", "p50_mb_per_s"),
        ("From the last byte sent to the server's CLOSE, median", "answer", "s", "p50_s"),
    ):
        bars = [(counted(r["scanners"], "scanner"), [Segment(unit, 0.0, r[key][column])]) for r in rows]
        notes = [f"{number(r[key][column])} {unit}" for r in rows]
        panels.append(Bars(title, bars, unit, notes, legend=False))
    about = record["settings"]["scan"]
    paced = f", {record['settings']['rate']:g} readouts/s each" if record["settings"]["rate"] else ", no pause"
    subtitle = f"{about['readouts']} readouts, {about['bytes'] / 1e6:.1f} MB a scan{paced}"
    write_chart(path, "Load", panels, subtitle, origin(record))


if __name__ == "__main__":
    main()
