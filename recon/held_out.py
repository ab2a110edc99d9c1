"""Lines that were measured, hidden from the reconstruction and predicted by it: how wrong are those that were not?

The readout is never undersampled, so columns of the image are solved for on their own: a strip of columns through the
head is reconstructed once more without some of its measured lines, by the network as it stands. What it says of the
hidden lines is compared with what was measured there, and the noise of the measurement taken off. They stand for the
lines that were never measured, at the same distance from the centre of k-space. No reference image is needed.

Source: splitting measured data for validation in Yaman et al., Magn Reson Med 84:3172 (2020); here it only judges.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recon.arrays import Array
from recon.fourier import to_kspace
from recon.network import Network
from recon.prior import calibration_band, learn_prior
from recon.reconstruct import Start
from recon.scan import CoilMaps, KSpace
from recon.sense import cg_sense
from recon.unrolled import estimate_unrolled

COLUMNS = 32
ONE_OF = 6  # measured lines outside the centre is hidden
MIN_HIDDEN = 3
ITERATIONS = 8  # of the classical start: the network goes on from it


class HeldOut(NamedTuple):
    """How hidden lines were predicted. excess: power that the prediction misses, over that of the lines, without noise.

    chi2: the same residual in noise variances. missing: share of the image's energy in lines that were not measured.
    """

    excess: float
    chi2: float
    missing: float


def hold_out(start: Start, network: Network | None, level: float) -> HeldOut | None:
    """Return how well hidden lines of a slice are predicted; None where too few lines could be hidden.

    start: of one slice, on the host. network: None judges the classical reconstruction. level: standard deviation of
    the noise in a sample. Raises BackendError from the network.
    """
    kspace = start.kspace
    hidden = lines_to_hide(kspace)
    if len(hidden) < MIN_HIDDEN:
        return None
    columns = strip(start.image[0])
    maps = CoilMaps(np.ascontiguousarray(start.maps.maps[..., columns]))
    samples = kspace.samples[..., columns] / np.float32(level)  # noise variance 1: a strip has no quiet columns to tell
    averages = kspace.averages.copy()
    averages[:, hidden] = 0
    calibration = None if kspace.calibration is None else kspace.calibration[..., columns] / np.float32(level)
    rest = KSpace(
        np.where((averages > 0)[:, None, :, None], samples, 0),
        averages,
        kspace.noise_scale,
        True,
        calibration,
    )
    image = start.image[..., columns] / np.float32(level)
    found = cg_sense(rest, maps, learn_prior(rest, image), ITERATIONS)
    if network is not None:
        found = estimate_unrolled(network, rest, maps, found)
    residual = samples[0] - to_kspace(maps.maps[0] * found, (1,))
    n_coils = len(residual)
    noise = n_coils / np.maximum(kspace.averages[0], 1)
    energy = (np.abs(to_kspace(maps.maps[0] * image, (1,))) ** 2).mean(2).sum(0)
    missed = (residual.real**2 + residual.imag**2).mean(2).sum(0)
    distance = np.abs(np.arange(len(energy)) - len(energy) // 2)
    near = np.exp(-0.5 * ((distance[:, None] - distance) / (2 + 0.05 * distance[:, None])) ** 2)
    smooth = near @ energy / near.sum(1)  # by distance from the centre: one line may be weak by chance
    unmeasured = ~kspace.measured[0]
    return HeldOut(
        float(max((missed - noise)[hidden].sum(), 0) / max(float(smooth[hidden].sum()), 1e-20)),
        float((missed / noise)[hidden].mean()),
        float(smooth[unmeasured].sum() / max(float(energy.sum()), 1e-20)),
    )


def lines_to_hide(kspace: KSpace) -> Array:
    """Return every `ONE_OF`-th measured line outside the centre, more where those would be too few: int (line)."""
    n_y = kspace.samples.shape[2]
    lines = np.flatnonzero(kspace.measured[0])
    outer = lines[np.abs(lines - n_y // 2) > max(calibration_band(kspace) // 2, 4)]
    step = min(ONE_OF, max(2, len(outer) // MIN_HIDDEN))
    return outer[step // 2 :: step]


def strip(image: Array, n: int = COLUMNS) -> slice:
    """Return `n` columns around the one that halves the brightness of an image (y, x)."""
    n_x = image.shape[1]
    profile = np.cumsum(np.abs(image).sum(0))
    middle = int(np.searchsorted(profile, profile[-1] / 2))
    first = min(max(0, middle - n // 2), max(0, n_x - n))
    return slice(first, min(first + n, n_x))
