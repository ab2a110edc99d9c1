"""`scanside simulate`: a simulated brain scan as an ISMRMRD file, with its truth beside it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge.anatomy import load_anatomy
from edge.raw_write import RawWriter, header_xml
from recon.contrast import CONTRASTS
from recon.errors import AcquisitionError, ScanError
from recon.head import Head, make_head
from recon.lesions import FINDINGS, Lesion, LesionTruth, measure, place_lesion
from recon.protocol import ORIENTATIONS, Protocol, geometry, slice_order
from recon.receive import MAX_COILS
from recon.scanner import SliceScan, noise_readouts, scan_slice

DEGREES_PER_MM = 0.5  # a head that moves also turns
_NOTICE = "simulated: an average anatomy, a modelled head and a modelled finding; nobody's scan"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    default = Protocol()
    parser.epilog = (
        "Writes FILE.h5 (ISMRMRD, dataset 'dataset'), FILE.truth.npz (image, lesion and geometry) and FILE.truth.json "
        "(the finding in numbers). The same arguments always give the same scan."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.h5", help="the raw data file to write")
    parser.add_argument("--finding", choices=FINDINGS, default="none", help="what the head has (default %(default)s)")
    parser.add_argument("--contrast", choices=tuple(CONTRASTS), default="flair", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="whose head, which lesion and which noise (default 0)")
    where = parser.add_argument_group("slices")
    where.add_argument(
        "--slices", type=int, default=default.n_slices, metavar="N", help="1 to 200 (default %(default)s)"
    )
    where.add_argument(
        "--matrix", type=int, default=default.matrix[0], metavar="N", help="N × N, 32 to 1024 (default %(default)s)"
    )
    where.add_argument("--orientation", choices=tuple(ORIENTATIONS), default="axial", help="(default %(default)s)")
    how = parser.add_argument_group("sampling")
    how.add_argument(
        "--coils", type=int, default=default.n_coils, metavar="N", help=f"1 to {MAX_COILS} (default %(default)s)"
    )
    how.add_argument(
        "--accelerate", type=int, default=default.acceleration, metavar="R", help="1 to 16 (default %(default)s)"
    )
    how.add_argument(
        "--acs", type=int, default=default.n_calibration, metavar="N", help="central lines (default %(default)s)"
    )
    how.add_argument("--full", action="store_true", help="read every line: the same as --accelerate 1")
    how.add_argument(
        "--partial-fourier", type=float, default=1.0, metavar="F", help="share of lines read, 0.6 to 1 (default 1)"
    )
    how.add_argument("--averages", type=int, default=1, metavar="N", help="1 to 16 (default 1)")
    faults = parser.add_argument_group("what can go wrong")
    faults.add_argument(
        "--snr", type=float, default=default.snr, metavar="X", help="white matter over noise (default %(default)g)"
    )
    faults.add_argument(
        "--motion",
        type=float,
        default=0.0,
        metavar="MM",
        help=f"the head moves half way through each slice, and turns {DEGREES_PER_MM} degrees a mm (default 0)",
    )
    faults.add_argument("--spikes", type=int, default=0, metavar="N", help="readouts with a spark (default 0)")
    faults.add_argument("--missing", type=int, default=0, metavar="N", help="readouts that never arrive (default 0)")
    parser.add_argument("--maps", action="store_true", help="put the coil maps into the truth as well (large)")


def run(args: argparse.Namespace) -> int:
    """Simulate and write; return 0, or 2 where no scan could have these settings or the file cannot be written."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        protocol = _protocol(args)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("slices", total=protocol.n_slices)
            truth = simulate_file(
                args.out,
                protocol,
                args.finding,
                args.seed,
                on_slice=lambda: progress.advance(task),
                with_maps=args.maps,
            )
    except (ScanError, OSError) as error:
        reason = error if isinstance(error, ScanError) else f"{args.out} cannot be written: {error.strerror or error}"
        print(f"scanside simulate: {reason}", file=sys.stderr)
        return 2
    found = truth["lesion"]
    what = f"{found['label']}, {found['volume_ml']:.1f} ml" if found else "no finding"
    print(f"{args.out}  {protocol.n_slices} slices, {protocol.n_coils} coils, {protocol.contrast.name}, {what}")
    print(f"{_beside(args.out, '.npz')}  {_beside(args.out, '.json')}")
    return 0


def _protocol(args: argparse.Namespace) -> Protocol:
    return Protocol(
        contrast=CONTRASTS[args.contrast],
        matrix=(args.matrix, args.matrix),
        n_slices=args.slices,
        orientation=args.orientation,
        n_coils=args.coils,
        acceleration=1 if args.full else args.accelerate,
        n_calibration=args.acs,
        partial_fourier=args.partial_fourier,
        n_averages=args.averages,
        snr=args.snr,
        motion_mm=args.motion,
        motion_deg=DEGREES_PER_MM * args.motion,
        n_spikes=args.spikes,
        n_missing=args.missing,
        seed=args.seed,
    )


def simulate_file(
    path: Path,
    protocol: Protocol,
    finding: str = "none",
    seed: int = 0,
    on_slice: Callable[[], None] | None = None,
    with_maps: bool = False,
) -> dict[str, Any]:
    """Write a scan of person `seed` with a finding to `path`, and its truth beside it; return what the JSON says.

    The stack is moved along its normal, as far as needed, so that it holds the lesion. `on_slice` is called after each
    slice. Truth: image float32 and lesion bool (slice, y, x), origin_mm, row_dir, col_dir, spacing_mm, thickness_mm,
    and with `with_maps` coil_maps complex64 (slice, coil, y, x).
    Raises ScanError where the finding cannot be made and OSError where a file cannot be written.
    """
    head = make_head(load_anatomy(), seed)
    lesion = place_lesion(head, finding, seed)
    numbers = measure(head, lesion) if lesion is not None else None
    if numbers is not None:
        protocol = _aimed(protocol, numbers)
    name = f"simulated {protocol.contrast.name} {protocol.orientation}"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    slices: dict[int, SliceScan] = {}
    try:
        with RawWriter(part, header_xml(protocol, name, seed)) as writer:
            writer.append(noise_readouts(protocol))
            for scanned in _scan_all(head, protocol, lesion):
                writer.append(scanned.readouts)
                slices[scanned.index] = replace(scanned, readouts=())
                if on_slice is not None:
                    on_slice()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    in_order = [slices[index] for index in range(protocol.n_slices)]
    truth = _truth(protocol, finding, seed, lesion, numbers, in_order)
    _write_arrays(_beside(path, ".npz"), protocol, in_order, with_maps)
    _beside(path, ".json").write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    return truth


def _scan_all(head: Head, protocol: Protocol, lesion: Lesion | None) -> Iterator[SliceScan]:
    """Yield the slices in the order they are read; some are made at once, only so many that memory stays small."""
    n_workers = min(os.cpu_count() or 1, 8)
    order = slice_order(protocol)
    with ThreadPoolExecutor(n_workers) as pool:
        for first in range(0, len(order), 2 * n_workers):
            batch = order[first : first + 2 * n_workers]
            yield from pool.map(lambda index: scan_slice(head, protocol, index, lesion), batch)


def _aimed(protocol: Protocol, numbers: LesionTruth) -> Protocol:
    """Return the protocol with its stack moved just enough to hold the lesion's centre two slices from its edge."""
    stack = geometry(protocol)
    along = float((np.asarray(numbers.centre_mm) - stack.origin_mm.mean(axis=0)) @ np.asarray(stack.normal))
    half = max(protocol.n_slices - 5, 0) / 2 * stack.spacing_mm[0]
    return replace(protocol, shift_mm=along - min(max(along, -half), half))


def _truth(
    protocol: Protocol,
    finding: str,
    seed: int,
    lesion: Lesion | None,
    numbers: LesionTruth | None,
    slices: list[SliceScan],
) -> dict[str, Any]:
    settings = asdict(protocol)
    settings["contrast"]["sequence"] = protocol.contrast.sequence.value
    out: dict[str, Any] = {"notice": _NOTICE, "finding": finding, "seed": seed, "lesion": None, "protocol": settings}
    if lesion is not None and numbers is not None:
        out["lesion"] = {
            "label": lesion.label,
            "side": "left" if numbers.centre_mm[0] > 0 else "right",
            **asdict(numbers),
            "voxels_in_slice": [int(scanned.lesion.sum()) for scanned in slices],
        }
    return out


def _write_arrays(path: Path, protocol: Protocol, slices: list[SliceScan], with_maps: bool) -> None:
    stack = geometry(protocol)
    arrays: dict[str, Any] = {
        "image": np.stack([scanned.image for scanned in slices]),
        "lesion": np.stack([scanned.lesion for scanned in slices]),
        "origin_mm": stack.origin_mm,
        "row_dir": np.asarray(stack.row_dir),
        "col_dir": np.asarray(stack.col_dir),
        "spacing_mm": np.asarray(stack.spacing_mm),
        "thickness_mm": np.float64(stack.thickness_mm),
    }
    if with_maps:
        arrays["coil_maps"] = np.stack([scanned.maps for scanned in slices])
    np.savez_compressed(path, **arrays)


def _beside(path: Path, ending: str) -> Path:
    """Return FILE.truth.npz or FILE.truth.json for FILE.h5; raises AcquisitionError for a path without a file name."""
    if not path.stem:
        raise AcquisitionError(f"{path} names no file; FILE.h5 is right")
    return path.with_name(f"{path.stem}.truth{ending}")
