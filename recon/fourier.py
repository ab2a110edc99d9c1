"""Orthonormal Fourier steps with their centre at n // 2 on both sides, right for odd sizes too."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from scipy import fft

from recon.arrays import Array, array_module


def fft_module(array: Array) -> ModuleType:
    """Return what transforms `array` in its own precision: scipy.fft, or cupyx.scipy.fft for an array on a device."""
    module: ModuleType = fft  # keeps complex64, unlike numpy before 2.0, and is faster
    if array_module(array) is not np:
        from cupyx.scipy import fft as device_fft

        module = device_fft
    return module


def _transform(array: Array, axes: Sequence[int], inverse: bool) -> Array:
    module, axes = fft_module(array), tuple(axes)
    step = module.ifftn if inverse else module.fftn
    return module.fftshift(step(module.ifftshift(array, axes=axes), axes=axes, norm="ortho"), axes=axes)


def to_image(kspace: Array, axes: Sequence[int]) -> Array:
    """Return the image of centred k-space along `axes`: the inverse transform (positive exponent), orthonormal.

    kspace: complex (…), any sizes; the sample at n // 2 of each axis is k = 0, the voxel at n // 2 is position 0.
    Source: the convention of Gadgetron, ismrmrd-tools and python-ismrmrd-server, made right for odd sizes.
    """
    return _transform(kspace, axes, inverse=True)


def to_kspace(image: Array, axes: Sequence[int]) -> Array:
    """Return centred k-space of `image` along `axes`: the inverse of `to_image`."""
    return _transform(image, axes, inverse=False)


def resize_centred(array: Array, axis: int, size: int) -> Array:
    """Return `array` cropped or zero-padded along `axis` to `size`, index n // 2 moving to size // 2."""
    n = array.shape[axis]
    if n == size:
        return array
    xp = array_module(array)
    start = n // 2 - size // 2
    keep = [slice(None)] * array.ndim
    if size < n:
        keep[axis] = slice(start, start + size)
        return array[tuple(keep)]
    shape = list(array.shape)
    shape[axis] = size
    out = xp.zeros(shape, array.dtype)
    keep[axis] = slice(-start, -start + n)
    out[tuple(keep)] = array
    return out
