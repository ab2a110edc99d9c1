"""Numbers with intervals: midline shift, ventricles, and a lesion's volume, longest diameter and side.

They are measured, never classified: nothing here says mass effect or hydrocephalus. Each interval holds the truth in 95
of 100 simulated heads that no fit has seen; where a number cannot be had, the reason stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import ndimage, spatial

from recon.arrays import Array
from recon.errors import ModelError
from triage.brain import brain_masks
from triage.findings import Measurement
from triage.midline import find_midline
from triage.preprocess import Planes
from triage.ventricles import FLUID_IS, FluidAtlas, find_ventricles

SHIFT, VOLUME, INDEX = "midline_shift_mm", "ventricle_volume_ml", "evans_index"
MIN_PLANES = 5  # with brain: fewer do not show the midline as a whole
MIN_SYMMETRY = 0.3  # along the line: less is no midline
OUTLINE = 0.5  # probability of what is drawn as a lesion, and that each part of one reaches somewhere
NEAR_MIDDLE_MM = 3.0


@dataclass(frozen=True)
class Spread:
    """From a raw number to value and interval: value = scale × raw, half width = factor × (floor + slope × |value|).

    floor_mm2: added to the floor of a volume for each plane that it was outlined in, as an area. It is that of a spread
    that was fitted to single slices: the half widths of a lesion's slices are then added up, as if all erred together.
    """

    scale: float
    floor: float
    slope: float
    factor: float
    floor_mm2: float = 0.0

    def measurement(self, raw: float, least: float = -np.inf, extent_mm: float = 0.0) -> Measurement:
        """Return the number and its interval, which does not go below `least`; extent_mm: outlined, across planes."""
        value = self.scale * raw
        half = self.factor * (self.floor + self.floor_mm2 * extent_mm / 1000 + self.slope * abs(value))
        return Measurement(value, (max(value - half, least), value + half))


@dataclass(frozen=True)
class Ruler:
    """What measuring needs to know: the average head's fluid, and by name and contrast how numbers scatter.

    levels: by finding and contrast the probability from which a voxel counts as the lesion's; OUTLINE where it is not.
    """

    atlas: FluidAtlas
    spreads: Mapping[str, Mapping[str, Spread]]
    levels: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def level(self, label: str, contrast: str) -> float:
        """Return the level of a finding on a contrast."""
        return self.levels.get(label, {}).get(contrast, OUTLINE)


def read_spreads(content: Mapping[str, Any]) -> dict[str, dict[str, Spread]]:
    """Return the spreads in the JSON of `measurement.json`; raise ModelError where it cannot be read."""
    try:
        return {
            name: {contrast: Spread(**{k: float(v) for k, v in each.items()}) for contrast, each in of.items()}
            for name, of in content["spreads"].items()
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"measurement.json cannot be read: {type(error).__name__}") from error


def read_levels(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the levels in the JSON of `measurement.json`; raise ModelError where they cannot be read."""
    try:
        found = {label: {k: float(v) for k, v in of.items()} for label, of in content.get("levels", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"measurement.json cannot be read: {type(error).__name__}") from error
    for each in (level for of in found.values() for level in of.values()):
        if not 0 < each <= OUTLINE:
            raise ModelError(f"measurement.json has a level of {each:g}; more than 0 and at most {OUTLINE:g} is right")
    return found


def measure_brain(planes: Planes, contrast: str, ruler: Ruler, orientation_is_known: bool) -> dict[str, Measurement]:
    """Return midline shift, ventricle volume and Evans-like index of the head in `planes`."""
    why = ""
    if planes.plane != "axial":
        why = f"slices are {planes.plane}; axial ones are measured"
    elif not orientation_is_known:
        why = "the orientation of the slices is not known"
    elif planes.is_usable.sum() < MIN_PLANES:
        why = f"{int(planes.is_usable.sum())} slices with brain; at least {MIN_PLANES} are needed"
    if why:
        return {name: Measurement(None, reason=why) for name in (SHIFT, VOLUME, INDEX)}
    images = planes.inputs[:, 0]
    brain = brain_masks(images)
    return {
        SHIFT: _shift(images, brain, planes.distance_mm, contrast, ruler),
        **_ventricles(images, brain, planes.distance_mm, contrast, ruler),
    }


def _shift(images: Array, brain: Array, distance_mm: float, contrast: str, ruler: Ruler) -> Measurement:
    spread = ruler.spreads.get(SHIFT, {}).get(contrast)
    if spread is None:
        return Measurement(None, reason=f"the midline was not validated on {contrast}")
    found = find_midline(images, brain, distance_mm)
    if found is None:
        return Measurement(None, reason="too little brain to see its middle")
    if found.symmetry < MIN_SYMMETRY * _usual(contrast):
        return Measurement(None, reason="no midline stands out")
    out = spread.measurement(abs(found.shift_mm), least=0.0)
    return replace(out, side="left" if found.shift_mm > 0 else "right")


def _usual(contrast: str) -> float:
    return 0.7 if contrast == "swi" else 1.0  # less contrast beside the midline


def _ventricles(images: Array, brain: Array, distance_mm: float, contrast: str, ruler: Ruler) -> dict[str, Measurement]:
    spreads = {name: ruler.spreads.get(name, {}).get(contrast) for name in (VOLUME, INDEX)}
    if contrast not in FLUID_IS:
        missing = Measurement(None, reason=f"ventricles cannot be measured on {contrast}: fluid does not stand out")
        return {VOLUME: missing, INDEX: missing}
    found = find_ventricles(images, brain, distance_mm, contrast, ruler.atlas)
    if isinstance(found, str):
        return {VOLUME: Measurement(None, reason=found), INDEX: Measurement(None, reason=found)}
    raw = {VOLUME: found.volume_ml, INDEX: found.index}
    return {
        name: Measurement(None, reason=f"it was not validated on {contrast}")
        if spread is None
        else spread.measurement(raw[name], least=0.0)
        for name, spread in spreads.items()
    }


@dataclass(frozen=True)
class Outline:
    """A lesion as a network outlines it, raw: volume in ml, longest diameter in mm, side, its key plane.

    extent_mm: the planes that it was outlined in, added up.
    """

    volume_ml: float
    diameter_mm: float
    extent_mm: float
    side: str
    key_plane: int


def outline(maps: Array, distance_mm: float, level: float = OUTLINE, least_mm2: float = 12.0) -> Outline | None:
    """Return size and side of what probabilities (plane, y, x) on planes of 1 mm outline, or None where nothing is.

    A voxel belongs to a lesion from `level` on. Parts that nowhere reach OUTLINE (or, where nothing does, the map's
    peak), and those smaller than `least_mm2` in all, are left out, but for the largest of the others.
    """
    inside = maps >= level
    if not inside.any():
        return None
    parts, _ = ndimage.label(inside, np.ones((3, 3, 3)))
    numbers = np.unique(parts[maps >= min(OUTLINE, max(float(maps.max()), level))])
    sizes = ndimage.sum_labels(inside, parts, numbers)
    kept = np.isin(parts, numbers[(sizes >= least_mm2) | (sizes == sizes.max())])
    areas = kept.sum(axis=(1, 2))
    main = np.argwhere(parts == numbers[int(sizes.argmax())]) * (distance_mm, 1.0, 1.0)
    column = float(np.argwhere(kept)[:, 2].mean()) - (maps.shape[2] - 1) / 2
    side = "middle" if abs(column) < NEAR_MIDDLE_MM else "left" if column > 0 else "right"
    volume, extent = float(areas.sum()) * distance_mm / 1000, float((areas > 0).sum()) * distance_mm
    return Outline(volume, _longest(main), extent, side, int((kept * maps).sum(axis=(1, 2)).argmax()))


def size_measurements(
    found: Outline, label: str, contrast: str, ruler: Ruler | None, orientation_is_known: bool
) -> dict[str, Measurement]:
    """Return volume, longest diameter and side of a lesion, with the ruler's spreads of this finding."""
    side = found.side if orientation_is_known else ""
    out = {}
    for name, raw in ((f"{label}_volume_ml", found.volume_ml), (f"{label}_diameter_mm", found.diameter_mm)):
        spread = ruler.spreads.get(name, {}).get(contrast) if ruler is not None else None
        if spread is None:
            out[name] = Measurement(raw, None, "no interval: its spread on this contrast was not measured", side)
        else:
            out[name] = replace(spread.measurement(raw, 0.0, found.extent_mm), side=side)
    return out


def _longest(points: Array) -> float:
    """Return the greatest distance between points (n, 3), mm, and half a voxel at both ends."""
    if len(points) > 40 and all(np.ptp(points, axis=0) > 0):
        points = points[spatial.ConvexHull(points, qhull_options="QJ").vertices]
    elif len(points) > 2000:
        points = points[:: len(points) // 2000 + 1]
    return float(spatial.distance.pdist(points).max(initial=0.0)) + 1.0
