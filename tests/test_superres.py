"""Super-resolution keeps what was measured, says what it adds, and refuses what it was not made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from recon.arrays import Array
from recon.errors import AcquisitionError, ModelError, ShapeError
from recon.fine_grid import FineAxis, band_axis, kept_axis, profile_axis, profile_weights
from recon.fourier import resize_centred, to_kspace
from recon.head_likeness import NAMES, Likeness, describe_volume
from recon.scan import Geometry, Provenance, Volume
from recon.style import render, unrender
from recon.superres import fine_geometry, noise_level, place, refusal, super_resolve
from recon.superres_card import Refiner, SuperCard, read_super_card

CARD = SuperCard("fake", "1", "0" * 64, "0" * 64, ("t1", "t2"), (8, 64), 0.5, 5)


class WildNetwork:
    """Adds whatever it likes, then projects as the graph does."""

    backend = "fake"

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the placed image and noise without what the measurement determines."""
        placed = inputs["place_y"] @ inputs["image"] @ inputs["place_x"].T
        wild = self.rng.standard_normal(placed.shape).astype(np.float32)
        known = inputs["basis_y"].T @ wild @ inputs["basis_x"]
        return {"placed": placed, "added": wild - inputs["basis_y"] @ known @ inputs["basis_x"].T}

    def close(self) -> None:
        """Nothing is held."""


REFINER = Refiner(CARD, WildNetwork(), Likeness(np.zeros((1, len(NAMES))), np.ones(len(NAMES)), 1e9))


def volume(shape: tuple[int, int, int] = (6, 20, 17), **provenance: Any) -> Volume:
    """Return a smooth blob with a little noise, measured."""
    rng = np.random.default_rng(1)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    data = np.exp(-2 * (y**2 + x**2)) * (1 + 0.2 * z) + 0.01 * rng.standard_normal(shape)
    origin = np.stack([[1.0, 2.0, 4.0 * k] for k in range(shape[0])])
    geometry = Geometry(origin, (1, 0, 0), (0, 1, 0), (4.0, 1.0, 1.2), 4.0)
    made = replace(Provenance("network", "scanside", ("noise prewhitened",)), **provenance)
    return Volume(data.astype(np.float32), geometry, made)


def measured_part(fine: Array, shape: tuple[int, int]) -> Array:
    """Return k-space of slices (…, y, x) where a grid of `shape` measured it, at that grid's size of numbers."""
    kspace = to_kspace(fine.astype(np.complex128), (-2, -1)) / 2
    return resize_centred(resize_centred(kspace, fine.ndim - 2, shape[0]), fine.ndim - 1, shape[1])


@given(st.integers(5, 40), st.integers(5, 40))
@settings(max_examples=20, deadline=None)
def test_measured_k_space_is_put_back_whatever_the_network_says(ny: int, nx: int) -> None:
    image = np.random.default_rng(ny * nx).standard_normal((1, ny, nx)).astype(np.float32)
    y, x = band_axis(ny), band_axis(nx)
    out = WildNetwork().run(
        {"image": image[None], "place_y": y.place, "place_x": x.place, "basis_y": y.basis, "basis_x": x.basis}
    )
    fine = (out["placed"] + out["added"])[0, 0, : y.size, : x.size]
    wanted = to_kspace(image[0].astype(np.complex128), (0, 1))
    difference = np.linalg.norm(measured_part(fine, (ny, nx)) - wanted) / np.linalg.norm(wanted)
    assert difference < 1e-5  # float32: rounding of some 2 n products


@pytest.mark.parametrize("axis", [band_axis(12), band_axis(13), profile_axis(7, 3), kept_axis(10)])
def test_a_fine_axis_is_filled_and_its_basis_orthonormal(axis: FineAxis) -> None:
    assert len(axis.place) % 8 == 0
    assert len(axis.place) == len(axis.basis) == len(axis.phase) >= axis.size
    np.testing.assert_allclose(axis.basis.T @ axis.basis, np.eye(axis.basis.shape[1]), atol=2e-6)
    assert not axis.basis[axis.size :].any()


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_mean_of_thin_slices_is_the_thick_one(factor: int) -> None:
    weights, axis = profile_weights(9, factor), profile_axis(9, factor)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights @ axis.place[: axis.size], np.eye(9), atol=1e-5)
    beyond = np.eye(axis.size) - axis.basis[: axis.size] @ axis.basis[: axis.size].T
    np.testing.assert_allclose(weights @ beyond, 0, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 5])
def test_slices_are_made_two_to_four_times_thinner(factor: int) -> None:
    with pytest.raises(ShapeError):
        profile_weights(4, factor)


def test_a_second_volume_that_says_what_it_is() -> None:
    first = volume()
    made = super_resolve(first, REFINER, "t1")
    assert made.volume.data.shape == (6, 40, 34)
    assert not made.volume.provenance.is_measured
    assert made.volume.provenance.method == "super-resolution"
    assert made.volume.provenance.steps[0] == "noise prewhitened"
    assert made.volume.provenance.model_sha256 == CARD.sha256
    assert first.provenance.is_measured
    assert 0 < made.share < 1
    np.testing.assert_allclose(
        made.volume.data - made.estimated, place(first.data, band_axis(20), band_axis(17)), atol=1e-5
    )
    wanted = to_kspace(first.data.astype(np.complex128), (1, 2))
    found = measured_part(made.volume.data, (20, 17))
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-5


def test_thin_slices_agree_with_both_measurements() -> None:
    first = volume()
    made = super_resolve(first, REFINER, "t2", n_thin=3)
    assert made.volume.data.shape == (18, 40, 34)
    assert made.factors == (3, 2, 2)
    thick = np.tensordot(profile_weights(6, 3), made.volume.data.astype(np.float64), 1)
    wanted = to_kspace(first.data.astype(np.complex128), (1, 2))
    assert np.linalg.norm(measured_part(thick, (20, 17)) - wanted) / np.linalg.norm(wanted) < 1e-5


@pytest.mark.parametrize("n_thin", [1, 2, 3])
def test_fine_voxels_lie_where_the_measured_ones_do(n_thin: int) -> None:
    geometry = volume().geometry
    fine = fine_geometry(geometry, (20, 17), n_thin)
    assert fine.spacing_mm == pytest.approx((4 / n_thin, 0.5, 0.6))
    assert fine.n_slices == 6 * n_thin
    # the centres of both grids, n // 2, are one point; so is the middle of each thick slice
    for before, after, n, size in ((geometry, fine, (10, 8), (20, 17)),):
        centre = before.origin_mm[0] + np.array([1.2 * n[1], 1.0 * n[0], 0])
        thin = after.origin_mm[:n_thin].mean(0) + np.array([0.6 * size[1], 0.5 * size[0], 0])
        np.testing.assert_allclose(thin, centre, atol=1e-9)


def test_a_point_stays_where_it_was() -> None:
    for shape in ((20, 17), (21, 16)):
        image = np.zeros((1, *shape), np.float32)
        image[0, shape[0] // 2 + 3, shape[1] // 2 - 2] = 1
        fine = place(image, band_axis(shape[0]), band_axis(shape[1]))[0]
        peak = np.unravel_index(np.argmax(fine), fine.shape)
        assert peak == (shape[0] + 6, shape[1] - 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"contrast": "dwi"}, "the contrast is dwi"),
        ({"volume": volume(is_measured=False)}, "synthetic already"),
        ({"volume": volume((6, 6, 20))}, "matrix"),
        ({"volume": volume((3, 20, 20)), "n_thin": 2}, "3 slices"),
        ({"volume": replace(volume(), data=np.full((6, 20, 17), np.nan))}, "finite"),
        ({"volume": replace(volume(), data=np.zeros((6, 20, 17)))}, "empty"),
        ({"refiner": replace(REFINER, card=replace(CARD, most_noise=1e-6))}, "noise"),
        ({"refiner": replace(REFINER, likeness=replace(REFINER.likeness, limit=0.0))}, "unlike"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], words: str) -> None:
    asked = {"volume": volume(), "refiner": REFINER, "contrast": "t1", **change}
    assert words in refusal(**asked)
    with pytest.raises(AcquisitionError, match="super-resolution is refused"):
        super_resolve(**asked)


def test_slices_with_gaps_are_not_made_thinner() -> None:
    apart = replace(volume().geometry, thickness_mm=2.0)
    assert "do not touch" in refusal(replace(volume(), geometry=apart), REFINER, "t1", 2)
    assert not refusal(replace(volume(), geometry=apart), REFINER, "t1")


def test_noise_is_measured_where_there_is_signal() -> None:
    rng = np.random.default_rng(3)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    image = np.exp(-(y**2) - x**2)[None] + 0.03 * rng.standard_normal((4, 64, 64))
    assert noise_level(image) == pytest.approx(0.03, rel=0.1)
    assert noise_level(np.zeros((1, 8, 8))) == 0


def test_noise_and_discs_are_unlike_ellipses_with_folds() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]

    def head(k: int) -> Array:
        folds = ndimage.gaussian_filter(np.random.default_rng(k).standard_normal((96, 96)), 2)
        return (np.hypot(y / 0.8, x / 0.65) < 1) * (0.6 + 0.2 * folds / folds.std()).clip(0.1, 1)

    known = np.concatenate([describe_volume(head(k)[None], (2.0, 2.0), 0.01) for k in range(8)])
    likeness = Likeness(known, np.maximum(known.std(0), 0.05), 2.0)
    assert likeness.distance(describe_volume(head(99)[None], (2.0, 2.0), 0.01)) < likeness.limit
    for other in (np.abs(rng.standard_normal((96, 96))), (np.hypot(y, x) < 0.7).astype(float), np.ones((96, 96))):
        assert likeness.distance(describe_volume(other[None], (2.0, 2.0), 0.01)) > likeness.limit


@given(st.floats(0, 1), st.integers(5, 24), st.integers(5, 24))
@settings(max_examples=15, deadline=None)
def test_the_style_can_be_undone(strength: float, ny: int, nx: int) -> None:
    first = volume((2, ny, nx))
    scale = float(np.percentile(first.data, 99.5))
    styled = render(first, strength, scale)
    assert not styled.provenance.is_measured
    assert "style" in styled.provenance.steps[-1]
    # float32 between the two: half a unit in the last place, enlarged where the curve is flattest
    np.testing.assert_allclose(unrender(styled, strength, scale), first.data, atol=2e-6 * scale)


def test_a_style_of_no_strength_changes_nothing() -> None:
    first = volume()
    np.testing.assert_allclose(render(first, 0.0, 1.0).data, first.data, atol=1e-6)
    with pytest.raises(AcquisitionError, match="0 to 1"):
        render(first, 1.5, 1.0)
    with pytest.raises(AcquisitionError, match="empty"):
        render(first, 0.5, 0.0)


def test_a_card_names_what_it_lacks() -> None:
    with pytest.raises(ModelError, match="trained_range"):
        read_super_card({"name": "n"})
