"""What is triage worth? `python -m benchmarks.triage`: a record and pictures, with whatever networks are there.

Held-out scores of each network (its card's), conformal coverage, real patients and volumes through the whole of triage,
foreign and spoiled input, wrong labels, simulated scans through reconstruction at several R and SNR, measurements
against the truth, minutes saved and added in a reading queue, and what it costs. Simulated findings say so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chart import Bars, Curves, Segment, write_chart
from benchmarks.figures import new_parser, new_progress, origin
from benchmarks.queue_harm import check, table
from benchmarks.record import make_record, write_record
from benchmarks.triage_cases import Runs
from benchmarks.triage_held_out import coverage, held_out_figures
from benchmarks.triage_scans import ACCELERATIONS, SNRS
from edge.triage_models import TRIAGE, open_tools

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PARTS = (
    "held_out",
    "coverage",
    "patients",
    "false_alarms",
    "foreign",
    "labels",
    "scans",
    "measurements",
    "queue",
    "cost",
)


def main() -> None:
    """Run what the command line asks for."""
    parser = new_parser("triage", __doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="the real data (%(default)s)")
    parser.add_argument("--models", type=Path, default=TRIAGE, metavar="DIR", help="networks (the package's)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="cases of a kind at most, evenly chosen")
    parser.add_argument("--cases", type=Path, metavar="FILE", help="measured heads so far, to go on from")
    parser.add_argument("--scanned", type=Path, metavar="FILE", help="scans so far, to go on from")
    parser.add_argument(
        "--accelerations", type=int, nargs="+", default=list(ACCELERATIONS), metavar="R", help="of scans"
    )
    parser.add_argument("--snrs", type=float, nargs="+", default=list(SNRS), metavar="SNR", help="of scans")
    args = parser.parse_args()
    limit = 2 if args.quick else args.limit
    tools, problems = open_tools(args.models)
    runs = Runs(
        tools, args.data, limit, args.quick, args.cases, tuple(args.accelerations), tuple(args.snrs), args.scanned
    )
    work: dict[str, Callable[[], Any]] = {
        "held_out": lambda: held_out_figures(tools.models),
        "coverage": lambda: coverage(tools.models, 10 if args.quick else 200),
        "patients": runs.patients,
        "false_alarms": runs.false_alarms,
        "foreign": runs.foreign,
        "labels": runs.labels,
        "scans": runs.scans,
        "measurements": runs.measurements,
        "queue": lambda: queue(tools.models, 20_000 if args.quick else 500_000),
        "cost": runs.cost,
    }
    results: dict[str, Any] = {"networks": [model.name for model in tools.models], "problems": list(problems)}
    with new_progress() as progress:
        for part in progress.track([each for each in PARTS if each in args.parts], description="triage"):
            results[part] = work[part]()
    record = make_record("triage", {"parts": args.parts, "limit": limit, "quick": args.quick}, results)
    write_record(record, args.json)
    if args.png is not None:
        write_chart(args.png, "Triage", panels(results), "simulated where it says so", origin(record))


def queue(models: Any, n_exams: int) -> dict[str, Any]:
    """Return the queue table for the networks' own operating points and for 0.9/0.9, and how simulation agrees."""
    points = {"0.9/0.9": (0.9, 0.9)}
    for key, each in held_out_figures(models).items():
        if each["exam"] and each["exam"]["sensitivity"]["n"] and each["exam"]["specificity"]["n"]:
            points[key] = (each["exam"]["sensitivity"]["value"], each["exam"]["specificity"]["value"])
    return {"table": table((0.02, 0.05, 0.1), (0.5, 0.8, 0.95), points), "simulation": check(n_exams)}


def panels(results: dict[str, Any]) -> list[Any]:
    """Return what can be drawn of the results."""
    out: list[Any] = []
    curves = {
        f"{key} ({each['evidence']})": [(p, f) for p, f, _ in each["calibration"]]
        for key, each in results.get("held_out", {}).items()
        if each["calibration"]
    }
    if curves:
        diagonal = {"as it should be": [(0.0, 0.0), (1.0, 1.0)]}
        title = "Calibration of held-out cases"
        out.append(Curves(title, {**diagonal, **curves}, "probability", "share with the finding", False, False))
    sizes = [
        (f"{key}, {each['mm2']} mm²", [Segment("sensitivity", 0, each["value"])], f"{each['hits']} of {each['n']}")
        for key, of in results.get("held_out", {}).items()
        for each in of["by_area"]
        if each["n"]
    ]
    if sizes:
        rows = [(name, bar) for name, bar, _ in sizes]
        out.append(Bars("Sensitivity by the finding's area", rows, "", [note for *_, note in sizes], legend=False))
    found = results.get("foreign", {}).get("by_kind", {})
    if found:
        states = ("not assessed", "flagged", "not flagged")
        rows = [(kind, _shares([(state, of[state]) for state in states])) for kind, of in found.items()]
        out.append(Bars("Foreign and spoiled input", rows, "share", names=states))
    table_rows = results.get("queue", {}).get("table", [])
    desks = [each for each in table_rows if (each["prevalence"], each["load"]) == (0.1, 0.8)]
    if desks:
        groups = {"with the finding": "diseased", "without it": "without", "missed": "missed"}
        bars = [
            (f"{each['operating_point']}, {group}", [Segment(group, 0, each[name])])
            for each in desks
            for group, name in groups.items()
        ]
        title = f"Minutes until reading, load 0.8, 10 % with the finding; first come: {desks[0]['first_come']:.0f}"
        out.append(Bars(title, bars, "min", names=tuple(groups)))
    return out or [Curves("Nothing was measured", {}, "", "")]


def _shares(parts: list[tuple[str, float]]) -> list[Segment]:
    pieces, at = [], 0.0
    for name, length in parts:
        if length > 0:
            pieces.append(Segment(name, at, float(length)))
            at += float(length)
    return pieces


if __name__ == "__main__":
    main()
