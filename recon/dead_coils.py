"""Coils that fall silent where strong lines do not show it: in noisy scans, or behind the centre of k-space.

`recon.coil_watch` looks at single lines as they come. Here all lines of an image are taken together, from each one to
the last in the order in which they came, and the image itself says what a coil ought to hold in them.
"""

from __future__ import annotations

import numpy as np

from recon.arrays import Array, to_host
from recon.coil_watch import CoilFault
from recon.fourier import to_kspace
from recon.reconstruct import Sensitivities
from recon.scan import KSpace

# A live coil holds what the image lets expect of it: gains were 0.9 to 1.1 in clean simulated scans. Where that is
# sure to 8 standard deviations of its noise, none of 330 of them comes below 0.3 (nor at 4), no real one below 0.62.
GAIN = 0.3
SURE = 8.0
# Of the power of the coil at the upper quartile, noise taken off, with three standard deviations for what noise may
# hide. Clean scans: 0.03 and more in 30 real ones; below this in 1 of 330 simulated ones, whose coil sees nothing.
SILENT = 0.003
MIN_LINES = 4  # at the edge of k-space one line by itself may be far from what a solved image has there
_ENDS = 16  # without noise readouts the noise is taken from the first and the last 16th of the readouts
_N_NOISE = 2500  # samples that a measured noise level rests on, at least
_TINY = 1e-30


def find_dead(kspace: KSpace, coils: Sensitivities, image: Array, order: Array) -> list[CoilFault]:
    """Return the coils of one 2-D slice that hold noise alone from some line to the last.

    kspace: complex64 (1, coil, ky, x), whitened, not compressed. coils: its compression and maps, which are needed.
    image: complex64 (1, y, x), solved from it in units of the noise. order: int (ky), the number of the readout that
    gave each line, -1 where not measured. Empty for one coil, and for scans with a second phase encoding.
    """
    if kspace.samples.shape[1] < 2 or kspace.slice_encoded or coils.maps is None:
        return []
    lines = np.flatnonzero(order >= 0)
    lines = lines[np.argsort(order[lines], kind="stable")]
    if len(lines) < MIN_LINES:
        return []
    native = np.eye(kspace.samples.shape[1]) if kspace.to_native is None else kspace.to_native
    measured = np.tensordot(native, to_host(kspace.samples[0][:, lines]), axes=1)
    virtual = to_host(to_kspace(coils.maps.maps[0] * image, (1,))[:, lines])
    expected = np.tensordot(native @ to_host(coils.matrix).conj().T, virtual, axes=1)
    n_averaged = kspace.averages[0][lines].astype(np.float64)
    noise = (np.abs(native) ** 2).sum(1)[:, None] / n_averaged  # (coil, line): power of a sample
    found = _unlike(expected, measured, noise)
    for coil, fault in _silent(measured, noise if kspace.noise_is_measured else None).items():
        found.setdefault(coil, fault)
    return [
        CoilFault(
            coil, int(order[lines[first]]), value, threshold, _words(coil, words, order[lines], first), first == 0
        )
        for coil, (first, value, threshold, words) in sorted(found.items())
    ]


_Found = dict[int, tuple[int, float, float, str]]  # by coil: first line, value, threshold, words


def _unlike(expected: Array, measured: Array, noise: Array) -> _Found:
    """Coils that hold little of what the image lets expect: a matched filter from each line to the last."""
    agreed = _to_last((expected.conj() * measured).real.sum(2) / noise)
    power = _to_last((expected.real**2 + expected.imag**2).sum(2) / noise)
    gain = agreed / np.maximum(power, _TINY)
    is_dead = (gain < GAIN) & (np.sqrt(2 * power) > SURE)
    is_dead[:, is_dead.shape[1] - MIN_LINES + 1 :] = False
    out: _Found = {}
    for coil in np.flatnonzero(is_dead.any(1)):
        first = int(is_dead[coil].argmax())
        value = float(gain[coil, first])
        words = f"holds {value:.2f} of what the image lets expect of it; {GAIN:g} is the least"
        out[int(coil)] = (first, value, GAIN, words)
    return out


def _silent(measured: Array, noise: Array | None) -> _Found:
    """Coils that hold noise alone where others hold signal, from each line to the last."""
    n_x = measured.shape[2]
    power = measured.real**2 + measured.imag**2
    n_lines = np.arange(measured.shape[1], 0, -1)
    if noise is None:
        n = max(1, n_x // _ENDS)
        ends = np.abs(to_kspace(measured, (2,))[:, :, np.r_[:n, n_x - n : n_x]]) ** 2
        level = _to_last(ends.mean(2)) / n_lines
        spread = np.sqrt(1 / (n_lines * n_x) + 1 / (n_lines * 2 * n))
    else:
        level = _to_last(noise) / n_lines
        spread = np.sqrt(1 / (n_lines * n_x) + 1 / _N_NOISE)
    excess = _to_last(power.mean(2)) / n_lines / np.maximum(level, _TINY) - 1
    most = np.maximum(excess, 0) + 3 * spread
    share = most / np.maximum(np.percentile(excess, 75, axis=0), _TINY)
    share[:, n_lines < MIN_LINES] = np.inf
    out: _Found = {}
    for coil in np.flatnonzero((share < SILENT).any(1)):
        first = int((share[coil] < SILENT).argmax())
        value = float(share[coil, first])
        words = f"holds noise only: at most {value:.2g} of the power of stronger coils; {SILENT:g} is the least"
        out[int(coil)] = (first, value, SILENT, words)
    return out


def _to_last(values: Array) -> Array:
    """Sums (coil, line) from each line to the last."""
    return values[:, ::-1].cumsum(1)[:, ::-1]


def _words(coil: int, words: str, numbers: Array, first: int) -> str:
    when = "from the start" if first == 0 else f"from readout {numbers[first]} on"
    return f"coil {coil} {words}, {when}"
