"""How much noise the classical reconstruction leaves where: its standard deviation, g-factor and SNR, exactly.

Columns of the image are solved for on their own, and for each of them everything that happens to the noise is a small
matrix. With the prior held fixed the classical path is linear, so its noise is known without repeating it: measured
lines keep theirs, and the others get what the least-squares problem makes of it. A few columns are worked out and the
rest lies between them.

Source: Pruessmann et al., Magn Reson Med 42:952 (1999), g-factor; Robson et al., Magn Reson Med 60:895 (2008), pseudo
replicas, which the tests repeat to compare.
"""

from __future__ import annotations

import numpy as np

from recon.arrays import Array
from recon.prior import SignalPrior, learn_prior
from recon.reconstruct import Start
from recon.scan import CoilMaps, KSpace

COLUMNS = 2


def noise_map(kspace: KSpace, maps: CoilMaps, prior: SignalPrior, columns: Array) -> Array:
    """Return the standard deviation of the noise in the classical image, float (y, column), 0 where no coil sees.

    kspace, maps, prior: of one slice, on the host; the noise has variance 1 a sample before averaging. columns: int.
    """
    n_y = maps.maps.shape[2]
    averages = kspace.averages[0].astype(np.float32)
    measured = (averages > 0).astype(np.float32)
    # circulant: what a weighting of lines does between two places y
    weighted, kept, left = (_circulant(each) for each in (averages, measured, 1 - measured))
    inverse = _circulant(np.where(averages > 0, 1 / np.maximum(averages, 1), 0))
    sharpness = _circulant(1 / prior.spectrum.astype(np.float32))
    out = np.zeros((n_y, len(columns)))
    for number, column in enumerate(columns):
        coils = maps.maps[0][:, :, column]
        seen = np.flatnonzero((coils.real**2 + coils.imag**2).sum(0) > 0.25)
        if not len(seen):
            continue
        between = np.ix_(seen, seen)
        coils = coils[:, seen]
        product = coils.conj().T @ coils
        spread = prior.variance[0][seen, column] ** -0.5
        normal = product * weighted[between] + spread[:, None] * sharpness[between] * spread
        # image = (A_keptᴴ + B normal⁻¹ Aᴴ W) samples, B putting predictions where nothing was measured
        filled = np.linalg.solve(normal.T, (product * left[between]).T).T
        noise = (product * inverse[between]).diagonal().real
        noise = noise + 2 * (filled * (product * kept[between]).T).sum(1).real
        noise = noise + ((filled @ (product * weighted[between])) * filled.conj()).sum(1).real
        out[seen, number] = np.sqrt(np.maximum(noise, 0))
    return out


def g_factor(start: Start, columns: Array | None = None) -> tuple[Array, Array, Array]:
    """Return the g-factor of the classical path, the noise's standard deviation and the columns they belong to.

    Both are float (y, column), 0 where no coil sees; g is the noise over that of all lines, measured as often, times
    the root of the acceleration. Regularisation may bring it below 1.
    """
    columns = spread_columns(start) if columns is None else columns
    noise = noise_map(start.kspace, start.maps, learn_prior(start.kspace, start.image), columns)
    return noise * float(np.sqrt(start.kspace.averages[0].mean())), noise, columns


def spread_columns(start: Start, n: int = COLUMNS) -> Array:
    """Return `n` columns that share the brightness of the image evenly: int (column)."""
    profile = np.cumsum((np.abs(start.image[0]) ** 2).sum(0) + 1e-20)
    wanted = (np.arange(n) + 0.5) / n * profile[-1]
    return np.unique(np.searchsorted(profile, wanted))


def snr_map(start: Start, level: float = 1.0, n_columns: int = 12 * COLUMNS) -> Array:
    """Return the classical image in units of its own noise, float32 (y, x): SNR, 0 where no coil sees.

    level: standard deviation of the noise in a sample. The noise is worked out in `n_columns` columns and interpolated
    between them. Source: Kellman and McVeigh, Magn Reson Med 54:1439 (2005), images in SNR units.
    """
    _, noise, columns = g_factor(start, spread_columns(start, n_columns))
    places = np.arange(start.image.shape[2])
    between = np.stack([np.interp(places, columns, row) for row in noise])
    seen = (start.maps.maps[0].real ** 2 + start.maps.maps[0].imag ** 2).sum(0) > 0.25
    away = np.where(seen & (between > 0), np.abs(start.image[0]) / np.maximum(level * between, 1e-20), 0)
    return away.astype(np.float32)


def _circulant(weights: Array) -> Array:
    """Return Fᴴ diag(weights) F of the centred orthonormal transform, complex64 (n, n)."""
    n = len(weights)
    kernel = np.fft.ifft(np.fft.ifftshift(weights))  # centre of k-space first, by the distance y - y'
    steps = np.arange(n)
    return kernel[(steps[:, None] - steps[None]) % n].astype(np.complex64)
