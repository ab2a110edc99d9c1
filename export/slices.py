"""Real magnitude images to train on: slices of brain volumes, strokes and tumours, each split by subject.

The folder is the data folder's layout: `brain/index.csv` and NIfTI files, `stroke_flair/axial.npz` with `index.csv`,
`tumour_t1c/index.csv` with `img/`. A set that is not there is left out, and the card says which were used.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recon.arrays import Array

TUMOUR_GAP = 2  # groups of numbers
TUMOUR_VALIDATION = 0.85  # the last part of the numbers: neighbours are the same patient, blocks are not
MIN_FILLED = 0.12  # of a slice: less shows hardly any brain
STROKE_SPACING_MM = (1.0, 1.0)
TUMOUR_FIELD_MM = 230.0  # assumed: the set does not say

SETS = {
    "brain": ("39 brain volumes of public repositories, by subject", "MIT, BSD, CC0, CC BY, Apache-2.0, PDDL: index"),
    "stroke_flair": ("OpenNeuro ds004889 FLAIR slices (Absher 2024, Sci Data 11:839)", "CC0"),
    "tumour_t1c": ("figshare 1512427 post-contrast T1w slices (Cheng 2017)", "CC BY 4.0"),
}


@dataclass(frozen=True, eq=False)
class Slice:
    """One magnitude image, uint8 (y, x), its voxel in mm, and whose and what it is."""

    pixels: Array
    spacing_mm: tuple[float, float]
    subject: str
    contrast: str
    source: str  # "brain", "stroke_flair" or "tumour_t1c"
    weight: float  # how often it is drawn, relative to the others


def load_slices(folder: Path, split: str, every: int = 2) -> list[Slice]:
    """Return the slices of `split` ("train" or "val"), every `every`-th of each volume and orientation.

    Raises FileNotFoundError where `folder` holds none of the sets.
    """
    found = [*_brain(folder / "brain", split, every), *stroke_slices(folder / "stroke_flair", split)]
    found += _tumour(folder / "tumour_t1c", split)
    if not found:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(SETS)} with a {split} split")
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _brain(folder: Path, split: str, every: int) -> Iterator[Slice]:
    import nibabel

    for row in _rows(folder / "index.csv"):
        if row["split"] != split:
            continue
        image = nibabel.load(folder / row["file"])
        volume = np.asarray(image.dataobj, np.uint8)
        spacing = np.asarray(image.header.get_zooms()[:3], float)
        thick = int(spacing.argmax())
        axes = (0, 1, 2) if spacing.max() < 1.5 * spacing.min() else (thick,)
        whole = row["coverage"] == "whole_head"
        for axis in axes:
            stack = np.moveaxis(volume, axis, 0)
            rest = [i for i in range(3) if i != axis]
            step = every if len(axes) == 3 else 1
            kept = [plane for plane in stack[::step] if (plane > 12).mean() > MIN_FILLED]
            for plane in kept:
                weight = (2.0 if whole else 1.0) / max(len(kept), 1) / len(axes)
                mm = (float(spacing[rest[0]]), float(spacing[rest[1]]))
                yield Slice(np.ascontiguousarray(plane), mm, row["subject"], row["contrast"], "brain", weight)


def stroke_slices(folder: Path, split: str) -> Iterator[Slice]:
    """Yield the slices of stroke patients of the suggested split, in the index's order; none without the set."""
    rows = _rows(folder / "index.csv")
    if not rows:
        return
    images = np.load(folder / "axial.npz")["image"]
    chosen = [row for row in rows if row["suggested_split"] == split]
    for row in chosen:
        pixels = images[int(row["row"])]
        group = f"stroke-{row['patient_group']}"
        yield Slice(pixels, STROKE_SPACING_MM, group, "FLAIR", "stroke_flair", 5.0 / len(chosen))


def _tumour(folder: Path, split: str) -> Iterator[Slice]:
    rows = _rows(folder / "index.csv")
    if rows:
        last = int(rows[int(TUMOUR_VALIDATION * len(rows))]["pseudo_group"])  # a patient's slices stay together
        chosen = [row for row in rows if (int(row["pseudo_group"]) > last) == (split == "val")]
        yield from _read_tumours(folder, chosen)


def tumour_slices(folder: Path, split: str) -> Iterator[Slice]:
    """Yield the slices of tumour patients of a split of `tumour_splits`; none without the set."""
    rows = _rows(folder / "index.csv")
    yield from _read_tumours(folder, [row for row, own in zip(rows, tumour_splits(rows), strict=True) if own == split])


def _read_tumours(folder: Path, rows: Sequence[Mapping[str, str]]) -> Iterator[Slice]:
    from PIL import Image

    for row in rows:
        with Image.open(folder / row["file"]) as image:
            pixels = np.asarray(image.convert("L"))
        spacing = (TUMOUR_FIELD_MM / pixels.shape[0], TUMOUR_FIELD_MM / pixels.shape[1])
        group = f"tumour-{row['pseudo_group']}"
        yield Slice(pixels, spacing, group, "T1w-Gd", "tumour_t1c", 5.0 / len(rows))


def tumour_splits(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return "train", "val" or "" for the rows of the tumour set's index, for triage and super-resolution.

    Held out is the last part of each kind of tumour's numbers, so that every kind is tried on, in whole groups of
    neighbouring numbers. Neighbours may be one patient: the groups next to those held out are left out of both.
    """
    split = ["train"] * len(rows)
    for kind in dict.fromkeys(row["label"] for row in rows):
        groups = list(dict.fromkeys(int(row["pseudo_group"]) for row in rows if row["label"] == kind))
        n_kept = int(TUMOUR_VALIDATION * len(groups))
        held = groups[n_kept:]
        beside = {*groups[max(n_kept - TUMOUR_GAP, 0) : n_kept], *range(held[-1] + 1, held[-1] + 1 + TUMOUR_GAP)}
        for number, row in enumerate(rows):
            group = int(row["pseudo_group"])
            if group in beside:
                split[number] = ""
            elif row["label"] == kind and group in held:
                split[number] = "val"
    return split
