"""Which lines were measured, as matrices a network multiplies by: a lattice that folds aliases, and lines beside it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from recon.arrays import Array, array_module, to_device
from recon.errors import AcquisitionError
from recon.fourier import resize_centred, to_image

GRID = 8  # image sides are padded to multiples of this: pixel-unshuffle by 2, then two coarser levels
MARGIN = 56  # lines: how far coils and the edge of their maps spread frequencies, both sides together
MAX_STEP = 8  # of a lattice


@dataclass(frozen=True, eq=False)
class Sampling:
    """The lines of one phase encoding, as the two parts of Fᴴ W F.

    lattice: complex64 (R): weight and phase of a uniform lattice's aliases, so that its Fᴴ W F between the aliases a
        and b is conj(latticeₐ) lattice_b; one 0 where there is no lattice.
    rows: float32 (2 ky, 2 coarse y): real form of the weighted rows of the Fourier matrix of all other lines.
    resample: float32 (coarse y, padded y): takes an image to the grid on which those lines see it; its transpose back.
    averages: float32 (ky). on_lattice, extra: which lines belong to which part, bool (ky).

    rows and resample are of the images' module (NumPy or CuPy); the others, one number a line or alias, stay on the
    host.
    """

    lattice: Array
    rows: Array
    resample: Array
    averages: Array
    on_lattice: Array
    extra: Array

    def coarse_maps(self, maps: Array) -> Array:
        """Return `maps`, complex64 (slice, coil, y, x), on the coarse grid, by linear interpolation along y."""
        n_y, n_coarse = maps.shape[2], len(self.resample)
        if n_coarse == n_y:
            return maps
        place = (np.arange(n_coarse) - n_coarse // 2) * (n_y / n_coarse) + n_y // 2
        left = np.floor(place).astype(int)
        xp = array_module(maps)
        part = xp.asarray((place - left).astype(np.float32)[:, None])
        right = xp.asarray(np.minimum(left + 1, n_y - 1))
        return maps[:, :, xp.asarray(left)] * (1 - part) + maps[:, :, right] * part

    def alias_matrices(self, maps: Array, power: Array) -> Array:
        """Return Aᴴ W A of the lattice between aliases, float32 (slice, 2, R, R, y / R, x); R² times 0 for no lattice.

        maps: complex64 (slice, coil, y, x). power: float32 (slice, y, x), the sum of their abs² over coils.
        """
        xp = array_module(maps)
        n_slices, n_coils, n_y, n_x = maps.shape
        n = len(self.lattice)
        out = xp.zeros((n_slices, 2, n, n, padded(n_y) // n, n_x), xp.float32)
        if not self.lattice.any():
            return out
        split = maps.reshape(n_slices, n_coils, n, -1, n_x)
        for a in range(n):
            out[:, 0, a, a] = abs(self.lattice[a]) ** 2 * power.reshape(n_slices, n, -1, n_x)[:, a]
            for b in range(a + 1, n):
                product = xp.einsum("scyx,scyx->syx", split[:, :, a].conj(), split[:, :, b])
                product *= self.lattice[a].conj() * self.lattice[b]
                out[:, 0, a, b] = out[:, 0, b, a] = product.real
                out[:, 1, a, b] = product.imag
                out[:, 1, b, a] = -product.imag
        return out

    def adjoint(self, samples: Array, maps: Array, coarse: Array) -> Array:
        """Return Aᴴ W samples, complex64 (slice, y, x): the lattice by full maps, the other lines by coarse ones.

        samples, maps: complex64 (slice, coil, ky, x). coarse: of `coarse_maps`.
        """
        xp = array_module(samples)
        n_y, n_coarse = samples.shape[2], len(self.resample)
        start = self.resample.shape[1] // 2 - n_y // 2
        out = xp.zeros((len(maps), n_y, maps.shape[3]), xp.complex64)
        if self.on_lattice.any():
            lines = samples * xp.asarray(np.where(self.on_lattice, self.averages, 0))[:, None]
            out += (maps.conj() * to_image(lines, (2,))).sum(1)
        if self.extra.any():
            weights = xp.asarray(np.where(self.extra, self.averages, 0))
            lines = resize_centred(samples * weights[:, None], 2, n_coarse)
            seen = (coarse.conj() * to_image(lines, (2,))).sum(1)
            back = self.resample[:, start : start + n_y].T @ seen
            out += back * ((maps.real**2 + maps.imag**2).sum(1) > 0.25)
        return out


def describe_sampling(averages: Array, may_fold: bool = True, xp: ModuleType = np) -> Sampling:
    """Return the sampling of lines with `averages` (ky); images are padded along y to a multiple of `GRID`.

    averages: on the host. xp: the module of the images (numpy or cupy).

    A lattice of lines with equal averages, which divides the grid, becomes a folding of aliases if it `may_fold`. Lines
    beside it that lie around the centre see the image through smooth coils: frequencies more than `MARGIN` / 2 beyond
    do not reach them (measured: 1e-3 of those lines, a twentieth of what coil maps leave unexplained).
    """
    averages = np.asarray(averages, np.float32)
    n_y = len(averages)
    n_padded = padded(n_y)
    weights = np.sqrt(averages)
    lattice, on_lattice = np.zeros(1, np.complex64), np.zeros(n_y, bool)
    step, offset = _lattice(averages) if may_fold and n_padded == n_y else (0, 0)
    if step:
        on_lattice[offset::step] = True
        turn = np.exp(-2j * np.pi * (offset - n_y // 2) / step * np.arange(step))
        lattice = (turn * weights[offset] / np.sqrt(step)).astype(np.complex64)
    extra = (weights > 0) & ~on_lattice
    places = np.flatnonzero(extra) - n_y // 2
    reach = 2 * int(np.abs(places).max(initial=0)) + MARGIN
    n_coarse = min(n_y, reach) if step else n_y
    waves = np.exp(-2j * np.pi / n_coarse * np.outer(places, np.arange(n_coarse) - n_coarse // 2))
    rows = np.zeros((max(len(places), 1), n_coarse), complex)
    rows[: len(places)] = weights[extra, None] * waves / np.sqrt(n_coarse)
    resample = to_device(_resampling(n_coarse, n_y, n_padded), xp)
    return Sampling(lattice, to_device(real_form(rows), xp), resample, averages, on_lattice, extra)


def separate(averages: Array) -> tuple[Array, Array]:
    """Return (kz) and (ky) whose product is `averages` (kz, ky), the first of 0 and 1; all on the host.

    Raises AcquisitionError where the lines measured along ky are not the same for every kz that was measured.
    """
    along_z = averages.any(1)
    rows = averages[along_z]
    if not len(rows) or not (rows == rows[0]).all():
        raise AcquisitionError(
            "ky and kz are not undersampled separably; the network needs the same lines in every partition"
        )
    return along_z.astype(np.float32), rows[0].astype(np.float32)


def padded(n: int) -> int:
    """Return the next multiple of `GRID`."""
    return -(-n // GRID) * GRID


def real_form(matrix: Array) -> Array:
    """Return the real form [[Re, -Im], [Im, Re]] of a complex matrix on the host, float32."""
    return np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]]).astype(np.float32)


def _lattice(averages: Array) -> tuple[int, int]:
    """Return (step, offset) of the densest lattice of equally averaged lines that divides the grid; (0, 0) for none."""
    for step in range(1, MAX_STEP + 1):
        for offset in range(step if len(averages) % step == 0 else 0):
            lines = averages[offset::step]
            if lines[0] > 0 and (lines == lines[0]).all():
                return step, offset
    return 0, 0


def _resampling(n_coarse: int, n_y: int, n_padded: int) -> Array:
    """Return what cuts frequencies to those of `n_coarse` voxels, float32 (coarse y, padded y), orthonormal rows."""
    out = np.zeros((n_coarse, n_padded), np.float32)
    start = n_padded // 2 - n_y // 2
    if n_coarse == n_y:
        out[:, start : start + n_y] = np.eye(n_y)
        return out
    k = np.arange(n_coarse) - n_coarse // 2
    k = k[np.abs(k) * 2 < n_coarse]  # the highest frequency of an even grid has no partner
    coarse = np.exp(2j * np.pi / n_coarse * np.outer(np.arange(n_coarse) - n_coarse // 2, k)) / np.sqrt(n_coarse)
    fine = np.exp(-2j * np.pi / n_y * np.outer(k, np.arange(n_y) - n_y // 2)) / np.sqrt(n_y)
    out[:, start : start + n_y] = (coarse @ fine).real
    return out
