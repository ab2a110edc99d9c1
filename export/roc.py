"""How well a score tells two kinds apart: area under the curve with its interval, and curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from recon.arrays import Array

N_BOOTSTRAP = 500


class Area(NamedTuple):
    """Area under the ROC curve, its 95 % interval, and how many scans of each kind it rests on."""

    area: float
    low: float
    high: float
    n_faulty: int
    n_clean: int


def auroc(faulty: Sequence[float], clean: Sequence[float]) -> float:
    """Return how often a faulty scan scores above a clean one, ties counting half (Mann–Whitney's U); NaN for none."""
    if not len(faulty) or not len(clean):
        return float("nan")
    ranks = stats.rankdata(np.concatenate((faulty, clean)))
    n = len(faulty)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(clean)))


def area(faulty: Sequence[tuple[int, float]], clean: Sequence[tuple[int, float]], seed: int = 0) -> Area:
    """Return the area for scores with the number of the scan that each belongs to, which is drawn as a whole."""
    value = auroc([score for _, score in faulty], [score for _, score in clean])
    rng = np.random.default_rng(seed)
    scans = sorted({number for number, _ in (*faulty, *clean)})
    by_scan = {
        number: ([s for n, s in faulty if n == number], [s for n, s in clean if n == number]) for number in scans
    }
    areas = []
    for _ in range(N_BOOTSTRAP if scans else 0):
        drawn = [by_scan[scans[index]] for index in rng.integers(len(scans), size=len(scans))]
        areas.append(auroc([s for bad, _ in drawn for s in bad], [s for _, good in drawn for s in good]))
    low, high = np.nanpercentile(areas, (2.5, 97.5)) if areas else (np.nan, np.nan)
    return Area(value, float(low), float(high), len(faulty), len(clean))


def curve(faulty: Sequence[float], clean: Sequence[float]) -> tuple[Array, Array]:
    """Return false and true alarm rates, both rising, for thresholds from high to low."""
    levels = np.unique(np.concatenate((faulty, clean)))[::-1]
    false = [0.0, *((np.asarray(clean)[:, None] >= levels).mean(0) if len(clean) else np.zeros(len(levels)))]
    true = [0.0, *((np.asarray(faulty)[:, None] >= levels).mean(0) if len(faulty) else np.zeros(len(levels)))]
    return np.array(false), np.array(true)


def draw(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, title: str) -> None:
    """Draw ROC curves, by name the scores of faulty and of clean scans, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), width_ratios=(1, 1))
    for ax, limit in zip(axes, (1.0, 0.1), strict=True):
        for name, (faulty, clean) in curves.items():
            if len(faulty) and len(clean):
                label = f"{name}: {auroc(faulty, clean):.3f} ({len(faulty)})"
                ax.plot(*curve(faulty, clean), label=label, linewidth=2.5 if name == "all" else 1.2)
        ax.set_xlim(0, limit)
        ax.set_ylim(0, 1.01)
        ax.grid(alpha=0.3)
        ax.set_xlabel("false alarms among clean scans")
        ax.set_ylabel("faulty scans found")
    axes[0].legend(fontsize=7, loc="lower right", title="area (scans)")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
