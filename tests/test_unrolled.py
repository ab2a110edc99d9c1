"""What a network is given: the very least-squares problem of the scan, scaled, padded and in small batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recon.arrays import Array
from recon.errors import BackendError, ModelError, ShapeError
from recon.fourier import to_image, to_kspace
from recon.network import read_card
from recon.scan import CoilMaps, KSpace
from recon.unrolled import (
    INPUTS,
    noise_level,
    prepare,
    prepare_batches,
    reconstruct_unrolled,
    refusal,
    run_on_nothing,
    unprepare,
)
from tests.fake_network import RANGE, FakeNetwork, normal


def smooth_maps(n_slices: int, n_coils: int, n_y: int, n_x: int) -> Array:
    """Coil maps as smooth as real ones, of unit norm everywhere."""
    y, x = np.linspace(-1, 1, n_y)[:, None], np.linspace(-1, 1, n_x)
    angles = 2 * np.pi * np.arange(n_coils) / n_coils
    maps = np.stack(
        [
            np.exp(-0.6 * ((y - np.sin(a)) ** 2 + (x - np.cos(a)) ** 2)) * np.exp(1j * (a + y * np.cos(a) + x))
            for a in angles
        ]
    )
    maps = maps / np.sqrt((np.abs(maps) ** 2).sum(0))
    return np.repeat(maps[None].astype(np.complex64), n_slices, 0)


def smooth_image(*shape: int) -> Array:
    """A complex image without the finest detail, zero towards its edges; one shape gives one image."""
    drawn = np.random.default_rng(shape).standard_normal((*shape, 2)) @ [1, 1j]
    noise = to_image(to_kspace(drawn, (1, 2)) * _bell(shape[1], shape[2]), (1, 2))
    return (noise * _bell(shape[1], shape[2])).astype(np.complex64)


def _bell(n_y: int, n_x: int) -> Array:
    y, x = np.linspace(-1, 1, n_y)[:, None], np.linspace(-1, 1, n_x)
    return np.exp(-4 * (y**2 + x**2))


def scan(averages: Array, maps: Array, image: Array, n_calibration: int = 12) -> KSpace:
    """The noise-free scan of `image` (slice, y, x): lines with `averages` (ky)."""
    samples = to_kspace(maps * image[:, None], (2,))
    centre = maps.shape[2] // 2
    calibration = samples[:, :, centre - n_calibration // 2 : centre - n_calibration // 2 + n_calibration]
    kept = np.broadcast_to(averages, (len(image), maps.shape[2]))
    return KSpace(samples * (kept[:, None, :, None] > 0), kept.astype(np.uint16), 1.0, True, calibration)


def lines(n: int, step: int, offset: int, acs: int) -> Array:
    averages = np.zeros(n, int)
    averages[offset::step] = 1
    averages[n // 2 - acs // 2 : n // 2 - acs // 2 + acs] = 1
    return averages


def _plane(inputs: dict[str, Array], name: str) -> Array:
    return inputs[name][:, 0] + 1j * inputs[name][:, 1]


@settings(max_examples=25, deadline=None)
@given(
    n_y=st.integers(40, 70),
    n_x=st.integers(17, 30),
    step=st.integers(1, 8),
    offset=st.integers(0, 7),
    acs=st.integers(0, 16),
    coils=st.integers(1, 4),
)
def test_inputs_without_a_lattice_are_the_scan_exactly(
    n_y: int, n_x: int, step: int, offset: int, acs: int, coils: int
) -> None:
    averages = lines(n_y, step, offset % step, acs)
    averages[np.flatnonzero(averages)[0]] = 3  # unequal averages: no lattice for sides that it would divide
    if step == 1:
        averages[n_y // 2 + 1] = 2
    maps, image = smooth_maps(2, coils, n_y, n_x), smooth_image(2, n_y, n_x)
    kspace = scan(averages, maps, image)
    prepared = prepare(kspace, CoilMaps(maps), image)
    weights = averages[None, None, :, None]
    wanted = (maps.conj() * to_image(to_kspace(maps * image[:, None], (2,)) * weights, (2,))).sum(1)
    scaled = _plane(prepared.inputs, "classical")
    seen = normal(prepared.inputs, scaled) if not prepared.inputs["aliases"].any() else None
    if seen is not None:
        found = unprepare(np.stack((seen.real, seen.imag), 1), prepared)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    found = unprepare(prepared.inputs["adjoint"], prepared)
    np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.parametrize(("step", "offset"), [(1, 0), (2, 1), (3, 2), (4, 3), (6, 5), (8, 0)])
def test_a_lattice_is_folded_exactly_and_calibration_lines_closely(step: int, offset: int) -> None:
    n_y = 192
    maps, image = smooth_maps(1, 6, n_y, 24), smooth_image(1, n_y, 24)
    for acs, tolerance in ((0, 1e-5), (20, 4e-3)):
        averages = 2 * lines(n_y, step, offset, acs)
        prepared = prepare(scan(averages, maps, image), CoilMaps(maps), image)
        assert prepared.inputs["aliases"].shape[2] == step
        assert prepared.inputs["rows"].shape[1] < 2 * n_y or not acs
        seen = to_kspace(maps * image[:, None], (2,)) * averages[None, None, :, None]
        wanted = (maps.conj() * to_image(seen, (2,))).sum(1)
        made = normal(prepared.inputs, _plane(prepared.inputs, "classical"))
        inside = np.abs(image) > 0.02 * np.abs(image).max()  # at the edge of the field coils jump, and there is no head
        for found in (np.stack((made.real, made.imag), 1), prepared.inputs["adjoint"]):
            error = np.linalg.norm((unprepare(found, prepared) - wanted)[inside]) / np.linalg.norm(wanted)
            assert error < tolerance


def test_a_separable_scan_in_two_directions_is_two_products() -> None:
    n_z, n_y, n_x = 21, 36, 5
    maps = smooth_maps(n_z, 3, n_y, n_x) * np.exp(1j * np.linspace(0, 1, n_z))[:, None, None, None].astype(np.complex64)
    image = smooth_image(n_z, n_y, n_x)
    along_z, along_y = lines(n_z, 2, 1, 7), 2 * lines(n_y, 3, 0, 12)
    averages = np.outer(along_z, along_y).astype(np.uint16)
    seen = to_kspace(maps * image[:, None], (0, 2)) * averages[:, None, :, None]
    samples = seen / np.maximum(averages, 1)[:, None, :, None]
    kspace = KSpace(samples, averages, 1.0, True, samples[:, :, 12:24], slice_encoded=True)
    prepared = prepare(kspace, CoilMaps(maps), image)
    wanted = (maps.conj() * to_image(seen, (0, 2))).sum(1)
    made = normal(prepared.inputs, _plane(prepared.inputs, "classical"))
    for found in (np.stack((made.real, made.imag), 1), prepared.inputs["adjoint"]):
        back = unprepare(found, prepared).transpose(2, 1, 0)
        np.testing.assert_allclose(back, wanted, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(reconstruct_unrolled(FakeNetwork(), kspace, CoilMaps(maps), image), image, atol=1e-5)
    averages[3, 5] = averages[3, 5] == 0  # one line more or less, in one partition only
    crooked = replace(kspace, averages=averages)
    assert "separably" in refusal(crooked, 3, replace(RANGE, matrix=(4, 64)))


def test_images_follow_their_kspace_in_proportion() -> None:
    """A network that is anything but linear, on a scan whose noise level grows with it."""
    maps, image = smooth_maps(1, 4, 64, 33), smooth_image(1, 64, 33)
    kspace = replace(scan(lines(64, 4, 0, 12), maps, 50 * image), noise_is_measured=False)
    assert kspace.calibration is not None
    loud = replace(kspace, samples=kspace.samples * 0.25, calibration=kspace.calibration * 0.25)
    network = FakeNetwork(lambda inputs: np.tanh(inputs["classical"]))
    found = reconstruct_unrolled(network, kspace, CoilMaps(maps), 50 * image)
    quiet = reconstruct_unrolled(network, loud, CoilMaps(maps), 12.5 * image)
    np.testing.assert_array_equal(quiet, 0.25 * found)


def test_slices_go_in_batches_and_come_back_in_order() -> None:
    maps, image = smooth_maps(5, 2, 40, 40), smooth_image(5, 40, 40) * np.arange(1, 6)[:, None, None]
    kspace = scan(lines(40, 2, 0, 12), maps, image)
    batches = list(prepare_batches(kspace, CoilMaps(maps), image, voxels=2 * 40 * 40))
    assert [len(each.inputs["adjoint"]) for each in batches] == [2, 2, 1]
    assert set(batches[0].inputs) == set(INPUTS)
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in batches[0].inputs.values())
    found = reconstruct_unrolled(FakeNetwork(), kspace, CoilMaps(maps), image)
    np.testing.assert_allclose(found, image, atol=1e-5 * np.abs(image).max())
    with pytest.raises(ShapeError, match="coil maps"):
        prepare(kspace, CoilMaps(maps[:, :, :-1]), image)
    with pytest.raises(ShapeError, match="classical"):
        prepare(kspace, CoilMaps(maps), image[:, 1:])


@pytest.mark.parametrize(
    ("averages", "matrix", "n_calibration", "coils", "words"),
    [
        (lines(64, 4, 0, 16), 64, 16, 4, ""),
        (lines(64, 8, 7, 16), 64, 16, 4, ""),
        (np.ones(64), 64, 16, 4, ""),
        (lines(64, 4, 0, 16) * (np.arange(64) >= 20), 64, 16, 4, ""),
        (lines(64, 4, 0, 16), 200, 16, 4, "200 lines"),
        (lines(64, 4, 0, 16), 12, 16, 4, "12 lines"),
        (lines(64, 4, 0, 16), 64, 11, 4, "11 calibration lines"),
        (lines(64, 12, 0, 16), 64, 16, 4, "acceleration 11.2"),
        (lines(64, 4, 0, 16) * (np.arange(64) >= 28), 64, 16, 4, "span"),
        (lines(64, 4, 0, 16), 64, 16, 13, "13 virtual coils"),
        (np.zeros(64), 64, 16, 4, "no line"),
    ],
)
def test_what_the_network_was_not_trained_for_is_refused_with_the_numbers(
    averages: Array, matrix: int, n_calibration: int, coils: int, words: str
) -> None:
    if matrix != len(averages):
        averages = lines(matrix, 2, 0, 12)
    samples = np.zeros((1, coils, matrix, 40), np.complex64)
    calibration = np.zeros((1, coils, n_calibration, 40), np.complex64)
    kspace = KSpace(samples, averages[None].astype(np.uint16), 1.0, True, calibration)
    found = refusal(kspace, coils, RANGE)
    assert words in found if words else not found


def test_slices_that_were_sampled_differently_are_refused() -> None:
    averages = np.stack([lines(64, 2, 0, 16), lines(64, 2, 1, 16)]).astype(np.uint16)
    kspace = KSpace(np.zeros((2, 1, 64, 40), np.complex64), averages, 1.0, True, np.zeros((2, 1, 16, 40), np.complex64))
    assert "sampled differently" in refusal(kspace, 1, RANGE)


def test_the_noise_is_read_beside_the_head_where_none_was_measured() -> None:
    noise = (np.random.default_rng(0).standard_normal((4, 64, 80, 2)) @ [1, 1j] / 2**0.5 * 0.3).astype(np.complex64)
    noise[:, :, 20:60] += 5
    noise[:, 1::2] = 0
    assert noise_level(noise, True) == 1
    assert noise_level(noise, False) == pytest.approx(0.3, rel=0.1)
    assert noise_level(np.zeros_like(noise), False) == 1


def test_a_network_that_imagines_something_in_nothing_is_refused() -> None:
    rng = np.random.default_rng(0)
    run_on_nothing(FakeNetwork())
    with pytest.raises(ModelError, match="empty scan"):
        run_on_nothing(FakeNetwork(lambda inputs: inputs["classical"] + rng.random(inputs["classical"].shape)))


def test_the_lines_that_were_measured_stay_as_they_are() -> None:
    """Whatever the network says: here zeros, which leave the zero-filled combination of the measured lines."""
    maps, image = smooth_maps(2, 3, 48, 40), 30 * smooth_image(2, 48, 40)
    kspace = scan(lines(48, 3, 1, 12), maps, image)
    found = reconstruct_unrolled(
        FakeNetwork(lambda inputs: 0 * inputs["classical"]), kspace, CoilMaps(maps), np.zeros_like(image)
    )
    wanted = (maps.conj() * to_image(kspace.samples, (2,))).sum(1)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_card_says_what_is_missing() -> None:
    trained = {"matrix": [96, 512], "acceleration": 8, "calibration_lines": 12, "coils": 12, "measured_extent": 0.6}
    whole = {"name": "n", "version": "1", "sha256": "0", "trained_range": trained}
    assert read_card(whole).trained_range.matrix == (96, 512)
    with pytest.raises(ModelError, match="sha256"):
        read_card({name: value for name, value in whole.items() if name != "sha256"})
    with pytest.raises(ModelError, match="acceleration"):
        read_card({**whole, "trained_range": {"matrix": [1, 2]}})
    with pytest.raises(ModelError, match="cannot be read"):
        read_card({**whole, "trained_range": {**trained, "matrix": 96}})


def test_a_failing_network_raises() -> None:
    def fail(_: object) -> Array:
        raise BackendError("no")

    maps = smooth_maps(1, 1, 40, 40)
    with pytest.raises(BackendError):
        reconstruct_unrolled(FakeNetwork(fail), scan(lines(40, 2, 0, 12), maps, maps[:, 0]), CoilMaps(maps), maps[:, 0])
