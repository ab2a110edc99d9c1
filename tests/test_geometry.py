"""Where voxels lie: from slice centres to origins and back, affines, and how slices are turned for display."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from edge.orientation import direction_letters, display_ops
from recon.errors import AcquisitionError, ShapeError
from recon.fourier import to_image, to_kspace
from recon.scan import Geometry
from tests.letter import LANDMARKS, letter_intensity, letter_volume

angles = st.tuples(*[st.floats(-180, 180)] * 3)
sizes = st.integers(1, 9)
lengths = st.floats(0.2, 20)
points = st.tuples(*[st.floats(-300, 300)] * 3)


def directions(euler: tuple[float, float, float]) -> tuple[Any, Any]:
    """Return a row and a column direction at right angles."""
    matrix = Rotation.from_euler("xyz", euler, degrees=True).as_matrix()
    return matrix[:, 0], matrix[:, 1]


@given(angles, points, st.tuples(sizes, sizes, sizes), st.tuples(lengths, lengths, lengths))
def test_centres_there_and_back(
    euler: tuple[float, float, float],
    centre: tuple[float, float, float],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> None:
    row, col = directions(euler)
    normal = np.cross(row, col)
    n_slices, n_y, n_x = shape
    centres = np.array(centre) + np.arange(n_slices)[:, None] * normal * spacing[0]
    geometry = Geometry.from_centres(centres, row, col, (n_y, n_x), spacing, spacing[0] / 2)
    assert geometry.n_slices == n_slices
    np.testing.assert_allclose(geometry.normal, normal, atol=1e-9)
    affine = geometry.affine()
    for index in range(n_slices):
        found = affine @ [n_x // 2, n_y // 2, index, 1]
        np.testing.assert_allclose(found[:3], centres[index], atol=1e-6)
        corner = affine @ [n_x - 1, n_y - 1, index, 1]
        expected = geometry.origin_mm[index] + row * (n_x - 1) * spacing[2] + col * (n_y - 1) * spacing[1]
        np.testing.assert_allclose(corner[:3], expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing[::-1], rtol=1e-6)
    assert np.linalg.det(affine[:3, :3]) > 0


def test_backward_stack_has_a_left_handed_affine() -> None:
    centres = np.array([[0, 0, -6.0 * k] for k in range(4)])
    geometry = Geometry.from_centres(centres, (1, 0, 0), (0, 1, 0), (5, 4), (6, 1, 2), 5)
    np.testing.assert_array_equal(geometry.affine()[:3, 2], [0, 0, -6])
    assert geometry.normal == (0, 0, 1)


@pytest.mark.parametrize("n", [8, 9])
def test_the_centre_of_k_space_is_the_centre_of_the_slice(n: int) -> None:
    """A point at the excited centre has flat k-space; its image must lie on the voxel that the geometry puts there."""
    image = to_image(np.ones((n, n), np.complex64), (0, 1))
    y, x = np.unravel_index(np.argmax(abs(image)), image.shape)
    geometry = Geometry.from_centres(np.array([[7.0, -3, 2]]), (0, 1, 0), (0, 0, -1), (n, n), (5, 1.5, 2), 5)
    np.testing.assert_allclose((geometry.affine() @ [x, y, 0, 1])[:3], [7, -3, 2], atol=1e-12)


def test_a_shift_of_the_centre_is_a_ramp_in_k_space() -> None:
    """Moving the slice's centre by whole voxels moves the letter the other way, through k-space and back."""
    shape, spacing = (72, 48), (5.0, 3.0, 4.0)
    here = Geometry.from_centres(np.zeros((1, 3)), (1, 0, 0), (0, 1, 0), shape, spacing, 5)
    there = Geometry.from_centres(np.array([[8.0, 9, 0]]), (1, 0, 0), (0, 1, 0), shape, spacing, 5)
    kspace = to_kspace(letter_volume(here, shape)[0].astype(np.complex128), (0, 1))
    ky, kx = np.meshgrid(np.arange(72) - 36, np.arange(48) - 24, indexing="ij")
    moved = to_image(kspace * np.exp(2j * np.pi * (ky * 3 / 72 + kx * 2 / 48)), (0, 1))
    np.testing.assert_allclose(moved.real, letter_volume(there, shape)[0], atol=1e-6)


def test_wrong_geometry_is_refused() -> None:
    origin = np.zeros((2, 3))
    with pytest.raises(ShapeError, match="origin_mm"):
        Geometry(np.zeros(3), (1, 0, 0), (0, 1, 0), (1, 1, 1), 1)
    for row, col in (((1, 0, 0), (1, 0, 0)), ((2, 0, 0), (0, 1, 0)), ((0, 0, 0), (0, 0, 0))):
        with pytest.raises(AcquisitionError, match="right angles"):
            Geometry(origin, row, col, (1, 1, 1), 1)
    for spacing in ((0.0, 1, 1), (1, -1, 1), (1, 1, float("nan"))):
        with pytest.raises(AcquisitionError, match="voxel size"):
            Geometry(origin, (1, 0, 0), (0, 1, 0), spacing, 1)
    with pytest.raises(AcquisitionError, match="finite"):
        Geometry(np.full((1, 3), np.nan), (1, 0, 0), (0, 1, 0), (1, 1, 1), 1)


AXES = np.eye(3)
STORED = [
    (sign_a * AXES[a], sign_b * AXES[b])
    for a in range(3)
    for b in range(3)
    if a != b
    for sign_a in (1, -1)
    for sign_b in (1, -1)
]
SHOWN = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}
# Two points of the patient with different intensity; where each lies on the picture (right of, below) the other.
TOWARDS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


@pytest.mark.parametrize("stored", STORED, ids=lambda v: f"row {v[0].astype(int)} col {v[1].astype(int)}")
def test_every_stored_orientation_is_shown_alike(stored: tuple[Any, Any]) -> None:
    """All 24 ways to store a plane give the picture that a radiologist expects, checked with the phantom itself."""
    row, col = stored
    shape = (41, 50)
    geometry = Geometry.from_centres(np.array([[1.0, 2.0, 3.0]]), row, col, shape, (5.0, 4.0, 4.0), 5.0)
    ops = display_ops(geometry)
    assert (ops.left, ops.right, ops.top, ops.bottom) == SHOWN[ops.plane]
    shown = ops.apply(letter_volume(geometry, shape)[0])
    # what the patient looks like on a picture whose right and bottom are as promised
    y, x = np.indices(shown.shape)
    where = np.asarray((1.0, 2.0, 3.0)) + 4.0 * (
        (x - anchor(shown.shape[1], ops.flip_x))[..., None] * np.array(TOWARDS[ops.right])
        + (y - anchor(shown.shape[0], ops.flip_y))[..., None] * np.array(TOWARDS[ops.bottom])
    )
    np.testing.assert_array_equal(shown, letter_intensity(where).astype(np.float32))
    assert ops.spacing((1.0, 2.0)) == ((2.0, 1.0) if ops.transpose else (1.0, 2.0))


def anchor(size: int, flipped: bool) -> int:
    """Return where voxel size // 2 lies after a flip."""
    return size - 1 - size // 2 if flipped else size // 2


@given(angles)
def test_oblique_slices_are_shown_upright(euler: tuple[float, float, float]) -> None:
    row, col = directions(euler)
    ops = display_ops(Geometry(np.zeros((1, 3)), tuple(row), tuple(col), (1, 1, 1), 1))
    opposite = str.maketrans("LRAPSI", "RLPAIS")
    assert (ops.left.translate(opposite), ops.top.translate(opposite)) == (ops.right, ops.bottom)
    assert ops.right
    assert ops.bottom
    assert set(ops.right).isdisjoint(ops.left)


def test_letters_of_directions() -> None:
    assert direction_letters(np.array([1.0, 0, 0])) == "L"
    assert direction_letters(np.array([0.1, -0.99, 0.1])) == "A"
    assert direction_letters(np.array([0, 0.6, -0.8])) == "IP"


def test_unknown_orientation_is_left_alone() -> None:
    geometry = Geometry(np.zeros((1, 3)), (-1, 0, 0), (0, 1, 0), (1, 1, 1), 1, is_known=False)
    ops = display_ops(geometry)
    image = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(ops.apply(image), image)
    assert (ops.left, ops.right, ops.top, ops.bottom) == ("", "", "", "")


def test_landmarks_lie_where_they_say() -> None:
    assert LANDMARKS["left"][0][0] > 0
    assert LANDMARKS["anterior"][0][1] < 0
    assert LANDMARKS["superior"][0][2] > 0
