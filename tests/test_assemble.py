"""Readouts to k-space: places, averages, completion, calibration lines, and what is refused without harm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recon.assemble import Assembler
from recon.errors import AcquisitionError, ShapeError
from recon.reconstruct import sense_coils
from recon.scan import Acquisition, Encoding, ImageKey, KSpace, Limit, Role
from tests.reference import (
    JUNK,
    KEY,
    SCAN_ID,
    Order,
    Sending,
    Voxels,
    assembled,
    coloured,
    dft,
    encoding_of,
    every_line,
    head_of_blobs,
    masked,
    random_voxels,
    scan_lines,
    scan_of,
)

# Samples go through two single-precision transforms of a few dozen samples each: 1e-6 of the largest value.
SINGLE = 1e-5

FLAT = encoding_of((16, 12, 1), kept=(8, 12, 1))


def native(kspace: KSpace) -> Any:
    """Return the lines in the receiver's units, complex64 (slice, coil, ky, x)."""
    if kspace.to_native is not None:
        return np.einsum("cw,swyx->scyx", kspace.to_native, kspace.samples)
    return kspace.samples * np.float32(kspace.noise_scale)


def expected_lines(kspace: Any, encoding: Encoding, is_resolved: bool = True) -> Any:
    """Return what assembly should give of complex (coil, kz, ky, kx): (slice, coil, ky, x), x without oversampling."""
    m = encoding.encoded_matrix
    columns = round(m.x * encoding.recon_fov_mm.x / encoding.encoded_fov_mm.x)
    lines = dft(kspace, (3,), inverse=True)[..., m.x // 2 - columns // 2 :][..., :columns]
    if is_resolved:
        lines = dft(lines, (1,), inverse=True)
    return np.moveaxis(lines, 0, 1)


def close(found: Any, true: Any, tolerance: float = SINGLE) -> None:
    np.testing.assert_allclose(found, true, rtol=0, atol=tolerance * np.abs(true).max())


def keys_of(assembler: Assembler, acquisitions: Iterable[Acquisition]) -> list[list[ImageKey]]:
    """Return what `add` told for each readout that completed something."""
    return [keys for keys in map(assembler.add, acquisitions) if keys]


# --- lines in their places --------------------------------------------------------------------------------------------


@given(st.data())
def test_any_scan_is_assembled_as_the_sums_say(data: st.DataObject) -> None:
    """Sizes odd and even, oversampling, part of the readout, reversed lines, any centre counter, lines left out."""
    n_x, n_y = data.draw(st.integers(6, 17)), data.draw(st.integers(4, 13))
    n_z = data.draw(st.sampled_from([1, 1, 2, 5]))
    columns = data.draw(st.integers((n_x + 1) // 2, n_x))
    encoding = encoding_of(
        (n_x, n_y, n_z),
        kept=(columns, n_y, n_z),
        centers=(data.draw(st.integers(n_y // 2, 40)), data.draw(st.integers(n_z // 2, 9))),
    )
    first = data.draw(st.integers(0, 2))  # at least 6 samples, and never the image's width about its centre
    if n_x - first == columns:
        first = 0
    thing = random_voxels(encoding, 2, data.draw(st.integers(0, 99)))
    places = data.draw(st.permutations(every_line(encoding)))
    places = places[: data.draw(st.integers(1, len(places)))]
    bits = data.draw(st.integers(0, 3))
    sending = Sending(first, None, 3 * (bits & 1), bits & 2, lambda place: sum(place) % 2 == 1)
    if first and first == sending.pre + sending.post:  # as many samples as a whole line: taken for one
        sending = replace(sending, pre=0, post=0)
    kspace = assembled(scan_of(encoding), scan_lines(thing, encoding, Order(places), sending), early=False).kspace(KEY)
    measured = masked(thing.kspace(encoding), places, slice(first, None))
    close(native(kspace), expected_lines(measured, encoding, not kspace.slice_encoded))
    if n_z == 1:
        found = kspace.averages
        expected = np.zeros((n_z, n_y), int)
        for place in places:
            expected[place] = 1
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(kspace.measured, expected > 0)


def test_averages_are_averaged() -> None:
    """Three noisy averages of each line, some lines with a fourth: the mean, and how many went into it."""
    encoding = replace(FLAT, limits=FLAT.limits | {"average": Limit(0, 3, 0)})
    things = [random_voxels(encoding, seed=seed) for seed in range(4)]
    acquisitions = []
    for average, thing in enumerate(things):
        places = every_line(encoding) if average < 3 else [(0, 2), (0, 7)]
        acquisitions += scan_lines(thing, encoding, Order(places, average=average))
    kspace = assembled(scan_of(encoding), acquisitions, early=False).kspace(KEY)
    lines = np.stack([thing.kspace(encoding) for thing in things])
    mean = lines[:3].mean(0)
    for ky in (2, 7):
        mean[:, 0, ky] = lines[:, :, 0, ky].mean(0)
    close(native(kspace), expected_lines(mean, encoding))
    counts = np.full((1, 12), 3)
    counts[0, [2, 7]] = 4
    np.testing.assert_array_equal(kspace.averages, counts)


def test_averaging_halves_the_power_of_the_noise() -> None:
    encoding = encoding_of((32, 32, 1))
    receiver = coloured(2)
    sending = Sending(noise=receiver)
    empty = Voxels(np.zeros((2, 1, 32, 32)))
    rng = np.random.default_rng(5)
    acquisitions = receiver.readouts(rng, 64, 32, 4.0)
    for average in range(2):
        order = Order(every_line(encoding), average=average)
        acquisitions += scan_lines(empty, encoding, order, sending, seed=average)
    kspace = assembled(scan_of(encoding), acquisitions, early=False).kspace(KEY)
    # 2048 complex samples: their power is known to 2.2 %, the covariance to about as much.
    assert np.mean(np.abs(kspace.samples) ** 2) == pytest.approx(0.5, rel=0.12)


def test_images_are_told_apart_by_their_counters() -> None:
    encodings = (FLAT, FLAT)
    keys = [
        ImageKey(0, 0, 0, 0, 0, 0),
        ImageKey(1, 0, 0, 0, 0, 0),
        ImageKey(0, 1, 0, 0, 0, 0),
        ImageKey(0, 0, 1, 0, 0, 0),
        ImageKey(0, 0, 0, 1, 0, 0),
        ImageKey(0, 0, 0, 0, 1, 0),
        ImageKey(0, 0, 0, 0, 0, 1),
    ]
    scans = [
        scan_lines(random_voxels(FLAT, seed=at), FLAT, Order(every_line(FLAT), key, fields={"segment": at % 3}))
        for at, key in enumerate(keys)
    ]
    interleaved = [lines[row] for row in range(12) for lines in scans]
    assembler = assembled(scan_of(*encodings), interleaved, early=False)
    assert assembler.open_keys() == sorted(keys)
    for at, key in enumerate(keys):
        close(native(assembler.kspace(key)), expected_lines(random_voxels(FLAT, seed=at).kspace(FLAT), FLAT))
        assert assembler.n_lines(key) == 12


def test_the_same_readouts_give_the_same_bits() -> None:
    lines = scan_lines(random_voxels(FLAT), FLAT, Order(every_line(FLAT)), Sending(noise=coloured(3)))
    one, two = (assembled(scan_of(FLAT), lines, early=early).kspace(KEY).samples for early in (True, False))
    np.testing.assert_array_equal(one, two)


def test_what_is_no_image_data_changes_nothing() -> None:
    lines = scan_lines(random_voxels(FLAT), FLAT, Order(every_line(FLAT)))
    plain = assembled(scan_of(FLAT), lines).kspace(KEY)
    junk = replace(lines[3], samples=np.full((3, 16), JUNK), role=Role.OTHER)
    shapes = replace(junk, samples=np.full((9, 5), np.nan))  # navigators may have any shape
    mixed = assembled(scan_of(FLAT), [junk, shapes, *lines[:6], junk, *lines[6:], shapes])
    np.testing.assert_array_equal(mixed.kspace(KEY).samples, plain.samples)


# --- three dimensions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_y", "n_z"), [(12, 6), (11, 5)])
def test_a_full_slab_has_its_slices_resolved(n_y: int, n_z: int) -> None:
    encoding = encoding_of((16, n_y, n_z))
    thing = random_voxels(encoding)
    kspace = assembled(scan_of(encoding), scan_lines(thing, encoding, Order(every_line(encoding)))).kspace(KEY)
    assert not kspace.slice_encoded
    close(native(kspace), expected_lines(thing.kspace(encoding), encoding))
    assert kspace.measured.all()


def test_a_slab_undersampled_along_ky_alone_has_its_slices_resolved() -> None:
    encoding = encoding_of((16, 12, 6))
    thing = random_voxels(encoding)
    places = [place for place in every_line(encoding) if place[1] % 2 == 0]
    kspace = assembled(scan_of(encoding), scan_lines(thing, encoding, Order(places))).kspace(KEY)
    assert not kspace.slice_encoded
    close(native(kspace), expected_lines(masked(thing.kspace(encoding), places), encoding))
    np.testing.assert_array_equal(kspace.measured, np.tile(np.arange(12) % 2 == 0, (6, 1)))


@pytest.mark.parametrize(
    "keeps",
    [
        lambda kz, ky: kz % 2 == 0 and ky % 2 == 0,
        lambda kz, ky: kz % 2 == 0,
        lambda kz, ky: ((kz - 3) / 3) ** 2 + ((ky - 6) / 6) ** 2 <= 1,
    ],
    ids=["both", "kz alone", "elliptical"],
)
def test_a_slab_undersampled_along_kz_stays_encoded(keeps: Any) -> None:
    encoding = encoding_of((16, 12, 6))
    thing = random_voxels(encoding)
    places = [place for place in every_line(encoding) if keeps(*place)]
    kspace = assembled(scan_of(encoding), scan_lines(thing, encoding, Order(places))).kspace(KEY)
    assert kspace.slice_encoded
    close(native(kspace), expected_lines(masked(thing.kspace(encoding), places), encoding, is_resolved=False))
    for place in every_line(encoding):
        assert kspace.measured[place] == (place in places)


def test_slice_partial_fourier_is_resolved() -> None:
    encoding = encoding_of((16, 12, 6), centers=(6, 1))
    thing = random_voxels(encoding)
    places = [place for place in every_line(encoding) if place[0] >= 2]
    kspace = assembled(scan_of(encoding), scan_lines(thing, encoding, Order(places))).kspace(KEY)
    assert not kspace.slice_encoded
    close(native(kspace), expected_lines(masked(thing.kspace(encoding), places), encoding))


# --- when an image is complete ----------------------------------------------------------------------------------------


def slices(n: int, encoding: Encoding = FLAT, **order: Any) -> list[list[Acquisition]]:
    """Return the lines of `n` slices, each ended by its flag."""
    return [
        scan_lines(
            random_voxels(encoding, seed=at),
            encoding,
            Order(every_line(encoding), ImageKey(0, at, 0, 0, 0, 0), **order),
        )
        for at in range(n)
    ]


def test_the_last_line_of_a_slice_completes_it() -> None:
    scans = slices(3)
    assembler = Assembler(scan_of(FLAT))
    order = [scans[at][row] for row in range(12) for at in (2, 0, 1)]
    assert keys_of(assembler, order) == [[ImageKey(0, at, 0, 0, 0, 0)] for at in (2, 0, 1)]


def test_without_early_nothing_is_complete() -> None:
    assembler = Assembler(scan_of(FLAT), early=False)
    assert keys_of(assembler, [line for lines in slices(2) for line in lines]) == []
    assert len(assembler.open_keys()) == 2


def test_a_slice_waits_for_its_last_average() -> None:
    encoding = replace(FLAT, limits=FLAT.limits | {"average": Limit(0, 2, 0)})
    assembler = Assembler(scan_of(encoding))
    for average in range(3):
        lines = scan_lines(random_voxels(encoding), encoding, Order(every_line(encoding), average=average))
        assert keys_of(assembler, lines) == ([[KEY]] if average == 2 else [])
    assert not assembler.late


@pytest.mark.parametrize("flag", ["last_in_repetition", "last_in_measurement"])
def test_a_slab_waits_for_its_repetition(flag: str) -> None:
    """Flags of the last line in each partition's slice end no slab."""
    encoding = encoding_of((16, 12, 4))
    thing = random_voxels(encoding)
    assembler = Assembler(scan_of(encoding))
    for kz in range(4):
        places = [(kz, ky) for ky in range(12)]
        lines = scan_lines(thing, encoding, Order(places, last={"last_in_slice": True, flag: kz == 3}))
        assert keys_of(assembler, lines) == ([[KEY]] if kz == 3 else [])


def test_the_end_of_a_repetition_completes_its_images_in_order_of_slices() -> None:
    assembler = Assembler(scan_of(FLAT))
    lines = [line for repetition in (0, 1) for at in (2, 0, 1) for line in repeated(at, repetition)]
    assert keys_of(assembler, lines[:-1]) == []
    last = replace(lines[-1], last_in_repetition=True)
    assert assembler.add(last) == [ImageKey(0, at, 0, 0, 1, 0) for at in range(3)]
    assert assembler.add(replace(last, role=Role.OTHER, last_in_repetition=False, last_in_measurement=True)) == [
        ImageKey(0, at, 0, 0, repetition, 0) for at in range(3) for repetition in (0, 1)
    ]


def repeated(at: int, repetition: int) -> list[Acquisition]:
    """Return a slice of a repetition without any flag."""
    key = ImageKey(0, at, 0, 0, repetition, 0)
    return scan_lines(random_voxels(FLAT), FLAT, Order(every_line(FLAT), key, last={}))


def test_a_navigator_may_be_what_ends_a_slice() -> None:
    assembler = Assembler(scan_of(FLAT))
    assert keys_of(assembler, repeated(0, 0)) == []
    navigator = Acquisition(np.ones((1, 3)), Role.OTHER, KEY, 0, last_in_slice=True)
    assert assembler.add(navigator) == [KEY]


def test_late_lines_are_noted_and_end_others() -> None:
    one, two = slices(2)
    assembler = Assembler(scan_of(FLAT))
    for line in one[:6]:
        assembler.add(line)
    assert assembler.add(replace(one[6], last_in_slice=True)) == [KEY]
    assembler.discard(KEY)
    for line in [*one[7:], *two[:-1]]:
        assert assembler.add(line) == []
    assert assembler.late == {KEY}
    late = replace(one[-1], last_in_measurement=True)
    assert assembler.add(late) == [ImageKey(0, 1, 0, 0, 0, 0)]
    assert assembler.open_keys() == [ImageKey(0, 1, 0, 0, 0, 0)]


def test_a_flag_on_a_line_of_calibration_completes_no_other_slice() -> None:
    assembler = Assembler(scan_of(FLAT))
    reference = Order(every_line(FLAT), ImageKey(0, 1, 0, 0, 0, 0), lambda _: Role.CALIBRATION)
    assert keys_of(assembler, [*repeated(0, 0), *scan_lines(random_voxels(FLAT), FLAT, reference)]) == []


def test_the_first_readout_tells_where_the_slice_lies() -> None:
    fields = {"position_mm": (1.0, 2.0, 3.0), "read_dir": (1.0, 0.0, 0.0)}
    lines = scan_lines(random_voxels(FLAT), FLAT, Order(every_line(FLAT), fields=fields))
    first = assembled(scan_of(FLAT), lines).first_readout(KEY)
    assert (first.position_mm, first.read_dir, first.step_1) == ((1.0, 2.0, 3.0), (1.0, 0.0, 0.0), 0)
    assert first.samples.size == 1


# --- calibration lines ------------------------------------------------------------------------------------------------

WIDE = encoding_of((48, 24, 1), kept=(24, 24, 1))
ROWS = [(0, ky) for ky in range(0, 24, 2)]
CENTRE = [(0, ky) for ky in range(8, 17)]


def interleaved_roles(place: tuple[int, int]) -> Role:
    """Return what an accelerated scan with its own calibration lines calls a line."""
    if place not in CENTRE:
        return Role.IMAGING
    return Role.CALIBRATION_AND_IMAGING if place in ROWS else Role.CALIBRATION


@pytest.mark.parametrize("mode", ["", "embedded", "interleaved", "separate", "external", "other"])
def test_calibration_lines_are_image_data_only_where_embedded(mode: str) -> None:
    encoding = replace(WIDE, calibration=mode)
    thing = random_voxels(encoding)
    places = sorted({*ROWS, *CENTRE})
    assembler = assembled(scan_of(encoding), scan_lines(thing, encoding, Order(places, role=interleaved_roles)))
    kspace = assembler.kspace(KEY)
    used = places if mode in ("embedded", "interleaved") else ROWS
    close(native(kspace), expected_lines(masked(thing.kspace(encoding), used), encoding))
    assert [(0, int(ky)) for ky in np.flatnonzero(kspace.measured[0])] == used
    assert assembler.n_lines(KEY) == len(ROWS)


@pytest.mark.parametrize("mode", ["", "embedded", "interleaved"])
def test_calibration_is_the_block_around_the_centre(mode: str) -> None:
    """On-grid lines (also imaging) and off-grid ones (calibration only) fill it together."""
    encoding = replace(WIDE, calibration=mode)
    thing = random_voxels(encoding)
    places = sorted({*ROWS, *CENTRE})
    lines = scan_lines(thing, encoding, Order(places, role=interleaved_roles))
    calibration = assembled(scan_of(encoding), lines).calibration(KEY)
    assert calibration is not None
    close(calibration, expected_lines(thing.kspace(encoding)[:, :, 8:17], encoding))


def test_a_separate_reference_calibrates_and_is_not_mixed_in() -> None:
    encoding = replace(WIDE, calibration="separate")
    thing, other = random_voxels(encoding), random_voxels(encoding, seed=1)
    reference = Order(CENTRE, KEY, lambda _: Role.CALIBRATION)
    lines = [*scan_lines(other, encoding, reference), *scan_lines(thing, encoding, Order(ROWS))]
    assembler = assembled(scan_of(encoding), lines)
    close(assembler.calibration(KEY), expected_lines(other.kspace(encoding)[:, :, 8:17], encoding))
    close(native(assembler.kspace(KEY)), expected_lines(masked(thing.kspace(encoding), ROWS), encoding))


@pytest.mark.parametrize(
    ("matrix", "voxel_mm"),
    [((40, 30, 1), (3.0, 4.0, 3.0)), ((64, 24, 1), (2.0, 2.5, 3.0)), ((36, 41, 1), (5.0, 3.0, 9.0))],
)
def test_a_reference_of_another_matrix_and_field_gives_the_same_block(
    matrix: tuple[int, int, int], voxel_mm: tuple[float, float, float]
) -> None:
    """Another encoding's lines of the same blobs become, but for one factor, the lines that imaging would have had.

    Blobs end before either field of view does, so 1 % is left: what the reference's coarser lines cut off.
    """
    imaging = encoding_of((96, 64, 1), kept=(48, 64, 1), voxel_mm=(2.0, 2.0, 3.0), calibration="separate")
    grid = encoding_of(matrix, kept=(max(16, matrix[0] // 2 + 8), matrix[1], 1), voxel_mm=voxel_mm)
    thing = head_of_blobs()
    reference = scan_lines(thing, grid, Order(every_line(grid), ImageKey(1, 0, 0, 0, 0, 0), lambda _: Role.CALIBRATION))
    lines = scan_lines(thing, imaging, Order([(0, ky) for ky in range(0, 64, 2)]))
    calibration = assembled(scan_of(imaging, grid), [*reference, *lines]).calibration(KEY)
    assert calibration is not None
    _, n_coils, n_ky, n_x = calibration.shape
    assert (n_coils, n_x) == (4, 48)
    full = expected_lines(thing.kspace(imaging), imaging)[:, :, 32 - n_ky // 2 :][:, :, :n_ky]
    # the outermost lines of the block carry the cut of the field of view
    inner = slice(n_ky // 4, n_ky - n_ky // 4)
    found, true = calibration[:, :, inner], full[:, :, inner]
    factor = np.vdot(true, found) / np.vdot(true, true)
    assert abs(np.angle(factor)) < 0.01
    assert np.linalg.norm(found - factor * true) < 0.03 * np.linalg.norm(factor * true)


def test_a_slab_reference_keeps_its_places_along_z() -> None:
    """A reference with thicker, fewer partitions over a taller slab calibrates each slice where it is."""
    imaging = encoding_of((48, 32, 16), voxel_mm=(3.0, 3.0, 4.0), calibration="separate")
    grid = encoding_of((32, 24, 12), voxel_mm=(4.5, 4.0, 8.0))
    thing = head_of_blobs()
    reference = scan_lines(thing, grid, Order(every_line(grid), ImageKey(1, 0, 0, 0, 0, 0), lambda _: Role.CALIBRATION))
    lines = scan_lines(thing, imaging, Order([p for p in every_line(imaging) if sum(p) % 2 == 0]))
    calibration = assembled(scan_of(imaging, grid), [*reference, *lines]).calibration(KEY)
    assert calibration is not None
    assert calibration.shape[0] == 16
    # the lines at ky = 0 are the object's projections along y: they can be compared without more
    found = np.abs(calibration[:, 0, calibration.shape[2] // 2])
    true = np.abs(expected_lines(thing.kspace(imaging), imaging)[:, 0, 16])
    factor = np.vdot(true, found) / np.vdot(true, true)
    assert np.linalg.norm(found - factor * true) < 0.1 * np.linalg.norm(factor * true)


def test_a_reference_larger_than_the_image_is_cut_to_it() -> None:
    imaging = encoding_of((24, 20, 1), voxel_mm=(4.0, 4.0, 3.0), calibration="separate")
    grid = encoding_of((48, 40, 1), voxel_mm=(2.0, 2.0, 3.0))
    thing = head_of_blobs()
    reference = scan_lines(thing, grid, Order(every_line(grid), ImageKey(1, 0, 0, 0, 0, 0), lambda _: Role.CALIBRATION))
    lines = scan_lines(thing, imaging, Order([(0, ky) for ky in range(0, 20, 2)]))
    assembler = assembled(scan_of(imaging, grid), [*reference, *lines])
    calibration = assembler.calibration(KEY)
    assert calibration is not None
    assert calibration.shape == (1, 4, 20, 24)
    assert sense_coils(calibration, 20, 4, False).maps is not None


@pytest.mark.parametrize(("n_z", "n_z_reference"), [(1, 8), (8, 1)])
def test_a_slab_and_a_slice_do_not_calibrate_each_other(n_z: int, n_z_reference: int) -> None:
    """Where the reference's slices lie among the image's is not told, so the image's own lines serve."""
    imaging = encoding_of((48, 24, n_z), calibration="separate")
    grid = encoding_of((48, 24, n_z_reference))
    reference = Order(every_line(grid), ImageKey(1, 0, 0, 0, 0, 0), lambda _: Role.CALIBRATION)
    own = random_voxels(imaging)
    lines = [
        *scan_lines(random_voxels(grid, seed=1), grid, reference),
        *scan_lines(own, imaging, Order(every_line(imaging))),
    ]
    close(assembled(scan_of(imaging, grid), lines).calibration(KEY), expected_lines(own.kspace(imaging), imaging))


def test_a_reference_of_other_slices_calibrates_none() -> None:
    encoding = replace(WIDE, calibration="separate")
    thing = random_voxels(encoding)
    reference = Order(CENTRE, ImageKey(0, 1, 0, 0, 0, 0), lambda _: Role.CALIBRATION)
    assembler = assembled(
        scan_of(encoding), [*scan_lines(thing, encoding, reference), *scan_lines(thing, encoding, Order(ROWS))]
    )
    assert assembler.calibration(KEY) is None
    assert assembler.n_calibrating(KEY) == 0


@pytest.mark.parametrize("n_central", [5, 6, 9, 24])
def test_the_block_is_large_enough_or_none(n_central: int) -> None:
    places = sorted({*ROWS, *((0, ky) for ky in range(12 - n_central // 2, 12 - n_central // 2 + n_central))})
    calibration = assembled(scan_of(WIDE), scan_lines(random_voxels(WIDE), WIDE, Order(places))).calibration(KEY)
    # every second row is there anyway, so an odd edge brings a line more on one side; the block stays about the centre
    if n_central == 5:
        assert calibration is None or calibration.shape[2] >= 6
    else:
        assert calibration is not None
        assert calibration.shape[2] >= n_central


def test_maps_made_early_are_the_maps_made_late() -> None:
    encoding = replace(WIDE, calibration="embedded")
    thing = head_of_blobs()
    places = [*CENTRE, *(place for place in ROWS if place not in CENTRE)]
    receiver = coloured(4, 1e-6)
    sending = Sending(noise=receiver)
    lines = scan_lines(thing, encoding, Order(places, role=interleaved_roles), sending)
    assembler = assembled(scan_of(encoding), receiver.readouts(np.random.default_rng(2), 20, 48, 2.0))
    for line in lines[: len(CENTRE)]:
        assembler.add(line)
    early, n_early = assembler.calibration(KEY), assembler.n_calibrating(KEY)
    for line in lines[len(CENTRE) :]:
        assembler.add(line)
    late = assembler.kspace(KEY).calibration
    assert n_early > 0
    assert assembler.n_calibrating(KEY) == n_early
    np.testing.assert_array_equal(early, late)
    one, two = (sense_coils(block, 24, 4, assembler.has_noise) for block in (early, late))
    assert one.maps is not None
    assert two.maps is not None
    np.testing.assert_array_equal(one.maps.maps, two.maps.maps)


def test_more_calibration_lines_are_noticed() -> None:
    encoding = replace(WIDE, calibration="embedded")
    lines = scan_lines(random_voxels(encoding), encoding, Order(CENTRE, role=interleaved_roles, last={}))
    assembler = assembled(scan_of(encoding), lines[:-1])
    before = assembler.n_calibrating(KEY)
    assembler.add(lines[-1])
    assert assembler.n_calibrating(KEY) > before
    again = assembler.n_calibrating(KEY)
    assembler.add(replace(lines[4], average=1))
    assert assembler.n_calibrating(KEY) == again + 1
    assembler.add(coloured(3).readouts(np.random.default_rng(0), 1, 16, 2.0)[0])
    assert assembler.n_calibrating(KEY) == again + 17


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(reason: str, error: type[Exception] = AcquisitionError, encoding: Encoding = FLAT, **changes: Any) -> None:
    """Add a bad readout first and in the middle of a scan; it is refused, and the scan is what it was."""
    lines = scan_lines(random_voxels(encoding), encoding, Order(every_line(encoding)))
    plain = assembled(scan_of(encoding), lines).kspace(KEY)
    assembler = Assembler(scan_of(encoding))
    bad = replace(lines[3], **changes)
    for at, line in enumerate(lines):
        if at in (0, 5) and (at == 5 or error is AcquisitionError):
            with pytest.raises(error, match=reason):
                assembler.add(bad)
        assembler.add(line)
    np.testing.assert_array_equal(assembler.kspace(KEY).samples, plain.samples)
    np.testing.assert_array_equal(assembler.kspace(KEY).averages, plain.averages)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, complex(0, np.nan)])
def test_samples_that_are_no_numbers_are_refused(bad: complex) -> None:
    samples = np.ones((3, 16), np.complex64)
    samples[1, 7] = bad
    refused("not finite numbers", samples=samples)


def test_readouts_in_no_place_are_refused() -> None:
    refused("kspace_encode_step_1 is 12; the header limits it to 0..11", step_1=12)
    refused("kspace_encode_step_2 is 1", step_2=1)
    refused("names encoding 4; the header has 1", key=ImageKey(4, 0, 0, 0, 0, 0))
    refused("do not fit an encoded matrix of 16", samples=np.ones((3, 18)), center_sample=9)
    refused("to be discarded", discard_pre=10, discard_post=6)


def test_a_changed_number_of_coils_is_refused() -> None:
    refused("readout", ShapeError, samples=np.ones((2, 16)))


@pytest.mark.parametrize("changes", [{"key": ImageKey(4, 0, 0, 0, 0, 0)}, {"step_1": 99}, {"discard_pre": 50}])
def test_a_refused_readout_does_not_fix_the_number_of_coils(changes: dict[str, Any]) -> None:
    lines = scan_lines(random_voxels(FLAT), FLAT, Order(every_line(FLAT)))
    assembler = Assembler(scan_of(FLAT))
    with pytest.raises(AcquisitionError):
        assembler.add(replace(lines[0], samples=np.ones((7, 16)), **changes))
    for line in lines:
        assembler.add(line)
    assert assembler.n_coils == 3


def test_noise_of_other_coils_is_refused() -> None:
    lines = scan_lines(random_voxels(FLAT), FLAT, Order(every_line(FLAT)))
    assembler = assembled(scan_of(FLAT), lines[:2])
    with pytest.raises(ShapeError, match="readout"):
        assembler.add(coloured(2).readouts(np.random.default_rng(0), 1, 64, 4.0)[0])


@pytest.mark.parametrize("role", [Role.IMAGING, Role.CALIBRATION])
def test_lines_beyond_the_memory_limit_are_refused(role: Role) -> None:
    """One slice of 3 coils, 12 lines and 8 columns takes 2304 bytes."""
    scans = slices(3, role=lambda _: role)
    assembler = Assembler(scan_of(FLAT), max_bytes=2 * 2304)
    for line in [*scans[0], *scans[1]]:
        assembler.add(line)
    with pytest.raises(AcquisitionError, match=r"lines of unfinished images would take 0\.0 MiB; the limit"):
        assembler.add(scans[2][0])
    if role is Role.IMAGING:
        assembler.discard(KEY)
        for line in scans[2]:
            assembler.add(line)
        assert len(assembler.open_keys()) == 2


def test_an_image_beyond_the_memory_limit_is_refused_at_its_first_line() -> None:
    big = encoding_of((4096, 4096, 4096))
    assembler = Assembler(scan_of(big))
    line = Acquisition(np.ones((4, 4096)), Role.IMAGING, KEY, 0, sample_time_us=1.0)
    with pytest.raises(AcquisitionError, match=r"one image would take 2097152\.0 MiB"):
        assembler.add(line)


def test_averages_take_no_more_memory() -> None:
    lines = slices(1)[0]
    assembler = Assembler(scan_of(FLAT), max_bytes=2304 + 192)
    for _ in range(3):
        for line in lines:
            assembler.add(line)
    assert assembler.kspace(KEY).averages.max() == 3


def test_impossible_encodings_are_refused_at_once() -> None:
    for changes in ({"trajectory": "radial"}, {"encoded_matrix": FLAT.encoded_matrix._replace(y=1)}):
        with pytest.raises(AcquisitionError):
            Assembler(scan_of(FLAT, replace(FLAT, **changes)))


def test_the_input_is_not_written_to() -> None:
    """Averages are summed in place, but never in the buffer that the samples came in."""
    encoding = encoding_of((16, 12, 1))
    lines = scan_lines(random_voxels(encoding), encoding, Order(every_line(encoding)))
    before = [line.samples.copy() for line in lines]
    assembled(scan_of(encoding), [*lines, *lines])
    for line, samples in zip(lines, before, strict=True):
        np.testing.assert_array_equal(line.samples, samples)


def test_scan_ids_are_not_in_messages() -> None:
    with pytest.raises(AcquisitionError) as caught:
        Assembler(scan_of(replace(FLAT, trajectory="radial")))
    assert SCAN_ID not in str(caught.value)
