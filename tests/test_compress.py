"""Coil compression keeps the signal and leaves noise white."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recon.compress import choose_n_virtual, compress, compression_matrix
from recon.errors import AcquisitionError, ShapeError


def complex_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Return complex64 noise of variance 1."""
    return ((rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / 2**0.5).astype(np.complex64)


def calibration_of_rank(rng: np.random.Generator, n_coils: int, rank: int, amplitude: float = 300.0) -> Any:
    """Return (2, coil, 12, 15) lines whose signal spans `rank` combinations of coils, in noise of variance 1."""
    mix = complex_normal(rng, (n_coils, rank))
    signal = amplitude * np.einsum("cr,srkx->sckx", mix, complex_normal(rng, (2, rank, 12, 15)))
    return (signal + complex_normal(rng, signal.shape)).astype(np.complex64)


@settings(max_examples=25, deadline=None)
@given(n_coils=st.integers(1, 20), seed=st.integers(0, 99), data=st.data())
def test_rows_are_orthonormal_and_ordered_by_energy(n_coils: int, seed: int, data: st.DataObject) -> None:
    calibration = complex_normal(np.random.default_rng(seed), (2, n_coils, 8, 9))
    n_virtual = data.draw(st.integers(1, n_coils))
    matrix = compression_matrix(calibration, n_virtual)
    assert matrix.shape == (n_virtual, n_coils)
    assert matrix.dtype == np.complex64
    np.testing.assert_allclose(matrix @ matrix.conj().T, np.eye(n_virtual), atol=1e-5)
    energy = (np.abs(compress(calibration, matrix)) ** 2).sum((0, 2, 3))
    assert (np.diff(energy) <= 1e-4 * energy[0]).all()


def test_all_virtual_coils_keep_all_energy() -> None:
    samples = calibration_of_rank(np.random.default_rng(1), 5, 3)
    virtual = compress(samples, compression_matrix(samples, 5))
    assert virtual.dtype == np.complex64
    np.testing.assert_allclose((np.abs(virtual) ** 2).sum(1), (np.abs(samples) ** 2).sum(1), rtol=1e-4)


def test_the_chosen_number_is_the_rank_of_the_signal() -> None:
    calibration = calibration_of_rank(np.random.default_rng(2), 12, 4)
    assert choose_n_virtual(calibration, kept=0.9999) == 4
    kept = compress(calibration, compression_matrix(calibration, 4))
    assert (np.abs(kept) ** 2).sum() > 0.9999 * (np.abs(calibration) ** 2).sum()


def test_the_chosen_number_has_bounds() -> None:
    rng = np.random.default_rng(3)
    assert choose_n_virtual(calibration_of_rank(rng, 30, 30), at_most=8) == 8
    assert choose_n_virtual(calibration_of_rank(rng, 3, 1)) == 1
    assert choose_n_virtual(1e-3 * complex_normal(rng, (1, 4, 8, 8))) == 4  # nothing above the noise: keep all coils


@pytest.mark.parametrize("n_virtual", [0, 5])
def test_an_impossible_number_is_refused(n_virtual: int) -> None:
    with pytest.raises(AcquisitionError, match="1 to 4 would be right"):
        compression_matrix(complex_normal(np.random.default_rng(0), (1, 4, 8, 8)), n_virtual)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_lines_without_signal_are_refused(value: float) -> None:
    with pytest.raises(AcquisitionError, match="no signal or no finite"):
        compression_matrix(np.full((1, 4, 8, 8), value, np.complex64), 2)


def test_other_coils_are_refused() -> None:
    matrix = compression_matrix(complex_normal(np.random.default_rng(0), (1, 4, 8, 8)), 2)
    with pytest.raises(ShapeError):
        compress(np.zeros((1, 5, 8, 8), np.complex64), matrix)
