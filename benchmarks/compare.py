"""Did it get faster? Compares two records of one benchmark, figure by figure, with a verdict that respects noise.

A figure with its repeats in the record is decided by the ratio of the medians, B / A, and a bootstrap interval of it:
"faster" or "slower" only where the whole interval lies beyond --least per cent, else "no difference seen". Fewer than
five repeats on a side, or a figure that is one number, give no verdict. Records of another device, or made with other
settings, are not comparable, and the reason is said. Repeats of one run share its minute: what a noisy neighbour does
to all of them no interval can know, so measure A and B in turns where a small difference matters.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from benchmarks.chart import Bars, Segment, write_chart
from benchmarks.figures import SAMPLES

FASTER, SLOWER, SAME, INCOMPARABLE = "faster", "slower", "no difference seen", "not comparable"
MORE, LESS, ONE, FEW = "more", "less", "one number each: no verdict", "too few repeats: no verdict"
MIN_REPEATS = 5
_DRAWS = 4000
_WIDEST = 3.0  # in the picture
_NAMES = ("case", "part", "method", "scan", "pattern", "peer", "scanners", "value", "series", "slice", "seed")
_SUMMARIES = ("p50_", "p95_", "p99_", "median_", "least_", "min_")
_EXAMPLE = "example"  # keys of one run's details, drawn but not compared
_STYLES = {FASTER: "green", SLOWER: "red", INCOMPARABLE: "yellow"}
_EPILOG = """examples:
  python -m benchmarks.compare before.json after.json
  python -m benchmarks.compare --fail-on-slower benchmarks/results/latency.json new.json

Exit code 0; 1 with --fail-on-slower where a figure is slower; 2 where a file is no record."""


class Figure(NamedTuple):
    """A number of a record: its repeats where the record keeps them, and their unit ("" where unknown)."""

    value: float
    samples: tuple[float, ...] = ()
    unit: str = ""


class Row(NamedTuple):
    """A figure in both records: B / A with its interval, None where there is none, the verdict, and why."""

    name: str
    a: float | None
    b: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: str
    why: str = ""


def main() -> None:
    """Compare the two records of the command line; print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="the record before")
    parser.add_argument("b", type=Path, metavar="B.json", help="the record after")
    parser.add_argument("--least", type=float, default=2.0, metavar="%", help="what counts at all (%(default)g)")
    parser.add_argument("--confidence", type=float, default=99.0, metavar="%", help="of the interval (%(default)g)")
    parser.add_argument("--fail-on-slower", action="store_true", help="exit code 1 where a figure is slower")
    parser.add_argument("--all", action="store_true", help="show figures without a verdict too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the ratios and their intervals here")
    args = parser.parse_args()
    if not 50 <= args.confidence < 100 or args.least < 0:
        parser.error("--confidence from 50 to below 100 and --least from 0 are needed")
    a, b = (read(parser, path) for path in (args.a, args.b))
    rows = list(compare(a, b, args.least, args.confidence))
    _show(rows, a, b, args.all)
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", "utf-8")
    if args.png:
        draw(rows, f"{args.b.name} / {args.a.name}", args.png)
    if args.fail_on_slower and any(row.verdict == SLOWER for row in rows):
        raise SystemExit(1)


def read(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Return a record; ends the program where the file holds none."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{path} cannot be read as a record: {error}")
    if not isinstance(record, dict) or not {"benchmark", "device", "settings", "results"} <= set(record):
        parser.error(f"{path} is no record: benchmark, device, settings and results are needed")
    return record


def compare(a: Mapping[str, Any], b: Mapping[str, Any], least: float = 2.0, confidence: float = 99.0) -> Iterator[Row]:
    """Yield a row for each figure of either record, in the order of `a`. least, confidence: in per cent."""
    why = difference(a, b)
    left, right = figures(a["results"]), figures(b["results"])
    for name in track(dict.fromkeys((*left, *right)), "figures", console=Console(stderr=True), transient=True):
        one, two = left.get(name), right.get(name)
        if one is None or two is None:
            missing = why or f"record {'B' if two is None else 'A'} lacks it"
            yield Row(name, one and one.value, two and two.value, None, None, INCOMPARABLE, missing)
        elif why:
            yield Row(name, one.value, two.value, None, None, INCOMPARABLE, why)
        else:
            yield _judge(name, one, two, least, confidence)


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return why two records as a whole cannot be compared, "" where they can."""
    if a["benchmark"] != b["benchmark"]:
        return f"another benchmark: {a['benchmark']}, {b['benchmark']}"
    for part, what in (("device", "another device"), ("settings", "other settings")):
        keys = [key for key in dict.fromkeys((*a[part], *b[part])) if a[part].get(key) != b[part].get(key)]
        if keys:
            first = keys[0]
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            return f"{what}: {first} {a[part].get(first)} in A, {b[part].get(first)} in B{more}"
    return ""


def figures(results: Any, path: str = "") -> dict[str, Figure]:
    """Return every number of a record's results by its path; repeats and their quantiles become one figure."""
    found: dict[str, Figure] = {}
    if isinstance(results, dict):
        sampled = [key for key in results if key.startswith(SAMPLES)]
        for key in sampled:
            unit = key.removeprefix(SAMPLES)
            if results[key]:
                name = f"{path} [{unit}]"
                found[name] = Figure(float(np.median(results[key])), tuple(map(float, results[key])), unit)
        label = _label(results)
        named = {key for key in _NAMES if label and path.endswith(label) and isinstance(results.get(key), (str, int))}
        for key, value in results.items():
            is_summary = sampled and (key.startswith(_SUMMARIES) or key == "repeats")
            if not is_summary and key not in (*sampled, *named) and not key.startswith(_EXAMPLE):
                found |= figures(value, f"{path} / {key}" if path else key)
    elif isinstance(results, list):
        for number, each in enumerate(results):
            label = _label(each) or str(number)
            found |= figures(each, f"{path} / {label}" if path else label)
    elif isinstance(results, (int, float)) and not isinstance(results, bool):
        found[path] = Figure(float(results))
    return found


def _label(row: Any) -> str:
    """Return what tells a row from the others of its list, "" where nothing does."""
    names = [f"{row[key]}" for key in _NAMES if isinstance(row.get(key), (str, int))] if isinstance(row, dict) else []
    return ", ".join(names)


def _judge(name: str, a: Figure, b: Figure, least: float, confidence: float) -> Row:
    ratio = b.value / a.value if a.value else None
    if not a.samples or not b.samples:
        return Row(name, a.value, b.value, ratio, None, ONE)
    if min(len(a.samples), len(b.samples)) < MIN_REPEATS or not (ratio and min(a.samples) > 0 and min(b.samples) > 0):
        return Row(name, a.value, b.value, ratio, None, FEW)
    low, high = bootstrap(a.samples, b.samples, confidence)
    interval = (round(low, 4), round(high, 4))
    less, more = (FASTER, SLOWER) if a.unit in ("ms", "s") else (LESS, MORE)
    if a.unit.endswith(("per_s", "per_h")):
        less, more = SLOWER, FASTER
    verdict = SAME
    if high < 1 - least / 100:
        verdict = less
    elif low > 1 + least / 100:
        verdict = more
    return Row(name, a.value, b.value, ratio, interval, verdict)


def bootstrap(a: Sequence[float], b: Sequence[float], confidence: float, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of median(b) / median(a) when both are drawn again with replacement.

    Source: Efron, Annals of Statistics 7:1 (1979). The same samples always give the same interval.
    """
    rng = np.random.default_rng(seed)
    one, two = (np.asarray(each, float) for each in (a, b))
    medians = [np.median(each[rng.integers(len(each), size=(_DRAWS, len(each)))], axis=1) for each in (one, two)]
    tail = (100 - confidence) / 2
    low, high = np.percentile(medians[1] / medians[0], [tail, 100 - tail])
    return float(low), float(high)


def _show(rows: Sequence[Row], a: Mapping[str, Any], b: Mapping[str, Any], everything: bool) -> None:
    console = Console(width=150)
    reason = difference(a, b)
    if reason:
        console.print(f"[yellow]{INCOMPARABLE}[/]: {reason}", highlight=False)
    table = Table(title=f"{a['benchmark']}: A {a['commit']} ({a['at'][:16]}), B {b['commit']} ({b['at'][:16]})")
    for heading in ("figure", "A", "B", "B / A", "interval", "verdict"):
        table.add_column(heading, overflow="fold")
    shown = [row for row in rows if everything or row.interval is not None or (row.why and row.why != reason)]
    for row in shown:
        numbers = ["" if v is None else f"{v:.4g}" for v in (row.a, row.b, row.ratio)]
        interval = "" if row.interval is None else f"{row.interval[0]:.3f} … {row.interval[1]:.3f}"
        style = _STYLES.get(row.verdict, "dim")
        table.add_row(
            escape(row.name), *numbers, interval, f"[{style}]{row.verdict}[/]{': ' + row.why if row.why else ''}"
        )
    if shown:
        console.print(table)
    counts = Counter(row.verdict for row in rows)
    console.print("; ".join(f"{n} {verdict}" for verdict, n in counts.most_common()) or "no figures", highlight=False)


def draw(rows: Sequence[Row], title: str, path: Path, most: int = 40) -> None:
    """Draw the intervals of B / A, the ones farthest from 1 first, at most `most` of them."""
    decided = [(row, row.interval) for row in rows if row.interval is not None]
    decided.sort(key=lambda pair: -abs(np.log(pair[0].ratio or 1.0)))
    ends = [(row, min(low, _WIDEST), min(high, _WIDEST)) for row, (low, high) in decided[:most]]
    bars = [(row.name[-70:], [Segment(row.verdict, low, high - low)]) for row, low, high in ends]
    notes = [f"{row.ratio:.3f} {row.verdict}" for row, _ in decided[:most]]
    names = [SAME, MORE, FASTER, SLOWER, LESS]  # whose colours are blue, amber, green, red, violet
    panel = Bars("Ratio of the medians and its interval", bars, "B / A", notes, names=names, bar=16)
    hidden = f"{len(decided) - most} more are in the table" if len(decided) > most else ""
    write_chart(path, title, [panel], hidden, f"Left of 1 is less; intervals are drawn up to {_WIDEST:g}")


if __name__ == "__main__":
    main()
