"""The shipped network asked what breaks networks: more lines, small disturbances, small things, nothing at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.ours import shipped_network
from benchmarks.stability import (
    MAX_LOSS_DB,
    MAX_MOVE,
    Head,
    by_acceleration,
    disturbed,
    dropped,
    images,
    kept_structure,
    nothing,
    simulated_head,
)
from recon.fourier import to_image, to_kspace
from recon.network import Network
from recon.reconstruct import reconstruct_classical
from recon.scan import CoilMaps, KSpace
from recon.sense import cg_sense
from recon.unrolled import reconstruct_unrolled, refusal
from tests.test_unrolled import lines, smooth_maps


@pytest.fixture(scope="module")
def network() -> Network:
    found = shipped_network()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Head:
    return simulated_head(tmp_path_factory.mktemp("head"), matrix=128)


def test_more_lines_never_make_it_worse_and_the_network_is_better_than_its_start(network: Network, head: Head) -> None:
    rows = by_acceleration(network, head)
    assert [row["acceleration"] for row in rows] == [8, 6, 5, 4, 3, 2, 1]
    assert all(row["gain_by_more_lines_db"] >= -MAX_LOSS_DB for row in rows), rows
    assert all(row["network_db"] > row["classical_db"] for row in rows if row["acceleration"] in (2, 3, 4)), rows


@pytest.mark.parametrize("acceleration", [2, 4, 8])
def test_a_small_disturbance_moves_the_image_little(network: Network, head: Head, acceleration: int) -> None:
    moved = disturbed(network, head, acceleration)
    assert max(moved.values()) <= MAX_MOVE, moved


@pytest.mark.parametrize("acceleration", [2, 4])
def test_a_small_structure_keeps_its_contrast(network: Network, head: Head, acceleration: int) -> None:
    kept = kept_structure(network, head, acceleration)
    assert kept["network"] is not None
    assert kept["classical"] is not None
    assert kept["network"] >= kept["classical"] - 0.01, kept


def test_nothing_is_made_of_nothing(network: Network, head: Head) -> None:
    found = nothing(network, head, 4)
    assert found["largest_of_zeros"] < 1e-3
    assert found["noise_size"] <= 1.05
    assert abs(found["noise_likeness"]) < 0.1


def test_twice_the_input_is_twice_the_image(network: Network, head: Head) -> None:
    kspace = dropped(head.kspace, 4)
    assert kspace.to_native is not None
    _, one = images(network, kspace, head.encoding)
    louder = replace(kspace, to_native=2 * kspace.to_native, noise_scale=2 * kspace.noise_scale)
    _, two = images(network, louder, head.encoding)
    np.testing.assert_array_equal(two, 2 * one)


def test_phase_survives(network: Network, head: Head) -> None:
    start = reconstruct_classical(dropped(head.kspace, 3), head.encoding).start
    assert start is not None
    made = reconstruct_unrolled(network, start.kspace, start.maps, start.image)
    full = reconstruct_classical(head.kspace, head.encoding).start
    assert full is not None
    inside = head.truth > 0.2 * head.truth.max()
    # the maps' own phase is the same: both rest on the same calibration lines but for their number
    turned = np.angle(made * start.image.conj())[inside]
    assert np.median(np.abs(turned)) < 0.05
    assert np.iscomplexobj(made)


def test_a_separable_3d_scan_goes_through_the_same_graph(network: Network) -> None:
    rng = np.random.default_rng(0)
    n_z, n_y, n_x = 96, 104, 6
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (n_z, n_y, n_x)), indexing="ij")
    inside = z**2 / 0.5 + y**2 / 0.6 < 1
    truth = 60 * inside * (1 + 0.3 * np.sign(np.sin(9 * z + 3 * x)) * np.sign(np.cos(11 * y)))
    maps = smooth_maps(n_z, 4, n_y, n_x) * np.exp(0.7j * z[:, None])
    image = truth * np.exp(1j * (y + z))
    along_z, along_y = lines(n_z, 2, 0, 16), lines(n_y, 2, 1, 20)
    noise = rng.standard_normal((*maps.shape, 2)) @ [1, 1j] / 2**0.5
    samples = to_kspace(maps * image[:, None], (0, 2)) + noise
    calibration = to_image(samples, (0,))[:, :, 42:62].astype(np.complex64)
    averages = np.outer(along_z, along_y).astype(np.uint16)
    kept = (samples * averages[:, None, :, None]).astype(np.complex64)
    kspace = KSpace(kept, averages, 1.0, True, calibration, slice_encoded=True)
    found = CoilMaps(maps)
    assert not refusal(kspace, 4, network.card.trained_range)
    classical = cg_sense(kspace, found)
    made = reconstruct_unrolled(network, kspace, found, classical)
    errors = [np.linalg.norm(each - image) / np.linalg.norm(image) for each in (classical, made)]
    assert errors[1] < errors[0] < 0.2, errors
