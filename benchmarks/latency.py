"""How long after its last readout is an image back, and where did the time go?

Starts the daemon (`scanside serve`, a state folder of its own, loopback), streams a simulated scan and listens to both
sides: the images that come back over MRD, and the events that carry each image's moments and stages. A slice's lines
go out at --rate, so that what can be done ahead is done; the next slice starts when the images of the last are back,
so that no slice waits for another (how many the daemon can take is the question of `benchmarks.throughput`).

  first        the classical image: last readout begins to be sent, until the whole image message is there
  network      the same for the network's image, which follows
  cold         the first slice of a scan sent as soon as the daemon accepts connections, its worker still loading
  warm         every slice of later scans

The stages of an image: receive (until the readout is in the spool), wait (until the worker takes it up), the chain's
own stages by the names its clock gives them, publish (pipe, ledger, until it is handed to the connection), deliver
(until the client has all of it). What is left of the total is given as `unexplained`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.chart import Bars, ChartPanel, Segment, stacked, write_chart
from benchmarks.figures import new_parser, new_progress, origin, spread
from benchmarks.record import make_record, write_record
from benchmarks.sender import EncodedScan, Place, Sent, encode_scan, send_scan
from benchmarks.server import HOST, Event, MeasuredDaemon
from edge.live import SERIES_NAMES
from edge.rawfile import open_raw
from edge.simulate import simulate_file
from recon.errors import DeliveryError
from recon.protocol import Protocol

SERIES = ("classical", "network")
UNEXPLAINED = "unexplained"
_EPILOG = """examples:
  python -m benchmarks.latency --json latency.json --png latency.png
  python -m benchmarks.latency --matrix 320 --coils 16 --acceleration 2 4 --scans 10

Reading it: docs/performance.md. Nothing else should run: on two cores a second program doubles the figures."""


@dataclass
class ImageTimes:
    """One image: its total and its parts, milliseconds, in the order in which they passed."""

    place: Place
    series: str
    total_ms: float
    parts: dict[str, float]


@dataclass
class ScanTimes:
    """One scan: its images, and from its last readout to `scan.done`; the chain's stages over the whole scan."""

    images: list[ImageTimes] = field(default_factory=list)
    done_ms: float = 0.0
    stage_ms: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Measure as the command line says; print a table and one JSON record."""
    parser = new_parser("latency", __doc__, _EPILOG)
    parser.add_argument("--matrix", type=int, nargs="+", default=[192, 256, 320], metavar="N", help="%(default)s")
    parser.add_argument("--coils", type=int, nargs="+", default=[8, 16], metavar="N", help="%(default)s")
    parser.add_argument("--acceleration", type=int, nargs="+", default=[2, 4], metavar="R", help="%(default)s")
    parser.add_argument("--slices", type=int, default=8, metavar="N", help="of a scan (%(default)s)")
    parser.add_argument("--scans", type=int, default=5, metavar="N", help="warm ones of each case (%(default)s)")
    parser.add_argument("--cold", type=int, default=3, metavar="N", help="starts of the daemon a case (%(default)s)")
    parser.add_argument("--rate", type=float, default=1000.0, metavar="N", help="readouts a second (%(default)g)")
    args = parser.parse_args()
    if args.quick:
        args.matrix, args.coils, args.acceleration, args.slices, args.scans, args.cold = [128], [8], [4], 3, 2, 1
    record = measure(args)
    _show(record)
    if args.png:
        draw(record, args.png)
    write_record(record, args.json)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the record of all cases."""
    cases = list(product(args.matrix, args.coils, args.acceleration))
    results = []
    with new_progress() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("scans", total=len(cases) * (args.cold + args.scans))
        for matrix, coils, acceleration in cases:
            progress.update(task, description=f"{matrix}×{matrix}, {coils} coils, R = {acceleration}")
            protocol = Protocol(matrix=(matrix, matrix), n_slices=args.slices, n_coils=coils, acceleration=acceleration)
            path = Path(folder) / "scan.h5"
            simulate_file(path, protocol)
            scan = encode_scan(open_raw(path))
            cold, warm, starts_s = _scans(scan, args, lambda: progress.advance(task))
            about = {"case": case_name(matrix, coils, acceleration), "readouts": scan.n_readouts}
            results.append({**about, **summarise(cold, warm, starts_s)})
    names = ("matrix", "coils", "acceleration", "slices", "scans", "cold", "rate", "quick")
    return make_record("latency", {name: getattr(args, name) for name in names}, results)


def case_name(matrix: int, coils: int, acceleration: int) -> str:
    """Return what a case is called."""
    return f"{matrix}×{matrix}, {coils} coils, R = {acceleration}"


def _scans(
    scan: EncodedScan, args: argparse.Namespace, tick: Callable[[], None]
) -> tuple[list[ScanTimes], list[ScanTimes], list[float]]:
    """Return cold and warm scans, and the seconds of each start; the last daemon to start serves the warm ones."""
    cold, warm, starts_s = [], [], []
    for number in range(args.cold):
        with MeasuredDaemon() as daemon:
            starts_s.append(daemon.start_s)
            cold.append(time_scan(daemon, scan, args.rate))
            tick()
            for _ in range(args.scans if number == args.cold - 1 else 0):
                warm.append(time_scan(daemon, scan, args.rate))
                tick()
    return cold, warm, starts_s


def time_scan(daemon: MeasuredDaemon, scan: EncodedScan, rate: float | None) -> ScanTimes:
    """Send a scan slice by slice and return its times; raises DeliveryError where it is not served."""
    begin = daemon.events.position()

    def until_back(place: Place) -> None:
        daemon.events.wait(begin, lambda header: _is_last_image(header, place))

    sent = send_scan(scan, HOST, daemon.port, rate=rate, gate=until_back)
    if sent.problem:
        raise DeliveryError(sent.problem)
    done = daemon.events.wait(begin, lambda header: header["kind"] in ("scan.done", "scan.failed"))
    if done.header["kind"] == "scan.failed":
        raise DeliveryError(f"the scan failed: {done.header['reason']}")
    last_s = max(sent.last_readout_s.values())
    images = image_times(sent, daemon.events.since(begin, "image"))
    return ScanTimes(images, 1e3 * (done.at_s - last_s), done.header["stage_ms"])


def _is_last_image(header: dict[str, Any], place: Place) -> bool:
    """Whether an event is the last image of a slice: the network's, or the classical one that stays alone."""
    if header["kind"] == "scan.failed":
        return True
    is_last = header.get("series") == "network" or "no_network" in header
    return header["kind"] == "image" and is_last and header["slice"] == place.slice


def image_times(sent: Sent, events: Sequence[Event]) -> list[ImageTimes]:
    """Return the times of each image that a readout completed and that came back to the sender."""
    moments = {(event.header["slice"], event.header["series"]): event.header for event in events}
    found = []
    for place, number, there_s in sent.image_s:
        header = moments.get((place.slice, SERIES_NAMES.get(number, "")))
        if header is None or header["moments_s"]["spooled"] is None or place not in sent.last_readout_s:
            continue
        at, out_s = header["moments_s"], sent.last_readout_s[place]
        spooled_s = min(at["spooled"], at["begun"])  # a worker that was reading may see it before the daemon notes it
        parts = {
            "receive": 1e3 * (spooled_s - out_s),
            "wait": 1e3 * (at["begun"] - spooled_s),
            **header["stage_ms"],
            "publish": 1e3 * (at["sent"] - at["made"]),
            "deliver": 1e3 * (there_s - at["sent"]),
        }
        total = 1e3 * (there_s - out_s)
        parts[UNEXPLAINED] = total - sum(parts.values())
        found.append(ImageTimes(place, header["series"], total, parts))
    return found


def summarise(cold: Sequence[ScanTimes], warm: Sequence[ScanTimes], starts_s: Sequence[float]) -> dict[str, Any]:
    """Return a case's figures: quantiles with their samples, and the last scan's images one by one."""
    images = [image for scan in warm for image in scan.images]
    out: dict[str, Any] = {"start": spread(starts_s, "s")}
    out |= {name: {} for name in ("cold", "warm", "stages", "unexplained_share")}
    for series in SERIES:
        firsts = [next((i for i in scan.images if i.series == series), None) for scan in cold]
        own = [image for image in images if image.series == series]
        if not own:
            continue
        out["cold"][series] = spread([image.total_ms for image in firsts if image is not None])
        out["warm"][series] = spread([image.total_ms for image in own])
        names = dict.fromkeys(name for image in own for name in image.parts)
        out["stages"][series] = {name: spread([image.parts.get(name, 0.0) for image in own]) for name in names}
        shares = [abs(image.parts[UNEXPLAINED]) / image.total_ms for image in own]
        out["unexplained_share"][series] = round(float(np.median(shares)), 4)
    out["scan_done"] = spread([scan.done_ms for scan in warm])
    names = dict.fromkeys(name for scan in warm for name in scan.stage_ms)
    out["scan_stages"] = {name: spread([scan.stage_ms.get(name, 0.0) for scan in warm]) for name in names}
    out["example_images"] = [
        {
            "slice": image.place.slice,
            "series": image.series,
            "parts_ms": {name: round(ms, 3) for name, ms in image.parts.items()},
        }
        for image in (warm[-1].images if warm else [])
    ]
    return out


def _show(record: dict[str, Any]) -> None:
    console = Console(stderr=True, width=150)
    table = Table(title="last readout on the wire to image at the scanner, ms: p50 / p95 / p99")
    for heading in ("case", "image", "warm", "cold (first slice)", "unexplained", "stages, p50 ms"):
        table.add_column(heading, overflow="fold")
    for case in record["results"]:
        for series, warm in case["warm"].items():
            stages = ", ".join(
                f"{name} {each['p50_ms']:.1f}" for name, each in case["stages"][series].items() if name != UNEXPLAINED
            )
            share = case["unexplained_share"][series]
            colour = "green" if share < 0.05 else "red"
            words = " / ".join(f"{warm[f'p{q}_ms']:.0f}" for q in (50, 95, 99))
            cold = case["cold"][series]["p50_ms"]
            table.add_row(
                case["case"], series, words, "" if cold is None else f"{cold:.0f}", f"[{colour}]{share:.1%}[/]", stages
            )
    console.print(table)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw one row an image of the last case, then the median stages of all cases."""
    last = record["results"][-1]
    stages = [each for case in record["results"] for each in case["stages"].values()]
    names = list(dict.fromkeys(name for each in sorted(stages, key=lambda s: -len(s)) for name in each))  # most first
    images = sorted(last["example_images"], key=lambda each: (each["slice"], SERIES.index(each["series"])))
    rows = [(f"slice {each['slice'] + 1} {each['series']}", stacked(each["parts_ms"])) for each in images[:20]]
    title = f"One warm scan: {last['case']}; at 0 the last readout of a slice begins to be sent"
    panels: list[ChartPanel] = [Bars(title, rows, "ms", _totals(rows), names=names, bar=18)]
    for series in SERIES:
        rows = [
            (case["case"], stacked({name: each["p50_ms"] for name, each in case["stages"][series].items()}))
            for case in record["results"]
            if series in case["stages"]
        ]
        if rows:
            title = f"Median of each stage until the {series} image is back"
            panels.append(Bars(title, rows, "ms", _totals(rows), names=names))
    settings = record["settings"]
    subtitle = f"{settings['scans']} warm scans of {settings['slices']} slices a case, one slice at a time"
    write_chart(path, "From the last readout to the image", panels, subtitle, origin(record))


def _totals(rows: Sequence[tuple[str, Sequence[Segment]]]) -> list[str]:
    return [f"{sum(piece.length for piece in pieces):.0f} ms" for _, pieces in rows]


if __name__ == "__main__":
    main()
