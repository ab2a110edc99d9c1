"""The peer is fed and read fairly: its image lies where ours does, for odd sizes too."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from benchmarks.bart import best_sense
from recon.fourier import to_kspace


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")
@pytest.mark.parametrize("shape", [(32, 32), (33, 32), (32, 35), (33, 35)])
def test_barts_image_of_a_full_scan_is_the_image(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    image = (100 + 40 * rng.random(shape)) * ((y / 11) ** 2 + (x / 9) ** 2 < 1)
    kspace = to_kspace(image.astype(np.complex64), (0, 1))[None, None]
    volume, _, _ = best_sense(kspace, 24, lambda found: 0.0, strengths=(0.0001,))
    scale = np.vdot(volume[0], image) / np.vdot(volume[0], volume[0])
    assert np.linalg.norm(scale * volume[0] - image) < 0.02 * np.linalg.norm(image)
