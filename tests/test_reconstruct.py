"""Readouts to images: right place, size and scale against sums written out and against objects known in millimetres."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recon.errors import AcquisitionError
from recon.reconstruct import Image, reconstruct_classical, sense_coils
from recon.scan import Acquisition, Encoding, ImageKey, Role
from tests.reference import (
    KEY,
    Order,
    Receiver,
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
    reference_image,
    scan_lines,
    scan_of,
)

SINGLE = 1e-5  # of the largest value: single-precision transforms of a few dozen samples
HEAD = head_of_blobs()


def image_of(lines: list[Acquisition], *encodings: Encoding, method: str = "zero-filled") -> Image:
    """Return the image of key 0 that these readouts make."""
    assembler = assembled(scan_of(*encodings), lines, early=False)
    return reconstruct_classical(assembler.kspace(KEY), encodings[0], method).image


def off(found: Any, true: Any) -> float:
    """Return the normalised root-mean-square error."""
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def shifts(found: Any, true: Any) -> list[int]:
    """Return by how many voxels `found` must be rolled along each axis to fit best; ties go to 0."""
    out = []
    for axis in range(true.ndim):
        steps = [0] if true.shape[axis] == 1 else [0, -2, -1, 1, 2]
        out.append(min(steps, key=lambda step: off(np.roll(found, step, axis), true)))
    return out


# --- against sums -----------------------------------------------------------------------------------------------------


@given(st.data())
def test_zero_filled_images_are_the_sums(data: st.DataObject) -> None:
    """Any matrix, oversampling along any axis, any wanted matrix, lines missing, in two and three dimensions."""
    n_z = data.draw(st.sampled_from([1, 1, 4, 5]))
    matrix = (data.draw(st.integers(6, 15)), data.draw(st.integers(4, 13)), n_z)
    kept = tuple(data.draw(st.integers((n + 1) // 2, n)) for n in matrix)
    wanted = tuple(1 if n == 1 else data.draw(st.integers(max(2, n - 2), n + 3)) for n in kept)
    if n_z == 1:
        kept, wanted = (*kept[:2], 1), (*wanted[:2], 1)
    encoding = encoding_of(matrix, wanted, kept)  # type: ignore[arg-type]
    thing = random_voxels(encoding, 2, data.draw(st.integers(0, 99)))
    places = data.draw(st.permutations(every_line(encoding)))
    places = places[: data.draw(st.integers(1, len(places)))]
    found = image_of(scan_lines(thing, encoding, Order(places)), encoding)
    true = reference_image(masked(thing.kspace(encoding), places), encoding)
    assert found.method == "zero-filled"
    assert found.data.shape == (wanted[2] if n_z > 1 else 1, wanted[1], wanted[0])
    np.testing.assert_allclose(found.data, true, rtol=0, atol=SINGLE * np.abs(thing.values).max())


@pytest.mark.parametrize("n", [24, 25])
@pytest.mark.parametrize("call_it", [lambda n: n // 2, lambda n: n - 1 - n // 2])
def test_reversed_lines_fit_between_the_others(n: int, call_it: Any) -> None:
    """Every second line read from the other end, whatever its header calls the centre: no ghost, no shift."""
    encoding = encoding_of((n, 14, 1), kept=(n // 2, 14, 1))
    thing = random_voxels(encoding)
    forward = scan_lines(thing, encoding, Order(every_line(encoding)))
    backward = scan_lines(
        thing, encoding, Order(every_line(encoding)), Sending(is_reversed=lambda _: True, center=call_it(n))
    )
    lines = [(forward, backward)[row % 2][row] for row in range(14)]
    true = reference_image(thing.kspace(encoding), encoding)
    np.testing.assert_allclose(image_of(lines, encoding).data, true, rtol=0, atol=SINGLE * true.max())


def test_contrasts_sets_and_repetitions_are_images_of_their_own() -> None:
    encoding = encoding_of((16, 12, 1))
    keys = [ImageKey(0, 0, c, p, r, s) for c in (0, 1) for p in (0, 1) for r in (0, 1) for s in (0, 1)]
    lines: list[Acquisition] = []
    for at, key in enumerate(keys):
        lines += scan_lines(random_voxels(encoding, seed=at), encoding, Order(every_line(encoding), key))
    assembler = assembled(scan_of(encoding), lines[::-1], early=False)
    for at, key in enumerate(keys):
        true = reference_image(random_voxels(encoding, seed=at).kspace(encoding), encoding)
        found = reconstruct_classical(assembler.kspace(key), encoding, "zero-filled").image.data
        np.testing.assert_allclose(found, true, rtol=0, atol=SINGLE * true.max())


# --- against millimetres ----------------------------------------------------------------------------------------------

# (encoded matrix, kept, wanted, voxel in mm): oversampled readout and phase, finer, coarser, odd, three dimensions
GRIDS: dict[
    str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int], tuple[float, float, float]]
] = {
    "plain": ((64, 60, 1), (64, 60, 1), (64, 60, 1), (2.0, 2.1, 3.0)),
    "readout oversampled": ((128, 60, 1), (64, 60, 1), (64, 60, 1), (2.0, 2.1, 3.0)),
    "phase oversampled": ((128, 90, 1), (64, 60, 1), (64, 60, 1), (2.0, 2.1, 3.0)),
    "odd": ((127, 85, 1), (63, 59, 1), (63, 59, 1), (2.0, 2.1, 3.0)),
    "odd in even": ((128, 86, 1), (63, 59, 1), (63, 59, 1), (2.0, 2.1, 3.0)),
    "finer": ((128, 60, 1), (64, 60, 1), (96, 101, 1), (2.0, 2.1, 3.0)),
    "coarser": ((256, 150, 1), (128, 120, 1), (60, 61, 1), (1.0, 1.05, 3.0)),
    "slab": ((64, 60, 40), (64, 60, 40), (64, 60, 40), (2.0, 2.1, 3.0)),
    "slab, oversampled and finer": ((96, 60, 48), (48, 60, 40), (60, 60, 51), (2.5, 2.1, 3.0)),
}


@pytest.mark.parametrize("method", ["zero-filled", "auto"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_known_object_is_where_and_as_bright_as_it_is(grid: str, method: str) -> None:
    """Gaussian blobs under Gaussian coils, at voxel i in (i − n // 2) voxels, in native units.

    Of 5 mm and wider on voxels of 3 mm at most, they are resolved to about 1e-3. Coil maps cut the background and
    compression may drop 0.1 % of the energy (3 % of the amplitude), which the combined image may differ by.
    """
    encoding = encoding_of(GRIDS[grid][0], GRIDS[grid][2], GRIDS[grid][1], GRIDS[grid][3])
    found = image_of(scan_lines(HEAD, encoding, Order(every_line(encoding))), encoding, method=method)
    true = HEAD.image(encoding)
    assert found.method == ("sense" if method == "auto" else method)
    assert found.data.shape == true.shape
    assert off(found.data, true) < (0.002 if method == "zero-filled" else 0.02)
    assert shifts(found.data, true) == [0, 0, 0]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("first", "n_x"), [(20, 128), (31, 127)])
def test_asymmetric_echoes_keep_their_place(first: int, n_x: int, backwards: bool) -> None:
    """A fifth or a quarter of the readout missing at its start: what is left tells place and most of the brightness."""
    encoding = encoding_of((n_x, 60, 1), kept=(64, 60, 1), voxel_mm=(2.0, 2.1, 3.0))
    sending = Sending(first, None, 5, 3, lambda _: backwards)
    lines = scan_lines(HEAD, encoding, Order(every_line(encoding)), sending)
    true = HEAD.image(encoding)
    found = image_of(lines, encoding)
    assert shifts(found.data, true) == [0, 0, 0]
    measured = masked(HEAD.kspace(encoding), every_line(encoding), slice(first, None))
    exact = reference_image(measured, encoding)
    np.testing.assert_allclose(found.data, exact, rtol=0, atol=SINGLE * exact.max())
    assert off(found.data, true) < 0.15


def test_partial_fourier_keeps_its_place() -> None:
    """Counters 0 to 44, centre 15, of 60 rows: a quarter is missing, and only the header's centre tells which."""
    encoding = encoding_of((64, 60, 1), voxel_mm=(2.0, 2.1, 3.0), centers=(15, 0))
    lines = scan_lines(HEAD, encoding, Order([(0, ky) for ky in range(15, 60)]))
    assert (lines[0].step_1, lines[-1].step_1) == (0, 44)
    for method in ("zero-filled", "auto"):
        found = image_of(lines, encoding, method=method)
        assert shifts(found.data, HEAD.image(encoding)) == [0, 0, 0]
        assert off(found.data, HEAD.image(encoding)) < 0.1


# --- accelerated ------------------------------------------------------------------------------------------------------


def noisy(
    lines_of: Encoding, places: list[tuple[int, int]], role: Any = None, key: ImageKey = KEY, power: float = 2e-3
) -> list[Acquisition]:
    """Return noise readouts of another dwell time and then noisy lines of the blobs, some calibration only."""
    receiver = coloured(4, power)
    order = Order(places, key, role or (lambda place: Role.IMAGING))
    noise = receiver.readouts(np.random.default_rng(3), 64, 128, 2.5)
    return [*noise, *scan_lines(HEAD, lines_of, order, Sending(noise=receiver, dwell_us=8.0))]


FIELD = encoding_of((128, 64, 1), kept=(64, 64, 1), voxel_mm=(2.0, 2.0, 3.0), calibration="embedded")
EVERY_THIRD = sorted({(0, ky) for ky in range(0, 64, 3)} | {(0, ky) for ky in range(22, 43)})


def test_sense_unfolds_what_zero_filling_folds() -> None:
    """3-fold, with its own calibration lines; noise of 1.5 % of the brightest voxel leaves 2.3 %, folding 13 %."""
    lines = noisy(FIELD, EVERY_THIRD, lambda place: Role.CALIBRATION if place[1] % 3 else Role.IMAGING)
    true = HEAD.image(FIELD)
    folded, found = (image_of(lines, FIELD, method=method) for method in ("zero-filled", "sense"))
    assert found.method == "sense"
    assert off(found.data, true) < 0.04
    assert off(found.data, true) < 0.5 * off(folded.data, true)
    assert shifts(found.data, true) == [0, 0, 0]


@pytest.mark.parametrize(
    ("matrix", "kept", "voxel_mm"),
    [((48, 32, 1), (48, 32, 1), (4.0, 4.0, 3.0)), ((96, 41, 1), (50, 41, 1), (3.5, 3.5, 9.0))],
)
def test_a_separate_reference_with_its_own_grid_unfolds_too(
    matrix: tuple[int, int, int], kept: tuple[int, int, int], voxel_mm: tuple[float, float, float]
) -> None:
    imaging = replace(FIELD, calibration="separate")
    grid = encoding_of(matrix, kept=kept, voxel_mm=voxel_mm)
    reference = noisy(grid, every_line(grid), lambda _: Role.CALIBRATION, ImageKey(1, 0, 0, 0, 0, 0))
    lines = [*reference, *noisy(imaging, [(0, ky) for ky in range(0, 64, 2)])]
    true = HEAD.image(imaging)
    found = image_of(lines, imaging, grid, method="sense")
    folded = image_of(lines, imaging, grid)
    assert off(found.data, true) < 0.03
    assert off(found.data, true) < 0.5 * off(folded.data, true)
    assert shifts(found.data, true) == [0, 0, 0]


def test_a_slab_is_unfolded_along_both_phase_encodings() -> None:
    encoding = encoding_of((48, 48, 32), voxel_mm=(2.5, 2.5, 3.0), calibration="embedded")
    places = [
        (kz, ky)
        for kz, ky in every_line(encoding)
        if (kz % 2 == 0 and ky % 2 == 0) or (abs(kz - 16) <= 5 and abs(ky - 24) <= 9)
    ]
    lines = noisy(encoding, places, power=2e-4)
    true = HEAD.image(encoding)
    folded, found = (image_of(lines, encoding, method=method) for method in ("zero-filled", "sense"))
    assert off(found.data, true) < 0.05
    assert off(found.data, true) < 0.5 * off(folded.data, true)
    assert shifts(found.data, true) == [0, 0, 0]


# --- scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e-7, 1.0, 1e6])
@pytest.mark.parametrize("method", ["zero-filled", "auto"])
def test_the_image_is_the_native_root_sum_of_squares(unit: float, method: str) -> None:
    """Whitening weighs coils by their noise; the image's units and shading are those of the native coils all the same.

    Noise of 0.2 % of the peak leaves 1 %; maps and compression as above.
    """
    encoding = encoding_of((64, 60, 1), voxel_mm=(2.0, 2.1, 3.0))
    bright = Voxels(unit * coil_images(encoding))
    receiver = coloured(4, (2e-3 * unit) ** 2 * 8)
    lines = [
        *receiver.readouts(np.random.default_rng(1), 64, 128, 2.5),
        *scan_lines(bright, encoding, Order(every_line(encoding)), Sending(noise=receiver, dwell_us=8.0)),
    ]
    found = image_of(lines, encoding, method=method)
    true = np.sqrt((np.abs(bright.values) ** 2).sum(0))
    inside = true > 0.1 * true.max()
    assert off(found.data[inside], true[inside]) < 0.03
    ratio = found.data[inside] / true[inside]
    assert abs(np.median(ratio) - 1) < 0.01
    assert np.percentile(np.abs(ratio - 1), 95) < 0.06


def coil_images(encoding: Encoding) -> Any:
    return dft(HEAD.kspace(encoding), (1, 2, 3), inverse=True)


def test_brightness_does_not_depend_on_the_slice() -> None:
    """No image is scaled by its own peak."""
    encoding = encoding_of((32, 30, 1))
    thing = random_voxels(encoding)
    images = [
        image_of(scan_lines(Voxels(factor * thing.values), encoding, Order(every_line(encoding))), encoding).data
        for factor in (1.0, 0.25)
    ]
    np.testing.assert_allclose(images[1], images[0] / 4, rtol=1e-4)


# --- what it falls back on --------------------------------------------------------------------------------------------


def test_without_calibration_coils_are_combined_by_root_sum_of_squares() -> None:
    encoding = encoding_of((32, 24, 1))
    lines = scan_lines(random_voxels(encoding), encoding, Order([(0, ky) for ky in range(0, 24, 2)]))
    auto, plain = (image_of(lines, encoding, method=method) for method in ("auto", "zero-filled"))
    assert auto.method == "root-sum-of-squares"
    assert any("no calibration lines" in step for step in auto.steps)
    np.testing.assert_array_equal(auto.data, plain.data)
    with pytest.raises(AcquisitionError, match="SENSE needs coil maps, and there are none: no calibration lines"):
        image_of(lines, encoding, method="sense")


def test_maps_from_before_are_used() -> None:
    lines = noisy(FIELD, EVERY_THIRD)
    assembler = assembled(scan_of(FIELD), lines, early=False)
    coils = sense_coils(assembler.calibration(KEY), 64, 4, assembler.has_noise)
    kspace = assembler.kspace(KEY)
    one = reconstruct_classical(kspace, FIELD, "auto", coils).image
    two = reconstruct_classical(kspace, FIELD, "auto").image
    np.testing.assert_array_equal(one.data, two.data)
    assert one.steps == two.steps


def test_calibration_without_signal_is_a_reason_not_an_error() -> None:
    coils = sense_coils(np.zeros((1, 3, 8, 16), np.complex64), 16, 3, True)
    assert coils.maps is None
    assert coils.reason


@pytest.mark.parametrize("with_noise", [False, True])
def test_steps_say_what_was_done(with_noise: bool) -> None:
    lines = noisy(FIELD, EVERY_THIRD)
    lines = lines if with_noise else [line for line in lines if line.role is not Role.NOISE]
    marked: list[str] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        marked.append(name)
        yield

    kspace = assembled(scan_of(FIELD), lines, early=False).kspace(KEY)
    image = reconstruct_classical(kspace, FIELD, "auto", None, stage).image
    expected = "noise readout" if with_noise else "level estimated from outer k-space"
    assert image.steps[0] == f"noise prewhitened ({expected})"
    assert image.steps[-2:] == ("regularised CG-SENSE", "signal of measured lines that the maps leave out, added")
    assert {"compress", "maps", "classical"} <= set(marked)


def test_one_coil_serves() -> None:
    encoding = encoding_of((32, 24, 1))
    thing = random_voxels(encoding, n_coils=1)
    found = image_of(scan_lines(thing, encoding, Order(every_line(encoding))), encoding, method="auto")
    np.testing.assert_allclose(found.data, np.abs(thing.values[0]), rtol=0, atol=1e-4)


def test_images_are_closed_to_writing() -> None:
    encoding = encoding_of((32, 24, 1))
    found = image_of(scan_lines(random_voxels(encoding), encoding, Order(every_line(encoding))), encoding)
    assert found.data.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        found.data[0, 0, 0] = 1


def test_noise_alone_is_noise() -> None:
    """A scan of nothing: the image is that of noise in native units, neither blown up nor taken for signal."""
    encoding = encoding_of((64, 48, 1))
    receiver = Receiver(np.eye(4) * 0.01)
    lines = [
        *receiver.readouts(np.random.default_rng(1), 64, 64, 1.0),
        *scan_lines(
            Voxels(np.zeros((4, 1, 48, 64))),
            encoding,
            Order(every_line(encoding)),
            Sending(noise=receiver, dwell_us=1.0),
        ),
    ]
    found = image_of(lines, encoding)
    assert np.sqrt(np.mean(found.data**2)) == pytest.approx(0.2, rel=0.03)  # four coils of 0.1
    assert image_of(lines, encoding, method="auto").data.max() < 0.6
