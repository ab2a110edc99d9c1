"""Fit how measurements scatter: `python -m export.measurements` writes what `triage.measure` reads.

Simulated heads with known midline shift and ventricles are measured on every contrast, at several noise levels and cut
in several ways. A raw number is scaled so that it has no bias, and its interval is the conformal one of these heads:
it holds the truth of 95 in 100 like them. `python -m benchmarks.triage` checks that on heads that this fit never saw.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track
from threadpoolctl import threadpool_limits

from export.heads import Drawn, Layout, Swelling, draw, fluid_atlas, lateral_ventricles, load_anatomy, shifted
from recon.arrays import Array
from recon.head import Anatomy, make_head
from recon.lesions import place_lesion
from triage.brain import brain_masks
from triage.measure import INDEX, SHIFT, VOLUME, Spread
from triage.midline import find_midline
from triage.preprocess import prepare
from triage.ventricles import FluidAtlas, find_ventricles

CONTRASTS = {"t1": "t1", "t2": "t2", "flair": "flair", "dwi": "dwi", "t2star": "swi"}  # simulated: what triage calls it
ASSETS = Path(__file__).resolve().parents[1] / "edge" / "assets" / "triage"
FLOORS = {SHIFT: 0.5, VOLUME: 1.0, INDEX: 0.01}  # of a spread, in the measurement's unit
COVERAGE = 0.95
MOST_SHIFT_MM = 24.0
SNR = (12.0, 45.0)


class Case(NamedTuple):
    """One measurement of one head: what is true and what was found (raw); NaN where it could not be had."""

    seed: int
    contrast: str
    name: str
    truth: float
    found: float


def drawn_head(anatomy: Anatomy, ventricles: Array, seed: int) -> tuple[Drawn, str]:
    """Return head `seed`, its finding, ventricles and cut drawn by the seed, and what it has."""
    rng = np.random.default_rng([seed, 77])
    head = make_head(anatomy, seed)
    kind = str(rng.choice(["none", "shift", "shift", "shift", "infarct", "bleed"]))
    lesion = None
    if kind == "shift":
        lesion = shifted(head, rng, MOST_SHIFT_MM)
    elif kind != "none":
        lesion = place_lesion(head, kind, seed)
    thickness = float(rng.choice([3, 4, 5]))
    distance = thickness + float(rng.choice([0, 1, 1.5]))
    layout = Layout(
        round(132 / distance), distance, thickness,
        tilt_deg=float(rng.uniform(-5, 20)), turn_deg=float(rng.uniform(-7, 7)), shift_mm=float(rng.uniform(-8, 8)),
    )  # fmt: skip
    return draw(head, ventricles, layout, lesion, Swelling(float(rng.uniform(-0.35, 0.45)))), kind


def noisy(image: Array, rng: np.random.Generator) -> Array:
    """Return the magnitude of an image with complex noise, at an SNR of the tissue drawn from SNR."""
    tissue = float(np.median(image[image > 0.1 * np.percentile(image, 99)]))
    sigma = tissue / float(np.exp(rng.uniform(*np.log(SNR))))
    noise = rng.standard_normal((2, *image.shape), np.float32) * np.float32(sigma)
    return np.abs(image + noise[0] + 1j * noise[1]).astype(np.float32)


def measured(drawn: Drawn, seed: int, atlas: FluidAtlas) -> list[Case]:
    """Return every raw measurement of a head beside its truth."""
    rng = np.random.default_rng([seed, 78])
    out = []
    for name, contrast in CONTRASTS.items():
        planes = prepare(noisy(drawn.images[name], rng), drawn.geometry)
        images = planes.inputs[:, 0]
        brain = brain_masks(images)
        line = find_midline(images, brain, planes.distance_mm)
        out.append(Case(seed, contrast, SHIFT, abs(drawn.shift_mm), np.nan if line is None else abs(line.shift_mm)))
        found = find_ventricles(images, brain, planes.distance_mm, contrast, atlas)
        if not isinstance(found, str):
            out.append(Case(seed, contrast, VOLUME, drawn.volume_ml, found.volume_ml))
            out.append(Case(seed, contrast, INDEX, drawn.index, found.index))
    return out


def fit_spread(truth: Array, found: Array, floor: float, is_total: bool = False) -> Spread:
    """Return the spread of a measurement: scale by the median ratio of the larger half, conformal half width.

    is_total: the scale is that of all cases together, so that they have no bias; outliers then count.
    """
    known = np.isfinite(found)
    truth, found = truth[known], found[known]
    large = truth >= np.median(truth)
    median = np.median(truth[large] / np.maximum(found[large], 1e-6))
    scale = float(truth.sum() / max(float(found.sum()), 1e-6) if is_total else median)
    value = scale * found
    off = np.abs(value - truth)
    slope = float(np.clip(np.polyfit(value, off, 1)[0], 0, 0.3))
    ratio = np.sort(off / (floor + slope * value))
    place = min(int(np.ceil((len(ratio) + 1) * COVERAGE)), len(ratio)) - 1
    return Spread(scale, floor, slope, float(ratio[place]))


MEASURED = 0.75  # of heads at least; the others say why not


def fit(cases: list[Case]) -> dict[str, dict[str, Spread]]:
    """Return the spread of each measurement on each contrast where most heads could be measured."""
    out: dict[str, dict[str, Spread]] = {}
    n_heads = len({case.seed for case in cases})
    for name, floor in FLOORS.items():
        for contrast in CONTRASTS.values():
            of = [case for case in cases if (case.name, case.contrast) == (name, contrast)]
            if sum(np.isfinite(case.found) for case in of) >= MEASURED * n_heads:
                truth, found = np.array([case.truth for case in of]), np.array([case.found for case in of])
                out.setdefault(name, {})[contrast] = fit_spread(truth, found, floor)
        if "t1" in out.get(name, {}):
            out[name]["t1ce"] = out[name]["t1"]  # the same but for vessels and what takes up contrast agent
    return out


def one_head(seed: int) -> list[Case]:
    """Return the measurements of one head; what it needs is made once in a process."""
    anatomy, ventricles, atlas = needs()
    threadpool_limits(1)
    return measured(drawn_head(anatomy, ventricles, seed)[0], seed, atlas)


@functools.cache
def needs() -> tuple[Anatomy, Array, FluidAtlas]:
    """Return the average head, its lateral ventricles and its fluid, made once in a process."""
    anatomy = load_anatomy()
    return anatomy, lateral_ventricles(anatomy), fluid_atlas(anatomy)


def cases_of(seeds: Sequence[int], path: Path | None = None) -> list[Case]:
    """Return the measurements of heads; those in `path`, JSON lines, are read from there, new ones added to it."""
    known: dict[int, list[Case]] = {}
    if path is not None and path.is_file():
        for line in path.read_text("utf-8").splitlines():
            found = [Case(*each) for each in json.loads(line)]
            known[found[0].seed] = found
    for seed in track([each for each in seeds if each not in known], "heads"):
        known[seed] = one_head(seed)
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[seed]) + "\n")
    return [case for seed in seeds for case in known[seed]]


def main() -> None:
    """Draw, measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=60, help="(default %(default)s)")
    parser.add_argument("--cases", type=Path, metavar="FILE", help="measurements so far, to go on from")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder (default: the package's assets)")
    args = parser.parse_args()
    cases = cases_of(range(args.heads), args.cases)
    args.out.mkdir(parents=True, exist_ok=True)
    atlas = needs()[2]
    np.savez_compressed(
        args.out / "fluid.npz",
        fluid=atlas.fluid,
        nearer=atlas.nearer,
        away=atlas.away,
        origin_mm=np.array(atlas.origin_mm),
        spacing_mm=atlas.spacing_mm,
    )
    path = args.out / "measurement.json"
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}  # lesions' sizes stay
    kept = {name: of for name, of in content.get("spreads", {}).items() if name not in FLOORS}
    spreads = {name: {contrast: asdict(each) for contrast, each in of.items()} for name, of in fit(cases).items()}
    content |= {
        "made_by": f"python -m export.measurements --heads {args.heads}",
        "evidence": "simulated",
        "heads": args.heads,
        "spreads": {**spreads, **kept},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
