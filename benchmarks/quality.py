"""How good is the learned reconstruction, next to ours without it, to zero-filling and to BART and SigPy at their best?

`python -m benchmarks.quality` drops lines of every fully sampled real scan in a data folder, and of simulated scans of
subjects that no training saw, and reconstructs what is left with each method. Ours run through the chain that serves a
scanner; the peers get the strength of their regularisation chosen with the reference, by PSNR, which no one without a
reference could.

Real scans are scored against the root-sum-of-squares of all their lines, noise included; simulated ones against their
noise-free image. The simulated ones come from the generator that training samples come from: other heads, but the same
physics. Real scans are the sterner test.

On a busy machine OMP_NUM_THREADS=1 keeps BART's threads from waiting for each other; the figures stay the same.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.bart import L2, WAVELET, best_sense, best_wavelet
from benchmarks.cases import SEED, Case, head_case, held_out, real_case, root_sum_of_squares, subject_case
from benchmarks.ours import REAL, kspaces, reconstruct, shipped_network
from benchmarks.record import make_record, write_record
from benchmarks.scores import compare, head_mask, hfen, matched, retention
from edge.comparison import write_comparison
from edge.undersample import undersample
from recon.arrays import Array
from recon.fourier import to_image
from recon.network import Network

QUICK = "iraki_prescan_16ch"
SIGPY = (0.0003, 0.001, 0.003, 0.01, 0.03)  # for images whose peak is 1
METHODS = ("zero-filled", "BART l2", "BART wavelet", "SigPy wavelet", "classical", "network")
GOODNESS: dict[str, Callable[[float], float]] = {  # more is better
    "psnr": lambda value: value,
    "ssim": lambda value: value,
    "nmse": lambda value: -value,
    "hfen": lambda value: -value,
    "retention": lambda value: -abs(1 - value),
}
PEERS = {"BART best": ("BART l2", "BART wavelet"), "classical": ("classical",), "zero-filled": ("zero-filled",)}
PAIRS = (
    ("network", "BART best"),
    ("network", "classical"),
    ("network", "zero-filled"),
    ("classical", "BART best"),
    ("classical", "zero-filled"),
)


class Made(NamedTuple):
    """One method's volume, float32 (slice, y, x), and the setting that it took."""

    volume: Array
    setting: str


def main() -> None:
    """Run the comparison; print tables and one JSON record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=REAL.parent, help="holds kspace/*.h5 and the held-out images")
    parser.add_argument("--accelerations", type=_numbers, default=(2, 4, 6, 8), metavar="R,…", help="(2,4,6,8)")
    parser.add_argument("--acs", type=_numbers, default=(24,), metavar="N,…", help="calibration lines (24)")
    parser.add_argument("--subjects", type=int, default=12, metavar="N", help="simulated ones (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these scans: file stems, simulated_00 and so on")
    parser.add_argument("--sigpy", action="store_true", help="with SigPy's L1WaveletRecon, which is slow")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw each scan's comparison here")
    parser.add_argument(
        "--json", "--out", dest="out", type=Path, metavar="FILE", help="write the record here rather than print it"
    )
    parser.add_argument("--quick", action="store_true", help="one small scan at the first acceleration")
    args = parser.parse_args()
    network = shipped_network()
    patterns = [(acceleration, acs) for acs in args.acs for acceleration in args.accelerations]
    if args.quick:
        patterns = patterns[:1]
    console = Console(stderr=True, width=170)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        try:
            loaders = _quick(args.data, Path(folder)) if args.quick else _all(args.data, args.subjects, Path(folder))
        except FileNotFoundError as error:
            parser.error(f"{error}; --subjects 0 does without")
        if not loaders:
            parser.error(f"{args.data / 'kspace'} holds no .h5 file, and no subject was asked for")
        if args.only:
            if unknown := set(args.only) - set(loaders):
                parser.error(f"--only {' '.join(sorted(unknown))}: one of {', '.join(loaders)} is right")
            loaders = {name: loaders[name] for name in args.only}
        task = progress.add_task("scans", total=len(loaders) * len(patterns))
        scans, rows = [], []
        for load in loaders.values():
            case = load()
            scans.append({"scan": case.name, **case.about})
            for pattern in patterns:
                progress.update(task, description=f"{case.name} R = {pattern[0]}, {pattern[1]} lines")
                rows += measure(case, *pattern, network, args.sigpy, args.pictures)
                progress.advance(task)
    compared = compare_pairs(rows)
    results = {
        "scans": scans,
        "rows": rows,
        "gains": gains(compared),
        "worse": [each for each in compared if each["gain"] < 0],
        "left_out": [method for method in METHODS if not any(row["method"] == method for row in rows)],
    }
    _show(console, results)
    settings = {
        "accelerations": [acceleration for acceleration, _ in patterns],
        "acs": sorted({acs for _, acs in patterns}),
        "quick": args.quick,
        "bart": {"l2": L2, "wavelet": WAVELET, "chosen by": "PSNR against the reference"},
        "sigpy": SIGPY if args.sigpy else None,
        "seed": SEED,
        "gain": "ours less the peer's, below 0: worse; NMSE and HFEN are negated, retention counts as -|1 - retention|",
        "BART best": "the better of l2 and wavelet, in each measure on its own",
    }
    write_record(make_record("quality", settings, results), args.out)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _quick(data: Path, folder: Path) -> dict[str, Callable[[], Case]]:
    path = data / "kspace" / f"{QUICK}.h5"
    return {QUICK: partial(real_case, path)} if path.is_file() else {"simulated_head": partial(head_case, folder)}


def _all(data: Path, n_subjects: int, folder: Path) -> dict[str, Callable[[], Case]]:
    """Return what loads each scan, by name."""
    loaders: dict[str, Callable[[], Case]] = {
        path.stem: partial(real_case, path) for path in sorted((data / "kspace").glob("*.h5"))
    }
    for number, source in enumerate(held_out(data, n_subjects) if n_subjects else []):
        loaders[f"simulated_{number:02}"] = partial(subject_case, source, number, folder)
    return loaders


def measure(
    case: Case,
    acceleration: int,
    acs: int,
    network: Network | None,
    with_sigpy: bool = False,
    pictures: Path | None = None,
) -> list[dict[str, Any]]:
    """Return the scores of each method on a case with lines dropped, and draw them into the folder `pictures`."""
    raw = undersample(case.raw, acceleration, acs)
    volumes = reconstruct(raw, network)[0]
    kspace = kspaces(raw)[0]
    mask = head_mask(case.reference)

    def closeness(volume: Array) -> float:
        return compare(case.reference, volume, mask).psnr

    made = {"zero-filled": Made(root_sum_of_squares(to_image(kspace, axes=(2, 3)), 1), "root-sum-of-squares")}
    for method, best in {"BART l2": best_sense, "BART wavelet": best_wavelet}.items():
        volume, strength, _ = best(kspace, acs, closeness)
        made[method] = Made(volume, f"{strength:g}")
    if with_sigpy:
        made["SigPy wavelet"] = best_sigpy(kspace, acs, closeness)
    for series, ours in volumes.items():
        made[series] = Made(ours.data, f"{ours.provenance.method} {ours.provenance.model_sha256[:12]}".strip())
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        write_comparison(
            pictures / f"{case.name}_R{acceleration}_acs{acs}.png",
            {
                method: matched(case.reference, made[method].volume, mask).astype(np.float32)
                for method in METHODS
                if method in made
            },
            case.reference.astype(np.float32),
            volumes["classical"].geometry,
            [len(case.reference) // 2],
            f"{case.name}, R = {acceleration}, {acs} calibration lines",
            "Reference: " + ("noise-free" if case.about["kind"] == "simulated" else "root-sum-of-squares of all lines"),
            truth_name="Reference",
            error_gain=5,
            panel_px=280,
        )
    pattern = {"scan": case.name, "kind": case.about["kind"], "acceleration": acceleration, "acs": acs}
    return [
        {**pattern, "method": method, "setting": each.setting, **judge(case, each.volume, mask)}
        for method, each in made.items()
    ]


def judge(case: Case, volume: Array, mask: Array) -> dict[str, float | None]:
    """Return all scores of a volume (slice, y, x); `mask` is the head's."""
    scores = compare(case.reference, volume, mask)
    kept = None if case.structures is None else retention(case.reference, volume, case.structures)
    return {
        "psnr": round(scores.psnr, 3),
        "ssim": round(scores.ssim, 5),
        "nmse": round(scores.nmse, 6),
        "hfen": round(hfen(case.reference, volume, mask), 5),
        "retention": None if kept is None else round(kept, 4),
    }


def best_sigpy(kspace: Array, acs: int, score: Callable[[Array], float]) -> Made:
    """Return SigPy's l1-wavelet reconstruction of (slice, coil, ky, kx) at the strength of best `score`."""
    from sigpy.mri.app import EspiritCalib, L1WaveletRecon

    scaled = kspace / root_sum_of_squares(to_image(kspace, axes=(2, 3)), 1).max()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SigPy's own making
        maps = [EspiritCalib(plane, calib_width=acs, show_pbar=False).run() for plane in scaled]
        made = {
            strength: np.abs(
                [L1WaveletRecon(*each, strength, show_pbar=False).run() for each in zip(scaled, maps, strict=True)]
            ).astype(np.float32)
            for strength in SIGPY
        }
    best = max(made, key=lambda strength: score(made[strength]))
    return Made(made[best], f"{best:g}")


def compare_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each scan, pattern, pair of `PAIRS` and measure both values and the gain: below 0 ours is worse.

    A peer that is the best of several is so in each measure on its own.
    """
    out = []
    keys = ("scan", "kind", "acceleration", "acs")
    for scan, several in groupby(rows, itemgetter(*keys)):
        methods = {row["method"]: row for row in several}
        for ours, peer in PAIRS:
            if ours not in methods:
                continue
            for name, goodness in GOODNESS.items():
                value = methods[ours][name]
                if value is None:
                    continue
                theirs = max((methods[each][name] for each in PEERS[peer]), key=goodness)
                gain = round(goodness(value) - goodness(theirs), 6)
                words = {"ours": ours, "peer": peer, "measure": name, "value": value, "peer_value": theirs}
                out.append({**dict(zip(keys, scan, strict=True)), **words, "gain": gain})
    return out


def gains(compared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean gain of each kind of scan, pattern, pair and measure, and in how many scans ours is worse.

    For simulated subjects, two or more, with the 95 % interval of their mean (bootstrap over subjects).
    """
    keys = ("ours", "peer", "kind", "acceleration", "acs", "measure")
    grouped: dict[tuple[Any, ...], list[float]] = {}
    for each in compared:
        grouped.setdefault(tuple(each[key] for key in keys), []).append(each["gain"])
    out = []
    for group, found in sorted(grouped.items(), key=lambda item: (PAIRS.index(item[0][:2]), item[0][2:5])):
        row = {**dict(zip(keys, group, strict=True)), "n": len(found), "n_worse": sum(gain < 0 for gain in found)}
        row["mean_gain"] = round(float(np.mean(found)), 5)
        if row["kind"] == "simulated" and len(found) > 1:
            row["interval_95"] = interval(np.asarray(found))
        out.append(row)
    return out


def interval(values: Array) -> list[float]:
    """Return the 95 % percentile interval of the mean of `values` (n), by 10 000 bootstrap samples."""
    drawn = np.random.default_rng(SEED).choice(values, (10_000, len(values))).mean(1)
    return [round(float(end), 5) for end in np.percentile(drawn, [2.5, 97.5])]


def _show(console: Console, results: dict[str, Any]) -> None:
    methods = [method for method in METHODS if method not in results["left_out"]]
    table = Table(title="PSNR (dB) · SSIM · HFEN · retention of small structures; green: the best PSNR")
    for heading in ("scan", "R", "lines", *methods):
        table.add_column(heading)
    for (scan, *pattern), several in groupby(results["rows"], itemgetter("scan", "acceleration", "acs")):
        found = {row["method"]: row for row in several}
        best = max(row["psnr"] for row in found.values())
        cells = (_cell(found[method], best) if method in found else "" for method in methods)
        table.add_row(scan, *map(str, pattern), *cells)
    console.print(table)
    table = Table(
        title="mean gain, below 0: worse; in how many scans ours is worse (95 % interval of the mean)", show_lines=True
    )
    for heading in ("ours", "peer", "scans", "R", "lines", *GOODNESS):
        table.add_column(heading)
    for group, several in groupby(results["gains"], itemgetter("ours", "peer", "kind", "acceleration", "acs")):
        by_measure = {row["measure"]: _gain_cell(row) for row in several}
        table.add_row(*map(str, group), *(by_measure.get(name, "") for name in GOODNESS))
    console.print(table)
    if "network" in results["left_out"]:
        console.print("The chain gave no series of a network: it is left out above.")


def _cell(row: dict[str, Any], best: float) -> str:
    words = f"{row['psnr']:.2f} {row['ssim']:.3f} {row['hfen']:.2f}"
    words += "" if row["retention"] is None else f" {row['retention']:.2f}"
    return f"[green]{words}[/]" if row["psnr"] == best else words


def _gain_cell(row: dict[str, Any]) -> str:
    words = [f"{row['mean_gain']:+.3g}, {row['n_worse']} of {row['n']}"]
    words += ["({:+.2g} … {:+.2g})".format(*row["interval_95"])] if "interval_95" in row else []
    return ("[red]{}[/]" if row["mean_gain"] < 0 else "{}").format("\n".join(words))


if __name__ == "__main__":
    if not shutil.which("bart"):
        raise SystemExit("benchmarks.quality needs the Debian package bart")
    main()
