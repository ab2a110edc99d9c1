"""Arrays that follow their module (NumPy or CuPy) and values that close their arrays to writing.

CuPy never takes a NumPy array for one of its own, nor gives one unasked. Whatever moves between the host and a device
does so here, by name; small arrays that only steer the work (masks, matrices between coils) are made on the host.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # a NumPy or CuPy array; shape, dtype and unit stand in each docstring


def array_module(array: Array) -> ModuleType:
    """Return the module (numpy or cupy) that `array` belongs to; CuPy is never imported for a NumPy array."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    return np


def to_host(array: Array) -> Array:
    """Return `array` as a NumPy array: itself where it is one, else a copy, after the work that makes it has ended."""
    return array if array_module(array) is np else array.get()


def to_device(array: Array, xp: ModuleType) -> Array:
    """Return `array` as one of module `xp` (numpy or cupy), with its dtype; itself where it belongs there already."""
    return to_host(array) if xp is np else xp.asarray(array)


def closed(array: Array, dtype: Any = None) -> Array:
    """Return `array` as `dtype`, closed to writing where its module can (NumPy); copies only to convert."""
    xp = array_module(array)
    out = xp.asarray(array, dtype=dtype)
    if xp is np:
        out = out.view()
        out.flags.writeable = False
    return out
