"""How fast are the coil maps, next to BART's ecalib and SigPy's EspiritCalib, and how good is SENSE with each?

`python -m benchmarks.coil_maps` estimates maps of the same k-space with all three in turns in one run (320×320, 8
coils, 24 calibration lines by default; `--data DIR` adds the real multi-coil scans there) and reconstructs with each by
the same CG-SENSE. Times are medians: ours (coil compression, maps of the virtual coils, and back to the physical ones)
and SigPy's from calibration lines in memory to maps, BART's one whole command (it reads and writes a file; starting it
takes about 3 ms). Prints a table and one JSON record.

BART and SigPy cut the background at eigenvalues of 0.8 and 0.95 by default, ours keeps a margin around the head; the
error is therefore given with every method's maps as they are, and with all of them inside the same region. Where the
truth is known there is one row more, for the true maps, and the sine of the angle between found and true maps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from threadpoolctl import threadpool_limits

from benchmarks.bart import bart, read_cfl, write_cfl
from benchmarks.record import make_record, write_record
from benchmarks.scores import Scores, compare
from recon.arrays import Array
from recon.fourier import to_image, to_kspace
from recon.reconstruct import sense_coils
from recon.scan import CoilMaps, KSpace
from recon.sense import cg_sense

REAL = ("pulseq_brain_16ch", "gpunufft_brain_4ch")
REPEATS = {"scanside": 15, "bart": 7, "sigpy": 3}  # the slow ones vary least


class Problem(NamedTuple):
    """One slice: k-space complex64 (coil, ky, kx) in units of its noise, and what is right, float (y, x).

    maps: the true ones, complex (coil, y, x), where they are known.
    """

    name: str
    lines: Array
    truth: Array
    maps: Array | None = None


def phantom(n: int, n_coils: int, snr: float) -> Problem:
    """Return a head of ellipses with fine stripes of tissue, seen by loops around it, with noise of variance 1."""
    y, x = np.meshgrid(*[(np.arange(n) - n // 2) / n] * 2, indexing="ij")

    def inside(cy: float, cx: float, ry: float, rx: float) -> Array:
        return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1

    brain = inside(0, 0, 0.39, 0.31)
    image = 1.0 * inside(0, 0, 0.45, 0.37) - 0.9 * inside(0, 0, 0.43, 0.35) + 0.5 * brain
    image += 0.1 * brain * np.sign(np.sin(60 * x + 12 * np.sin(9 * y)))
    for side in (-1, 1):
        image -= 0.45 * inside(-0.03, 0.07 * side, 0.13, 0.04)
    image += 0.3 * inside(0.18, 0.12, 0.03, 0.03)
    angle = (2 * np.pi * np.arange(n_coils) / n_coils)[:, None, None]
    maps = np.exp(1j * angle) / ((x - 0.7 * np.cos(angle)) + 1j * (y - 0.7 * np.sin(angle)))
    maps /= np.sqrt((np.abs(maps) ** 2).sum(0))
    rng = np.random.default_rng(0)
    lines = to_kspace(snr * maps * image, (1, 2))
    lines += (rng.standard_normal(lines.shape) + 1j * rng.standard_normal(lines.shape)) / 2**0.5
    return Problem(f"phantom {n}×{n}, {n_coils} coils", lines.astype(np.complex64), snr * image, maps)


def real_scan(path: Path) -> Problem:
    """Return the first slice of a fully sampled ISMRMRD file, scaled by the noise of its outermost samples."""
    import ismrmrd

    data = ismrmrd.Dataset(str(path), "dataset", create_if_needed=False)
    matrix = ismrmrd.xsd.CreateFromDocument(data.read_xml_header()).encoding[0].encodedSpace.matrixSize
    lines: Array = None
    for index in range(data.number_of_acquisitions()):
        readout = data.read_acquisition(index)
        if lines is None:
            lines = np.zeros((readout.active_channels, matrix.y, matrix.x), np.complex64)
        if readout.idx.slice == 0:
            lines[:, readout.idx.kspace_encode_step_1] = readout.data
    data.close()
    edge = np.abs(lines[:, [0, 1, -2, -1], : matrix.x // 16]) ** 2
    lines /= np.sqrt(np.median(edge) / np.log(2))
    truth = np.sqrt((np.abs(to_image(lines, (1, 2))) ** 2).sum(0))
    return Problem(f"{path.stem}, {matrix.y}×{matrix.x}, {len(lines)} coils", lines, truth)


def undersample(problem: Problem, step: int, n_central: int) -> KSpace:
    """Return each `step`-th line and the central ones of a problem, as the reconstruction receives them."""
    n_ky = problem.lines.shape[1]
    averages = np.zeros(n_ky, np.uint16)
    averages[::step] = 1
    averages[n_ky // 2 - n_central // 2 :][:n_central] = 1
    samples = to_image(problem.lines * (averages > 0)[:, None], (2,))[None]
    calibration = samples[:, :, n_ky // 2 - n_central // 2 :][:, :, :n_central]
    return KSpace(samples, averages[None], 1.0, True, calibration)


def estimators(problem: Problem, n_central: int, folder: Path) -> dict[str, Callable[[], Array]]:
    """Return the ways to get maps (coil, y, x) of a problem, each ready to run."""
    from sigpy.mri.app import EspiritCalib

    n_ky = problem.lines.shape[1]
    central = slice(n_ky // 2 - n_central // 2, n_ky // 2 - n_central // 2 + n_central)
    calibration = to_image(problem.lines[None, :, central], (3,))
    write_cfl(folder / "k", np.moveaxis(problem.lines, 0, -1)[:, :, None])

    def scanside() -> Array:
        with threadpool_limits(limits=1, user_api="blas"):  # as the daemon's worker runs it
            found = sense_coils(calibration, n_ky, calibration.shape[1], True)
            assert found.maps is not None, found.reason
            return np.tensordot(found.matrix.conj().T, found.maps.maps[0], axes=1)

    def with_bart() -> Array:
        bart("ecalib", "-m1", "-r", n_central, folder / "k", folder / "s")
        return folder / "s"

    def sigpy() -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of SigPy's own making
            return EspiritCalib(problem.lines, calib_width=n_central, show_pbar=False).run()

    return {"scanside": scanside, "bart": with_bart, "sigpy": sigpy}


def measure(problem: Problem, step: int, n_central: int, repeats: dict[str, int], tick: Callable[[], None]) -> Any:
    """Return for each method its times (ms), and the scores of the CG-SENSE image that its maps give."""
    kspace = undersample(problem, step, n_central)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        ways = estimators(problem, n_central, Path(name))
        times: dict[str, list[float]] = {method: [] for method in ways}
        found: dict[str, Array] = {}
        for turn in range(1 + max(repeats[method] for method in ways)):  # the first one warms up
            for method, run in ways.items():
                if turn > repeats[method]:
                    continue
                start = time.perf_counter()
                found[method] = run()
                if turn:
                    times[method].append(1e3 * (time.perf_counter() - start))
                tick()
        found["bart"] = np.moveaxis(read_cfl(found["bart"]), -1, 0)
    if problem.maps is not None:
        found["true"] = problem.maps
    inside = np.logical_and.reduce([np.abs(maps).sum(0) > 0 for maps in found.values()])
    for method, maps in found.items():
        scores, alike = (_judge(problem, kspace, maps * region) for region in (1, inside))
        results[method] = {
            "median_ms": float(np.median(times[method])) if method in times else None,
            "min_ms": min(times[method]) if method in times else None,
            "p95_ms": float(np.percentile(times[method], 95)) if method in times else None,
            "samples_ms": [round(ms, 3) for ms in times.get(method, ())],
            "sine": None if problem.maps is None else sine(maps, problem.maps, problem.truth > 0),
            "nrmse": scores.nmse**0.5,
            "psnr": scores.psnr,
            "ssim": scores.ssim,
            "nrmse_same_region": alike.nmse**0.5,
        }
    return results


def sine(found: Array, true: Array, where: Array) -> float:
    """Return the root mean square, over `where`, of the sine between two sets of maps (coil, y, x)."""
    norm = np.sqrt((np.abs(found) ** 2).sum(0) * (np.abs(true) ** 2).sum(0))
    cosine = np.abs((found.conj() * true).sum(0)) / np.maximum(norm, 1e-9)
    return float(np.sqrt(np.clip(1 - cosine[where] ** 2, 0, 1).mean()))


def _judge(problem: Problem, kspace: KSpace, maps: Array) -> Scores:
    image = cg_sense(kspace, CoilMaps(np.ascontiguousarray(maps[None])))
    return compare(problem.truth[None], np.abs(image))


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="matrix of the phantom")
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--snr", type=float, default=50, help="of the phantom's brightest tissue")
    parser.add_argument("--acs", type=int, default=24, help="calibration lines")
    parser.add_argument("--step", type=int, default=4, help="acceleration R of the CG-SENSE that judges the maps")
    parser.add_argument("--repeats", type=int, help="of each method; by default " + str(REPEATS))
    parser.add_argument("--data", type=Path, help="a folder that holds real scans: " + ", ".join(REAL))
    parser.add_argument("--json", type=Path, help="write the record here rather than print it")
    options = parser.parse_args()
    problems = [phantom(options.size, options.coils, options.snr)]
    if options.data:
        problems += [real_scan(options.data / f"{name}.h5") for name in REAL if (options.data / f"{name}.h5").is_file()]
    repeats = dict.fromkeys(REPEATS, options.repeats) if options.repeats else REPEATS
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[str, Any] = {}
    with Progress(*columns, console=console) as progress:
        for problem in problems:
            task = progress.add_task(problem.name, total=sum(repeats.values()) + len(repeats))
            results[problem.name] = measure(
                problem,
                options.step,
                options.acs,
                repeats,
                lambda task=task: progress.advance(task),  # type: ignore[misc]
            )
    for name, result in results.items():
        console.print(_table(name, options, result))
    settings = {
        **{key: getattr(options, key) for key in ("size", "coils", "snr", "acs", "step")},
        "repeats": repeats,
        "sigpy": f"EspiritCalib(calib_width={options.acs})",
        "bart": f"ecalib -m1 -r {options.acs}",
        "reference": "truth for the phantom, root-sum-of-squares of all lines for scans",
    }
    write_record(make_record("coil_maps", settings, results), options.json)


def _table(name: str, options: argparse.Namespace, result: dict[str, Any]) -> Table:
    table = Table(title=f"{name}; CG-SENSE at R = {options.step}, {options.acs} calibration lines")
    for title in ("maps", "median ms", "min ms", "ours is faster", "sine", "NRMSE", "same region", "PSNR dB", "SSIM"):
        table.add_column(title, justify="left" if title == "maps" else "right")
    for method, row in result.items():
        timed = row["median_ms"] is not None
        ratio = row["median_ms"] / result["scanside"]["median_ms"] if timed else 1
        table.add_row(
            method,
            f"{row['median_ms']:.1f}" if timed else "",
            f"{row['min_ms']:.1f}" if timed else "",
            f"{ratio:.0f}×" if ratio != 1 else "",
            "" if row["sine"] is None else f"{row['sine']:.4f}",
            f"{row['nrmse']:.4f}",
            f"{row['nrmse_same_region']:.4f}",
            f"{row['psnr']:.2f}",
            f"{row['ssim']:.4f}",
        )
    return table


if __name__ == "__main__":
    main()
