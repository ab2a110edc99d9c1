"""Does the verdict find faults, and leave clean scans alone? `python -m benchmarks.trust`

Scans of subjects that no training saw are simulated, clean and with faults (`export.verdict_trials`), and judged as the
chain judges them. Reported: the area under the ROC curve of faults that raise the true error by more than 20 %, by
fault and pooled; which hard faults were caught; motion's area and how far its onset is missed; how often a clean scan
is called out or asked to be repeated; the rank correlation of the held-out-lines measure with the true error; the true
error by verdict. Real scans (`--real`) are judged as they are, at several accelerations, and with faults in their
readouts.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from threadpoolctl import threadpool_limits

from benchmarks.cases import SEED
from benchmarks.ours import REAL, run_chain, shipped_network
from benchmarks.record import make_record, write_record
from edge.header import read_header
from edge.intake import to_acquisition
from edge.rawfile import RawFile, open_raw
from edge.recon_file import readouts
from edge.undersample import undersample
from edge.verdict import Handling, Slices, verdict_of
from export.assess import Assessed, assess
from export.calibrate_quality import scores
from export.faults import INJECTED, inject
from export.roc import area, auroc, draw
from export.slices import load_slices
from export.trials import Stream
from export.verdict_trials import CLEAN, Row, make_rows, onset_errors
from recon.errors import ScanError
from recon.limits import Limits, completed
from recon.network import Network
from recon.quality import Level, Verdict
from recon.scan import Scan

HARD = ("no calibration", "not finite", "dead coil", "swapped coils", "sampling out of range")
ACCELERATIONS = ((1, 0), (2, 24), (4, 24))
DATA = REAL.parent
SPOILED = "hku_S3_FLAIR_nocage_rawEMI"
SPOILED_FAULTS = tuple(name for name in INJECTED if name not in ("swapped coils", "no calibration"))


def verdict_on(scan: Scan, assessed: Assessed, limits: Limits) -> Verdict | None:
    """Return the verdict of the chain on an assessed scan."""
    slices = Slices(dict(assessed.measures), dict(assessed.numbers))
    return verdict_of(scan, assessed.lines, Handling(Counter(assessed.left_out)), slices, limits)


def simulated(
    data: Path, network: Network, n_scans: int, n_faults: int, seed: int, share: float
) -> tuple[dict[str, Any], Any]:
    """Return what the record says of simulated scans, and the scores by fault."""
    limits = network.card.limits
    assert limits is not None

    def judge(stream: Stream, assessed: Assessed) -> tuple[str, bool]:
        verdict = verdict_on(stream.scan, assessed, limits)
        return ("none", False) if verdict is None else (verdict.level.value, verdict.advice.repeat)

    rows = list(make_rows(load_slices(data, "val", every=4), network, n_scans, n_faults, seed, judge, share))
    by_fault = scores(rows, limits)
    return tell(rows, by_fault, limits), by_fault


def tell(rows: list[Row], by_fault: Any, limits: Limits) -> dict[str, Any]:
    """Return the figures of assessed scans."""
    clean = [row for row in rows if row.fault == CLEAN]
    images = [row for row in rows if row.has_image and "held_out" in row.values]
    moved = [row for row in rows if row.fault == "motion" and row.severity > 0]
    away = onset_errors(moved)
    found = [row for row in moved if row.found is not None]
    return {
        "scans": len(clean),
        "with_faults": len(rows) - len(clean),
        "subjects": len({row.subject for row in rows}),
        "area": {name: area(*each)._asdict() for name, each in by_fault.items() if each[0]},
        "hard_faults": {
            fault: {
                "of": sum(row.fault == fault for row in rows),
                "caught": sum(row.fault == fault and _is_caught(row) for row in rows),
                "made_worse": sum(row.fault == fault and row.is_worse for row in rows),
                "caught_of_worse": sum(row.fault == fault and row.is_worse and _is_caught(row) for row in rows),
            }
            for fault in HARD
        },
        "motion_3_mm_and_more": {
            "of": len(moved),
            "made_worse": sum(row.is_worse for row in moved),
            "area": _motion_area(rows, moved),
            "area_where_worse": _motion_area(rows, [row for row in moved if row.is_worse]),
            "onset_told": len(found),
            "onset_within_5_percent": float((away <= 0.05).mean()) if len(away) else None,
            "onset_within_5_percent_by_order": {
                order: _near([row for row in found if row.setting["order"] == order])
                for order in sorted({row.setting["order"] for row in found})
            },
        },
        "clean": {
            "called_out": sum(_is_caught(row) for row in clean),
            "untrusted": sum(row.level == Level.UNTRUSTED.value for row in clean),
            "advised_to_repeat": sum(row.repeat for row in clean),
            "faulty_readouts": dict(sum((Counter(row.kinds) for row in clean), Counter())),
        },
        "spearman_held_out_with_true_error": _spearman(images, "held_out", limits),
        "spearman_expected_error_with_true_error": _spearman(images, "expected_error", limits),
        "spearman_without_motion": _spearman([row for row in images if row.fault != "motion"], "held_out", limits),
        "by_level": {
            level: {
                "scans": len(some),
                "median_error": round(float(np.median([row.error for row in some])), 4),
                "median_error_over_clean": round(float(np.median([r.error / r.clean_error for r in some])), 3),
                "worse_by_20_percent": round(float(np.mean([row.is_worse for row in some])), 3),
            }
            for level in sorted({row.level for row in rows if row.has_image})
            for some in [[row for row in rows if row.level == level and row.has_image]]
        },
    }


def _is_caught(row: Row) -> bool:
    return not row.has_image or row.level in (Level.DEGRADED.value, Level.UNTRUSTED.value)


def _motion_area(rows: list[Row], moved: list[Row]) -> float | None:
    """The area of the motion score alone, over scans in which it was taken."""
    still = [row.values["inconsistency"] for row in rows if row.fault == CLEAN and "inconsistency" in row.values]
    value = auroc([row.values["inconsistency"] for row in moved if "inconsistency" in row.values], still)
    return value if np.isfinite(value) else None


def _near(rows: list[Row]) -> float | None:
    away = onset_errors(rows)
    return float((away <= 0.05).mean()) if len(away) else None


def _spearman(rows: list[Row], measure: str, limits: Limits) -> float | None:
    if len(rows) < 10:
        return None
    values = [completed(row.values, limits)[measure] for row in rows]
    return float(stats.spearmanr(values, [row.error for row in rows]).statistic)


def real_scans(folder: Path, network: Network, accelerations: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the verdict on every file of a folder at each acceleration; a file that cannot be had so is left out."""
    out = []
    for path in sorted(folder.glob("*.h5")):
        for acceleration, acs in accelerations:
            try:
                report = run_chain(undersample(open_raw(path), acceleration, acs), network)[1]
            except ScanError:
                continue
            quality = report["quality"]
            out.append(
                {
                    "scan": path.stem,
                    "acceleration": acceleration,
                    "method": report["method"],
                    "verdict": quality["verdict"],
                    "repeat": bool(quality["advice"] and quality["advice"]["repeat"]),
                    "reasons": [f"{each['code']} {each['value']} > {each['threshold']}" for each in quality["reasons"]],
                    "judge_share": judge_share(report["stage_ms"]),
                }
            )
    return out


def judge_share(stage_ms: dict[str, float]) -> float | None:
    """Return the time that measures took over that of the reconstruction that they judge."""
    work = sum(stage_ms.get(name, 0.0) for name in ("compress", "maps", "classical", "network"))
    return round(stage_ms.get("judge", 0.0) / work, 3) if work else None


def spoiled_scans(folder: Path, network: Network, seed: int = SEED) -> dict[str, Any]:
    """Return how many real scans at R = 2 are called out with each fault in their readouts, the gravest of three."""
    limits = network.card.limits
    assert limits is not None
    out: dict[str, Any] = {}
    for path in sorted(folder.glob("*.h5")):
        if path.stem == SPOILED:
            continue
        try:
            raw = undersample(open_raw(path), 2, 24)
        except ScanError:
            continue
        scan, acquisitions = stream_of(raw)
        for number, fault in enumerate(SPOILED_FAULTS):
            if fault == "dead coil" and len(acquisitions[0].samples) == 1:
                continue
            spoiled = inject(fault, 2, list(acquisitions), np.random.default_rng([seed, number]))
            entry = out.setdefault(fault, {"of": 0, "called_out": 0, "missed": []})
            entry["of"] += 1
            try:
                verdict = verdict_on(scan, assess(scan, spoiled, network, every=4), limits)
            except ScanError:
                verdict = None
                entry["called_out"] += 1
                continue
            if verdict is not None and verdict.level is not Level.TRUSTED:
                entry["called_out"] += 1
            else:
                entry["missed"].append(path.stem)
    return out


def stream_of(raw: RawFile) -> tuple[Scan, list[Any]]:
    """Return a file's header and readouts as values."""
    scan, _ = read_header(raw.header, "trial")
    return scan, [to_acquisition(each.header, each.samples) for each in readouts(raw) if each.samples is not None]


def main(arguments: list[str] | None = None) -> int:
    """Run and write the record; 0 done, 2 where the data or the network are not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trust", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of real images and scans")
    parser.add_argument("--scans", type=int, default=120, help="simulated scans (default %(default)s)")
    parser.add_argument("--faults", type=int, default=6, help="faults of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=900, help="(default %(default)s)")
    parser.add_argument("--motion-share", type=float, default=0.0625, help="of the faults (default: as many as others)")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, default=True, help="judge real scans too")
    parser.add_argument("--json", type=Path, help="where the record goes (default: printed)")
    parser.add_argument("--png", type=Path, help="draw the curves")
    args = parser.parse_args(arguments)
    threadpool_limits(limits=1, user_api="blas")
    network = shipped_network()
    if network is None or network.card.limits is None:
        print("benchmarks.trust: there is no network with limits; export.calibrate_quality sets them", file=sys.stderr)
        return 2
    results: dict[str, Any] = {}
    try:
        results["simulated"], by_fault = simulated(
            args.data, network, args.scans, args.faults, args.seed, args.motion_share
        )
    except FileNotFoundError as error:
        print(f"benchmarks.trust: {error}", file=sys.stderr)
        return 2
    if args.png:
        curves = {name: ([s for _, s in bad], [s for _, s in good]) for name, (bad, good) in by_fault.items()}
        draw(curves, args.png, "Faults found, among simulated scans of held-out subjects that they made worse")
    if args.real and (args.data / "kspace").is_dir():
        results["real"] = real_scans(args.data / "kspace", network, ACCELERATIONS)
        results["real_spoiled_at_2"] = spoiled_scans(args.data / "kspace", network)
    settings = {"scans": args.scans, "faults": args.faults, "seed": args.seed, "motion_share": args.motion_share}
    write_record(make_record("trust", settings, results), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
