"""Fourier steps against sums that are written out: sizes odd and even, both directions, and resizing about n // 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recon.fourier import resize_centred, to_image, to_kspace
from tests.reference import centred, dft, waves

sizes = st.integers(1, 12)
# Relative error of a single-precision transform of a few dozen samples: about 1e-7, times the root of its size.
SINGLE = 2e-6


def numbers(shape: tuple[int, ...], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def far(found: Any, true: Any) -> float:
    return float(np.linalg.norm(found - true) / max(np.linalg.norm(true), 1e-30))


@given(st.tuples(sizes, sizes, sizes), st.sets(st.integers(0, 2), min_size=1), st.integers(0, 9))
def test_transforms_are_the_sums(shape: tuple[int, int, int], axes: set[int], seed: int) -> None:
    array = numbers(shape, seed)
    for step, inverse in ((to_image, True), (to_kspace, False)):
        found = step(array, tuple(axes))
        assert found.dtype == np.complex64
        assert far(found, dft(array, tuple(axes), inverse)) < SINGLE


@given(st.tuples(sizes, sizes), st.integers(0, 9))
def test_transforms_undo_each_other_and_keep_energy(shape: tuple[int, int], seed: int) -> None:
    array = numbers(shape, seed)
    assert far(to_kspace(to_image(array, (0, 1)), (0, 1)), array) < SINGLE
    assert np.linalg.norm(to_image(array, (0, 1))) == pytest.approx(np.linalg.norm(array), rel=1e-5)


@pytest.mark.parametrize("n", [7, 8])
def test_a_point_beside_the_centre_has_the_phase_of_its_side(n: int) -> None:
    """A point at +1 voxel turns by −2π/n from sample to sample: the scanner's forward transform."""
    image = np.zeros(n, np.complex64)
    image[n // 2 + 1] = 1
    found = to_kspace(image, (0,)) * np.sqrt(n)
    np.testing.assert_allclose(found, np.exp(-2j * np.pi * centred(n) / n), atol=1e-6)


@given(sizes, sizes)
def test_resizing_keeps_the_centre(n: int, size: int) -> None:
    out = resize_centred(np.arange(1, n + 1), 0, size)
    assert len(out) == size
    assert out[size // 2] == n // 2 + 1
    for index, value in enumerate(out):
        at = index - size // 2 + n // 2
        assert value == (at + 1 if 0 <= at < n else 0)


@given(sizes, st.integers(0, 8))
def test_zero_filling_interpolates_the_series(n: int, more: int) -> None:
    """Padding k-space evaluates the same Fourier series on finer voxels, with 0 where it was."""
    image = numbers((n,))
    fine = n + more
    found = to_image(resize_centred(to_kspace(image, (0,)), 0, fine), (0,)) * np.sqrt(fine / n)
    series = waves(centred(n), centred(n) / n, -1) @ image / n
    assert far(found, waves(centred(fine) / fine, centred(n), 1) @ series) < SINGLE


def test_the_input_is_left_alone() -> None:
    array = numbers((4, 5))
    array.flags.writeable = False
    before = array.copy()
    to_image(array, (0, 1))
    resize_centred(array, 1, 7)
    np.testing.assert_array_equal(array, before)
