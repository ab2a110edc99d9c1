"""`scanside recon`: the same chain as the daemon's, on a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge.chain import Chain
from edge.exam_triage import open_triage
from edge.header import read_header
from edge.model import PRECISIONS, RECONSTRUCTION
from edge.mrd import Readout, next_message, read_acquisition
from edge.rawfile import RawFile, open_raw
from edge.results import Results
from edge.settings import Settings, TriageSettings
from edge.spool import new_scan_id
from edge.supply import BACKENDS, Supply
from edge.undersample import undersample
from recon.errors import BackendError, ModelError, ScanError
from recon.quality import Level
from recon.reconstruct import METHODS


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
        help="what runs the network; auto takes the best there is (%(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the convolutions: auto is float16 in engines, float32 elsewhere; int8 where the card offers it",
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
    if args.accelerate < 1 or args.acs < 0:
        return _fail(f"--accelerate {args.accelerate} --acs {args.acs}: R ≥ 1 and N ≥ 0 are needed", 2)
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


def reconstruct_file(
    raw: RawFile,
    folder: Path,
    method: str,
    is_shown: bool = True,
    model: Path = RECONSTRUCTION,
    backend: str = "auto",
    engines: Path | None = None,
    precision: str = "auto",
) -> dict[str, Any]:
    """Reconstruct `raw` into `folder` and return the report; progress is shown on a terminal. Raises ScanError.

    model, backend, engines, precision: the network's folder, what runs it, where engines are kept, and how it
    computes. "auto" does without a network that cannot be opened, and says so.
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
        triage=open_triage(asdict(TriageSettings())),
    )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (is_shown and console.is_terminal)) as progress:
        task = progress.add_task("readouts", total=len(raw.heads))
        for readout in readouts(raw):
            chain.feed(readout)
            progress.advance(task)
        return chain.finish("complete", "", lambda: readouts(raw))


def readouts(raw: RawFile) -> Iterator[Readout]:
    """Yield the readouts of a file as they would arrive. Raises AcquisitionError where the file is damaged."""
    for content in raw.acquisitions():
        message = next_message(content)
        assert message is not None
        yield read_acquisition(content, message)


def _fail(reason: str, code: int) -> int:
    print(f"scanside recon: {reason}", file=sys.stderr)
    return code
