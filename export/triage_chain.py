"""Magnitude images as this system makes them: simulated coils, noise and missing lines, then the shipped network.

What triage sees at run time is never the stored image of a data set. A share of what it is trained on therefore goes
through the chain: the image is seen by coils, its k-space is undersampled by R = 1 to 8 and reconstructed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from scipy import ndimage

from export.simulated import FINENESS, Draw, acquire, draw_coils, draw_mask, draw_phase
from recon.arrays import Array
from recon.errors import AcquisitionError
from recon.sense import keep_measured
from recon.unrolled import unprepare

MATRIX = (192, 192)
FIELD_MM = 240.0
SPACING_MM = FIELD_MM / MATRIX[0]
DRAW = Draw(
    sizes=MATRIX[:1],
    n_columns=None,
    accelerations=(1, 1, 2, 2, 3, 4, 4, 4, 5, 6, 8),
    acs=(16, 32),
    coils=(1, 2, 4, 4, 6, 8),
    lattice_share=0.9,
)
SIGMA = (0.003, 0.05)  # of the peak, log-uniform


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Return the network in `path` on one core of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def place(image: Array, spacing_mm: tuple[float, float], n: tuple[int, int], field_mm: float = FIELD_MM) -> Array:
    """Return an image (y, x) in the middle of a square field of view of `n` (y, x) pixels, float32."""
    step = np.array([field_mm / n[0] / spacing_mm[0], field_mm / n[1] / spacing_mm[1]])
    offset = (np.array(image.shape) - 1) / 2 - step * (np.array(n) - 1) / 2
    blur = 0.4 * np.sqrt(np.maximum(step**2 - 1, 0))
    smooth = ndimage.gaussian_filter(image.astype(np.float32), blur) if blur.max() > 0.1 else image
    placed: Array = ndimage.affine_transform(smooth, step, offset, n, np.float32, order=1)
    return placed


def reconstruct(
    rng: np.random.Generator,
    session: Any,
    image: Array,
    acceleration: int | None = None,
    sigma: float | None = None,
    n_coils: int | None = None,
) -> tuple[Array, int, float]:
    """Return a magnitude image as reconstructed from a simulated scan, float32 MATRIX, its acceleration and noise.

    image: float32 (y, x), a magnitude on a grid FINENESS times as fine as MATRIX; see `place`.
    """
    coils = int(rng.choice(DRAW.coils)) if n_coils is None else n_coils
    draw = DRAW if acceleration is None else Draw(sizes=MATRIX[:1], accelerations=(acceleration,), acs=(24, 24),
                                                  lattice_share=1.0, partial_share=0.0)  # fmt: skip
    noise = float(np.exp(rng.uniform(*np.log(SIGMA)))) if sigma is None else sigma
    while True:
        measured, factor, n_acs = draw_mask(rng, MATRIX[0], draw, coils)
        seen_by = draw_coils(rng, coils, image.shape)
        with suppress(AcquisitionError):
            sample = acquire(rng, image * draw_phase(rng, image), seen_by, measured, noise, None, None, (factor, n_acs))
            break
    names = [each.name for each in session.get_inputs()]
    inputs = {name: np.ascontiguousarray(sample.prepared.inputs[name]) for name in names}
    found = unprepare(session.run(["image"], inputs)[0], sample.prepared)
    kept = keep_measured(sample.kspace, sample.maps, found)
    return np.abs(kept[0]).astype(np.float32), factor, noise


def fine_shape() -> tuple[int, int]:
    """Return the grid (y, x) that `reconstruct` wants its image on."""
    return FINENESS * MATRIX[0], FINENESS * MATRIX[1]
