"""Where readouts and samples go, which grid the image has and where it lies, against the slow reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recon.errors import AcquisitionError
from recon.placement import (
    check_encoding,
    directions,
    image_columns,
    place_readout,
    place_step,
    stack_geometry,
    to_recon_grid,
    voxel_size,
)
from recon.scan import Acquisition, ImageKey, Limit, Matrix, Role, Size
from tests.reference import KEY, Sending, dft, encoding_of, reference_image

AXIAL_DIRS: dict[str, Any] = {"read_dir": (1, 0, 0), "phase_dir": (0, 1, 0), "slice_dir": (0, 0, 1)}


def noise(shape: tuple[int, ...], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def readout(samples: Any = None, step_1: int = 0, step_2: int = 0, **fields: Any) -> Acquisition:
    return Acquisition(np.ones((2, 8)) if samples is None else samples, Role.IMAGING, KEY, step_1, step_2, **fields)


# --- samples ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_every_sample_lands_on_its_frequency(data: st.DataObject) -> None:
    """Any part of the line, with any discards, read from either end, lies where the whole line has it."""
    n = data.draw(st.integers(4, 17))
    columns = data.draw(st.integers((n + 1) // 2, n))
    first = data.draw(st.integers(0, n // 2))  # an echo holds its centre
    stop = data.draw(st.integers(n // 2 + 1, n))
    pre, post = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    backwards = data.draw(st.booleans())
    # As wide as the image and centred: that is taken for a line whose oversampling was removed.
    assume(not (stop - first == columns and abs(n // 2 - first - columns // 2) <= 1))
    # As many samples as the line has: taken for all of it (test_full_size_readouts_are_centred).
    assume(stop - first + pre + post != n or (first, n - stop) == (pre, post))
    encoding = encoding_of((n, 6, 1), kept=(columns, 6, 1))
    line = noise((2, n))
    samples, fields = Sending(first, stop, pre, post, lambda _: backwards).send(line, (0, 0), np.random.default_rng())
    found = place_readout(readout(samples, **fields), encoding)
    expected = np.zeros_like(line)
    expected[:, first:stop] = line[:, first:stop]
    np.testing.assert_array_equal(found, expected.astype(np.complex64))


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("center", [lambda n: n // 2, lambda n: n - 1 - n // 2, lambda n: 0, lambda n: 65535])
def test_full_size_readouts_are_centred(n: int, backwards: bool, center: Callable[[int], int]) -> None:
    """Scanners differ in what they call the centre of a reversed line, and some send 0: a whole line fits one way."""
    line = noise((2, n))
    sending = Sending(is_reversed=lambda _: backwards, center=center(n))
    samples, fields = sending.send(line, (0, 0), np.random.default_rng())
    found = place_readout(readout(samples, **fields), encoding_of((n, 6, 1), kept=(n // 2, 6, 1)))
    np.testing.assert_array_equal(found, line.astype(np.complex64))


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("backwards", [False, True])
def test_full_size_readouts_lose_their_discards(n: int, backwards: bool) -> None:
    """A line with as many samples as the grid has, the outer ones of them to be discarded, is not moved."""
    line = noise((2, n))
    sending = Sending(2, n - 1, 2, 1, lambda _: backwards)
    samples, fields = sending.send(line, (0, 0), np.random.default_rng())
    found = place_readout(readout(samples, **fields), encoding_of((n, 6, 1)))
    line[:, [0, 1, n - 1]] = 0
    np.testing.assert_array_equal(found, line.astype(np.complex64))


@pytest.mark.parametrize(("n", "columns"), [(16, 8), (17, 9), (18, 9), (15, 8)])
@pytest.mark.parametrize(
    ("backwards", "center"),
    [
        (False, lambda m: m // 2),
        (False, lambda m: 65000),
        (True, lambda m: m // 2),
        (True, lambda m: m - 1 - m // 2),
        (True, lambda m: 65000),
    ],
)
@pytest.mark.parametrize("discards", [(0, 0), (3, 1)])
def test_oversampling_may_be_removed_before_sending(
    n: int, columns: int, backwards: bool, center: Callable[[int], int], discards: tuple[int, int]
) -> None:
    """A line of the image's own width has the image that it would have had with oversampling."""
    encoding = encoding_of((n, 6, 1), kept=(columns, 6, 1))
    image = noise((2, columns))
    pre = discards[1] if backwards else discards[0]
    sending = Sending(0, None, *discards, lambda _: backwards, center(columns) + pre)
    samples, fields = sending.send(dft(image, (1,), inverse=False), (0, 0), np.random.default_rng())
    line = place_readout(readout(samples, **fields), encoding)
    assert line.shape == (2, n)
    found = dft(line, (1,), inverse=True)[:, n // 2 - columns // 2 :][:, :columns]
    np.testing.assert_allclose(found, image, atol=1e-5)  # single precision


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("n_sent", [5, 6])
def test_a_centre_beyond_the_samples_means_centred(n_sent: int, backwards: bool) -> None:
    """As Gadgetron has it, for senders that do not fill the field in."""
    found = place_readout(
        readout(np.ones((1, n_sent)), center_sample=9, is_reversed=backwards), encoding_of((12, 6, 1))
    )
    np.testing.assert_array_equal(np.flatnonzero(found[0]), np.arange(n_sent) + 6 - n_sent // 2)


@pytest.mark.parametrize(
    ("sent", "fields", "reason"),
    [
        (20, {"center_sample": 10}, "20 samples with their centre at 10 do not fit an encoded matrix of 16"),
        (10, {"center_sample": 0}, "do not fit an encoded matrix of 16"),
        (10, {"center_sample": 9}, "do not fit"),
        (16, {"discard_pre": 9, "discard_post": 7}, "9 \\+ 7 samples are to be discarded of a readout of 16"),
        (16, {"discard_pre": 40}, "discarded"),
    ],
)
def test_samples_that_do_not_fit_are_refused(sent: int, fields: dict[str, int], reason: str) -> None:
    with pytest.raises(AcquisitionError, match=reason):
        place_readout(readout(np.ones((1, sent)), **fields), encoding_of((16, 6, 1), kept=(8, 6, 1)))


# --- lines ------------------------------------------------------------------------------------------------------------


@given(st.integers(4, 40), st.integers(1, 12), st.integers(0, 60), st.integers(0, 60))
def test_counters_name_rows(n_y: int, n_z: int, c1: int, c2: int) -> None:
    encoding = encoding_of((8, n_y, n_z), centers=(c1, c2))
    for step_1 in range(max(0, c1 - n_y // 2), c1 - n_y // 2 + n_y):
        kz, ky = place_step(readout(step_1=step_1, step_2=c2), encoding)
        assert (kz, ky) == (n_z // 2, step_1 - c1 + n_y // 2)


def test_partial_fourier_is_placed_by_its_centre() -> None:
    """The example of ISMRMRD's own documentation: counters 0 to 83, centre 28, of 140 rows: rows 42 to 125."""
    encoding = replace(encoding_of((8, 140, 1)), limits={"kspace_encoding_step_1": Limit(0, 83, 28)})
    assert [place_step(readout(step_1=step), encoding)[1] for step in (0, 28, 83)] == [42, 70, 125]


def test_without_limits_the_middle_is_the_centre() -> None:
    encoding = replace(encoding_of((8, 7, 4)), limits={})
    assert place_step(readout(step_1=3, step_2=2), encoding) == (2, 3)
    with pytest.raises(AcquisitionError, match=r"kspace_encode_step_1 is 7; the header limits it to 0\.\.6"):
        place_step(readout(step_1=7), encoding)


@pytest.mark.parametrize(
    ("limit", "step", "reason"),
    [
        (Limit(0, 9, 5), 10, "is 10; the header limits it to 0..9"),
        (Limit(4, 9, 5), 3, "limits it to 4..9"),
        (Limit(0, 30, 5), 12, "12 with centre 5 falls on row 12 of a matrix of 10"),
        (Limit(0, 30, 20), 3, "falls on row -12"),
    ],
)
def test_lines_off_the_grid_are_refused(limit: Limit, step: int, reason: str) -> None:
    encoding = replace(encoding_of((8, 10, 1)), limits={"kspace_encoding_step_1": limit})
    with pytest.raises(AcquisitionError, match=reason):
        place_step(readout(step_1=step), encoding)


def test_partitions_off_the_slab_are_refused() -> None:
    with pytest.raises(AcquisitionError, match="kspace_encode_step_2 is 1"):
        place_step(readout(step_1=2, step_2=1), encoding_of((8, 6, 1)))


# --- encodings --------------------------------------------------------------------------------------------------------

GOOD = encoding_of((16, 8, 1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trajectory": "radial"}, "'radial'; only 'cartesian'"),
        ({"trajectory": "spiral"}, "only 'cartesian'"),
        ({"trajectory": "epi"}, "only 'cartesian'"),
        ({"encoded_matrix": Matrix(16, 0, 1)}, "encoded matrix is \\(16, 0, 1\\)"),
        ({"recon_matrix": Matrix(16, 9000, 1)}, "recon matrix"),
        ({"encoded_matrix": Matrix(16, 3, 1)}, "at least 4×4"),
        ({"encoded_fov_mm": Size(10, -1, 5)}, "encoded field of view"),
        ({"recon_fov_mm": Size(10, float("nan"), 5)}, "recon field of view"),
        ({"recon_fov_mm": Size(10, 10, float("inf"))}, "recon field of view"),
    ],
)
def test_impossible_encodings_are_refused(changes: dict[str, Any], reason: str) -> None:
    check_encoding(GOOD)
    check_encoding(replace(GOOD, trajectory="Cartesian"))
    with pytest.raises(AcquisitionError, match=reason):
        check_encoding(replace(GOOD, **changes))


# --- the image's grid -------------------------------------------------------------------------------------------------


@given(st.data())
def test_the_wanted_grid_is_reached_as_the_sums_say(data: st.DataObject) -> None:
    matrix, kept, wanted = [], [], []
    for low, high in ((4, 14), (4, 14), (1, 6)):
        n = data.draw(st.integers(low, high))
        matrix.append(n)
        kept.append(data.draw(st.integers((n + 1) // 2, n)))
        wanted.append(data.draw(st.integers(max(1, kept[-1] - 3), kept[-1] + 4)))
    if matrix[2] == 1:
        kept[2] = wanted[2] = 1
    encoding = encoding_of(tuple(matrix), tuple(wanted), tuple(kept))  # type: ignore[arg-type]
    image = noise((1, matrix[2], matrix[1], matrix[0]))
    columns = image_columns(encoding)
    assert columns == kept[0]
    cropped = image[..., matrix[0] // 2 - columns // 2 :][..., :columns]
    found = to_recon_grid(cropped[0].astype(np.complex64), encoding)
    expected = reference_image(dft(image, (1, 2, 3), inverse=False), encoding)
    np.testing.assert_allclose(np.abs(found), expected, atol=2e-5)  # single precision, values of up to 5


@given(st.integers(4, 20), st.integers(4, 20), st.integers(4, 30), st.integers(4, 30), st.floats(0.3, 1))
def test_voxel_size_spans_what_was_kept(n_x: int, n_y: int, w_x: int, w_y: int, share: float) -> None:
    encoding = replace(GOOD, encoded_matrix=Matrix(n_x, n_y, 1), recon_matrix=Matrix(w_x, w_y, 1))
    encoding = replace(encoding, recon_fov_mm=Size(*(share * mm for mm in encoding.encoded_fov_mm)))
    size = voxel_size(encoding)
    columns = image_columns(encoding)
    assert size.x * w_x == pytest.approx(columns * encoding.encoded_fov_mm.x / n_x)
    assert abs(size.y * w_y - encoding.recon_fov_mm.y) <= encoding.encoded_fov_mm.y / n_y  # rounded to whole voxels
    assert size.z == encoding.recon_fov_mm.z


# --- where it lies ----------------------------------------------------------------------------------------------------


def first_of(index: int, position: tuple[float, float, float], **dirs: Any) -> Acquisition:
    return Acquisition(
        np.ones((1, 4)), Role.IMAGING, ImageKey(0, index, 0, 0, 0, 0), 0, position_mm=position, **(AXIAL_DIRS | dirs)
    )


def test_the_position_is_voxel_n_half() -> None:
    encoding = encoding_of((16, 9, 1), wanted=(10, 11, 1), kept=(8, 8, 1))
    firsts = [first_of(k, (1.0, 2.0, 7.0 * k)) for k in range(3)]
    geometry = stack_geometry(firsts, encoding)
    assert geometry.is_known
    dx, dy = 8 * 2.0 / 10, 8 * 2.5 / 11
    assert geometry.spacing_mm == pytest.approx((7.0, dy, dx))
    assert geometry.thickness_mm == 3.0
    np.testing.assert_allclose(geometry.origin_mm[1] + [5 * dx, 5 * dy, 0], [1, 2, 7], atol=1e-9)


@pytest.mark.parametrize("towards", [1, -1])
def test_partitions_follow_the_slice_direction(towards: int) -> None:
    encoding = encoding_of((8, 8, 6), wanted=(8, 8, 8), kept=(8, 8, 4), voxel_mm=(1, 1, 3))
    geometry = stack_geometry([first_of(0, (0.0, 0.0, 10.0), slice_dir=(0, 0, towards))], encoding)
    np.testing.assert_allclose(geometry.origin_mm[:, 2], 10 + towards * (np.arange(8) - 4) * 1.5)
    assert geometry.spacing_mm[0] == geometry.thickness_mm == 1.5


@pytest.mark.parametrize(
    "dirs",
    [
        {"read_dir": (0, 0, 0), "phase_dir": (0, 0, 0), "slice_dir": (0, 0, 0)},
        {"phase_dir": (1, 0, 0)},
        {"read_dir": (2, 0, 0)},
        {"read_dir": (float("nan"), 0, 0)},
        {"read_dir": (float("inf"), 0, 0)},
    ],
)
def test_directions_that_are_none_are_said_to_be_unknown(dirs: dict[str, Any]) -> None:
    geometry = stack_geometry([first_of(0, (1.0, 2.0, 3.0), **dirs)], GOOD)
    assert not geometry.is_known
    assert (geometry.row_dir, geometry.col_dir) == ((1, 0, 0), (0, 1, 0))


def test_a_slice_direction_alone_may_be_missing() -> None:
    for missing in ((0.0, 0.0, 0.0), (float("nan"),) * 3):
        read, phase, along, is_known = directions(first_of(0, (0.0, 0.0, 0.0), slice_dir=missing))
        assert is_known
        np.testing.assert_array_equal(along, np.cross(read, phase))


def test_directions_of_single_precision_are_made_right() -> None:
    c, s = np.float32(np.cos(0.4)) * 1.005, np.float32(np.sin(0.4))
    read, phase, _, is_known = directions(first_of(0, (0, 0, 0), read_dir=(c, s, 0), phase_dir=(-s, c, 0.004)))
    assert is_known
    assert np.linalg.norm(read) == pytest.approx(1)
    assert np.linalg.norm(phase) == pytest.approx(1)
    assert read @ phase == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("positions", [[(0.0, 0.0, 0.0)] * 3, [(float("nan"), 0.0, 0.0)] * 3])
def test_slices_on_top_of_each_other_are_laid_out(positions: list[tuple[float, float, float]]) -> None:
    geometry = stack_geometry([first_of(k, p) for k, p in enumerate(positions)], GOOD)
    assert not geometry.is_known
    centres = geometry.origin_mm[:, 2]
    np.testing.assert_allclose(centres, [-3, 0, 3])


def test_one_slice_at_the_isocentre_is_known() -> None:
    geometry = stack_geometry([first_of(4, (0.0, 0.0, 0.0))], GOOD)
    assert geometry.is_known
    assert geometry.spacing_mm[0] == 3.0
