"""Figures as a record keeps them: quantiles for people, and the samples behind them for `benchmarks.compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

QUANTILES = (50, 95, 99)
SAMPLES = "samples_"  # a key of this kind holds the repeats, in the unit that follows


def spread(samples: Sequence[float], unit: str = "ms") -> dict[str, Any]:
    """Return the 50th, 95th and 99th percentile, interpolated, and `samples`; null where there are none.

    Of fewer than a hundred samples the 99th percentile says little more than the largest does.
    """
    shown = [round(float(value), 4) for value in samples]
    values = np.percentile(shown, QUANTILES).round(4).tolist() if shown else [None] * len(QUANTILES)
    return {**{f"p{q}_{unit}": v for q, v in zip(QUANTILES, values, strict=True)}, f"{SAMPLES}{unit}": shown}


def new_parser(name: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Return a command line with what every benchmark takes: --quick, --json and --png."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the smallest size: to see that it works, not to quote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here rather than print it")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures here")
    return parser


def new_progress() -> Progress:
    """Return a progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def origin(record: dict[str, Any]) -> str:
    """Return one line on where a record comes from, for a chart's foot."""
    machine = record["device"]
    name = ", ".join([str(machine["cpu"]), f"{machine['cores']} cores", *machine.get("gpu", [])])
    return f"{record['at'][:16].replace('T', ' ')} UTC · commit {record['commit']} · {name}"
