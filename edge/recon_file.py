"""`scanside recon`: the same chain as the daemon's, on a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge.chain import Chain
from edge.exam_triage import open_triage, triage_scan
from edge.header import read_header
from edge.model import PRECISIONS, RECONSTRUCTION
from edge.mrd import Readout, next_message, read_acquisition
from edge.rawfile import RawFile, open_raw
from edge.results import Results
from edge.settings import Settings, TriageSettings
from edge.spool import new_scan_id
from edge.super_resolution import Choice, super_resolve_scan
from edge.superres_model import open_refiner
from edge.supply import BACKENDS, Supply
from edge.undersample import undersample
from recon.errors import BackendError, ModelError, ScanError
from recon.quality import Level
from recon.reconstruct import METHODS
from recon.superres_card import Refiner


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside recon`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="ISMRMRD .h5, or a recorded MRD stream (raw.mrd)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go (made if need be)")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="auto",
        help="auto takes the network where it may serve this scan, else sense; the others insist (%(default)s)",
    )
    parser.add_argument("--accelerate", type=int, default=1, metavar="R", help="keep every R-th phase-encode line only")
    parser.add_argument("--acs", type=int, default=24, metavar="N", help="and the N central ones (%(default)s)")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what runs the networks; auto takes the best there is (%(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the convolutions: auto is float16 in engines, float32 elsewhere; int8 where the card offers it",
    )
    finer = parser.add_argument_group(
        "super-resolution", "a second, synthetic volume beside the measured one; not for diagnostic use"
    )
    finer.add_argument(
        "--super-resolve", action="store_true", help="voxels half as long and wide; everything measured is kept"
    )
    finer.add_argument(
        "--thin-slices", type=int, default=1, metavar="N", help="and N slices for each thick one, 1 to 4 (%(default)s)"
    )
    finer.add_argument(
        "--seven-tesla-style",
        type=float,
        default=0.0,
        metavar="S",
        help="also render it in a 7 T style of strength S, 0 to 1: contrast and sharpness only (%(default)g)",
    )
    parser.add_argument("--model", type=Path, default=RECONSTRUCTION, metavar="DIR", help="another network's folder")
    parser.add_argument(
        "--engines",
        type=Path,
        default=Settings().state / "engines",
        metavar="DIR",
        help="where scanside engines build keeps what it builds (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Do `scanside recon`: 0 done, 1 the scan cannot be served, 2 wrong use."""
    if not args.file.is_file():
        return _fail(f"{args.file}: there is no such file", 2)
    if mistake := _mistake(args):
        return _fail(mistake, 2)
    try:
        raw = undersample(open_raw(args.file), args.accelerate, args.acs)
        report = reconstruct_file(
            raw,
            args.out,
            args.method,
            model=args.model,
            backend=args.backend,
            engines=args.engines,
            precision=args.precision,
            finer=Choice(args.thin_slices, args.seven_tesla_style) if args.super_resolve else None,
        )
    except ScanError as error:
        return _fail(str(error), 1)
    for volume in report["volumes"]:
        shape = "×".join(map(str, volume["shape"]))
        print(f"{args.out / volume['file']}  {shape}  {volume['method']}  {volume['dicom_files']} DICOM files")
        beside = volume["classical"]
        print(f"{args.out / beside['file']}  {shape}  {beside['method']}  the classical image, always beside it")
        for step in (step for step in volume["steps"] if step.startswith("network not used")):
            print(f"note: {step}")
    for line in _finer_words(args.out, report.get("super_resolution", ())):
        print(line)
    for finding in report["findings"]:
        why = f" ({finding['why']})" if finding["why"] else ""
        print(f"{finding['finding']}: {finding['state']}{why}")
    quality = report["quality"]
    if quality["verdict"] == Level.TRUSTED.value:
        expected = quality["measures"].get("expected_error")
        print(
            "quality: trusted" + ("" if expected is None else f" (expected error {100 * expected:.0f} % of the signal)")
        )
    for reason in quality["reasons"]:
        print(f"quality: {quality['verdict']}: {reason['words']}")
    if quality["reasons"] and quality["advice"]["repeat"]:
        print(f"advice: scan again: {quality['advice']['what']}")
    print(f"{args.out / 'report.json'}  {args.out / 'preview.png'}")
    return 0


def _mistake(args: argparse.Namespace) -> str:
    if args.accelerate < 1 or args.acs < 0:
        return f"--accelerate {args.accelerate} --acs {args.acs}: R ≥ 1 and N ≥ 0 are needed"
    if not 1 <= args.thin_slices <= 4 or not 0 <= args.seven_tesla_style <= 1:
        return "--thin-slices takes 1 to 4, --seven-tesla-style 0 to 1"
    if not args.super_resolve and (args.thin_slices > 1 or args.seven_tesla_style):
        return "--thin-slices and --seven-tesla-style need --super-resolve"
    return ""


def _finer_words(out: Path, volumes: Iterable[dict[str, Any]]) -> Iterator[str]:
    for each in volumes:
        if each["state"] != "made":
            yield f"note: super-resolution refused: {each['why']}"
            continue
        shape, share = "×".join(map(str, each["shape"])), 100 * each["estimated"]["share_of_energy"]
        yield f"{out / each['file']}  {shape}  synthetic: {share:.2g} % of its energy is estimated"
        yield f"{out / each['preview']}  beside the measured image; not for diagnostic use"


def reconstruct_file(
    raw: RawFile,
    folder: Path,
    method: str,
    is_shown: bool = True,
    model: Path = RECONSTRUCTION,
    backend: str = "auto",
    engines: Path | None = None,
    precision: str = "auto",
    finer: Choice | None = None,
) -> dict[str, Any]:
    """Reconstruct `raw` into `folder` and return the report; progress is shown on a terminal. Raises ScanError.

    model, backend, engines, precision: the network's folder, what runs it and super-resolution, where engines are kept,
    and how it computes. "auto" does without a network that cannot be opened, and says so. finer: what is
    super-resolved, None for nothing.
    """
    scan, exam = read_header(raw.header, new_scan_id())
    supply, no_network = None, ""
    if method in ("auto", "network"):
        try:
            supply = Supply(model, backend, engines, precision)
        except (ModelError, BackendError) as error:
            if method == "network":
                raise
            no_network = str(error)
    chain = Chain(
        Results(folder, scan, exam),
        method=method,
        network=None if supply is None else supply.network(),
        no_network=no_network,
        device=None if supply is None else supply.arrays,
    )
    triage = open_triage(asdict(TriageSettings()))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (is_shown and console.is_terminal)) as progress:
        task = progress.add_task("readouts", total=len(raw.heads))
        for readout in readouts(raw):
            chain.feed(readout)
            progress.advance(task)
        report = triage_scan(triage, chain.results, chain.finish("complete", "", lambda: readouts(raw)))
        if finer is not None:
            task = progress.add_task("super-resolution", total=None)
            report |= {
                "super_resolution": super_resolve_scan(
                    chain.results,
                    _refiner(backend, engines),
                    finer,
                    report["quality"]["verdict"] or "",
                    lambda done, of: progress.update(task, completed=done, total=of),
                )
            }
            chain.results.write_report(report)
    return report


def _refiner(backend: str, engines: Path | None) -> Refiner | ModelError | BackendError:
    try:
        return open_refiner(backend=backend, engines=engines)
    except (ModelError, BackendError) as error:
        return error


def readouts(raw: RawFile) -> Iterator[Readout]:
    """Yield the readouts of a file as they would arrive. Raises AcquisitionError where the file is damaged."""
    for content in raw.acquisitions():
        message = next_message(content)
        assert message is not None
        yield read_acquisition(content, message)


def _fail(reason: str, code: int) -> int:
    print(f"scanside recon: {reason}", file=sys.stderr)
    return code
