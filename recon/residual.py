"""What measured lines hold beyond what coil maps and an image explain: of all lines, and of the calibration lines."""

from __future__ import annotations

import numpy as np

from recon.arrays import Array
from recon.fourier import resize_centred, to_image, to_kspace
from recon.scan import CoilMaps, KSpace

COARSE = 64  # lines of the grid that calibration lines are looked at on, at least
NEAR = 0.15  # of the calibration image's peak: below lies what no map is needed for


def line_excess(kspace: KSpace, maps: CoilMaps, image: Array, level: float) -> Array:
    """Return the power of each line that `image` leaves unexplained, less the noise in it: float (ky), 0 elsewhere.

    kspace, maps: of one slice. image: complex64 (y, x), with measured lines kept (`recon.sense.keep_measured`), so that
    as much of the noise as the maps can hold is in it. level: standard deviation of the noise in a sample.
    It is the sum over coils, a sample, in the units of `kspace` squared; it may be negative by chance.
    """
    n_coils = maps.maps.shape[1]
    measured = kspace.measured[0]
    left = kspace.samples[0][:, measured] - to_kspace(maps.maps[0] * image[None], (1,))[:, measured]
    power = np.zeros(len(measured))
    power[measured] = (left.real**2 + left.imag**2).mean(2).sum(0)
    noise = level**2 * (n_coils - _support(maps)) / np.maximum(kspace.averages[0], 1)
    return np.where(measured, power - noise, 0)


def chi_squared(kspace: KSpace, maps: CoilMaps, excess: Array, level: float) -> float:
    """Return the mean residual of measured lines in noise variances, 1 where it is noise alone.

    excess: of `line_excess`.
    """
    measured = kspace.measured[0]
    noise = level**2 * (maps.maps.shape[1] - _support(maps)) / kspace.averages[0][measured]
    return float(1 + excess[measured].mean() / max(float(noise.mean()), 1e-20))


def misfit(kspace: KSpace, maps: CoilMaps, image: Array, excess: Array) -> float:
    """Return what measured lines hold beyond the maps and `image` (y, x), root mean square over that of the lines.

    Relative to the signal, not to the noise: no real maps explain a scan to within its noise, however clean it is.
    """
    measured = kspace.measured[0]
    lines = to_kspace(maps.maps[0] * image[None], (1,))[:, measured]
    energy = float((lines.real**2 + lines.imag**2).mean(2).sum())
    return float(np.sqrt(np.maximum(excess[measured], 0).sum() / max(energy, 1e-20)))


def _support(maps: CoilMaps) -> float:
    return float((maps.maps.real**2 + maps.maps.imag**2).sum(1).mean())


def map_residual(kspace: KSpace, maps: CoilMaps, level: float) -> float | None:
    """Return the share of the calibration lines' energy that the coil maps do not explain, noise left out.

    Near 0 for the maps of this very scan and near 1 for those of another coil. None for one coil, or where the
    calibration lines hold only noise.
    """
    if kspace.calibration is None or maps.maps.shape[1] == 1:
        return None
    n_coils, n_lines, _ = kspace.calibration.shape[1:]
    n_y = maps.maps.shape[2]
    step = max(1, n_y // max(COARSE, 2 * n_lines))
    n_coarse = n_y // step
    window = np.sin(np.pi * (np.arange(n_lines) + 1) / (n_lines + 1)).astype(np.float32) ** 2  # Hann
    coils = to_image(resize_centred(kspace.calibration[0] * window[:, None], 1, n_coarse), (1,))
    rows = (np.arange(n_coarse) - n_coarse // 2) * step + n_y // 2
    coarse = maps.maps[0][:, rows]
    combined = (coarse.conj() * coils).sum(0)
    left = coils - coarse * combined
    noise = level**2 * float((window**2).sum()) / n_coarse
    power = (coils.real**2 + coils.imag**2).sum(0)
    inside = power > NEAR**2 * power.max()
    energy = float(power[inside].sum()) - n_coils * noise * inside.sum()
    if energy <= 0:
        return None
    seen = (coarse.real**2 + coarse.imag**2).sum(0)[inside]
    rest = float((left.real**2 + left.imag**2).sum(0)[inside].sum()) - noise * float((n_coils - seen).sum())
    return float(np.clip(rest / energy, 0, 1))
