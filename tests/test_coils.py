"""Coil maps against the truth of a phantom, against SigPy's ESPIRiT, and where there are none to be had."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recon.coils import MIN_LINES, estimate_maps
from recon.errors import AcquisitionError, ShapeError
from recon.fourier import to_image, to_kspace


def smooth_coils(n_coils: int, n_y: int, n_x: int) -> Any:
    """Return complex128 (coil, y, x), unit norm over coils: loops around the field of view."""
    y = ((np.arange(n_y) - n_y // 2) / n_y)[:, None]
    x = ((np.arange(n_x) - n_x // 2) / n_x)[None]
    angle = 2 * np.pi * np.arange(n_coils) / n_coils + 0.1
    distance = (x - 0.75 * np.cos(angle)[:, None, None]) + 1j * (y - 0.75 * np.sin(angle)[:, None, None])
    maps = np.exp(1j * angle)[:, None, None] / distance
    return maps / np.sqrt((np.abs(maps) ** 2).sum(0))


def head(n_y: int, n_x: int) -> Any:
    """Return a float64 (y, x) head: a bright rim, a dim interior, ventricles, and one bright lesion."""
    y = ((np.arange(n_y) - n_y // 2) / n_y)[:, None]
    x = ((np.arange(n_x) - n_x // 2) / n_x)[None]

    def ellipse(cy: float, cx: float, ry: float, rx: float) -> Any:
        return ((((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2) < 1).astype(float)

    image = ellipse(0, 0, 0.44, 0.36) - 0.5 * ellipse(0, 0, 0.40, 0.32)
    return (
        image
        - 0.3 * ellipse(-0.05, 0.08, 0.12, 0.05)
        - 0.3 * ellipse(-0.05, -0.08, 0.12, 0.05)
        + 0.3 * ellipse(0.15, 0.1, 0.04, 0.04)
    )


def calibration_of(maps: Any, image: Any, n_lines: int, snr: float = 100.0, seed: int = 0) -> Any:
    """Return complex64 (1, coil, n_lines, x), noise variance 1 a sample, image maximum `snr`."""
    n_y = image.shape[0]
    lines = to_kspace(snr * maps * image, (1,))
    lines = lines[:, n_y // 2 - n_lines // 2 :][:, :n_lines]
    rng = np.random.default_rng(seed)
    noise = (rng.standard_normal(lines.shape) + 1j * rng.standard_normal(lines.shape)) / 2**0.5
    return (lines + noise)[None].astype(np.complex64)


def sine(found: Any, true: Any, where: Any) -> float:
    """Return the root mean square of the sine between found and true maps (coil, y, x)."""
    cosine = np.abs((found.conj() * true).sum(0)) / np.maximum(np.sqrt((np.abs(found) ** 2).sum(0)), 1e-9)
    return float(np.sqrt(np.clip(1 - cosine[where] ** 2, 0, 1).mean()))


@settings(max_examples=12, deadline=None)
@given(
    n_y=st.integers(64, 150),
    n_x=st.integers(64, 150),
    n_coils=st.integers(3, 9),
    n_lines=st.integers(16, 32),
)
def test_maps_are_those_of_the_phantom(n_y: int, n_x: int, n_coils: int, n_lines: int) -> None:
    true, image = smooth_coils(n_coils, n_y, n_x), head(n_y, n_x)
    maps = estimate_maps(calibration_of(true, image, n_lines), n_y).maps
    assert maps.shape == (1, n_coils, n_y, n_x)
    assert maps.dtype == np.complex64
    assert sine(maps[0], true, image > 0) < 0.03
    norm = (np.abs(maps[0]) ** 2).sum(0)
    assert np.allclose(norm[norm > 0], 1, atol=1e-4)
    assert (norm[image > 0] > 0).all()  # the head is never cut


@pytest.mark.parametrize("n_lines", [8, 10, 12])
def test_few_lines_still_give_maps(n_lines: int) -> None:
    true, image = smooth_coils(6, 96, 80), head(96, 80)
    maps = estimate_maps(calibration_of(true, image, n_lines), 96).maps
    assert sine(maps[0], true, image > 0) < 0.12


@pytest.mark.parametrize("snr", [5.0, 20.0])
def test_noise_does_not_cut_the_head(snr: float) -> None:
    true, image = smooth_coils(4, 128, 128), head(128, 128)
    maps = estimate_maps(calibration_of(true, image, 24, snr), 128).maps
    assert (np.abs(maps[0]).sum(0) == 0)[image > 0].mean() < 0.001
    assert sine(maps[0], true, image > 0) < 0.15


def test_the_map_carries_the_signal_of_root_sum_of_squares() -> None:
    true, image = smooth_coils(8, 120, 101), head(120, 101)
    lines = calibration_of(true, image, 120, snr=300.0)
    maps = estimate_maps(lines, 120).maps
    coils = to_image(lines, (2,))
    combined = np.abs((maps.conj() * coils).sum(1))[0]
    rss = np.sqrt((np.abs(coils) ** 2).sum(1))[0]
    assert (combined <= rss * (1 + 1e-4)).all()
    assert combined[image > 0].sum() > 0.995 * rss[image > 0].sum()


def test_as_good_as_sigpy() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sigpy.mri.app import EspiritCalib
    true, image = smooth_coils(4, 64, 64), head(64, 64)
    lines = to_kspace(100 * true * image, (1, 2))
    rng = np.random.default_rng(0)
    lines += (rng.standard_normal(lines.shape) + 1j * rng.standard_normal(lines.shape)) / 2**0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = EspiritCalib(lines.astype(np.complex64), calib_width=24, crop=0, show_pbar=False).run()
    calibration = to_image(lines[:, 20:44], (2,))[None].astype(np.complex64)
    maps = estimate_maps(calibration, 64).maps[0]
    inside = image > 0
    assert sine(maps, other, inside) < 0.03
    assert sine(maps, true, inside) < 1.2 * sine(other, true, inside) + 0.002


def test_one_coil_has_a_map_of_ones() -> None:
    maps = estimate_maps(np.ones((3, 1, 1, 20), np.complex64), 31).maps
    np.testing.assert_array_equal(maps, np.ones((3, 1, 31, 20)))


def test_slices_do_not_touch() -> None:
    true, image = smooth_coils(4, 64, 64), head(64, 64)
    first, second = (calibration_of(true, part, 20, seed=seed) for seed, part in enumerate((image, image[::-1])))
    both = estimate_maps(np.concatenate([first, second]), 64).maps
    np.testing.assert_array_equal(both[1], estimate_maps(second, 64).maps[0])


def test_the_scale_of_strong_signal_does_not_matter() -> None:
    calibration = calibration_of(smooth_coils(4, 64, 70), head(64, 70), 20, snr=1000)
    np.testing.assert_allclose(estimate_maps(4 * calibration, 64).maps, estimate_maps(calibration, 64).maps, atol=1e-3)


@pytest.mark.parametrize("n_lines", [1, MIN_LINES - 1])
def test_too_few_lines_are_refused(n_lines: int) -> None:
    calibration = calibration_of(smooth_coils(4, 64, 64), head(64, 64), n_lines)
    with pytest.raises(AcquisitionError, match=f"{n_lines} lines .* at least {MIN_LINES}"):
        estimate_maps(calibration, 64)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_lines_without_signal_are_refused(value: float) -> None:
    with pytest.raises(AcquisitionError, match="slice 0 hold no signal or no finite"):
        estimate_maps(np.full((1, 4, 24, 64), value, np.complex64), 64)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError):
        estimate_maps(np.ones((4, 24, 64), np.complex64), 64)
    with pytest.raises(ShapeError):
        estimate_maps(np.ones((1, 4, 65, 64), np.complex64), 64)
