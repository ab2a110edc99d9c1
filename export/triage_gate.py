"""Fit the gate: `python -m export.triage_gate --planes DIR` writes what `triage.gate` reads.

DIR holds planes of `python -m export.triage_images` (real brains, stroke and tumour patients; training subjects only);
to them come simulated heads of every contrast. Each plane is described as it is and once more with noise and blur;
those with a skull also without it. Nothing foreign is learned: what is far from all of these is refused.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track
from scipy import ndimage

from export.measurements import ASSETS, CONTRASTS, drawn_head, needs, noisy
from export.triage_images import load
from recon.arrays import Array
from triage.artefacts import (
    CLIPPED,
    REPEATS,
    REVERSED,
    STRIPES,
    WORDS,
    Artefacts,
    fit_weights,
    front_and_back,
    measure_artefacts,
)
from triage.brain import brain_masks
from triage.gate import (
    MANY,
    MIN_AREA_MM2,
    SIMILAR,
    Gate,
    Kind,
    describe_exam,
    describe_plane,
    fit_kind,
    gate_json,
    is_stripped,
    most_of_brain,
    read_gate,
)
from triage.preprocess import prepare

HEAD_SEEDS = 20_000
SHARES = {"stroke_flair": 0.1, "tumour_t1c": 0.12, "brain": 0.3}  # of planes that are looked at
MIN_PLANES = 30  # fewer make no kind
MARGIN, MARGIN_OF_FEW = 0.5, 4.0  # log odds
NOISE = (0.0, 0.1)
BLUR = (0.0, 1.1)
MORE = {REPEATS: 1.75, STRIPES: 1.2, CLIPPED: 2.0}  # times the worst clean series
KEPT = 0.995  # of single planes, which may be
MORE_OF_FEW = {REPEATS: 1.15, STRIPES: 1.15, CLIPPED: 2.5, REVERSED: 1.0}  # times as bad


def main() -> None:
    """Describe, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=Path, required=True, metavar="DIR", help="made by export.triage_images")
    parser.add_argument("--heads", type=int, default=6, help="simulated heads, each on every contrast (%(default)s)")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="descriptions so far, JSON lines, to go on from")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder (default: the package's assets)")
    parser.add_argument("--only", choices=("artefacts", "sure"), help="keep the rest of the gate.json in that folder")
    args = parser.parse_args()
    path = args.out / "gate.json"
    made_by = f"python -m export.triage_gate --planes DIR --heads {args.heads}"
    if args.only:
        content = json.loads(path.read_text("utf-8"))
        gate, made_by = read_gate(content), content["made_by"]
    else:
        gate = fit(described(args.planes, args.heads, args.cache))
    if args.only != "sure":
        gate = replace(gate, artefacts=fit_artefacts(args.planes, args.heads))
    if args.only != "artefacts":
        gate = replace(gate, sure=fit_sure(gate, args.planes))
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"made_by": made_by, **gate_json(gate)}) + "\n", "utf-8")
    for name, kinds in gate.kinds.items():
        print(name, [round(kind.limit, 2) for kind in kinds])


Row = tuple[str, bool, list[float]]  # contrast, whether simulated, numbers


def described(planes: Path, n_heads: int, cache: Path | None) -> list[Row]:
    """Return what training planes are like; parts that `cache` holds are read from there, others added to it."""
    known: dict[str, list[Row]] = {}
    if cache is not None and cache.is_file():
        for line in cache.read_text("utf-8").splitlines():
            name, rows = json.loads(line)
            known[name] = [(contrast, simulated, numbers) for contrast, simulated, numbers in rows]
    parts = [f"planes {path.name}" for path in sorted(planes.glob("*.npz")) if not path.name.startswith("shapes")]
    parts += [f"head {seed}" for seed in range(n_heads)]
    for part in track([each for each in parts if each not in known], "parts"):
        kind, _, which = part.partition(" ")
        source = _planes(planes / which) if kind == "planes" else _heads(int(which))
        rng = np.random.default_rng([zlib.crc32(part.encode()), 3])
        known[part] = [
            row for contrast, simulated, image in source for row in _describe(contrast, simulated, image, rng)
        ]
        if cache is not None:
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps([part, known[part]]) + "\n")
    return [row for part in parts for row in known[part]]


def fit(rows: list[Row]) -> Gate:
    """Return the gate: a kind for each contrast, with and without skull, real and simulated, where there are enough."""
    groups: dict[tuple[str, bool, bool], list[list[float]]] = defaultdict(list)
    for contrast, simulated, numbers in rows:
        groups[contrast, simulated, is_stripped(np.array(numbers))].append(numbers)
    kinds: dict[str, list[Kind]] = defaultdict(list)
    for (contrast, _, _), of in sorted(groups.items()):
        if len(of) >= MIN_PLANES:
            kinds[contrast].append(fit_kind(np.array(of)))
    return Gate({name: tuple(each) for name, each in kinds.items()}, MARGIN, MARGIN_OF_FEW)


def fit_sure(gate: Gate, folder: Path) -> dict[str, float]:
    """Return by how much each contrast must lead before something is ruled out by it, in log odds.

    It is MARGIN more than the lead of any training subject's volume under a wrong label.
    """
    sure = dict.fromkeys(gate.kinds, MARGIN)
    for true, images, brain, kind in _series(folder):
        if kind == "exam":
            numbers = describe_exam(images, brain)
            for contrast in gate.kinds:
                if not any({contrast, true} <= group for group in ({true}, *SIMILAR)):
                    sure[contrast] = max(sure[contrast], gate.lead(contrast, numbers)[0] + MARGIN)
    return sure


def fit_artefacts(folder: Path, n_heads: int) -> Artefacts:
    """Return weights and limits of what no head shows, from clean heads of training subjects and simulated ones.

    A series may be a little worse than the worst of them (MORE), and fewer planes than all but a few (KEPT).
    """
    series = [*_series(folder), *(each for seed in range(n_heads) for each in _drawn(seed))]
    single: dict[str, list[tuple[Array, Array]]] = defaultdict(list)
    upright: dict[str, list[Array]] = defaultdict(list)
    sideways = set()
    for contrast, images, brain, kind in series:
        single[contrast] += zip(images, brain, strict=True)
        if kind == "any way":
            sideways.add(contrast)
        else:
            upright[contrast] += [front_and_back(*each) for each in zip(images, brain, strict=True)]
    weights = fit_weights([np.array(each) for each in upright.values()])
    exams = [measure_artefacts(images, brain, weights) for _, images, brain, kind in series if kind == "exam"]
    most = {name: max(each[name] for each in exams) * more for name, more in MORE.items()}
    most[REVERSED] = 0.0
    of_few = {}
    for contrast, of in single.items():
        found = [measure_artefacts(image[None], brain[None], weights) for image, brain in track(of, contrast)]
        of_few[contrast] = {
            name: max(float(np.quantile([each[name] for each in found], KEPT)) * more, 0.0)
            for name, more in MORE_OF_FEW.items()
        }
        if contrast in sideways:
            of_few[contrast].pop(REVERSED)
    print("worst series", {name: max(each[name] for each in exams) for name in WORDS})
    return Artefacts(weights, most, of_few)


Series = tuple[str, Array, Array, str]  # contrast, images, brain; "exam", "few" planes, or planes lying in "any way"


def _series(folder: Path) -> Iterator[Series]:
    """Yield training subjects' planes: those of one volume together, patients' slices alone."""
    rng = np.random.default_rng(6)
    volumes: dict[tuple[str, str], list[Array]] = defaultdict(list)
    for path in sorted(folder.glob("*.npz")):
        if "part" in path.name or path.name.startswith(("shapes", "exams")):
            continue
        for each in load([path]):
            label = each.label
            is_chosen = label.source == "brain" or rng.random() < SHARES.get(label.source, 1.0)
            if label.split == "train" and label.factor == 0 and is_chosen:
                name = label.group if label.source == "brain" else f"{label.group} {label.row}"
                volumes[name, CONTRASTS.get(label.contrast, label.contrast)].append(each.image.astype(np.float32))
    for (name, contrast), images in volumes.items():
        shown = most_of_brain(np.stack(images))
        if shown is not None:
            few = "any way" if name.startswith("tumour") else "few"  # published in all directions
            yield contrast, *shown, "exam" if len(images) >= MANY else few


def _drawn(seed: int) -> Iterator[Series]:
    anatomy, ventricles, _ = needs()
    drawn, _ = drawn_head(anatomy, ventricles, HEAD_SEEDS + seed)
    rng = np.random.default_rng([seed, 4])
    for name, contrast in CONTRASTS.items():
        shown = most_of_brain(prepare(noisy(drawn.images[name], rng), drawn.geometry).inputs[:, 0])
        if shown is not None:
            yield contrast, *shown, "exam"


def _planes(path: Path) -> Iterator[tuple[str, bool, Array]]:
    rng = np.random.default_rng(len(path.name))
    for each in load([path]):
        label = each.label
        if label.split == "train" and rng.random() < SHARES.get(label.source, 1.0):
            contrast = CONTRASTS.get(label.contrast, label.contrast)
            yield contrast, label.source in ("heads", "exams"), each.image.astype(np.float32)


def _heads(seed: int) -> Iterator[tuple[str, bool, Array]]:
    anatomy, ventricles, _ = needs()
    drawn, _ = drawn_head(anatomy, ventricles, HEAD_SEEDS + seed)
    rng = np.random.default_rng([seed, 4])
    for name, contrast in CONTRASTS.items():
        for image in prepare(noisy(drawn.images[name], rng), drawn.geometry).inputs[:, 0]:
            yield contrast, True, image


def _describe(contrast: str, simulated: bool, image: Array, rng: np.random.Generator) -> Iterator[Row]:
    brain = brain_masks(image[None])[0]
    if brain.sum() < max(MIN_AREA_MM2, 5000 * simulated):
        return
    numbers = describe_plane(image, brain)
    seen = [image]
    if not is_stripped(numbers):
        seen.append(image * ndimage.binary_dilation(brain, iterations=int(rng.integers(0, 3))))
    for each in seen:
        yield contrast, simulated, _rounded(describe_plane(each, brain))
        sigma, width = rng.uniform(*NOISE), rng.uniform(*BLUR)
        noise = rng.standard_normal((2, *each.shape), np.float32) * np.float32(sigma) * (each.any())
        worse = np.abs(ndimage.gaussian_filter(each, width) + noise[0] + 1j * noise[1]).astype(np.float32)
        worse *= each > 0 if is_stripped(numbers) or each is not image else 1
        again = brain_masks(worse[None])[0]
        if again.sum() >= MIN_AREA_MM2:
            yield contrast, simulated, _rounded(describe_plane(worse, again))


def _rounded(numbers: Array) -> list[float]:
    return [float(f"{value:.5g}") for value in numbers]


if __name__ == "__main__":
    main()
