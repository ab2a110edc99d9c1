"""A letter phantom: an analytic object in patient coordinates that no flip, swap or shift leaves unchanged.

An F, readable as such on an axial picture with the patient's left on the right and anterior up: its stem on the
patient's right, its bars towards the left, its top anterior. It is 56 mm deep from foot to head, its middle bar only in
the lower half. Around it lie balls of known intensity and place, all within an ellipsoid "head".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recon.scan import Geometry

HEAD_SEMI_AXES_MM = (75.0, 92.0, 68.0)
HEAD = 0.15
LETTER = 0.6
BALL_RADIUS_MM = 9.0

# Name, centre in LPS mm (x left, y posterior, z superior) and intensity: all different.
LANDMARKS: dict[str, tuple[tuple[float, float, float], float]] = {
    "left": ((52.0, 20.0, 6.0), 1.0),
    "anterior": ((-8.0, -72.0, 4.0), 0.9),
    "superior": ((10.0, 5.0, 50.0), 0.8),
    "right posterior inferior": ((-34.0, 48.0, -30.0), 0.4),
}

# The F's boxes: (from, to) along x, y and z.
_BOXES = (
    ((-38.0, -26.0), (-50.0, 30.0), (-28.0, 28.0)),  # stem
    ((-26.0, 22.0), (-50.0, -38.0), (-28.0, 28.0)),  # top bar
    ((-26.0, 8.0), (-18.0, -6.0), (-28.0, 0.0)),  # middle bar, lower half only
)


def letter_intensity(points_mm: Any) -> Any:
    """Return the phantom's intensity, float64 (…), at points (…, 3) in LPS mm; 0 outside, at most 1."""
    points = np.asarray(points_mm, np.float64)
    out = np.where(((points / HEAD_SEMI_AXES_MM) ** 2).sum(-1) <= 1, HEAD, 0.0)
    for box in _BOXES:
        inside = np.ones(out.shape, bool)
        for axis, (low, high) in enumerate(box):
            inside &= (points[..., axis] >= low) & (points[..., axis] < high)
        out[inside] = LETTER
    for centre, intensity in LANDMARKS.values():
        out[((points - centre) ** 2).sum(-1) <= BALL_RADIUS_MM**2] = intensity
    return out


def letter_volume(geometry: Geometry, shape: tuple[int, int]) -> Any:
    """Return float32 (slice, y, x): the phantom at the voxel centres of slices of `shape` at `geometry`."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    in_plane = (
        x[..., None] * np.asarray(geometry.row_dir) * geometry.spacing_mm[2]
        + y[..., None] * np.asarray(geometry.col_dir) * geometry.spacing_mm[1]
    )
    return np.stack([letter_intensity(origin + in_plane) for origin in geometry.origin_mm]).astype(np.float32)
