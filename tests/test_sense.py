"""SENSE: the operator, exact recovery, and what the reconstruction must never be worse than."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recon.coils import estimate_maps
from recon.errors import ShapeError
from recon.fourier import to_image, to_kspace
from recon.prior import SignalPrior, learn_prior
from recon.scan import CoilMaps, KSpace
from recon.sense import (
    SenseOperator,
    add_unexplained,
    calibration_image,
    cg_sense,
    root_sum_of_squares,
    unexplained,
    zero_filled,
)
from tests.test_coils import head, smooth_coils

SHARED = Path(__file__).resolve().parents[2] / "shared"


def complex_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Return complex64 noise of variance 1."""
    return ((rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / 2**0.5).astype(np.complex64)


def every(n_ky: int, step: int, n_central: int) -> Any:
    """Return uint16 (ky): each `step`-th line and the central ones, once."""
    averages = np.zeros(n_ky, np.uint16)
    averages[::step] = 1
    averages[n_ky // 2 - n_central // 2 :][:n_central] = 1
    return averages


def scan(maps: Any, image: Any, averages: Any, n_central: int = 20, noise: float = 1.0, seed: int = 0) -> KSpace:
    """Return k-space of `image` (slice, y, x) seen by `maps` (coil, y, x), at `averages` (ky)."""
    lines = to_kspace(maps[None] * image[:, None], (2,))
    n_ky = image.shape[1]
    spread = noise / np.sqrt(np.maximum(averages, 1))[:, None]
    lines = lines + spread * complex_normal(np.random.default_rng(seed), lines.shape)
    lines = (lines * (averages > 0)[:, None]).astype(np.complex64)
    calibration = lines[:, :, n_ky // 2 - n_central // 2 :][:, :, :n_central] if n_central else None
    return KSpace(lines, np.repeat(averages[None], len(image), 0), 1.0, True, calibration)


def error(found: Any, true: Any) -> float:
    """Return the normalised root-mean-square error of the magnitude."""
    return float(np.linalg.norm(np.abs(found) - np.abs(true)) / np.linalg.norm(true))


def flat_prior(shape: tuple[int, int, int], variance: float, n_phase: int = 1) -> SignalPrior:
    """Return a prior that favours no place and no detail."""
    return SignalPrior(np.full(shape, variance), np.ones(shape[1] if n_phase == 1 else shape[:2]))


sizes = st.integers(4, 33)


@settings(max_examples=30, deadline=None)
@given(n_coils=st.integers(1, 4), phase=st.lists(sizes, min_size=1, max_size=2), n_x=st.integers(1, 5), seed=sizes)
def test_the_operator_and_its_adjoint_agree(n_coils: int, phase: list[int], n_x: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, phase).astype(np.float32)
    operator = SenseOperator(complex_normal(rng, (n_coils, n_x, *phase)), weights)
    image, lines = complex_normal(rng, (n_x, *phase)), complex_normal(rng, (n_coils, n_x, *phase))
    forward = operator.forward(image)
    assert forward.dtype == np.complex64
    left, right = np.vdot(lines, forward), np.vdot(operator.adjoint(lines), image)
    assert abs(left - right) < 1e-4 * (1 + np.linalg.norm(forward) * np.linalg.norm(lines))
    np.testing.assert_allclose(
        operator.normal(image), operator.adjoint(forward), atol=1e-4 * np.abs(forward).max() * 10
    )


@settings(max_examples=10, deadline=None)
@given(n_y=st.integers(40, 71), n_x=st.integers(30, 41), factor=st.floats(0.1, 8), seed=st.integers(0, 99))
def test_linear_in_the_samples_under_one_prior(n_y: int, n_x: int, factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = CoilMaps(smooth_coils(4, n_y, n_x)[None])
    one = scan(maps.maps[0], 50 * head(n_y, n_x)[None], every(n_y, 2, 16), 16)
    other = replace(one, samples=one.samples * complex_normal(rng, (n_y, 1)))
    both = replace(one, samples=one.samples + np.float32(factor) * other.samples)
    prior = flat_prior((1, n_y, n_x), 100.0)
    first, second, together = (cg_sense(k, maps, prior, n_iterations=100) for k in (one, other, both))
    expected = first + np.float32(factor) * second
    assert np.linalg.norm(together - expected) < 5e-3 * np.linalg.norm(expected)


@settings(max_examples=10, deadline=None)
@given(n_y=st.integers(64, 101), n_x=st.integers(60, 71), step=st.integers(2, 3), n_coils=st.integers(6, 10))
def test_recovers_an_image_without_noise(n_y: int, n_x: int, step: int, n_coils: int) -> None:
    true = 1000 * head(n_y, n_x)[None] * np.exp(1j * np.linspace(0, 2, n_x))
    maps = smooth_coils(n_coils, n_y, n_x)
    kspace = scan(maps, true, every(n_y, step, 20), noise=0)
    found = cg_sense(kspace, CoilMaps(maps[None]), flat_prior((1, n_y, n_x), 1e8), 200, tolerance=1e-6)
    assert found.dtype == np.complex64
    assert np.linalg.norm(found - true) < 0.01 * np.linalg.norm(true)


def test_doubled_data_give_a_doubled_image() -> None:
    maps = smooth_coils(6, 96, 80)
    kspace = scan(maps, 200 * head(96, 80)[None], every(96, 3, 20))
    doubled = replace(kspace, samples=2 * kspace.samples, calibration=2 * kspace.calibration)
    held = CoilMaps(maps[None])
    once, twice = cg_sense(kspace, held), cg_sense(doubled, held)
    assert np.linalg.norm(twice - 2 * once) < 0.03 * np.linalg.norm(twice)


@pytest.mark.parametrize("shape", [(96, 80), (95, 81)])
def test_better_than_zero_filling_and_near_the_noise(shape: tuple[int, int]) -> None:
    true = 60 * head(*shape)[None]
    maps = smooth_coils(8, *shape)
    kspace = scan(maps, true, every(shape[0], 3, 20))
    found = cg_sense(kspace, estimate_maps(kspace.calibration, shape[0]))
    assert error(found, true) < 0.4 * error(zero_filled(kspace, None), true)
    full = scan(maps, true, every(shape[0], 1, 20))
    assert error(found, true) < 2.5 * error(root_sum_of_squares(full), true)


def test_fully_measured_it_is_the_coil_combination() -> None:
    true = 30 * head(90, 81)[None]
    kspace = scan(smooth_coils(6, 90, 81), true, every(90, 1, 24), 24)
    maps = estimate_maps(kspace.calibration, 90)
    found = cg_sense(kspace, maps)
    np.testing.assert_array_equal(found, zero_filled(kspace, maps))
    assert error(found, true) <= error(root_sum_of_squares(kspace), true)


def test_measured_lines_stay_as_they_are() -> None:
    kspace = scan(np.ones((1, 64, 50)), 50 * head(64, 50)[None], every(64, 2, 16), 16)
    found = cg_sense(kspace, CoilMaps(np.ones((1, 1, 64, 50))))
    lines = to_kspace(found[:, None], (2,))
    where = kspace.measured[0]
    np.testing.assert_allclose(lines[:, :, where], kspace.samples[:, :, where], atol=1e-3)
    assert np.abs(lines[:, :, ~where]).max() > 1  # and the others are predicted


@pytest.mark.parametrize("snr", [4, 40])
def test_one_coil_is_not_worse_than_zero_filling(snr: int) -> None:
    true = snr * head(96, 90)[None]
    kspace = scan(np.ones((1, 96, 90)), true, every(96, 2, 24), 24)
    assert error(cg_sense(kspace, CoilMaps(np.ones((1, 1, 96, 90)))), true) < error(zero_filled(kspace, None), true)


def test_partial_fourier_is_not_worse_than_zero_filling() -> None:
    true = 60 * head(96, 80)[None]
    maps = smooth_coils(6, 96, 80)
    averages = every(96, 2, 20)
    averages[:24] = 0
    kspace = scan(maps, true, averages)
    found = cg_sense(kspace, estimate_maps(kspace.calibration, 96))
    assert np.isfinite(found).all()
    assert error(found, true) < 0.7 * error(zero_filled(kspace, None), true)


def test_averages_count() -> None:
    true = 20 * head(80, 80)[None]
    maps = smooth_coils(4, 80, 80)
    averages = every(80, 2, 20)
    many = averages * np.uint16(9)
    found = [cg_sense(scan(maps, true, a, seed=3), CoilMaps(maps[None])) for a in (averages, many)]
    assert error(found[1], true) < 0.6 * error(found[0], true)


def test_a_small_lesion_survives() -> None:
    true = 40 * head(128, 128)
    spot = np.zeros_like(true, bool)
    spot[50:53, 70:73] = True
    maps = smooth_coils(8, 128, 128)
    held = CoilMaps(maps[None])
    averages = every(128, 3, 24)
    without, lesion = (
        np.abs(cg_sense(scan(maps, image[None], averages, 24), held))[0] for image in (true, true + 12 * spot)
    )
    assert (lesion - without)[
        spot
    ].mean() > 0.7 * 12  # at a contrast of 12 noise units and R = 3; zero filling keeps 0.63


@pytest.mark.parametrize("n_slices", [1, 5, 6])
def test_two_phase_encodings_agree_with_one_where_kz_is_full(n_slices: int) -> None:
    shape = (n_slices, 64, 45)
    true = 50 * head(64, 45)[None] * np.linspace(1, 0.5, n_slices)[:, None, None]
    maps = smooth_coils(5, 64, 45)
    flat = scan(maps, true, every(64, 2, 20))
    held = CoilMaps(np.repeat(maps[None], n_slices, 0))
    deep = replace(flat, samples=to_kspace(flat.samples, (0,)), slice_encoded=True)
    np.testing.assert_allclose(zero_filled(deep, held), zero_filled(flat, held), atol=1e-3)
    np.testing.assert_allclose(root_sum_of_squares(deep), root_sum_of_squares(flat), atol=1e-3)
    found = [
        cg_sense(kspace, held, flat_prior(shape, 400.0, n_phase), n_iterations=60)
        for kspace, n_phase in ((flat, 1), (deep, 2))
    ]
    assert np.linalg.norm(found[0] - found[1]) < 5e-3 * np.linalg.norm(found[0])
    learned = [error(cg_sense(kspace, held), true) for kspace in (flat, deep)]
    assert learned[1] < 1.1 * learned[0]


def test_two_undersampled_phase_encodings() -> None:
    n_z, n_y, n_x = 24, 60, 40
    z = ((np.arange(n_z) - n_z // 2) / n_z)[:, None, None]
    true = 80 * head(n_y, n_x) * (np.abs(z) < 0.4) * (1 + z)
    coils = smooth_coils(8, n_y, n_x)[None] * np.exp(1j * z[:, None] * np.arange(8)[None, :, None, None])
    coils = coils * (1 + z[:, None] * (-1.0) ** np.arange(8)[None, :, None, None])
    coils = coils / np.sqrt((np.abs(coils) ** 2).sum(1, keepdims=True))
    full = to_kspace(coils * true[:, None], (0, 2))
    full = full + complex_normal(np.random.default_rng(0), full.shape)
    averages = np.zeros((n_z, n_y), np.uint16)
    averages[::2, ::2] = 1
    averages[4:20, 20:40] = 1
    samples = (full * (averages > 0)[:, None, :, None]).astype(np.complex64)
    kspace = KSpace(samples, averages, 1.0, True, to_image(full[:, :, 20:40], (0,)), slice_encoded=True)
    held = CoilMaps(coils)
    assert error(cg_sense(kspace, held), true) < 0.5 * error(zero_filled(kspace, held), true)


def test_without_calibration_lines_a_prior_is_learned_all_the_same() -> None:
    true = 60 * head(96, 80)[None]
    maps = smooth_coils(8, 96, 80)
    kspace = scan(maps, true, every(96, 2, 0), 0)
    held = CoilMaps(maps[None])
    assert error(cg_sense(kspace, held), true) < 0.5 * error(zero_filled(kspace, held), true)


def test_an_empty_scan_gives_an_empty_image() -> None:
    kspace = KSpace(np.zeros((1, 2, 32, 32), np.complex64), every(32, 2, 8)[None], 1.0, True)
    np.testing.assert_array_equal(cg_sense(kspace, CoilMaps(np.ones((1, 2, 32, 32)))), np.zeros((1, 32, 32)))


def test_other_grids_are_refused() -> None:
    kspace = scan(np.ones((1, 32, 32)), head(32, 32)[None], every(32, 2, 8), 8)
    maps = CoilMaps(np.ones((1, 1, 32, 32)))
    with pytest.raises(ShapeError, match="coil maps"):
        cg_sense(kspace, CoilMaps(np.ones((1, 2, 32, 32))))
    with pytest.raises(ShapeError, match="coil maps"):
        zero_filled(kspace, CoilMaps(np.ones((1, 1, 32, 31))))
    with pytest.raises(ShapeError, match="prior variance"):
        cg_sense(kspace, maps, flat_prior((1, 32, 31), 1.0))
    with pytest.raises(ShapeError, match="prior spectrum"):
        cg_sense(kspace, maps, flat_prior((1, 32, 32), 1.0, n_phase=2))
    with pytest.raises(ShapeError, match="prior spectrum"):
        SignalPrior(np.ones((1, 32, 32)), np.ones(31))


def test_the_prior_is_positive_and_knows_where_detail_is() -> None:
    kspace = scan(smooth_coils(6, 96, 80), 100 * head(96, 80)[None], every(96, 3, 20))
    maps = estimate_maps(kspace.calibration, 96)
    prior = learn_prior(kspace, calibration_image(kspace, maps), resolution=0.5)
    assert prior.variance.dtype == prior.spectrum.dtype == np.float32
    assert (prior.variance > 0).all()
    assert (prior.spectrum > 0).all()
    assert np.argmax(prior.spectrum) == 48
    inside = head(96, 80) > 0
    assert prior.variance[0][inside].mean() > 5 * np.median(prior.variance[0][~inside])


@pytest.mark.real_data
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real scans are not here")
@pytest.mark.parametrize(
    ("name", "step", "n_central", "psnr", "ssim"),
    [  # the least that is right: BART 0.8.00 ecalib -m1 and pics -l2 at its best λ of 0.001, 0.01 and 0.05
        ("pulseq_brain_16ch", 2, 24, 34.37, 0.9654),
        ("pulseq_brain_16ch", 4, 16, 25.37, 0.8119),
        ("gpunufft_brain_4ch", 2, 24, 41.72, 0.9875),
        ("gpunufft_brain_4ch", 4, 16, 28.18, 0.8679),
    ],
)
def test_not_worse_than_bart_on_real_scans(name: str, step: int, n_central: int, psnr: float, ssim: float) -> None:
    sys.path.insert(0, str(SHARED / "tools"))
    try:
        import score  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    path = str(SHARED / "data" / "kspace" / f"{name}.h5")
    raw = score.kspace(path)
    n_ky = raw.shape[2]
    averages = every(n_ky, step, n_central)
    outermost = np.flatnonzero(averages)[[0, 1, -2, -1]]
    edge = np.abs(raw[:, :, outermost, : raw.shape[3] // 16]) ** 2
    sigma = float(np.sqrt(np.median(edge) / np.log(2)))
    samples = to_image((raw * (averages > 0)[:, None] / sigma).astype(np.complex64), (3,))
    calibration = samples[:, :, n_ky // 2 - n_central // 2 :][:, :, :n_central]
    kspace = KSpace(samples, averages[None], sigma, False, calibration)
    found = cg_sense(kspace, estimate_maps(calibration, n_ky))
    result = score.score(score.reference(path), np.abs(found))
    assert result["psnr"] >= psnr
    assert result["ssim"] >= ssim


def _second_source(share: float, step: int, noise: float = 1.0) -> tuple[KSpace, CoilMaps, Any, Any]:
    """Return a scan whose coils also see a bright disc that their maps know nothing of; and the right image."""
    maps, image = smooth_coils(6, 64, 48), 60 * head(64, 48)
    y, x = np.arange(64)[:, None], np.arange(48)
    disc = share * 60 * (np.hypot(y - 30, x - 24) < 6)
    turned = maps[::-1] * np.exp(2j * np.pi * np.arange(6) / 6)[:, None, None]  # the coils in another order
    own = maps * image + turned * disc
    both = scan(np.ones_like(maps[:1]), np.zeros((1, 64, 48)), every(64, step, 20))
    lines = to_kspace(own[None], (2,)) + noise * complex_normal(np.random.default_rng(1), (1, 6, 64, 48))
    lines = (lines * (both.averages > 0)[:, None, :, None]).astype(np.complex64)
    kspace = KSpace(lines, both.averages, 1.0, True, lines[:, :, 22:42])
    return kspace, CoilMaps(maps[None]), np.sqrt((np.abs(own) ** 2).sum(0))[None], disc[None] > 0


@pytest.mark.parametrize("step", [1, 2])
def test_what_maps_leave_out_is_added(step: int) -> None:
    kspace, maps, right, disc = _second_source(0.8, step)
    image = cg_sense(kspace, maps)
    power = unexplained(kspace, maps, image, np.ones(1))
    whole = add_unexplained(image, power)
    inside = np.abs(np.abs(image) - right)[disc].mean()
    assert np.abs(np.abs(whole) - right)[disc].mean() < (0.3 if step == 1 else 0.75) * inside
    np.testing.assert_allclose(np.angle(whole[disc]), np.angle(image[disc]), atol=1e-5)
    doubled = replace(kspace, samples=2 * kspace.samples)
    np.testing.assert_allclose(
        unexplained(doubled, maps, 2 * image, 2 * np.ones(1)), 4 * power, rtol=1e-3, atol=1e-3 * power.max()
    )


def test_where_maps_explain_all_nothing_is_added_but_a_little_noise() -> None:
    kspace, maps, _, _ = _second_source(0.0, 2)
    image = cg_sense(kspace, maps)
    power = unexplained(kspace, maps, image, np.ones(1))
    assert power.min() >= 0
    assert power.mean() < 0.5  # variances of the noise, of 2.5 that were taken away
    bright = np.abs(image) > 30
    assert np.abs(np.abs(add_unexplained(image, power)) / np.abs(image) - 1)[bright].mean() < 1e-3


def test_one_coil_leaves_nothing_out_and_nothing_stays_nothing() -> None:
    one = np.ones((1, 1, 24, 16), np.complex64)
    samples = complex_normal(np.random.default_rng(0), one.shape)
    kspace = KSpace(samples, np.ones((1, 24), np.uint16), 1.0, True)
    image = to_image(samples[:, 0], (1,))
    assert not unexplained(kspace, CoilMaps(one), image, np.ones(1)).any()
    empty = np.zeros((1, 24, 16), np.complex64)
    assert not add_unexplained(empty, np.ones(empty.shape, np.float32)).any()
