"""A rendering that resembles 7 T at a glance: steeper mid-tones and crisper edges. A style, not a field strength.

No contrast that depends on the field is made: it cannot be known from a measurement at another one. Both steps can be
undone exactly, so that the rendering hides nothing and adds nothing:

- sharpness: every spatial frequency f of a slice is multiplied by 1 + s·SHARPNESS·(1 − exp(−(f / f₀)²)), f₀ = CORNER
  cycles a mm, which is 1 for the mean and never below 1;
- contrast: a value u (1 is the volume's scale) becomes u − s·CONTRAST·sin(2πu) / (2π) between 0 and 1, and stays as it
  is outside: its slope is 1 + s·CONTRAST in the middle and 1 − s·CONTRAST at the ends, never 0.

s is the strength, 0 (nothing is changed) to 1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from recon.arrays import Array
from recon.errors import AcquisitionError
from recon.fourier import to_image, to_kspace
from recon.scan import Volume

SHARPNESS = 0.6
CONTRAST = 0.5
CORNER = 0.5  # cycles a mm
METHOD = "7T-style rendering"
NEWTON_STEPS = 60


def render(volume: Volume, strength: float, scale: float) -> Volume:
    """Return `volume` in the style of `strength`, 0 to 1; a value of `scale` counts as 1. Undone by `unrender`.

    Raises AcquisitionError for another strength, and for a scale that is not above 0.
    """
    _check(strength, scale)
    data = volume.data.astype(np.float64) / scale
    data = _curve(_filtered(data, volume.geometry.spacing_mm[1:], strength, undo=False), strength) * scale
    made = volume.provenance
    words = f"rendered in 7 T style, strength {strength:g}, scale {scale:.6g}: a style, not a field strength"
    provenance = replace(made, steps=(*made.steps, words), is_measured=False)
    return Volume(data.astype(np.float32), volume.geometry, provenance)


def unrender(volume: Volume, strength: float, scale: float) -> Array:
    """Return float32 (slice, y, x): the values that `render` was given, to rounding."""
    _check(strength, scale)
    data = _uncurve(volume.data.astype(np.float64) / scale, strength)
    return (_filtered(data, volume.geometry.spacing_mm[1:], strength, undo=True) * scale).astype(np.float32)


def _check(strength: float, scale: float) -> None:
    if not 0 <= strength <= 1:
        raise AcquisitionError(f"a style of strength {strength:g} was asked for; 0 to 1 is possible")
    if not scale > 0:
        raise AcquisitionError("the volume is empty: there is nothing to render")


def _filtered(data: Array, spacing_mm: tuple[float, float], strength: float, undo: bool) -> Array:
    f_y, f_x = ((np.arange(n) - n // 2) / (n * mm) for n, mm in zip(data.shape[1:], spacing_mm, strict=True))
    gain = 1 + strength * SHARPNESS * (1 - np.exp(-(f_y[:, None] ** 2 + f_x**2) / CORNER**2))
    # frequency −n/2 stands for +n/2 too, so a real image stays real
    kspace = to_kspace(data.astype(np.complex128), (1, 2))
    return np.asarray(to_image(kspace / gain if undo else kspace * gain, (1, 2)).real)


def _curve(u: Array, strength: float) -> Array:
    bent = u - strength * CONTRAST * np.sin(2 * np.pi * u) / (2 * np.pi)
    return np.where((u > 0) & (u < 1), bent, u)


def _uncurve(v: Array, strength: float) -> Array:
    """Return u of which `_curve` made v, by Newton's method held to 0..1."""
    u = np.clip(v, 0, 1)
    for _ in range(NEWTON_STEPS):
        error = u - strength * CONTRAST * np.sin(2 * np.pi * u) / (2 * np.pi) - np.clip(v, 0, 1)
        if float(np.abs(error).max(initial=0)) < 1e-13:
            break
        u = np.clip(u - error / (1 - strength * CONTRAST * np.cos(2 * np.pi * u)), 0, 1)
    return np.where((v > 0) & (v < 1), u, v)
