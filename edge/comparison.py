"""The picture that shows what a reconstruction gains: methods beside the truth, their errors, and a detail enlarged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_gradient_magnitude, uniform_filter

from edge.orientation import DisplayOps, display_ops
from edge.preview import Panel, write_preview
from edge.window import display_window
from recon.arrays import Array
from recon.errors import ShapeError
from recon.scan import Geometry

ZOOM = 0.36  # size of the enlarged detail, as part of the slice's, so that both fill the same frame


def write_comparison(
    path: Path,
    methods: Mapping[str, Array],
    truth: Array,
    geometry: Geometry,
    slices: Sequence[int],
    title: str,
    footer: str,
    *,
    subtitle: str = "",
    truth_name: str = "Fully sampled",
    error_gain: float = 10.0,
    panel_px: int = 320,
) -> None:
    """Write `methods` (name to float32 (slice, y, x)) beside `truth`, same shape and units, for each of `slices`.

    Three rows a slice: the images in one window, an amber-framed detail of them, and |difference| × `error_gain`, whose
    bar is in per cent of white. The notes give each shown slice's NRMSE (‖x − t‖ / ‖t‖).
    Raises ShapeError if the images are not on one grid.
    """
    ops = display_ops(geometry)
    rows: list[list[Panel]] = []
    for index in slices:
        images = {}
        for name, volume in methods.items():
            if volume.shape != truth.shape:
                raise ShapeError(f"image of {name}", volume.shape, truth.shape)
            images[name] = ops.apply(volume[index])
        place = f" · slice {index + 1}" if len(slices) > 1 else ""
        rows += _slice_rows(images, ops.apply(truth[index]), ops, geometry, f"{truth_name}{place}", error_gain)
    write_preview(path, rows, title, footer, subtitle, panel_px)


def _slice_rows(
    images: Mapping[str, Array], truth: Array, ops: DisplayOps, geometry: Geometry, truth_name: str, gain: float
) -> list[list[Panel]]:
    window = display_window(truth)
    letters = (ops.left, ops.right, ops.top, ops.bottom)
    spacing = ops.spacing(geometry.spacing_mm[1:])
    box = busiest_box(truth)
    y0, y1, x0, x1 = box
    whole, detail, errors = [], [], []
    for name, image in {**images, truth_name: truth}.items():
        note = "" if image is truth else f"NRMSE {100 * _nrmse(image, truth):.1f} %"
        whole.append(Panel(name, image, spacing, window, note=note, letters=letters, box=box))
        detail.append(Panel("", image[y0:y1, x0:x1], spacing, window))
        if image is not truth:
            error = 100 * np.abs(image - truth) / window[1]
            range_percent = (0.0, 100 / gain)
            errors.append(Panel(f"Error × {gain:g}", error, spacing, range_percent, "error", "of white", " %"))
    return [whole, detail, errors]


def busiest_box(image: Array) -> tuple[int, int, int, int]:
    """Return (y0, y1, x0, x1), `ZOOM` of `image` (y, x) each way, where most edges are, nearer the middle first."""
    height, width = (max(round(ZOOM * n), 1) for n in image.shape)
    edges = gaussian_gradient_magnitude(np.asarray(image, np.float64), 1.0)
    y, x = (np.linspace(-1, 1, n) for n in image.shape)
    central = np.exp(-2 * (y[:, None] ** 2 + x**2))  # the rim of fat is busy too, but not what one looks at
    density = uniform_filter(edges, (height, width), mode="constant") * central
    at_y, at_x = np.unravel_index(int(np.argmax(density)), density.shape)
    y0 = min(max(int(at_y) - height // 2, 0), image.shape[0] - height)
    x0 = min(max(int(at_x) - width // 2, 0), image.shape[1] - width)
    return y0, y0 + height, x0, x0 + width


def _nrmse(image: Array, truth: Array) -> float:
    return float(np.linalg.norm(image - truth) / max(float(np.linalg.norm(truth)), np.finfo(np.float32).tiny))
