"""What each triage network is shown while it trains, and what it should find there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from scipy import ndimage

from export.triage_augment import (
    add_skull,
    add_white_matter_disease,
    decoy,
    is_stripped,
    look,
    move,
    paste,
)
from export.triage_images import Plane
from export.triage_lesions import (
    coarsen,
    drop_out,
    insert_bleed,
    insert_infarct,
    insert_mass,
    insert_old_or_new_infarct,
    to_diffusion,
    to_gradient_echo,
)
from recon.arrays import Array

DECOY_SHARE = 0.35
SKULL_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class Example:
    """float32 image (y, x) with the brain's median at 1, and bool mask (y, x) of what should be found."""

    image: Array
    mask: Array


class Planes(Protocol):
    """Where a recipe takes its planes from."""

    by_kind: dict[str, list[Plane]]

    def draw(self, rng: np.random.Generator, kind: str) -> Plane:
        """Return any plane of a kind."""


class Recipe(Protocol):
    """How a finding is trained."""

    def kind(self, plane: Plane) -> str:
        """Return what a plane is drawn for, "" for nothing."""

    def draw(self, rng: np.random.Generator, pool: Planes) -> Example:
        """Return one example."""


def choose(rng: np.random.Generator, pool: Planes, shares: dict[str, float]) -> str:
    """Return one of the kinds that the pool has, as often as `shares` says."""
    there = [name for name in shares if pool.by_kind.get(name)]
    weight = np.array([shares[name] for name in there])
    return str(rng.choice(there, p=weight / weight.sum()))


def finish(rng: np.random.Generator, image: Array, mask: Array) -> Example:
    """Return a plane as another scanner shows another head."""
    if is_stripped(image) and rng.random() < SKULL_SHARE:
        image = add_skull(rng, image)
    image, mask = move(rng, image, mask)
    return Example(look(rng, image), mask)


PLAQUES = "msLong"  # subjects with multiple sclerosis


class Infarct:
    """FLAIR: stroke patients' own lesions, also put into other planes or drawn there after their shapes at any height;
    heads without one, or with another finding."""

    SHARES: ClassVar[dict[str, float]] = {
        "with": 0.40,
        "without": 0.30,
        "heads-with": 0.07,
        "heads-without": 0.07,
        "brain": 0.06,
        "plaques": 0.10,
    }
    PASTE: ClassVar[dict[str, float]] = {"without": 0.3, "heads-without": 0.3, "brain": 0.4, "plaques": 0.2}
    DRAWN = 0.4  # of what is put into planes
    DISEASED: ClassVar[dict[str, float]] = {"with": 0.12, "plaques": 0.1}  # white matter; others:
    MOSTLY_DISEASED = 0.25

    def kind(self, plane: Plane) -> str:
        """Return the side of the question that a plane stands for."""
        label = plane.label
        if label.source == "shapes":
            return "shapes"
        if label.contrast != "flair" or label.group == "tcgaFG6692":  # a patient with a glioma
            return ""
        if label.source == "stroke_flair":
            return "with" if plane.mask.any() else "without"
        if label.source == "heads":
            return "heads-with" if label.finding == "infarct" and plane.mask.any() else "heads-without"
        if label.source == "brain":
            return "plaques" if label.group.startswith(PLAQUES) else "brain"
        return ""

    def draw(self, rng: np.random.Generator, pool: Planes) -> Example:
        """Return one example."""
        kind = choose(rng, pool, self.SHARES)
        plane = pool.draw(rng, kind)
        image = plane.image.astype(np.float32)
        mask = plane.mask if kind.endswith("with") else np.zeros_like(plane.mask)
        if rng.random() < self.DISEASED.get(kind, self.MOSTLY_DISEASED):
            diseased = add_white_matter_disease(rng, image)
            image = np.where(ndimage.binary_dilation(mask, iterations=2), image, diseased)
        if rng.random() < DECOY_SHARE:
            image = decoy(rng, image, pool.draw(rng, "with").mask)
        if rng.random() < self.PASTE.get(kind, 0.0):
            if rng.random() < self.DRAWN and pool.by_kind.get("shapes"):
                made = insert_old_or_new_infarct(rng, image, pool.draw(rng, "shapes").mask)
            else:
                donor = pool.draw(rng, "with")
                made = paste(rng, image, mask, donor.image.astype(np.float32), donor.mask)
            image, mask = made or (image, mask)
        return finish(rng, image, mask)


GLIOMA = "tcgaFG6692"  # the one volume of a patient with a tumour


MORE_GLIOMAS = 0.5  # of the other tumours are drawn again: gliomas are harder, and all the harder without uptake


class Mass:
    """Post-contrast T1w: patients' tumours. Those, T1w, T2w and FLAIR: simulated ones in other heads, and none."""

    SHARES: ClassVar[dict[str, float]] = {
        "with": 0.42,
        "t1ce": 0.08,
        "t1": 0.12,
        "t2": 0.10,
        "flair": 0.08,
        "stroke": 0.06,
        "heads-with": 0.07,
        "heads-without": 0.07,
    }
    INSERT: ClassVar[dict[str, float]] = {
        "t1ce": 0.5,
        "t1": 0.5,
        "t2": 0.5,
        "flair": 0.55,
        "stroke": 0.3,
        "heads-without": 0.2,
    }

    def kind(self, plane: Plane) -> str:
        """Return the side of the question that a plane stands for."""
        label = plane.label
        if label.source == "tumour_t1c":
            return "with"
        if label.source == "stroke_flair":
            return "stroke"
        if label.source == "heads":
            return "heads-with" if label.finding == "mass" and plane.mask.any() else "heads-without"
        return label.contrast if label.source == "brain" and label.group != GLIOMA else ""

    def draw(self, rng: np.random.Generator, pool: Planes) -> Example:
        """Return one example."""
        kind = choose(rng, pool, self.SHARES)
        plane = pool.draw(rng, kind)
        if kind == "with" and plane.label.finding != "glioma" and rng.random() < MORE_GLIOMAS:
            plane = pool.draw(rng, kind)
        contrast = plane.label.contrast if plane.label.contrast in ("t1", "t1ce", "t2") else "flair"
        image = plane.image.astype(np.float32)
        mask = plane.mask if kind.endswith("with") else np.zeros_like(plane.mask)
        if kind == "t1" and rng.random() < 0.5:  # before or after contrast: vessels and scalp apart, a head looks alike
            contrast = "t1ce"
        if rng.random() < DECOY_SHARE and kind in ("with", "t1ce", "t1"):
            image = decoy(rng, image, pool.draw(rng, "with").mask)
        chance = rng.random()
        if chance < self.INSERT.get(kind, 0.0):
            is_real = contrast == "t1ce" and rng.random() < 0.4 and pool.by_kind.get("with")
            donor = pool.draw(rng, "with") if is_real else None
            made = (
                insert_mass(rng, image, contrast)
                if donor is None
                else paste(rng, image, mask, donor.image.astype(np.float32), donor.mask)
            )
            image, mask = made or (image, mask)
        return finish(rng, image, mask)


class Haemorrhage:
    """T2*, susceptibility-weighted and FLAIR: simulated bleeding in other contrasts' heads, and its mimics."""

    SHARES: ClassVar[dict[str, float]] = {
        "t1": 0.2,
        "t2": 0.18,
        "flair": 0.18,
        "stroke": 0.16,
        "heads-with": 0.14,
        "heads-without": 0.14,
    }
    INSERT = 0.45

    def kind(self, plane: Plane) -> str:
        """Return the side of the question that a plane stands for."""
        label = plane.label
        if label.source == "stroke_flair":
            return "stroke"
        if label.source == "heads":
            if label.contrast not in ("flair", "t2star"):
                return ""
            return "heads-with" if label.finding == "bleed" and plane.mask.any() else "heads-without"
        if label.source == "brain" and label.group != GLIOMA and label.contrast in ("t1", "t2", "flair"):
            return label.contrast
        return ""

    def draw(self, rng: np.random.Generator, pool: Planes) -> Example:
        """Return one example."""
        kind = choose(rng, pool, self.SHARES)
        plane = pool.draw(rng, kind)
        image, shown = plane.image.astype(np.float32), plane.label.contrast
        if kind == "heads-with":
            return finish(rng, image, plane.mask)
        mask = np.zeros_like(plane.mask)
        if shown == "flair" and rng.random() < 0.75:
            contrast = "flair"
        elif shown == "t2star":
            contrast, image = "swi", drop_out(rng, image)
        else:
            contrast, image = "swi", to_gradient_echo(rng, image, shown)
        chance = self.INSERT if kind != "heads-without" else 0.2
        if rng.random() < chance:
            image, mask = insert_bleed(rng, image, contrast) or (image, mask)
        return finish(rng, image, mask)


class DiffusionInfarct:
    """Diffusion-weighted: infarcts of patients' shapes drawn into other contrasts' heads, and mimics."""

    SHARES: ClassVar[dict[str, float]] = {
        "t1": 0.32,
        "t2": 0.26,
        "flair": 0.2,
        "heads-with": 0.11,
        "heads-without": 0.11,
    }
    INSERT = 0.5

    def kind(self, plane: Plane) -> str:
        """Return the side of the question that a plane stands for."""
        label = plane.label
        if label.source == "shapes":
            return "shapes"
        if label.source == "heads" and label.contrast == "dwi":
            return "heads-with" if label.finding == "infarct" and plane.mask.any() else "heads-without"
        if label.source == "brain" and label.group != GLIOMA and label.contrast in ("t1", "t2", "flair"):
            return label.contrast
        return ""

    def draw(self, rng: np.random.Generator, pool: Planes) -> Example:
        """Return one example."""
        kind = choose(rng, pool, self.SHARES)
        plane = pool.draw(rng, kind)
        image, mask = plane.image.astype(np.float32), plane.mask
        if not kind.startswith("heads"):
            image, mask = to_diffusion(rng, image, plane.label.contrast), np.zeros_like(mask)
            if rng.random() < self.INSERT:
                image, mask = insert_infarct(rng, image, pool.draw(rng, "shapes").mask) or (image, mask)
        elif kind == "heads-without":
            mask = np.zeros_like(mask)
        if rng.random() < 0.8:
            image = coarsen(rng, image, (1.5, 3.0))
        return finish(rng, image, mask)


RECIPES: dict[str, Recipe] = {
    "infarct": Infarct(),
    "mass": Mass(),
    "haemorrhage": Haemorrhage(),
    "infarct-dwi": DiffusionInfarct(),
}
