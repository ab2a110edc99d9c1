"""Small simulated slices with what was solved and the truth, for tests of measures: an ellipse head with detail."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recon.arrays import Array
from recon.fourier import to_kspace
from recon.reconstruct import Start, reconstruct_classical, sense_coils
from recon.scan import Encoding, KSpace, Matrix, Size


class Made(NamedTuple):
    """A slice: what was solved, when lines came (two passes), and the noise-free magnitude (y, x)."""

    start: Start
    order: Array
    truth: Array


def head(rng: np.random.Generator, shape: tuple[int, int], shift: tuple[float, float] = (0, 0)) -> Array:
    """A head with detail and a smooth phase, complex (y, x), lying `shift` voxels off; one seed gives one head."""
    y = (np.arange(shape[0]) - shape[0] // 2 - shift[0]) / shape[0] * 2
    x = (np.arange(shape[1]) - shape[1] // 2 - shift[1]) / shape[1] * 2
    image = 1.0 * ((y[:, None] / 0.72) ** 2 + (x / 0.66) ** 2 < 1)
    for _ in range(24):
        centre, radius = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.03, 0.2, 2)
        inside = ((y[:, None] - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
        image = np.where(inside, rng.uniform(0.3, 1.8), image)
    phase = rng.normal(0, 0.6, 3)
    return image * np.exp(1j * (phase[0] * y[:, None] + phase[1] * x + phase[2] * y[:, None] * x))


def coils(n: int, shape: tuple[int, int], turn: float = 0.0) -> Array:
    """Smooth receive fields around the head, complex (coil, y, x)."""
    y, x = np.linspace(-1, 1, shape[0])[:, None], np.linspace(-1, 1, shape[1])
    angles = 2 * np.pi * np.arange(n) / n + turn
    return np.stack(
        [np.exp(-1.2 * ((y - np.sin(a)) ** 2 + (x - np.cos(a)) ** 2) + 1j * (a + y * np.cos(a) + x)) for a in angles]
    )


def make_slice(
    rng: np.random.Generator,
    shape: tuple[int, int] = (96, 72),
    *,
    step: int = 3,
    n_acs: int = 16,
    n_coils: int = 6,
    sigma: float = 0.01,
    late_shift: tuple[float, float] | None = None,
    onset: float = 0.4,
    other_maps: bool = False,
    noise_is_measured: bool = True,
) -> Made:
    """Return a slice of which every `step`-th line and the central ones were measured, in two passes.

    sigma: noise, of the peak. late_shift: voxels that the head lies off from `onset`, a share of the lines, on.
    other_maps: coil maps of an array that was turned.
    """
    n_y, n_x = shape
    seed = int(rng.integers(1 << 30))
    fields = coils(n_coils, shape)
    measured = np.zeros(n_y, bool)
    measured[rng.integers(step) :: step] = True
    centre = slice(n_y // 2 - n_acs // 2, n_y // 2 - n_acs // 2 + n_acs)
    measured[centre] = True
    lines = np.flatnonzero(measured)
    order = np.full(n_y, -1)
    order[np.concatenate((lines[::2], lines[1::2]))] = np.arange(len(lines))
    still = fields * head(np.random.default_rng(seed), shape)
    scale = 1 / (sigma * float(np.percentile(np.sqrt((np.abs(still) ** 2).sum(0)), 99.5)))
    samples = to_kspace(still, (1,)) * scale
    if late_shift is not None:
        moved = to_kspace(fields * head(np.random.default_rng(seed), shape, late_shift), (1,)) * scale
        samples = np.where((order >= int(onset * len(lines)))[:, None], moved, samples)
    samples = samples + rng.standard_normal((*samples.shape, 2)) @ [1, 1j] * 0.5**0.5
    samples = np.where(measured[:, None], samples, 0).astype(np.complex64)[None]
    kspace = KSpace(samples, measured[None].astype(np.uint16), 1.0, noise_is_measured, samples[:, :, centre])
    given = None
    if other_maps:
        wrong = to_kspace(coils(n_coils, shape, 1.3) * head(np.random.default_rng(seed), shape), (1,)) * scale
        given = sense_coils(wrong[None, :, centre].astype(np.complex64), n_y, n_coils, True)
    encoding = Encoding(Matrix(n_x, n_y, 1), Size(n_x, n_y, 5), Matrix(n_x, n_y, 1), Size(n_x, n_y, 5))
    start = reconstruct_classical(kspace, encoding, "sense", given).start
    assert start is not None
    return Made(start, order, np.sqrt((np.abs(still) ** 2).sum(0)) * scale)
