"""Arrays that follow their module (NumPy or CuPy) and values that close their arrays to writing."""

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


def closed(array: Array, dtype: Any = None) -> Array:
    """Return `array` as `dtype`, closed to writing where its module can (NumPy); copies only to convert."""
    xp = array_module(array)
    out = xp.asarray(array, dtype=dtype)
    if xp is np:
        out = out.view()
        out.flags.writeable = False
    return out
