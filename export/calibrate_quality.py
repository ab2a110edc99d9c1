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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy import optimize, special
from threadpoolctl import threadpool_limits

from export.assess import HostNetwork
from export.roc import area, draw
from export.slices import SETS, load_slices
from export.trials import KEY
from export.verdict_trials import CLEAN, Row, load_rows, make_rows, save_rows
from recon.arrays import Array
from recon.consistency import SliceMeasures
from recon.judge import SAYINGS, slice_reasons, suspicion
from recon.limits import FALSE_ALARMS, FEATURE, ODDS, Limit, Limits, completed, covariates, evidence, read_limits
from recon.network import read_card

PICTURE = "quality_roc.png"
MIN_ROWS = 40  # clean scans, to say what is usual in those whose noise was, or was not, measured
LEAST_DEVIATION = 3.0  # spreads; about one false alarm in 740 for a measure that is log-normal
GRAVE_SHARE = 0.95  # of the scans above a grave threshold are worse than without their fault
MIN_GRAVE = 8  # scans above it
# Of measures that are about nought in clean scans: what is smaller says nothing. No maps explain a real scan as well as
# a simulated one: a clean 16-coil brain (pulseq_brain_16ch) has a misfit of 0.1, simulated scans 0.04.
FLOORS = {
    "inconsistency": 3e-3,
    "misfit": 0.08,
    "hidden": 0.01,
    "ghost": 0.02,
    "disagreement": 0.01,
    "map_residual": 1e-4,
}
SHRINK = 0.05  # of the features' mean variance, added to each: few scans tell a covariance badly
LINE_SCORE = 50.0  # of a scan with a faulty readout, far above any odds
RIDGE = 1e-3  # on the weights of standardised evidence
MIN_SPREAD = 0.25  # real scans differ more than simulated ones
CALLED_OUT = 0.005  # of clean scans, by the odds alone


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
    judged = [(row, completed(row.values, empty)) for row in rows]
    for measure in SAYINGS:
        if measure == ODDS:
            continue
        for known in (True, False):
            some = [(row, v) for row, v in judged if measure in v and (v.get("noise_known", 0) > 0.5) == known]
            found = _limit(measure, some)
            if found is not None:
                limits.append({"measure": measure, "noise_known": known, **found})
    section: dict[str, Any] = {"limits": limits, "familiar": familiar}
    section["odds"] = _weights(rows, section)
    section["limits"] += _limits_of_odds(rows, read_limits(section))
    return section


def _weights(rows: list[Row], section: dict[str, Any]) -> dict[str, Any]:
    """Logistic regression of being worse for a fault on a slice's measures; both kinds weigh the same."""
    measures = [name for name in SAYINGS if any(each["measure"] == name for each in section["limits"])]
    n = 2 * len(measures) + 5
    limits = read_limits({**section, "odds": {"measures": measures, "weights": [0.0] * n, "error_weights": [0.0] * n}})
    chosen = [row for row in rows if row.values and not _has_line_fault(row) and (row.fault == CLEAN or row.is_worse)]
    matrix = np.array([evidence(completed(row.values, limits), limits) for row in chosen])
    is_bad = np.array([row.fault != CLEAN for row in chosen], float)
    spread = matrix.std(axis=0)
    spread[spread < 1e-9] = 1.0
    share = np.where(is_bad > 0, 0.5 / max(is_bad.sum(), 1), 0.5 / max((1 - is_bad).sum(), 1))

    def loss(weights: Array) -> tuple[float, Array]:
        odds = (matrix / spread) @ weights
        value = float((share * (np.logaddexp(0, odds) - is_bad * odds)).sum() + RIDGE * (weights**2).sum())
        return value, (matrix / spread).T @ (share * (special.expit(odds) - is_bad)) + 2 * RIDGE * weights

    found = optimize.minimize(loss, np.zeros(n), jac=True, method="L-BFGS-B").x
    # and how wrong an image is: its relative error, by least squares of the logarithm, over all scans with an image
    seen = [row for row in rows if row.values and row.has_image]
    evidences = np.array([evidence(completed(row.values, limits), limits) for row in seen])
    logs = np.log([max(row.error, 1e-4) for row in seen])
    square = evidences.T @ evidences / len(seen) + RIDGE * np.diag(spread**2)
    error = np.linalg.solve(square, evidences.T @ logs / len(seen))
    return {"measures": measures, "weights": _short(found / spread), "error_weights": _short(error)}


def _limits_of_odds(rows: list[Row], limits: Limits) -> list[dict[str, Any]]:
    """The odds, in the logarithm, from where on a scan is called out."""
    clean = [suspicion(row.values, limits) for row in rows if row.values and row.fault == CLEAN]
    degraded = float(np.quantile(clean, 1 - CALLED_OUT))
    common = {"measure": ODDS, "coefficients": [0.0, 0.0, 0.0], "spread": 1.0, "degraded": round(degraded, 3)}
    common |= {"untrusted": None, "floor": 1e-9}  # what no measure alone finds grave is not
    return [{**common, "noise_known": known} for known in (True, False)]


def _has_line_fault(row: Row) -> bool:
    return bool(row.kinds) or row.left_out > 0 or not row.has_image


def _grave(sorted_rows: list[tuple[float, bool]], least: float) -> float | None:
    """The lowest value above `least` at and above which nearly all scans are worse, given in falling order."""
    share = np.cumsum([worse for _, worse in sorted_rows]) / np.arange(1, len(sorted_rows) + 1)
    for index in range(len(sorted_rows) - 1, MIN_GRAVE - 2, -1):
        if share[index] >= GRAVE_SHARE and sorted_rows[index][0] > least:
            return round(float(sorted_rows[index][0]), 3)
    return None


def _limit(measure: str, rows: list[tuple[Row, dict[str, float]]]) -> dict[str, Any] | None:
    clean = [v for row, v in rows if row.fault == CLEAN]
    if len(clean) < MIN_ROWS:
        return None
    design = np.array([covariates(v) for v in clean])
    floor = FLOORS.get(measure, 1e-6)
    logs = np.log(np.maximum([v[measure] for v in clean], floor))
    coefficients = np.linalg.lstsq(design, logs, rcond=None)[0]
    rest = logs - design @ coefficients
    spread = max(float(np.sqrt((rest**2).mean())), MIN_SPREAD)
    trial = Limit(tuple(coefficients), spread, 0.0, np.inf, floor)
    deviations = np.array([trial.deviation(v[measure], v) for v in clean])
    degraded = max(LEAST_DEVIATION, float(np.quantile(deviations, 1 - FALSE_ALARMS)) + 0.25)
    bad = sorted(((trial.deviation(v[measure], v), row.is_worse) for row, v in rows), reverse=True)
    return {
        "coefficients": _short(coefficients),
        "spread": round(spread, 5),
        "degraded": round(degraded, 3),
        "untrusted": _grave(bad, max(degraded, float(deviations.max()))),
        "floor": floor,
    }


def _short(numbers: Any) -> list[float]:
    return [float(f"{number:.6g}") for number in numbers]


def score(row: Row, limits: Limits) -> float:
    """Return how suspicious a scan is: the odds by its measures, and far above them any fault of its readouts."""
    return suspicion(row.values, limits) + (LINE_SCORE if _has_line_fault(row) else 0.0)


def scores(rows: list[Row], limits: Limits) -> dict[str, tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """Return by fault, and for "all", scores of scans that it made worse and of clean ones, with scan numbers."""
    clean = [(row.scan, score(row, limits)) for row in rows if row.fault == CLEAN]
    out = {"all": ([(row.scan, score(row, limits)) for row in rows if row.fault != CLEAN and row.is_worse], clean)}
    for fault in sorted({row.fault for row in rows} - {CLEAN}):
        out[fault] = ([(r.scan, score(r, limits)) for r in rows if r.fault == fault and r.is_worse], clean)
    return out


def is_called_out(values: Mapping[str, float], limits: Limits) -> bool:
    """Return whether a slice of these measures is anything but clean."""
    return bool(slice_reasons({KEY: SliceMeasures(values, None, None)}, limits, {KEY: np.zeros(0, int)}))


def summary(rows: list[Row], limits: Limits) -> dict[str, Any]:
    """Return what a card says of the run: areas with intervals, false alarms, how many scans."""
    by_fault = scores(rows, limits)
    clean = [row for row in rows if row.fault == CLEAN]
    return {
        "scans": len(clean),
        "with_faults": len(rows) - len(clean),
        "subjects": len({row.subject for row in rows}),
        "clean_called_out": sum(_has_line_fault(row) or is_called_out(row.values, limits) for row in clean),
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
