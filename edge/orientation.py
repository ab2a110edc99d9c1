"""How a slice is turned for display, and which way the patient's left, front and head then lie.

Radiological convention: axial with the patient's left on the right and anterior up; coronal with left on the right and
superior up; sagittal with anterior on the left and superior up. Source: DICOM PS3.17 and common practice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recon.arrays import Array
from recon.scan import Geometry

# Per plane (by the axis that the slice normal is nearest to): the LPS directions wanted to the right and downwards.
_WANTED = {
    0: ("sagittal", (0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
    1: ("coronal", (1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
    2: ("axial", (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
}
_LETTERS = (("L", "R"), ("P", "A"), ("S", "I"))  # towards +x, −x; +y, −y; +z, −z
OBLIQUE = 0.34  # a direction that leans 20° or more towards a second axis is named after both


@dataclass(frozen=True)
class DisplayOps:
    """Turns a slice (y, x) for display: `transpose` first, then the flips along the new y and x.

    Letters say which way of the patient each edge of the picture lies, "" where the orientation is not known.
    """

    plane: str
    transpose: bool
    flip_y: bool
    flip_x: bool
    left: str
    right: str
    top: str
    bottom: str

    def apply(self, image: Array) -> Array:
        """Return a view of `image`, any dtype (y, x), as it is shown."""
        out = image.T if self.transpose else image
        return out[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def spacing(self, spacing_mm: tuple[float, float]) -> tuple[float, float]:
        """Return the pixel spacing (y, x) of the shown slice from the stored one's."""
        return (spacing_mm[1], spacing_mm[0]) if self.transpose else spacing_mm


def display_ops(geometry: Geometry) -> DisplayOps:
    """Return how slices at `geometry` are shown; as stored and without letters where the orientation is not known."""
    if not geometry.is_known:
        return DisplayOps("orientation unknown", False, False, False, "", "", "", "")
    row, col = np.asarray(geometry.row_dir), np.asarray(geometry.col_dir)
    plane, rightward, downward = _WANTED[int(np.argmax(np.abs(geometry.normal)))]
    straight = abs(row @ rightward) + abs(col @ downward)
    turned = abs(col @ rightward) + abs(row @ downward)
    transpose = bool(turned > straight)
    across, down = (col, row) if transpose else (row, col)
    flip_x, flip_y = bool(across @ rightward < 0), bool(down @ downward < 0)
    across, down = (-across if flip_x else across), (-down if flip_y else down)
    return DisplayOps(
        plane, transpose, flip_y, flip_x,
        direction_letters(-across), direction_letters(across), direction_letters(-down), direction_letters(down),
    )  # fmt: skip


def direction_letters(direction: Array) -> str:
    """Return the letters of an LPS unit vector (3,), the strongest first: "L", or "PS" for an oblique one."""
    strongest = [int(axis) for axis in np.argsort(-np.abs(direction), kind="stable") if abs(direction[axis]) > OBLIQUE]
    return "".join(_LETTERS[axis][int(direction[axis] < 0)] for axis in strongest)
