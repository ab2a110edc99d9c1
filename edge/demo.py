"""`scanside demo`: a simulated scanner streams an accelerated brain scan into the daemon, and everything comes out."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge.child import DaemonProcess
from edge.comparison import write_comparison
from edge.live import SERIES_NAMES
from edge.mrd import LAST_IN_SLICE
from edge.rawfile import RawFile, open_raw
from edge.recon_file import reconstruct_file
from edge.replay import Replayed, save_images, stream_file, times_due
from edge.simulate import simulate_file
from edge.wire import Subscriber
from recon.arrays import Array
from recon.errors import DeliveryError, ScanError
from recon.lesions import FINDINGS
from recon.protocol import Protocol
from recon.scan import Geometry

LINES_PER_S = 120.0  # a turbo spin echo with TR 9 s and 12 slices reads about 40 lines a second: three times as fast
_EVENT_S = 60.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where all goes (./%(default)s)")
    parser.add_argument("--finding", choices=FINDINGS, default="mass", help="what the head has (default %(default)s)")
    parser.add_argument("--seed", type=int, default=4, help="whose head, which finding and which noise (%(default)s)")
    parser.add_argument("--rate", default=f"{LINES_PER_S:g}", metavar="max|N", help="readouts a second (%(default)s)")
    parser.add_argument("--stay", action="store_true", help="keep the daemon up afterwards, until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    """Run the demo: 0 when images, DICOM and events came out, 1 with the reason when not."""
    console = Console()
    try:
        _demonstrate(args, console)
    except (ScanError, OSError) as error:
        print(f"scanside demo: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass
class _Heard:
    """What the subscriber heard of the scan: how many of each kind of event, and the last one's header."""

    kinds: Counter[str] = field(default_factory=Counter)
    done: dict[str, Any] | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)


def _demonstrate(args: argparse.Namespace, console: Console) -> None:
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    for old in ("state", "results"):
        shutil.rmtree(out / old, ignore_errors=True)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        protocol = Protocol()
        task = progress.add_task("simulate the head and its scan", total=protocol.n_slices)
        simulate_file(out / "scan.h5", protocol, args.finding, args.seed, on_slice=lambda: progress.advance(task))
        raw = open_raw(out / "scan.h5")
        with DaemonProcess(out / "state", out / "daemon.log") as daemon:
            replayed, heard, latencies_ms = _scan(raw, daemon, args.rate, progress)
            done = heard.done
            if done is None or done["kind"] != "scan.done":
                why = done.get("reason", "") if done else "no scan.done event came"
                raise DeliveryError(f"the daemon did not finish the scan: {why}")
            shutil.copytree(out / "state" / done["results"], out / "results")
            save_images(replayed.images, out / "images")
            task = progress.add_task("draw the comparison", total=1)
            nrmse = _draw(raw, out, protocol)
            progress.advance(task)
            progress.stop()
            _show(console, out, replayed, heard, latencies_ms, nrmse)
            if args.stay:
                console.print(
                    f"The daemon stays up: MRD 127.0.0.1:{daemon.port}, events {daemon.events}. Ctrl-C ends it."
                )
                with suppress(KeyboardInterrupt):
                    threading.Event().wait()


def _scan(
    raw: RawFile, daemon: DaemonProcess, rate: str, progress: Progress
) -> tuple[Replayed, _Heard, dict[str, list[float]]]:
    """Stream the scan while listening to events; return what came back, and last line → image by series, in ms."""
    heard = _Heard()
    flags = raw.heads["flags"].astype(np.uint64)
    slice_of_last = {
        int(i): int(raw.heads["idx"]["slice"][i]) for i in np.flatnonzero(flags & np.uint64(LAST_IN_SLICE))
    }
    sending = progress.add_task("scanner: readouts sent over MRD", total=len(raw.heads))
    images = progress.add_task("daemon: images over ZeroMQ", total=2 * len(slice_of_last))
    listener = threading.Thread(target=_listen, args=(daemon.events, heard, progress, images), daemon=True)
    listener.start()
    sent_at: dict[int, float] = {}
    count = iter(range(len(raw.heads)))

    def on_readout() -> None:
        number = next(count)
        progress.advance(sending)
        if number in slice_of_last:
            sent_at[slice_of_last[number]] = time.monotonic()

    replayed = stream_file(raw, "127.0.0.1", daemon.port, due_s=times_due(raw, rate), on_readout=on_readout)
    start = time.monotonic() - replayed.total_s
    heard.is_over.wait(_EVENT_S)
    if replayed.problem:
        raise DeliveryError(replayed.problem)
    latencies_ms: dict[str, list[float]] = {}
    for image, at_s in zip(replayed.images, replayed.image_at_s, strict=True):
        series = SERIES_NAMES[int(image.header["image_series_index"])]
        latencies_ms.setdefault(series, []).append((start + at_s - sent_at[int(image.header["slice"])]) * 1e3)
    return replayed, heard, latencies_ms


def _listen(address: str, heard: _Heard, progress: Progress, images: Any) -> None:
    subscriber = Subscriber(address)
    while not heard.is_over.is_set():
        event = subscriber.receive(timeout_s=0.5)
        if event is None:
            continue
        header, _ = event
        kind = header["kind"]
        heard.kinds[kind] += 1
        if kind not in ("heartbeat", "scan.progress"):
            progress.console.print(_line(header), style="dim", highlight=False)
        if kind == "image":
            progress.advance(images)
        elif kind == "findings":
            heard.findings = header["findings"]
        elif kind in ("scan.done", "scan.failed"):
            heard.done = header
            heard.is_over.set()
    subscriber.close()


def _line(header: dict[str, Any]) -> str:
    """One event as a line to read along."""
    words = f"event {header['seq']:3d}  {header['kind']}"
    if header["kind"] == "image":
        high = header["window"][1]
        words += (
            f"  {header['series']} {header['slice'] + 1}/{header['slices']}  {header['shape']}  window to {high:.3g}"
        )
    elif header["kind"] == "scan.started":
        words += f"  {header['slices']} slices, {header['coils']} coils, acceleration {header['acceleration'][0]}"
    elif header["kind"] == "scan.done":
        words += f"  {header['images']} images, {header['method']}"
    return words


def _draw(raw: RawFile, out: Path, protocol: Protocol) -> dict[str, float]:
    """Draw preview.png for the slice with most of the finding; return each volume's NRMSE against the truth."""
    with np.load(out / "scan.truth.npz") as arrays:
        truth, lesion = arrays["image"], arrays["lesion"]
        geometry = Geometry(
            arrays["origin_mm"],
            tuple(arrays["row_dir"]),
            tuple(arrays["col_dir"]),
            tuple(arrays["spacing_mm"].tolist()),
            float(arrays["thickness_mm"]),
        )
    with tempfile.TemporaryDirectory() as folder:
        reconstruct_file(raw, Path(folder), "zero-filled", is_shown=False)
        zero_filled = np.load(Path(folder) / "volume.npy")
    results = out / "results"
    shown = {"Zero-filled": zero_filled, "CG-SENSE": np.load(results / "classical.npy")}
    shown["Network"] = np.load(results / "volume.npy")
    shown = {name: _scaled(volume, truth) for name, volume in shown.items()}
    number = int(lesion.sum(axis=(1, 2)).argmax()) if lesion.any() else len(truth) // 2
    write_comparison(
        out / "preview.png",
        shown,
        truth,
        geometry,
        [number],
        "A simulated brain scan, 4 times faster",
        f"Simulated head · {protocol.contrast.name.upper()} · R = {protocol.acceleration}, "
        f"{protocol.n_calibration} calibration lines, {protocol.n_coils} coils · slice {number + 1} of {len(truth)}",
        truth_name="Truth",
    )
    return {name: float(np.linalg.norm(made - truth) / np.linalg.norm(truth)) for name, made in shown.items()}


def _spread(times_ms: list[float]) -> str:
    median, p95 = np.percentile(times_ms, [50, 95])
    return f"median {median:.0f} ms, p95 {p95:.0f} ms a slice ({len(times_ms)} slices)"


def _scaled(image: Array, truth: Array) -> Array:
    """`image` in the truth's unit, by one least-squares factor for the volume."""
    return (image * (np.vdot(truth, image) / max(float(np.vdot(image, image)), 1e-30))).astype(np.float32)


def _named(finding: dict[str, Any]) -> str:
    """A finding with its probability and place, where there are any."""
    if finding["state"] != "flagged":
        return str(finding["finding"])
    words = f"{finding['finding']} (p {finding['probability']:.2f}, evidence {finding['evidence']}"
    return f"{words}, slice {finding['key_slice'] + 1})" if finding["key_slice"] is not None else f"{words})"


def _measured(name: str, each: dict[str, Any]) -> str:
    words = f"{name} {each['value']:.3g}"
    if each["interval"]:
        words += f" [{each['interval'][0]:.3g}, {each['interval'][1]:.3g}]"
    return f"{words} {each['side']}" if each.get("side") else words


def _show(
    console: Console,
    out: Path,
    replayed: Replayed,
    heard: _Heard,
    latencies_ms: dict[str, list[float]],
    nrmse: dict[str, float],
) -> None:
    report = json.loads((out / "results" / "report.json").read_text())
    volume = report["volumes"][0]
    kinds = ", ".join(f"{n} {kind}" for kind, n in heard.kinds.items() if kind != "heartbeat")
    by_state: dict[str, list[str]] = {}
    for each in heard.findings:
        words = f"{each['state']} ({each['why']})" if each["why"] else each["state"]
        by_state.setdefault(words, []).append(_named(each))
    states = [f"{', '.join(labels)}: {state}" for state, labels in by_state.items()]
    measured = [_measured(name, each) for name, each in report["measurements"].items() if each["value"] is not None]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, words in (
        ("the picture", f"{out / 'preview.png'}"),
        (
            "images",
            f"{out / 'results' / volume['file']}, classical.npy beside it; {len(replayed.images)} back over MRD",
        ),
        ("DICOM", f"{out / 'results' / volume['dicom']} ({volume['dicom_files']} files)"),
        ("report", f"{out / 'results' / 'report.json'}"),
        ("raw data", f"{out / 'scan.h5'}; the spool's copy under {out / 'state' / 'spool'}"),
        ("method", f"{volume['method']}: {'; '.join(volume['steps'])}"),
        (
            "error",
            ", ".join(f"{name} {100 * e:.1f} %" for name, e in nrmse.items()) + " (NRMSE to the noise-free truth)",
        ),
        *((f"last line → {series}", _spread(times)) for series, times in latencies_ms.items()),
        ("events", kinds),
        ("findings", "; ".join(states)),
        ("measured", "; ".join(measured) or "nothing"),
    ):
        table.add_row(name, words)
    console.print(table)
    console.print("For research use only. Not for diagnostic use.", style="dim")
