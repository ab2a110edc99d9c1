"""Receiver noise: covariance over dwell times, whitening within statistics, and levels that were never measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recon.assemble import Assembler
from recon.errors import AcquisitionError, ShapeError
from recon.noise import EdgeLevel, NoiseCovariance, whitening_matrix
from recon.scan import Acquisition, ImageKey, Role
from tests.reference import (
    KEY,
    Order,
    Receiver,
    Sending,
    Voxels,
    assembled,
    coloured,
    encoding_of,
    every_line,
    scan_lines,
    scan_of,
)


def gathered(parts: list[tuple[Any, float]]) -> NoiseCovariance:
    noise = NoiseCovariance()
    for samples, dwell_us in parts:
        noise.add(samples, dwell_us)
    return noise


def measured(noise: NoiseCovariance, sample_time_us: float, ratio: float | None = None) -> Any:
    found = noise.covariance(sample_time_us, ratio)
    assert found is not None
    return found


def draw(receiver: Receiver, n: int, dwell_us: float, seed: int = 0) -> Any:
    return receiver.draw(np.random.default_rng(seed), n, dwell_us)


# --- covariance -------------------------------------------------------------------------------------------------------


def test_covariance_is_that_of_the_receiver() -> None:
    """20000 samples: a covariance is known to about 1/√20000 = 0.7 % of its channels' powers."""
    receiver = coloured(4)
    found = gathered([(draw(receiver, 20000, 1.0), 1.0)]).covariance(1.0)
    assert found is not None
    assert np.linalg.norm(found - receiver.covariance) < 0.03 * np.linalg.norm(receiver.covariance)


@given(st.floats(0.5, 50), st.floats(0.5, 50), st.floats(0.5, 50))
def test_every_dwell_time_counts_as_its_own(first: float, second: float, imaging: float) -> None:
    """Readouts of two bandwidths give what one readout at the imaging bandwidth would have given."""
    samples = draw(coloured(3), 50, 1.0)
    both = measured(gathered([(samples / np.sqrt(first), first), (samples / np.sqrt(second), second)]), imaging)
    alone = measured(gathered([(samples / np.sqrt(imaging), imaging)]), imaging)
    np.testing.assert_allclose(both, alone, rtol=1e-9)


@pytest.mark.parametrize("unknown", [0.0, -1.0, float("nan"), float("inf")])
def test_an_unknown_dwell_time_scales_nothing(unknown: float) -> None:
    samples = draw(coloured(3), 50, 4.0)
    expected = samples @ samples.conj().T / 50
    for noise_us, imaging_us in ((unknown, 5.0), (5.0, unknown), (unknown, unknown)):
        np.testing.assert_allclose(measured(gathered([(samples, noise_us)]), imaging_us), expected, rtol=1e-12)


def test_bandwidth_ratio_is_the_noise_readouts() -> None:
    samples = draw(coloured(3), 50, 4.0)
    noise = gathered([(samples, 4.0)])
    np.testing.assert_allclose(measured(noise, 4.0, 0.8), measured(noise, 4.0) / 0.8, rtol=1e-12)


def test_too_little_noise_is_no_measure() -> None:
    receiver = coloured(4)
    assert NoiseCovariance().covariance(1.0) is None
    assert gathered([(draw(receiver, 7, 1.0), 1.0)]).covariance(1.0) is None
    enough = gathered([(draw(receiver, 7, 1.0), 1.0), (draw(receiver, 1, 1.0, seed=1), 1.0)])
    assert enough.n_samples == 8
    assert enough.covariance(1.0) is not None


def test_silent_or_copied_channels_are_no_measure() -> None:
    samples = draw(coloured(4), 50, 1.0)
    assert gathered([(np.zeros((4, 50)), 1.0)]).covariance(1.0) is None
    assert gathered([(samples * [[1], [0], [0], [0]], 1.0)]).covariance(1.0) is None
    assert gathered([(np.repeat(samples[:1], 4, 0), 1.0)]).covariance(1.0) is None
    assert gathered([(samples * [[1], [1], [1], [0]], 1.0)]).covariance(1.0) is not None


def test_changed_channels_are_refused() -> None:
    noise = gathered([(np.ones((4, 8)), 1.0)])
    with pytest.raises(ShapeError, match="noise readout"):
        noise.add(np.ones((3, 8)), 1.0)
    with pytest.raises(ShapeError, match="noise readout"):
        noise.add(np.ones((3, 8)), 2.0)
    assert noise.n_samples == 8


# --- whitening --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 99), st.floats(1e-12, 1e12))
def test_whitening_undoes_the_covariance(n_coils: int, seed: int, power: float) -> None:
    covariance = coloured(n_coils, power, seed).covariance
    powers = np.linalg.eigvalsh(covariance)
    assume(powers[0] > 2e-3 * np.median(powers))  # weaker ones are raised
    matrix = whitening_matrix(covariance)
    assert matrix.dtype == np.complex64
    assert abs(np.triu(matrix, 1)).max() < 1e-6 * abs(matrix).max()
    np.testing.assert_allclose(matrix @ covariance @ matrix.conj().T, np.eye(n_coils), atol=1e-3)


def test_a_dead_channel_stays_quiet() -> None:
    covariance = np.diag([1.0, 1.0, 1.0, 0.0])
    matrix = whitening_matrix(covariance)
    assert abs(matrix).max() == pytest.approx(1000**0.5, rel=1e-5)


@pytest.mark.parametrize("wrong", [np.zeros((3, 3)), np.full((3, 3), np.nan), -np.eye(3)])
def test_no_noise_power_is_refused(wrong: Any) -> None:
    with pytest.raises(AcquisitionError, match="no finite positive noise power"):
        whitening_matrix(wrong)


NOISE_US, IMAGING_US = 2.5, 8.0


def noise_scan(ratio: float | None = None) -> Assembler:
    """Return an assembler that took noise readouts and image lines that hold nothing but noise."""
    encoding = encoding_of((64, 48, 1), kept=(32, 48, 1))
    receiver = coloured(4, power=3e-9)
    rng = np.random.default_rng(1)
    heard = Receiver(receiver.covariance * (ratio or 1.0))  # a noise readout hears a narrower band than it samples
    empty = Voxels(np.zeros((4, 1, 48, 64)))
    lines = scan_lines(empty, encoding, Order(every_line(encoding)), Sending(dwell_us=IMAGING_US, noise=receiver))
    scan = scan_of(encoding, ratio=ratio)
    return assembled(scan, [*heard.readouts(rng, 40, 64, NOISE_US), *lines], early=False)


@pytest.mark.parametrize("ratio", [None, 0.8])
def test_whitened_noise_has_unit_covariance(ratio: float | None) -> None:
    """1536 samples against 2560: both know their covariance to 1/√n, together to 3.2 %; here within 4 of those."""
    assembler = noise_scan(ratio)
    kspace = assembler.kspace(KEY)
    assert kspace.noise_is_measured
    flat = kspace.samples[0].reshape(4, -1)
    found = flat @ flat.conj().T / flat.shape[1]
    np.testing.assert_allclose(found, np.eye(4), atol=0.13)
    # Removal of oversampling halves samples and bandwidth alike: neighbours stay uncorrelated.
    assert abs(np.vdot(flat[:, 1:], flat[:, :-1])) / flat.size < 0.06


def test_native_units_come_back() -> None:
    assembler = noise_scan()
    kspace = assembler.kspace(KEY)
    assert kspace.to_native is not None
    native = np.einsum("cw,swyx->scyx", kspace.to_native, kspace.samples)
    # 3e-9 at 1 µs, on average over the coils, is 3e-9 / 8 at 8 µs; 6144 samples: known to 1.3 %.
    assert np.mean(np.abs(native) ** 2) == pytest.approx(3e-9 / IMAGING_US, rel=0.06)
    assert kspace.noise_scale == pytest.approx((3e-9 / IMAGING_US) ** 0.5, rel=0.03)


# --- a level that was not measured ------------------------------------------------------------------------------------


def test_the_level_is_that_of_the_outer_lines() -> None:
    encoding = encoding_of((64, 48, 1))
    receiver = Receiver(np.eye(4) * 0.04)
    bright = np.zeros((4, 1, 48, 64), complex)
    bright[:, 0, 12:36, 16:48] = 1.0  # a square: k-space falls off towards its edges
    sending = Sending(dwell_us=1.0, noise=receiver)
    assembler = assembled(scan_of(encoding), scan_lines(Voxels(bright), encoding, Order(every_line(encoding)), sending))
    kspace = assembler.kspace(KEY)
    assert not kspace.noise_is_measured
    assert kspace.to_native is None
    # The edges of k-space hold some signal too: never too low, and not far too high.
    assert 0.97 * 0.2 < kspace.noise_scale < 1.5 * 0.2


def test_nothing_to_tell_a_level_from_is_one() -> None:
    level = EdgeLevel()
    assert level.level() == 1.0
    level.add(np.zeros((2, 64)), 3)
    assert level.level() == 1.0


def test_one_silent_line_does_not_lower_the_level() -> None:
    level = EdgeLevel()
    rng = np.random.default_rng(0)
    for distance in range(32):
        level.add(rng.standard_normal((4, 64)) * (distance != 31) + 0j, distance)
    assert level.level() == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("noise", [np.zeros((4, 64)), np.ones((4, 3))])
def test_useless_noise_readouts_cost_no_scan(noise: Any) -> None:
    """Zeros, or too few samples to tell four channels apart: the level is estimated, and the report says so."""
    encoding = encoding_of((16, 12, 1))
    lines = scan_lines(Voxels(np.ones((4, 1, 12, 16))), encoding, Order(every_line(encoding)))
    readout = Acquisition(noise, Role.NOISE, ImageKey(0, 0, 0, 0, 0, 0), 0, sample_time_us=4.0)
    assembler = assembled(scan_of(encoding), [readout, *lines])
    assert not assembler.has_noise
    assert not assembler.kspace(KEY).noise_is_measured
