"""Coils against the textbook, and noise against the covariance it was drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from recon.errors import AcquisitionError, ShapeError
from recon.receive import CENTRE_MM, Loop, draw_noise, helmet, loop_field, noise_covariance, sensitivities


@pytest.mark.parametrize("radius", [30.0, 75.0])
@pytest.mark.parametrize("distance", [0.0, 20.0, 80.0, 300.0])
def test_on_its_axis_a_loop_has_the_textbook_field(radius: float, distance: float) -> None:
    normal = np.array([2.0, -1.0, 2.0]) / 3
    centre = np.array([10.0, -5.0, 40.0])
    loop = Loop(tuple(centre), tuple(normal), radius)
    field = loop_field(loop, centre + distance * normal, n_segments=400)
    expected = 2 * np.pi * 0.1 * radius**2 / (radius**2 + distance**2) ** 1.5  # µT for 1 A, mm
    assert field == pytest.approx(expected * normal, rel=1e-3)
    coarse = loop_field(loop, centre + distance * normal)
    assert np.linalg.norm(coarse) == pytest.approx(expected, rel=0.01)


def test_the_field_has_no_sources() -> None:
    loop = Loop((0, 0, 0), (0, 0, 1), 50)
    point, h = np.array([20.0, 35.0, 25.0]), 0.01
    divergence = sum(
        (loop_field(loop, point + h * e)[i] - loop_field(loop, point - h * e)[i]) / (2 * h)
        for i, e in enumerate(np.eye(3))
    )
    assert divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n_coils", [1, 2, 4, 8, 16, 32])
def test_helmets_surround_the_head(n_coils: int) -> None:
    loops = helmet(n_coils)
    assert len(loops) == n_coils
    centre = np.stack([sensitivities(loops, np.asarray(CENTRE_MM))])
    assert np.sqrt((np.abs(centre) ** 2).sum()) == pytest.approx(1)
    rim = np.array([[80, 18, 20], [-80, 18, 20], [0, 105, 20], [0, -75, 30], [0, 20, 90]], float)
    seen = np.sqrt((np.abs(sensitivities(loops, rim)) ** 2).sum(axis=0))
    assert seen.min() > 0.15
    assert seen.max() < 8


def test_each_coil_sees_its_own_side_best() -> None:
    for loop in helmet(8):
        near = np.asarray(CENTRE_MM) + 0.6 * (np.asarray(loop.centre_mm) - CENTRE_MM)
        far = np.asarray(CENTRE_MM) - 0.6 * (np.asarray(loop.centre_mm) - CENTRE_MM)
        values = np.abs(sensitivities((loop,), np.stack([near, far])))[0]
        assert values[0] > 2 * values[1]


@pytest.mark.parametrize("n_coils", [0, 33])
def test_other_numbers_of_coils_are_refused(n_coils: int) -> None:
    with pytest.raises(AcquisitionError, match="1 to 32"):
        helmet(n_coils)


def test_points_must_have_three_coordinates() -> None:
    with pytest.raises(ShapeError, match="points"):
        loop_field(Loop((0, 0, 0), (0, 0, 1), 5), np.zeros((4, 2)))


@pytest.mark.parametrize("n_coils", [1, 8, 32])
def test_the_covariance_is_realised(n_coils: int) -> None:
    covariance = noise_covariance(helmet(n_coils), 5)
    assert np.allclose(covariance, covariance.conj().T)
    assert np.linalg.eigvalsh(covariance).min() > 0
    assert np.trace(covariance).real == pytest.approx(n_coils)
    noise = draw_noise(np.random.default_rng(0), covariance, 60000, sigma=0.5)
    found = noise @ noise.conj().T / noise.shape[1] / (2 * 0.5**2)
    assert noise.dtype == np.complex64
    assert np.abs(found - covariance).max() < 0.03  # six standard errors of 60000 samples
    if n_coils > 1:
        assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 0.1  # the coils are correlated
