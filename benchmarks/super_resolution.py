"""What does super-resolution recover, what does it make up, and what does it cost?

`python -m benchmarks.super_resolution` measures heads of subjects that no training saw coarsely, as a scanner would
(half of k-space within the plane, or thick slices; noise), and compares what is made of them with the truth: our
network beside zero-filling (sinc), cubic splines and detail that the scan teaches itself. Two-way lesion test, images
that are no heads, and milliseconds are in the same record. `--pictures` draws comparisons.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy import ndimage

from benchmarks.ours import REAL, reconstruct
from benchmarks.record import make_record, write_record
from benchmarks.scores import head_mask
from benchmarks.superres_cases import (
    CORRELATION,
    NAMES,
    NOISE,
    Case,
    judge,
    make_all,
    patient_cases,
    real_cases,
    row_of,
    simulated_cases,
    sinc,
    through_cases,
    volume_of,
)
from benchmarks.superres_lesions import STANDS_OUT, detectability, false_structures
from edge.comparison import write_comparison
from edge.rawfile import open_raw
from edge.super_resolution import in_band_difference
from edge.superres_model import SUPER_RESOLUTION, open_refiner
from export.superres_data import cut_k_space
from recon.arrays import Array
from recon.errors import AcquisitionError
from recon.head_likeness import Likeness
from recon.scan import Volume
from recon.superres import Steps, super_resolve
from recon.superres_card import Refiner

REAL_PHANTOMS = ("phantom_pulseq_16ch", "phantom_ge_8ch_7sl", "phantom_twixtools_gre_2ch")
MEASURES = ("psnr", "ssim", "hfen", "cut_off", "cut_off_seventh", "cut_off_axes")


def main() -> None:
    """Run the comparison; print tables and one JSON record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.super_resolution",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=REAL.parent, help="holds brain/, stroke_flair/ and kspace/")
    parser.add_argument("--model", type=Path, default=SUPER_RESOLUTION, metavar="DIR", help="another network's folder")
    parser.add_argument("--slices", type=int, default=12, metavar="N", help="of each volume (%(default)s)")
    parser.add_argument("--sites", type=int, default=24, metavar="N", help="lesions of a kind a head (%(default)s)")
    parser.add_argument("--patients", type=int, default=400, metavar="N", help="without false structures (%(default)s)")
    parser.add_argument("--others", type=int, default=48, metavar="N", help="slices of two other sets (%(default)s)")
    parser.add_argument("--simulated", type=int, default=2, metavar="N", help="simulated heads (%(default)s)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw comparisons here")
    parser.add_argument("--json", "--out", dest="out", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--quick", action="store_true", help="a slice or two of everything")
    parser.add_argument("--cost-of", type=Path, metavar="RECORD", help="only time it again, and put that into a record")
    args = parser.parse_args()
    if args.quick:
        args.slices, args.sites, args.patients, args.simulated, args.others = 1, 3, 2, 0, 1
    refiner = open_refiner(args.model)
    if args.cost_of is not None:
        time_again(args.cost_of, refiner)
        return
    console = Console(stderr=True, width=150)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("super-resolution", total=6)

        def begin(words: str) -> None:
            progress.update(task, description=words, advance=1)

        begin("within the plane")
        rows = in_plane(args.data, refiner, args.slices, args.simulated, args.pictures, args.others)
        begin("thinner slices")
        thin = through_plane(args.data, refiner, (2,) if args.quick else (2, 3, 4), 5 if args.quick else 8)
        begin("lesions")
        seen = detectability(args.data, refiner, args.sites)
        false = false_structures(args.data, refiner, args.patients)
        begin("what is no head")
        null = null_tests(args.data, refiner)
        begin("cost")
        cost = milliseconds(refiner, 3 if args.quick else 15)
        begin("done")
    results = {
        "model_sha256": refiner.card.sha256,
        "rows": rows,
        "summary": summary(rows),
        "through_plane": thin,
        "lesions": {"detectability": seen, "false_structures": false},
        "null_tests": null,
        "cost": cost,
    }
    _show(console, results)
    settings = {
        "slices": args.slices,
        "sites": args.sites,
        "patients": args.patients,
        "others": args.others,
        "simulated": args.simulated,
        "quick": args.quick,
        "noise": NOISE,
        "cut_off": f"ring correlation {CORRELATION}, radius 1 is the highest measured frequency along an axis",
        "false_structure": f"a blob as strong as a lesion of 3 mm with a contrast of {STANDS_OUT} of the scale",
    }
    write_record(make_record("super_resolution", settings, results), args.out)


def in_plane(
    data: Path, refiner: Refiner, n_slices: int, n_simulated: int, pictures: Path | None, n_others: int = 0
) -> list[dict[str, Any]]:
    """Return the scores of every held-out volume; draw each into the folder `pictures`.

    n_others: single slices of each of two other sets.
    """
    cases = [
        *real_cases(data, n_slices),
        *(patient_cases(data, n_others) if n_others else ()),
        *(simulated_cases(n_simulated) if n_simulated else ()),
    ]
    raw = raw_case(data)
    rows = []
    for case in [*cases, *([raw] if raw is not None else [])]:
        volumes, made = make_all(case, refiner)
        row = row_of(case, volumes)
        row["in_band"] = in_band_difference(case.measured, made)
        row["share_of_energy"] = made.share
        rows.append(row)
        if pictures is not None and case.kind in ("real", "simulated"):  # the others do not say how the head lies
            draw(pictures, case, volumes)
    return rows


def raw_case(data: Path) -> Case | None:
    """Return a real raw scan, of which only the centre of k-space is given; None where it is not there."""
    file = data / "kspace" / "gpunufft_brain_4ch.h5"
    if not file.is_file():
        return None
    truth = reconstruct(open_raw(file))[0]["classical"]
    scale = np.float32(np.percentile(truth.data, 99.5))
    whole = truth.data / scale
    measured = np.stack([cut_k_space(np.random.default_rng(2), plane, 0.0) for plane in whole])
    spacing = truth.geometry.spacing_mm
    coarse = volume_of(measured, (spacing[0], 2 * spacing[1], 2 * spacing[2]))
    return Case("gpunufft_brain_4ch T2w (raw data)", "gpunufft_brain_4ch", "T2w", "raw", whole, coarse)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each kind and contrast the means over volumes, and the gain in PSNR with its interval over slices."""
    rng = np.random.default_rng(0)
    out = []
    for kind, contrast in dict.fromkeys((row["kind"], row["contrast"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["contrast"]) == (kind, contrast)]
        gains = np.concatenate([row["gain_of_slices"] for row in own])
        drawn = rng.choice(gains, (10_000, len(gains))).mean(1)
        means = {
            method: {name: round(float(np.mean([row[method][name] for row in own])), 4) for name in MEASURES}
            for method in ("sinc", "cubic", "self-taught", "network")
        }
        out.append(
            {
                "contrast": contrast if kind == "real" else f"{contrast} ({kind})",
                "kind": kind,
                "subjects": len({row["subject"] for row in own}),
                "slices": len(gains),
                "psnr_gain": round(means["network"]["psnr"] - means["sinc"]["psnr"], 3),
                "psnr_gain_95": [round(float(v), 3) for v in np.percentile(drawn, (2.5, 97.5))],
                "further": {name: round(means["network"][name] / means["sinc"][name] - 1, 4) for name in MEASURES[3:]},
                **means,
                "in_band": max(row["in_band"] for row in own),
                "share_of_energy": round(float(np.mean([row["share_of_energy"] for row in own])), 6),
            }
        )
    return out


def through_plane(data: Path, refiner: Refiner, factors: tuple[int, ...], n_slices: int) -> list[dict[str, Any]]:
    """Return the scores of isotropic volumes whose slices were made thick, beside spline interpolation."""
    rows = []
    for n_thin in factors:
        for case in through_cases(data, n_thin, n_slices):
            made = super_resolve(case.measured, refiner, NAMES[case.contrast], n_thin)
            plain = thinned(sinc(case.measured.data), n_thin)
            mask = head_mask(case.truth)
            both = {
                "interpolated": judge(case.truth, plain, mask),
                "network": judge(case.truth, made.volume.data, mask),
            }
            gain = both["network"]["psnr"] - both["interpolated"]["psnr"]
            rows.append(
                {
                    "name": case.name,
                    "n_thin": n_thin,
                    "psnr_gain": round(gain, 3),
                    "in_band": in_band_difference(case.measured, made),
                    **both,
                }
            )
    return rows


def thinned(stack: Array, n_thin: int) -> Array:
    """Return slices interpolated by cubic splines between the thick ones' centres."""
    at = (np.arange(len(stack) * n_thin) - (n_thin - 1) / 2) / n_thin
    filtered = ndimage.spline_filter1d(stack.astype(np.float64), 3, axis=0, mode="nearest")
    z, y, x = np.meshgrid(at, np.arange(stack.shape[1]), np.arange(stack.shape[2]), indexing="ij")
    return np.asarray(
        ndimage.map_coordinates(filtered, (z, y, x), order=3, mode="nearest", prefilter=False), np.float32
    )


def null_tests(data: Path, refiner: Refiner) -> list[dict[str, Any]]:
    """Return for images that are no heads, or not such as were trained for, whether they are refused and why.

    share: of the energy that would be estimated if the refusal were not heeded.
    """
    rng = np.random.default_rng(11)
    n = 128
    y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]
    noise = np.abs(rng.standard_normal((3, n, n)) + 1j * rng.standard_normal((3, n, n)))
    disc = (np.hypot(y, x) < 0.75).astype(float)
    holes = disc - sum(
        0.5 * (np.hypot(y - a, x - b) < r) for a, b, r in ((0.3, 0, 0.1), (-0.3, 0.2, 0.05), (0, -0.4, 0.2))
    )
    bars = disc * (1 - 0.6 * ((np.floor(x * 16) % 2 == 0) & (np.abs(y) < 0.3)))
    images = {
        "constant": np.ones((3, n, n)),
        "noise alone": noise,
        "constant with noise": np.ones((3, n, n)) + 0.02 * noise,
        "disc": np.stack([disc] * 3) + 0.005 * noise,
        "disc with holes": np.stack([holes] * 3) + 0.005 * noise,
        "disc with bars": np.stack([bars] * 3) + 0.005 * noise,
    }
    tests = [(name, volume_of(each.astype(np.float32), (5.0, 1.8, 1.8)), "") for name, each in images.items()]
    case = next(iter(real_cases(data, 3)))
    turned = ndimage.rotate(case.measured.data, 37, axes=(1, 2), reshape=False, order=1)
    tests += [
        ("a head, turned by 37°", replace(case.measured, data=turned.astype(np.float32)), ""),
        ("a head said to be dwi", case.measured, "dwi"),
        ("a super-resolved head", super_resolve(case.measured, refiner, "").volume, ""),
    ]
    for name in REAL_PHANTOMS:
        file = data / "kspace" / f"{name}.h5"
        if file.is_file():
            tests.append((name, reconstruct(open_raw(file))[0]["classical"], ""))
    return [{"name": name, **_null(volume, refiner, contrast)} for name, volume, contrast in tests]


def _null(volume: Volume, refiner: Refiner, contrast: str) -> dict[str, Any]:
    why = ""
    try:
        super_resolve(volume, refiner, contrast)
    except AcquisitionError as error:
        why = str(error)
    careless = replace(refiner, likeness=Likeness(refiner.likeness.known, refiner.likeness.spread, np.inf))
    steps = Steps(volume, careless)
    for _ in steps:
        pass
    made = steps.result()
    scale = float(np.percentile(volume.data, 99.5)) or 1.0
    rms = float(np.sqrt((made.estimated.astype(np.float64) ** 2).mean())) / scale
    return {"refused": bool(why), "why": why, "share": made.share, "added_rms": rms}


def time_again(path: Path, refiner: Refiner, n: int = 15) -> None:
    """Put new milliseconds into the record at `path`: those of the whole run are as slow as the machine was busy.

    Raises ValueError where the record was made with other weights.
    """
    record = json.loads(path.read_bytes())
    if record["results"]["model_sha256"] != refiner.card.sha256:
        raise ValueError(f"{path.name} was made with other weights")
    busy = [*record["results"].pop("cost_when_busy", []), record["results"]["cost"]]
    record["results"] |= {"cost": milliseconds(refiner, n), "cost_when_busy": busy}
    write_record(record, path)


def milliseconds(refiner: Refiner, n: int) -> dict[str, Any]:
    """Return what a slice of 256 × 256 takes, from measured to twice as fine, projection and all."""
    image = np.random.default_rng(0).random((1, 256, 256)).astype(np.float32)
    steps = Steps(volume_of(image, (5.0, 0.9, 0.9)), refiner)
    took = []
    for _ in range(n + 1):
        begin = time.perf_counter()
        for _ in steps:
            pass
        took.append(1e3 * (time.perf_counter() - begin))
    took = took[1:]
    return {
        "slice": "256×256 to 512×512",
        "backend": refiner.network.backend,
        "n": n,
        "median_ms": round(float(np.median(took)), 1),
        "p95_ms": round(float(np.percentile(took, 95)), 1),
        "min_ms": round(min(took), 1),
        "load": [round(each, 1) for each in os.getloadavg()],  # of others, too: 1, 5 and 15 minutes
    }


def upside(stack: Array) -> Array:
    """Return slices (slice, x, y) of right, anterior, superior voxels as they are looked at, (slice, y, x)."""
    return stack.transpose(0, 2, 1)[:, ::-1, ::-1]


def draw(folder: Path, case: Case, volumes: dict[str, Array]) -> None:
    """Draw the middle slice by every method beside the truth."""
    folder.mkdir(parents=True, exist_ok=True)
    z_mm, y_mm, x_mm = case.measured.geometry.spacing_mm
    geometry = volume_of(case.truth, (z_mm, y_mm / 2, x_mm / 2)).geometry
    shown = {"Zero-filled (sinc)": volumes["sinc"], "Self-taught": volumes["self-taught"], "AI-SR": volumes["network"]}
    truth = case.truth
    if case.slice_axis is not None:
        shown, truth = {method: upside(each) for method, each in shown.items()}, upside(truth)
        geometry = volume_of(truth, (z_mm, x_mm / 2, y_mm / 2), axis=case.slice_axis).geometry
    name = case.name.replace(" ", "_").replace("(", "").replace(")", "")
    write_comparison(
        folder / f"super_resolution_{name}.png",
        shown,
        truth,
        geometry,
        [len(case.truth) // 2],
        f"{case.name}: half of k-space each way, and what is made of it",
        "AI-SR is synthetic: detail beyond the measured resolution is estimated",
        truth_name="Truth",
        error_gain=5,
        panel_px=400,
    )


def _show(console: Console, results: dict[str, Any]) -> None:
    table = Table(title="within the plane, × 2: means over held-out volumes; cut-off in measured frequencies")
    for heading in ("contrast", "slices", "method", "PSNR", "SSIM", "HFEN", "cut-off", "gain on sinc (dB)"):
        table.add_column(heading)
    for row in results["summary"]:
        for method in ("sinc", "cubic", "self-taught", "network"):
            found = row[method]
            last = (
                f"{row['psnr_gain']:+.2f}, cut-off {100 * row['further']['cut_off']:+.0f} %"
                if method == "network"
                else ""
            )
            table.add_row(
                row["contrast"], str(row["slices"]), method, f"{found['psnr']:.2f}", f"{found['ssim']:.4f}",
                f"{found['hfen']:.3f}", f"{found['cut_off']:.2f}", last if method == "network" else "",
            )  # fmt: skip
    console.print(table)
    for row in results["through_plane"]:
        console.print(f"{row['name']}: {row['n_thin']} times thinner, {row['psnr_gain']:+.2f} dB on interpolation")
    for row in results["lesions"]["detectability"]:
        words = f"{row['kind']} {row['diameter_mm']:g} mm: AUC {row['input']:.3f} → {row['network']:.3f}"
        console.print(f"{words} {row['difference_95']}")
    console.print(f"false structures: {results['lesions']['false_structures']}")
    for row in results["null_tests"]:
        console.print(f"{row['name']}: {row['why'] or 'served'}; {100 * row['share']:.3g} % estimated")
    console.print(f"cost: {results['cost']}")


if __name__ == "__main__":
    main()
