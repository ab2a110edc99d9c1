"""The planes that a triage network is trained on, or that are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.triage_images import Plane, load
from export.triage_recipes import Recipe
from triage.preprocess import SIZE
from triage.score import middle_of

MIDDLE = middle_of(SIZE)
HELD_OUT_SHAPES = 8  # every so many patients' outlines are for held-out examples
MIN_AREA = 100  # mm²: fewer are too small to be asked for


class Pool:
    """The training planes of a recipe (or those held out), by what they are drawn for; grows as files appear."""

    def __init__(self, folder: Path, recipe: Recipe, fold: str, is_held_out: bool = False) -> None:
        self._folder, self._recipe, self._fold, self._is_held_out = folder, recipe, fold, is_held_out
        self._seen: set[Path] = set()
        self.by_kind: dict[str, list[Plane]] = {}
        self.look_again()

    @property
    def n(self) -> int:
        """How many planes there are."""
        return sum(map(len, self.by_kind.values()))

    def look_again(self) -> None:
        """Read the files that were not there before."""
        complete = (path for path in sorted(self._folder.glob("*.npz")) if "part" not in path.name)
        new = [path for path in complete if path not in self._seen]
        self._seen |= set(new)
        for path in new:
            for plane in load([path]):
                kind = self._recipe.kind(plane)
                if kind and is_training(plane, self._fold) != self._is_held_out:
                    kept = Plane(plane.image[MIDDLE].copy(), plane.mask[MIDDLE].copy(), plane.label)
                    self.by_kind.setdefault(kind, []).append(kept)

    def draw(self, rng: np.random.Generator, kind: str) -> Plane:
        """Return any plane of a kind."""
        planes = self.by_kind[kind]
        return planes[int(rng.integers(len(planes)))]


def is_training(plane: Plane, fold: str) -> bool:
    """Return whether a plane may be trained on; folds leave out every N-th patient of the stroke set."""
    if plane.label.source == "shapes":
        return int(plane.label.group.split("-")[1]) % HELD_OUT_SHAPES != 0
    if fold and plane.label.source == "stroke_flair":
        left_out, n = (int(each) for each in fold.split("/"))
        return int(plane.label.group.split("-")[1]) % n != left_out
    return plane.label.split == "train"
