"""Set the verdict's thresholds: `python -m export.calibrate_quality --data DIR --model edge/assets/reconstruction`.

Scans of training subjects are simulated, clean and with faults, and measured as the chain measures them. What is usual
in the clean ones, and from where on a measure speaks of an image that is wrong, goes into the `quality` section of the
network's card, and the curves of what was found into a picture beside it. The table of all scans may be kept, so that
thresholds can be set again without simulating anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from threadpoolctl import threadpool_limits

from export.assess import HostNetwork
from export.roc import area, draw
from export.slices import SETS, load_slices
from export.verdict_trials import CLEAN, Row, load_rows, make_rows, save_rows
from recon.judge import SAYINGS, suspicion
from recon.limits import FALSE_ALARMS, FEATURE, Limit, Limits, covariates, read_limits, with_novelty
from recon.network import read_card

PICTURE = "quality_roc.png"
MIN_ROWS = 40  # clean scans, to say what is usual in those whose noise was, or was not, measured
LEAST_DEVIATION = 3.0  # spreads; about one false alarm in 740 for a measure that is log-normal
GRAVE_SHARE = 0.95  # of the scans above a grave threshold are worse than without their fault
MIN_GRAVE = 8  # scans above it
# Of measures that are about nought in clean scans: what is smaller says nothing.
FLOORS = {"inconsistency": 3e-3, "ghost": 0.02, "disagreement": 0.01, "map_residual": 1e-4}
SHRINK = 0.05  # of the features' mean variance, added to each: few scans tell a covariance badly
LINE_SCORE = 10.0  # of a scan with a faulty readout, far above any measure


def fit(rows: list[Row]) -> dict[str, Any]:
    """Return the `limits` and `familiar` of a card's quality section, from clean scans and those with faults."""
    limits = []
    names = sorted({name for row in rows for name in row.values if name.startswith(FEATURE)})
    clean = [row for row in rows if row.fault == CLEAN and all(name in row.values for name in names)]
    features = np.array([[row.values[name] for name in names] for row in clean])
    covariance = np.cov(features, rowvar=False)
    precision = np.linalg.inv(covariance + SHRINK * np.diag(np.diag(covariance)) + 1e-9 * np.eye(len(names)))
    familiar = {"mean": _short(features.mean(0)), "precision": [_short(each) for each in precision]}
    empty = read_limits({"limits": [], "familiar": familiar})
    judged = [(row, with_novelty(row.values, empty)) for row in rows]
    for measure in SAYINGS:
        for known in (True, False):
            some = [(row, v) for row, v in judged if measure in v and (v.get("noise_known", 0) > 0.5) == known]
            found = _limit(measure, some)
            if found is not None:
                limits.append({"measure": measure, "noise_known": known, **found})
    return {"limits": limits, "familiar": familiar}


def _limit(measure: str, rows: list[tuple[Row, dict[str, float]]]) -> dict[str, Any] | None:
    clean = [v for row, v in rows if row.fault == CLEAN]
    if len(clean) < MIN_ROWS:
        return None
    design = np.array([covariates(v) for v in clean])
    floor = FLOORS.get(measure, 1e-6)
    logs = np.log(np.maximum([v[measure] for v in clean], floor))
    coefficients = np.linalg.lstsq(design, logs, rcond=None)[0]
    rest = logs - design @ coefficients
    spread = max(float(np.sqrt((rest**2).mean())), 1e-3)
    trial = Limit(tuple(coefficients), spread, 0.0, np.inf, floor)
    deviations = np.array([trial.deviation(v[measure], v) for v in clean])
    degraded = max(LEAST_DEVIATION, float(np.quantile(deviations, 1 - FALSE_ALARMS)) + 0.25)
    bad = sorted(((trial.deviation(v[measure], v), row.is_worse) for row, v in rows), reverse=True)
    untrusted = None
    share = np.cumsum([worse for _, worse in bad]) / np.arange(1, len(bad) + 1)
    for index in range(len(bad) - 1, MIN_GRAVE - 2, -1):
        if share[index] >= GRAVE_SHARE and bad[index][0] > degraded:
            untrusted = round(float(bad[index][0]), 3)
            break
    return {
        "coefficients": _short(coefficients),
        "spread": round(spread, 5),
        "degraded": round(degraded, 3),
        "untrusted": untrusted,
        "floor": floor,
    }


def _short(numbers: Any) -> list[float]:
    return [float(f"{number:.6g}") for number in numbers]


def score(row: Row, limits: Limits) -> float:
    """Return how suspicious a scan is: its measures, and far above them any fault of its readouts."""
    faulty = sum(row.kinds.values()) + row.left_out + (0 if row.has_image else 1)
    return suspicion(row.values, limits) + (LINE_SCORE if faulty else 0.0)


def scores(rows: list[Row], limits: Limits) -> dict[str, tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """Return by fault, and for "all", scores of scans that it made worse and of clean ones, with scan numbers."""
    clean = [(row.scan, score(row, limits)) for row in rows if row.fault == CLEAN]
    out = {"all": ([(row.scan, score(row, limits)) for row in rows if row.fault != CLEAN and row.is_worse], clean)}
    for fault in sorted({row.fault for row in rows} - {CLEAN}):
        out[fault] = ([(r.scan, score(r, limits)) for r in rows if r.fault == fault and r.is_worse], clean)
    return out


def summary(rows: list[Row], limits: Limits) -> dict[str, Any]:
    """Return what a card says of the run: areas with intervals, false alarms, how many scans."""
    by_fault = scores(rows, limits)
    clean = [row for row in rows if row.fault == CLEAN]
    return {
        "scans": len(clean),
        "with_faults": len(rows) - len(clean),
        "subjects": len({row.subject for row in rows}),
        "clean_called_out": sum(score(row, limits) > 1 for row in clean),
        "area": {name: area(*each)._asdict() for name, each in by_fault.items() if each[0]},
        "line_faults_in_clean": dict(sum((Counter(row.kinds) for row in clean), Counter())),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the calibration; 0 when the card was written, 2 for wrong use."""
    parser = argparse.ArgumentParser(prog="python -m export.calibrate_quality", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of real images")
    parser.add_argument("--model", type=Path, required=True, help="the model folder, whose card.json is written")
    parser.add_argument("--scans", type=int, default=240, help="simulated scans (default %(default)s)")
    parser.add_argument("--faults", type=int, default=4, help="faults of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where the table is written, as it grows")
    parser.add_argument("--table", type=Path, metavar="FILE", help="a table that was kept, in place of a simulation")
    parser.add_argument("--no-picture", action="store_true", help="draw no curves")
    args = parser.parse_args(arguments)
    card_path = args.model / "card.json"
    try:
        content = json.loads(card_path.read_text("utf-8"))
        rows = load_rows(args.table) if args.table else _simulate(args, content)
    except (OSError, ValueError) as error:
        print(f"export.calibrate_quality: {error}", file=sys.stderr)
        return 2
    if args.keep:
        save_rows(rows, args.keep)
    section = fit(rows)
    limits = read_limits(section)
    section["calibration"] = {
        "data": "simulated scans of training subjects, clean and with faults",
        "sets": sorted(SETS),
        "seed": args.seed,
        **summary(rows, limits),
    }
    content["quality"] = section
    card_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not args.no_picture:
        curves = {
            name: ([s for _, s in bad], [s for _, s in good]) for name, (bad, good) in scores(rows, limits).items()
        }
        draw(
            curves,
            args.model / PICTURE,
            "Faults found, among simulated scans of training subjects that they made worse",
        )
    print(json.dumps(section["calibration"], indent=1))
    return 0


def _simulate(args: argparse.Namespace, content: dict[str, Any]) -> list[Row]:
    slices = load_slices(args.data, "train", every=6)
    network = HostNetwork(args.model / "model.onnx", read_card({**content, "quality": None}))
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("simulated scans", total=args.scans * (1 + args.faults))
        threadpool_limits(limits=1, user_api="blas")
        for row in make_rows(slices, network, args.scans, args.faults, args.seed):
            rows.append(row)
            progress.advance(task)
            if args.keep and len(rows) % 100 == 0:
                save_rows(rows, args.keep)
    return rows


if __name__ == "__main__":
    sys.exit(main())
