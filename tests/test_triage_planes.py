"""The planes that triage networks see: the same head, however it lies in the volume, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recon.arrays import Array
from recon.errors import ModelError, ShapeError
from recon.scan import Geometry
from triage.card import Calibration, Decision, read_calibration, read_triage_card
from triage.likeness import describe, distance
from triage.preprocess import SIZE, prepare
from triage.score import plane_scores

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


def head_at(points: Array) -> Array:
    """An ellipsoidal head with a bright spot on the patient's left, in front, at LPS points (3, …)."""
    x, y, z = points
    radius = np.sqrt((x / 70) ** 2 + (y / 88) ** 2 + (z / 80) ** 2)
    spot = np.exp(-((x - 35) ** 2 + (y + 30) ** 2 + (z - 10) ** 2) / (2 * 7.0**2))
    return np.clip((1 - radius) * 40, 0, 1) * (100 + 20 * np.exp(-(x**2) / 50) + 150 * spot)


def volume(
    n: tuple[int, int, int], spacing: tuple[float, float, float], row: Array, col: Array
) -> tuple[Array, Geometry]:
    normal = np.cross(row, col)
    places = (np.arange(n[0]) - (n[0] - 1) / 2) * spacing[0]
    geometry = Geometry.from_centres(places[:, None] * normal, row, col, n[1:], spacing, spacing[0])
    grid = np.stack(np.meshgrid(*(np.arange(each) for each in n), indexing="ij"), -1).astype(float)
    points = geometry.origin_mm[:, None, None, :] + grid[..., 2:] * spacing[2] * row + grid[..., 1:2] * spacing[1] * col
    return head_at(np.moveaxis(points, -1, 0)).astype(np.float32), geometry


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([(1, 1), (-1, 1), (1, -1), (-1, -1)]),
    st.booleans(),
    st.sampled_from([(5, 160, 180), (6, 151, 147), (1, 200, 200)]),
    st.floats(-15, 15),
)
def test_a_head_looks_the_same_however_it_is_stored(
    signs: tuple[int, int], is_turned: bool, n: tuple[int, int, int], degrees: float
) -> None:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    row, col = signs[0] * np.array([c, s, 0]), signs[1] * np.array([-s, c, 0])
    if is_turned:
        row, col = col, row
    data, geometry = volume(n, (5.0, 1.3, 1.3), row, col)
    planes = prepare(data, geometry)
    assert planes.inputs.shape == (n[0], 2, *SIZE)
    assert planes.plane == "axial"
    assert planes.is_usable.all()
    wanted = prepare(*volume(n, (5.0, 1.0, 1.0), *map(np.array, AXIAL))).inputs
    middle = n[0] // 2
    here = middle if signs[0] * signs[1] * (-1 if is_turned else 1) > 0 else n[0] - 1 - middle
    error = np.abs(planes.inputs[here] - wanted[middle])
    assert np.median(error[wanted[middle] > 0.5]) < 0.06
    left = planes.inputs[here, 0]
    y, x = np.unravel_index(left.argmax(), left.shape)
    assert (y, x) == pytest.approx((SIZE[0] / 2 - 30, SIZE[1] / 2 + 35), abs=7)
    np.testing.assert_array_equal(planes.inputs[:, 1], planes.inputs[:, 0, :, ::-1])


@pytest.mark.parametrize(
    ("row", "col"), [AXIAL, ((-1, 0, 0), (0, 0, -1)), ((0, 1, 0), (0, 0, -1)), ((0, -1, 0), (1, 0, 0))]
)
@pytest.mark.parametrize("spacing", [(5.0, 1.2, 0.9), (1.5, 1.5, 1.5)])
def test_maps_find_their_way_back(row: Array, col: Array, spacing: tuple[float, float, float]) -> None:
    data, geometry = volume((20 if spacing[0] > 3 else 90, 133, 140), spacing, np.array(row), np.array(col))
    planes = prepare(data, geometry)
    back = planes.to_voxels(planes.inputs[:, 0])
    assert back.shape == data.shape
    assert planes.is_usable.sum() > 5
    inside = (data > 90) & (back > 0.6)  # planes with hardly any head are empty, the edge of the head is coarse
    assert inside.sum() > 0.5 * (data > 90).sum()
    assert np.corrcoef(back[inside], data[inside])[0, 1] > (0.5 if planes.plane == "sagittal" else 0.85)
    peaks = [np.array(np.unravel_index(each.argmax(), each.shape)) * spacing for each in (back, data)]
    assert np.linalg.norm(peaks[0] - peaks[1]) < (6 if spacing[0] < 3 else 12)


def test_a_mask_lies_where_its_image_does() -> None:
    data, geometry = volume((3, 150, 160), (5.0, 1.4, 1.3), np.array([0.0, -1, 0]), np.array([1.0, 0, 0]))
    planes = prepare(data, geometry)
    mask = planes.to_planes((data > 150).astype(np.float32)) > 0.5
    assert mask.any()
    assert planes.inputs[:, 0][mask].min() > 1.2


def test_planes_say_how_they_lie() -> None:
    coronal, geometry = volume((9, 90, 90), (6.0, 2.0, 2.0), np.array([1.0, 0, 0]), np.array([0, 0, -1.0]))
    planes = prepare(coronal, geometry)
    assert planes.plane == "coronal"
    assert planes.slice_of is not None
    thin, geometry = volume((90, 90, 90), (2.0, 2.0, 2.0), np.array([1.0, 0, 0]), np.array([0, 0, -1.0]))
    planes = prepare(thin, geometry)
    assert planes.plane == "axial"
    assert planes.is_slab
    assert planes.slice_of is None
    assert planes.distance_mm == pytest.approx(4)


def test_nothing_to_see_is_not_usable() -> None:
    _, geometry = volume((3, 64, 64), (5.0, 3.0, 3.0), *map(np.array, AXIAL))
    planes = prepare(np.zeros((3, 64, 64)), geometry)
    assert not planes.is_usable.any()
    assert not planes.inputs.any()
    with pytest.raises(ShapeError):
        prepare(np.zeros((2, 64, 64)), geometry)
    with pytest.raises(ShapeError):
        planes.to_voxels(np.zeros((3, 64, 64)))


def test_brightness_and_scale_do_not_matter() -> None:
    data, geometry = volume((4, 120, 120), (5.0, 1.8, 1.8), *map(np.array, AXIAL))
    one, two = prepare(data, geometry), prepare(1e-4 * data, geometry)
    np.testing.assert_allclose(one.inputs, two.inputs, atol=1e-4)
    np.testing.assert_allclose(describe(one), describe(two), atol=1e-2)


def test_a_score_follows_the_most_suspicious_place() -> None:
    logits = np.full((3, 1, 40, 40), -6.0)
    logits[1, 0, 10:17, 20:27] = 4
    logits[2, 0, 10, 20] = 9
    scores = plane_scores(logits)
    assert scores[1] == pytest.approx(4, abs=1e-3)
    assert scores[0] < -5
    assert scores[2] < -3
    with pytest.raises(ShapeError):
        plane_scores(logits[:, 0])


def test_distance_is_one_where_features_scatter_as_trained() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(0, 1, (6, 6))
    features = rng.normal(0, 1, (4000, 6)) @ mix + 3
    found = distance(features, features.mean(0), np.linalg.inv(np.cov(features.T)))
    assert (found**2).mean() == pytest.approx(1, rel=0.01)
    assert distance(features[:1] + 100, features.mean(0), np.linalg.inv(np.cov(features.T)))[0] > 10
    with pytest.raises(ShapeError):
        distance(features[:, :3], features.mean(0), np.eye(6))


def card() -> dict[str, object]:
    decision = {"slope": 1.0, "offset": 0.0, "threshold": 0.5}
    flair = {"evidence": "real", "slice": decision, "exam": decision, "ood_limit": 2.0}
    return {
        "name": "a", "version": "1", "sha256": "0" * 64, "finding": "infarct", "plane": "axial", "step_mm": 1.0,
        "size": list(SIZE), "contrasts": {"flair": flair}, "calibration": {"sha256": "0" * 64},
    }  # fmt: skip


def test_a_card_is_read_or_says_what_is_wrong() -> None:
    assert read_triage_card(card()).contrasts["flair"].one_slice.probability(0.0) == 0.5
    assert Decision(2.0, -1.0, 0.5).probability(0.5) == 0.5
    for name in card():
        with pytest.raises(ModelError, match=name):
            read_triage_card({key: value for key, value in card().items() if key != name})
    with pytest.raises(ModelError, match="finding"):
        read_triage_card({**card(), "finding": "tumor"})
    with pytest.raises(ModelError, match="cannot be read"):
        read_triage_card({**card(), "size": 3})


def test_a_calibration_is_read_or_says_what_is_missing() -> None:
    n = 4
    arrays = {
        "flair.score": np.zeros(n), "flair.is_positive": np.zeros(n, bool), "flair.is_exam": np.zeros(n, bool),
        "flair.is_simulated": np.zeros(n, bool), "flair.area_mm2": np.zeros(n), "flair.group": np.arange(n),
        "flair.ood_mean": np.zeros(3), "flair.ood_precision": np.eye(3),
    }  # fmt: skip
    found: Calibration = read_calibration(arrays, "flair")
    assert not found.score.flags.writeable
    with pytest.raises(ModelError, match="t1"):
        read_calibration(arrays, "t1")
    with pytest.raises(ShapeError):
        read_calibration({**arrays, "flair.ood_mean": np.zeros(2)}, "flair")
