"""Is the classical reconstruction as good as the peers' on the same data, and how fast is the whole chain beside them?

Fully sampled phantoms of Debian's generator against `ismrmrd_recon_cartesian_2d`, accelerated ones and real scans
against BART's `ecalib` and `pics -l2` at the strength that is best against the reference. Then time, error and memory
of a slice, `benchmarks.speed`; PyTorch eager where it is installed. The network's accuracy has a benchmark of its own,
`benchmarks.quality`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.bart import best_sense
from benchmarks.chart import Curves, write_chart
from benchmarks.figures import origin
from benchmarks.ours import REAL, kspaces, reconstruct
from benchmarks.record import make_record, write_record
from benchmarks.scores import compare
from benchmarks.speed import measure_speed
from edge.comparison import write_comparison
from edge.rawfile import open_raw
from edge.undersample import undersample
from recon.arrays import Array
from recon.fourier import to_image

_SIZES = ((128, 8), (256, 16))


def main() -> None:
    """Run the comparison and print a table and one JSON record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one phantom size, and real scans at R = 2 only")
    parser.add_argument("--data", type=Path, default=REAL, help="folder of real ISMRMRD scans (left out where absent)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="draw time against error, and each real scan, here")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only-speed", action="store_true", help="leave the images out")
    part.add_argument("--only-images", action="store_true", help="leave the speed out, which a busy machine spoils")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args()
    jobs: list[Callable[[], list[dict[str, Any]]]] = [
        partial(phantom, matrix, coils, acceleration)
        for matrix, coils in (_SIZES[:1] if args.quick else _SIZES)
        for acceleration in (1, 2, 4)
    ]
    patterns = ((2, 24),) if args.quick else ((2, 24), (3, 24), (4, 24))
    paths = sorted(args.data.glob("*.h5"))
    jobs += [partial(real, path, *pattern, args.png) for pattern in patterns for path in paths]
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True, width=140)
    with Progress(console=console) as progress:
        for job in progress.track([] if args.only_speed else jobs, description="scans"):
            rows += job()
        speed = None if args.only_images else measure_speed(progress, *((96, 4, 1) if args.quick else ()))
    _show(rows, console)
    if speed is not None:
        _show_speed(speed, console)
    settings = {"quick": args.quick, "real": args.data.exists()}
    record = make_record("peers", settings, {"images": rows, "speed": speed})
    if args.png and speed is not None:
        draw(record, args.png / "speed.png")
    write_record(record, args.json)


def phantom(matrix: int, coils: int, acceleration: int) -> list[dict[str, Any]]:
    """Compare on one generated file, every repetition on its own: NRMSE against the stored phantom."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "phantom.h5"
        subprocess.run(
            f"ismrmrd_generate_cartesian_shepp_logan -m {matrix} -c {coils} -O 2 -r 2 -a {acceleration} -w 24 "
            f"-n 0.05 -C -o {path}".split(),
            check=True,
            capture_output=True,
        )
        with h5py.File(path, locking=False) as file:
            truth = _magnitude(file["dataset/phantom"][0])
            shading = np.sqrt((_magnitude(file["dataset/csm"][0]) ** 2).sum(0))
        raw = open_raw(path)
        start = time.perf_counter()
        ours = [each["classical"] for each in reconstruct(raw)]
        ours_s = (time.perf_counter() - start) / len(ours)
        peer_kspaces = kspaces(raw)
        peer_volumes: list[tuple[str, Array]] = []
        if acceleration == 1:
            copy = shutil.copy(path, path.with_name("peer.h5"))  # it writes into the file
            start = time.perf_counter()
            subprocess.run(["ismrmrd_recon_cartesian_2d", copy], check=True, capture_output=True)
            peer_s = time.perf_counter() - start
            with h5py.File(copy) as file:
                images = np.asarray(file["dataset/cpp/data"], np.float32).reshape(-1, matrix, matrix)
            peer_volumes = [("ismrmrd_recon_cartesian_2d", image[None]) for image in images]
            peer_s /= len(images)
        rows = []
        for number, volume in enumerate(ours):
            # Every method gives the phantom times the coils' joint sensitivity: compared with that, and without a mask.
            reference = (truth * shading)[None]
            everywhere = np.ones(reference.shape, bool)
            if acceleration == 1:
                label, peer = peer_volumes[min(number, len(peer_volumes) - 1)]
            else:
                closeness = partial(_closeness, reference, everywhere)
                peer, strength, peer_s = best_sense(peer_kspaces[number], 24, closeness)
                label = f"bart l2 {strength:g}"
            rows.append(
                {
                    "scan": f"shepp-logan {matrix} {coils}ch",
                    "pattern": f"R{acceleration} rep {number}",
                    "peer": label,
                    "ours_nrmse": round(compare(reference, volume.data, everywhere).nmse ** 0.5, 5),
                    "peer_nrmse": round(compare(reference, peer, everywhere).nmse ** 0.5, 5),
                    "ours_s": round(ours_s, 3),
                    "peer_s": round(peer_s, 3),
                }
            )
        return rows


def real(path: Path, acceleration: int, acs: int, folder: Path | None) -> list[dict[str, Any]]:
    """Compare on one fully sampled real scan of which lines are dropped: scores against its root-sum-of-squares."""
    full = open_raw(path)
    raw = undersample(full, acceleration, acs)
    start = time.perf_counter()
    volume = reconstruct(raw)[0]["classical"]
    ours_s = time.perf_counter() - start
    reference = np.sqrt((np.abs(to_image(kspaces(full)[0], axes=(2, 3))) ** 2).sum(1))
    kspace = kspaces(raw)[0]
    peer, strength, peer_s = best_sense(kspace, acs, lambda v: compare(reference, v).psnr)
    ours, theirs = compare(reference, volume.data), compare(reference, peer)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        zero_filled = np.sqrt((np.abs(to_image(kspace, axes=(2, 3))) ** 2).sum(1))
        shown = {"Zero-filled": zero_filled, f"BART l2 {strength:g}": peer, "Scanside": volume.data}
        write_comparison(
            folder / f"{path.stem}_R{acceleration}.png",
            {label: _matched(reference, image) for label, image in shown.items()},
            reference.astype(np.float32),
            volume.geometry,
            [len(reference) // 2],
            f"{path.stem}, R = {acceleration}, {acs} calibration lines",
            "Reference: root-sum-of-squares of all lines",
        )
    return [
        {
            "scan": path.stem,
            "pattern": f"R{acceleration} acs{acs}",
            "peer": f"bart l2 {strength:g}",
            "ours_psnr": round(ours.psnr, 2),
            "peer_psnr": round(theirs.psnr, 2),
            "ours_ssim": round(ours.ssim, 4),
            "peer_ssim": round(theirs.ssim, 4),
            "ours_s": round(ours_s, 3),
            "peer_s": round(peer_s, 3),
        }
    ]


def _closeness(reference: Array, mask: Array, volume: Array) -> float:
    return -compare(reference, volume, mask).nmse


def _magnitude(stored: Array) -> Array:
    return np.hypot(stored["real"], stored["imag"])


def _matched(reference: Array, image: Array) -> Array:
    return (image * (np.vdot(reference, image) / np.vdot(image, image))).astype(np.float32)


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="scanside against its peers (NRMSE: lower is better; PSNR, SSIM: higher)")
    for heading in ("scan", "pattern", "peer", "measure", "scanside", "peer's", ""):
        table.add_column(heading)
    for row in rows:
        for measure in ("nrmse", "psnr", "ssim"):
            if f"ours_{measure}" in row:
                ours, theirs = row[f"ours_{measure}"], row[f"peer_{measure}"]
                is_better = ours <= theirs if measure == "nrmse" else ours >= theirs
                words = (row["scan"], row["pattern"], row["peer"], measure, f"{ours:g}", f"{theirs:g}")
                table.add_row(*words, "[green]≥[/]" if is_better else "[red]worse[/]")
    console.print(table)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw time against error of each contender that makes an image."""
    speed = record["results"]["speed"]
    rows = [row for row in speed["rows"] if row["nrmse"] is not None]
    panel = Curves(
        "Towards the lower left is better",
        {row["method"]: [(row["median_ms"], row["nrmse"])] for row in rows},
        "milliseconds a slice, median",
        "NRMSE against the phantom's truth",
        log_y=False,
        joined=False,
    )
    about = f"{speed['matrix']}×{speed['matrix']}, {speed['virtual_coils']} virtual coils, R = {speed['acceleration']}"
    about += f", {speed['acs']} calibration lines; all on the same phantom, side by side in one run"
    write_chart(path, "Time against error", [panel], about, origin(record))


def _show_speed(speed: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"one slice of {speed['matrix']}×{speed['matrix']}, {speed['virtual_coils']} virtual coils, R = 4"
    )
    for heading in ("method", "median ms", "least ms", "NRMSE", "peak MiB"):
        table.add_column(heading)
    for row in speed["rows"]:
        words = [str(row[name]) for name in ("method", "median_ms", "least_ms", "nrmse", "peak_mib")]
        table.add_row(*("" if word == "None" else word for word in words))
    console.print(table)
    for name, ratio in speed["ratios"].items():
        console.print(f"{name}: {ratio:g}")


if __name__ == "__main__":
    if not shutil.which("bart") or not shutil.which("ismrmrd_generate_cartesian_shepp_logan"):
        raise SystemExit("benchmarks.peers needs the Debian packages bart and ismrmrd-tools")
    main()
