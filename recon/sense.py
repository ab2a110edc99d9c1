"""Classical reconstruction: regularised SENSE by conjugate gradients, and the combinations it is compared with.

Noise has variance 1 in every coil sample, so the regularisation has a meaning and nothing to tune: the image at each
place is taken for a Gaussian variable whose variance is the local signal power, and the reconstruction is its most
likely value (a Wiener estimate). The power is learned from the calibration lines first and then from the image that
this gives.

Source: Pruessmann et al., Magn Reson Med 46:638 (2001); the spatial prior follows Tsao et al., Magn Reson Med 50:1031
(2003), k-t SENSE, with image places in the part of temporal frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from recon.arrays import Array, array_module
from recon.errors import ShapeError
from recon.fourier import resize_centred, to_image
from recon.scan import CoilMaps, KSpace

FIRST_ITERATIONS = 8
ITERATIONS = 15
TOLERANCE = 1e-3
BLUR_VOXELS = 2.0  # width of the neighbourhood that a voxel's signal power is taken from
POWER_FLOOR = 1.0  # noise variances; whatever stands out of the noise is never suppressed as background
MODEL_ERROR = 3e-4  # part of the signal power that coil maps and motion leave unexplained
COLUMNS = 32  # columns of a 3-D scan solved at a time, which bounds the memory


def cg_sense(kspace: KSpace, maps: CoilMaps, prior: Array | None = None, n_iterations: int = ITERATIONS) -> Array:
    """Return the most likely image, complex64 (slice, y, x), in units of the noise's standard deviation.

    kspace: any set of measured lines, in one phase encoding, or two where it is `slice_encoded`; averaged lines weigh
        as much as their averages. maps: on the same grid.
    prior: float32 (slice, y, x), the variance expected of the image at each place; None takes it from the data in two
        steps (`calibration_power`, then the power of the image that this gives). With a prior of its own the result
        is linear in the samples.
    n_iterations: at most so many steps of conjugate gradients; they end earlier at a residual of `TOLERANCE`.
    Raises ShapeError if maps or prior are not on the grid of `kspace`.
    """
    _check(kspace, maps)
    if prior is not None:
        return _solve(kspace, maps, prior, None, n_iterations)
    first = signal_prior(calibration_power(kspace, maps))
    image = _solve(kspace, maps, first, None, min(FIRST_ITERATIONS, n_iterations))
    xp = array_module(image)
    return _solve(kspace, maps, signal_prior(xp.abs(image) ** 2), image, n_iterations)


def root_sum_of_squares(kspace: KSpace) -> Array:
    """Return the root-sum-of-squares of the coil images, unmeasured lines as zeros: float32 (slice, y, x)."""
    image = to_image(kspace.samples, _phase_axes(kspace))
    return array_module(image).sqrt((image.real**2 + image.imag**2).sum(1))


def zero_filled(kspace: KSpace, maps: CoilMaps | None) -> Array:
    """Return the image with unmeasured lines as zeros, complex64 (slice, y, x), in units of the noise.

    With maps the coils are combined by them (the adjoint of the encoding), without by root-sum-of-squares.
    Raises ShapeError if the maps are not on the grid of `kspace`.
    """
    if maps is None:
        return root_sum_of_squares(kspace).astype(np.complex64)
    _check(kspace, maps)
    return (maps.maps.conj() * to_image(kspace.samples, _phase_axes(kspace))).sum(1)


def calibration_power(kspace: KSpace, maps: CoilMaps) -> Array:
    """Return the power of the image at the resolution of the calibration lines, float32 (slice, y, x), noise units.

    Where there are none it is that of the zero-filled image, scaled up for the lines that are missing.
    """
    xp = array_module(kspace.samples)
    if kspace.calibration is None:
        part = float(kspace.measured.mean())
        return xp.abs(zero_filled(kspace, maps) / max(part, 1e-6)) ** 2
    n_lines = kspace.calibration.shape[2]
    window = xp.sin(xp.pi * (xp.arange(n_lines) + 1) / (n_lines + 1)).astype(xp.float32) ** 2  # Hann: no side lobes
    lines = resize_centred(kspace.calibration * window[:, None], 2, kspace.samples.shape[2])
    return xp.abs((maps.maps.conj() * to_image(lines, (2,))).sum(1)) ** 2


def signal_prior(power: Array) -> Array:
    """Return the variance expected of the image, float32 (slice, y, x), from an estimate of its power, noise units.

    Power is averaged over a neighbourhood and kept above the noise; what the model cannot explain counts as noise.
    """
    xp = array_module(power)
    n_y, n_x = power.shape[1:]
    local = _blur(xp, n_y) @ power.astype(xp.float32) @ _blur(xp, n_x)
    typical = (local**2).sum((1, 2), keepdims=True) / xp.maximum(local.sum((1, 2), keepdims=True), 1e-30)
    return (local + POWER_FLOOR) / (1 + MODEL_ERROR * typical)


def _blur(xp: ModuleType, n: int) -> Array:
    """Return the average over a Gaussian neighbourhood along a periodic axis, float32 (n, n)."""
    steps = xp.arange(n)
    distance = (steps[:, None] - steps[None] + n // 2) % n - n // 2
    weight = xp.exp(-0.5 * (distance / BLUR_VOXELS) ** 2)
    return (weight / weight.sum(1, keepdims=True)).astype(xp.float32)


@dataclass(frozen=True, eq=False)
class SenseOperator:
    """The weighted encoding W½ F S of one block of image, its centre moved to index 0 along the phase encodings.

    maps: complex64 (coil, x, *phase), *phase being (y) or (z, y); weights: float32 (*phase) of k-space lines.
    The phase encodings come last so that the transforms run along contiguous memory.
    """

    maps: Array
    weights: Array

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the phase encodings."""
        return tuple(range(2, self.maps.ndim))

    def forward(self, image: Array) -> Array:
        """Return W½ F S image, complex64 (coil, x, *phase), from an image (x, *phase)."""
        fft = _fft(image)
        root = array_module(image).sqrt(self.weights)
        return root * fft.fftn(self.maps * image[None], axes=self.axes, norm="ortho")

    def adjoint(self, samples: Array) -> Array:
        """Return Sᴴ Fᴴ W½ samples, complex64 (x, *phase), from weighted samples (coil, x, *phase)."""
        root = array_module(samples).sqrt(self.weights)
        coils = _fft(samples).ifftn(root * samples, axes=self.axes, norm="ortho")
        return (self.maps.conj() * coils).sum(0)

    def normal(self, image: Array) -> Array:
        """Return Sᴴ Fᴴ W F S image, complex64 (x, *phase): `adjoint` of `forward`, with one product by the weights."""
        coils = self.maps * image[None]
        for step in ("fftn", "ifftn"):
            if step == "ifftn":
                coils *= self.weights
            transform = getattr(_fft(image), step)
            coils = transform(coils, axes=self.axes)
        coils *= self.maps.conj()
        return coils.sum(0)


def _fft(array: Array) -> ModuleType:
    xp = array_module(array)
    if xp is np:
        from scipy import fft  # keeps complex64, unlike numpy before 2.0

        module: ModuleType = fft
        return module
    module = xp.fft
    return module


def _phase_axes(kspace: KSpace) -> tuple[int, ...]:
    return (0, 2) if kspace.slice_encoded else (2,)


def _check(kspace: KSpace, maps: CoilMaps) -> None:
    if maps.maps.shape != kspace.samples.shape:
        raise ShapeError("coil maps", maps.maps.shape, kspace.samples.shape)


def _blocks(kspace: KSpace) -> Iterator[tuple[slice, slice]]:
    """Yield (slices, columns) of the image that can be solved for on their own."""
    n_slices, _, _, n_x = kspace.samples.shape
    if kspace.slice_encoded:
        for start in range(0, n_x, COLUMNS):
            yield slice(None), slice(start, start + COLUMNS)
    else:
        for index in range(n_slices):
            yield slice(index, index + 1), slice(None)


def _phase_last(array: Array, n_phase: int, inverse: bool = False) -> Array:
    """Return (slice, coil, y, x) as (coil, x, *phase), centre at index 0; `inverse` takes (x, *phase) back."""
    xp = array_module(array)
    if inverse:
        volume = xp.fft.fftshift(array, axes=tuple(range(1, array.ndim)))
        return volume[None].transpose(0, 2, 1) if n_phase == 1 else volume.transpose(1, 2, 0)
    moved = array.transpose(1, 3, 0, 2)  # (coil, x, slice, y)
    if n_phase == 1:
        moved = moved[:, :, 0]
    return xp.fft.ifftshift(moved, axes=tuple(range(2, moved.ndim)))


def _solve(kspace: KSpace, maps: CoilMaps, prior: Array, start: Array | None, n_iterations: int) -> Array:
    """Return argmin Σ averages |samples - F S image|² + Σ |image|² / prior, complex64 (slice, y, x)."""
    xp = array_module(kspace.samples)
    n_slices, _, n_y, n_x = kspace.samples.shape
    if prior.shape != (n_slices, n_y, n_x):
        raise ShapeError("prior", prior.shape, (n_slices, n_y, n_x))
    n_phase = len(_phase_axes(kspace))
    image = xp.empty((n_slices, n_y, n_x), xp.complex64)
    for slices, columns in _blocks(kspace):
        weights = xp.fft.ifftshift(xp.asarray(kspace.averages[slices], xp.float32)).reshape((-1, n_y)[2 - n_phase :])
        operator = SenseOperator(_phase_last(maps.maps[slices, :, :, columns], n_phase), weights)
        samples = _phase_last(kspace.samples[slices, :, :, columns], n_phase)
        precision = 1 / _phase_last(prior[slices, None, :, columns], n_phase)[0]
        guess = None if start is None else _phase_last(start[slices, None, :, columns], n_phase)[0]
        solved = _conjugate_gradients(operator, samples, precision, guess, n_iterations)
        image[slices, :, columns] = _phase_last(solved, n_phase, inverse=True)
    return image


def _conjugate_gradients(
    operator: SenseOperator, samples: Array, precision: Array, start: Array | None, n_iterations: int
) -> Array:
    """Return the solution of (Sᴴ Fᴴ W F S + precision) image = Sᴴ Fᴴ W samples, preconditioned by its diagonal."""
    xp = array_module(samples)
    right = operator.adjoint(xp.sqrt(operator.weights) * samples)
    sensitivity = (operator.maps.real**2 + operator.maps.imag**2).sum(0)
    diagonal = operator.weights.mean() * sensitivity + precision
    image = xp.zeros_like(right) if start is None else start.copy()
    residual = right if start is None else right - operator.normal(image) - precision * image
    scaled = residual / diagonal
    direction = scaled
    error = float(xp.vdot(residual, scaled).real)
    enough = TOLERANCE**2 * float(xp.vdot(right, right / diagonal).real)
    for _ in range(n_iterations):
        if error <= enough:
            break
        product = operator.normal(direction) + precision * direction
        step = error / float(xp.vdot(direction, product).real)
        image += step * direction
        residual = residual - step * product
        scaled = residual / diagonal
        previous, error = error, float(xp.vdot(residual, scaled).real)
        direction = scaled + (error / previous) * direction
    return image
