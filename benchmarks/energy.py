"""What does a slice cost in joules? `python -m benchmarks.energy`: each meter of this machine, network and classical.

One slice, 320×320, 8 virtual coils, R = 4 with 24 calibration lines, again and again for some seconds, from arrays in
memory as the daemon's worker does it. *Classical* is coil maps and CG-SENSE, which every scan gets; *network* is what
comes on top of it. Joules are all that a meter counted while that ran, divided by the slices; what the machine takes
when it does nothing is measured beforehand and given beside it, not subtracted. A machine without meters gets
"unavailable" with the reasons, never an estimate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits

from benchmarks.coil_maps import phantom, undersample
from benchmarks.record import make_record, write_record
from edge.model import RECONSTRUCTION
from edge.power import Energy, PowerMeter, Survey, look_for_meters
from edge.supply import BACKENDS, Supply
from recon.coils import estimate_maps
from recon.network import Network
from recon.sense import cg_sense
from recon.unrolled import reconstruct_unrolled

ACS = 24
IDLE = "idle"


def main() -> None:
    """Parse the command line, measure, show and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.energy", description=__doc__)
    parser.add_argument("--matrix", type=int, default=320, help="voxels each way (default %(default)s)")
    parser.add_argument("--coils", type=int, default=8, help="virtual coils (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each way and for idling (default %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs the network")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record here rather than print it")
    args = parser.parse_args()
    network = Supply(RECONSTRUCTION, args.backend).network()
    results = measure(network, args.matrix, args.coils, args.seconds)
    show(results)
    settings = {
        "matrix": args.matrix,
        "virtual_coils": args.coils,
        "acceleration": 4,
        "acs": ACS,
        "seconds": args.seconds,
        "model": network.card.sha256,
        "backend": network.backend,
    }
    write_record(make_record("energy", settings, results), args.out)


def measure(network: Network, matrix: int, n_coils: int, seconds: float, sysfs: Path = Path("/sys")) -> dict[str, Any]:
    """Return which meters there are and, for each, joules a slice of each way; see the module.

    seconds: how long each way runs at least. sysfs: where meters are looked for.
    """
    survey: Survey = look_for_meters(sysfs)
    meters, reasons = survey
    rows: list[dict[str, Any]] = []
    if meters:
        ways: dict[str, Callable[[], object]] = {IDLE: lambda: time.sleep(min(1.0, seconds))}
        ways |= contenders(network, matrix, n_coils)
        with Progress(console=Console(stderr=True)) as progress:
            for way, run in progress.track(list(ways.items()), description="energy"):
                rows += _measure_way(meters, way, run, seconds)
    return {
        "meters": [{"source": meter.source, "name": meter.name} for meter in meters],
        "unavailable": reasons,
        "rows": rows,
    }


def contenders(network: Network, matrix: int, n_coils: int) -> dict[str, Callable[[], object]]:
    """Return the ways to an image of one slice, each ready to run."""
    threadpool_limits(limits=1, user_api="blas")  # as the daemon's worker runs
    kspace = undersample(phantom(matrix, n_coils, 40.0), 4, ACS)
    maps = estimate_maps(kspace.calibration, matrix)
    classical = cg_sense(kspace, maps)
    return {
        "classical": lambda: cg_sense(kspace, estimate_maps(kspace.calibration, matrix)),
        "network": lambda: reconstruct_unrolled(network, kspace, maps, classical),
    }


def _measure_way(meters: list[PowerMeter], way: str, run: Callable[[], object], seconds: float) -> list[dict[str, Any]]:
    """Return for each meter what it counted while `run` ran for `seconds`, at least once, after a warm-up."""
    run()
    n_runs = 0
    with ExitStack() as stack:
        energies = [stack.enter_context(Energy(meter)) for meter in meters]
        start = time.monotonic()
        while n_runs == 0 or time.monotonic() - start < seconds:
            run()
            n_runs += 1
    rows = []
    for meter, energy in zip(meters, energies, strict=True):
        row = {"way": way, "meter": f"{meter.source} {meter.name}", "seconds": round(energy.seconds, 3)}
        if energy.joules is None:
            rows.append({**row, "unavailable": energy.reason})
            continue
        row |= {"joules": round(energy.joules, 4), "watts": round(energy.joules / energy.seconds, 3)}
        if way != IDLE:
            row |= {"slices": n_runs, "joules_per_slice": round(energy.joules / n_runs, 4)}
        rows.append(row)
    return rows


def show(results: dict[str, Any]) -> None:
    """Print the table to standard error: the record goes to standard output."""
    console = Console(stderr=True)
    if not results["rows"]:
        console.print("energy: unavailable")
    else:
        table = Table(title="energy of one slice")
        for heading in ("meter", "way", "J a slice", "W", "slices"):
            table.add_column(heading)
        for row in results["rows"]:
            if "unavailable" in row:
                table.add_row(row["meter"], row["way"], "unavailable", row["unavailable"])
                continue
            each = (row.get("joules_per_slice", "–"), row["watts"], row.get("slices", "–"))
            table.add_row(row["meter"], row["way"], *map(str, each))
        console.print(table)
    for reason in results["unavailable"]:
        console.print(f"  {reason}", highlight=False)


if __name__ == "__main__":
    main()
