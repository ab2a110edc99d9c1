"""The whole way of a slice on device arrays: the numbers that NumPy gives, nothing mixed, nothing kept.

Each test runs on a strict fake of CuPy everywhere, and on CuPy itself where there is a device.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.backends.device import Device, open_device
from edge.chain import Chain
from edge.header import read_header
from edge.model import RECONSTRUCTION
from edge.rawfile import open_raw
from edge.recon_file import readouts
from edge.results import Results
from edge.supply import Supply
from recon.arrays import Array, array_module, to_device, to_host
from recon.errors import BackendError
from recon.fourier import to_image, to_kspace
from recon.noise import whiten, whitening_matrix
from recon.reconstruct import reconstruct_classical, reconstruct_network, sense_coils
from recon.scan import CoilMaps, Encoding, KSpace, Matrix, Size
from recon.sense import keep_measured, root_sum_of_squares
from recon.unrolled import noise_level, prepare, unprepare
from tests import fake_cupy
from tests.fake_network import RANGE, FakeNetwork, normal
from tests.test_unrolled import lines, smooth_image, smooth_maps


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A CUDA device, and the fake of one."""
    if request.param == "fake":
        with fake_cupy.installed():
            yield open_device("cuda")
    else:
        try:
            found = open_device("cuda")
        except BackendError as error:
            pytest.skip(str(error))
        yield found


def is_fake(device: Device) -> bool:
    """Whether NumPy does the work behind the device's arrays."""
    return device.name.startswith("Fake")


@dataclass(frozen=True)
class Case:
    """A scan's native k-space, complex64 (slice, coil, ky, x), with what is known of it."""

    native: Array
    averages: Array
    covariance: Array
    encoding: Encoding
    n_calibration: int
    is_measured: bool = True
    slice_encoded: bool = False


def case(name: str, n_x: int = 40, n_coils: int = 5) -> Case:
    """A scan of `name`: "lattice", "random" (its noise not measured) or "separable" (3-D)."""
    rng = np.random.default_rng(3)
    n_z, n_y = {"lattice": (2, 96), "random": (2, 58), "separable": (12, 36)}[name]
    mix = np.eye(n_coils) + 0.2 * (rng.standard_normal((n_coils, n_coils, 2)) @ [1, 1j])
    maps = smooth_maps(n_z, n_coils, n_y, n_x)
    image = 3000 * smooth_image(n_z, n_y, n_x)
    axes = (0, 2) if name == "separable" else (2,)
    noise = rng.standard_normal((n_z, n_coils, n_y, n_x, 2)) @ [1, 1j] / 2**0.5
    native = np.einsum("vc,scyx->svyx", mix, to_kspace(maps * image[:, None], axes) + noise).astype(np.complex64)
    along_y = lines(n_y, 3, 1, 14)
    if name == "random":
        along_y = np.maximum(lines(n_y, n_y, 0, 14), rng.random(n_y) < 0.4)
    along_z = lines(n_z, 2, 0, 6) if name == "separable" else np.ones(n_z, int)
    averages = np.outer(along_z, along_y).astype(np.uint16)
    wanted = Matrix(n_x - 8, n_y + 6, n_z)
    fov = Size(200.0, 200.0, 60.0)
    encoding = Encoding(Matrix(n_x, n_y, n_z if name == "separable" else 1), fov, wanted, fov)
    return Case(native, averages, mix @ mix.conj().T, encoding, 14, name != "random", name == "separable")


def network() -> FakeNetwork:
    """A network that makes use of all its inputs: one step down the gradient of the least-squares problem."""

    def step(inputs: Mapping[str, Any]) -> Any:
        image = inputs["classical"][:, 0] + 1j * inputs["classical"][:, 1]
        made = normal(inputs, image)
        down = inputs["adjoint"] - array_module(made).stack((made.real, made.imag), 1)
        shrunk = inputs["support"] * inputs["variance"] / (inputs["variance"] + inputs["sigma"] + inputs["measured"])
        return (inputs["classical"] + 0.2 * shrunk * down).astype(np.float32)

    return FakeNetwork(step, replace(RANGE, matrix=(8, 128)))


def way_of_a_slice(scan: Case, xp: Any) -> dict[str, Array]:
    """Return what every step makes of `scan`, worked out on arrays of `xp`."""
    whitening = whitening_matrix(scan.covariance)
    full = whiten(to_device(scan.native, xp), whitening)
    start = full.shape[2] // 2 - scan.n_calibration // 2
    calibration = full[:, :, start : start + scan.n_calibration]
    if scan.slice_encoded:
        calibration = to_image(calibration, (0,))
    samples = full * xp.asarray(scan.averages > 0)[:, None, :, None]
    to_native = np.linalg.inv(whitening) if scan.is_measured else None
    kspace = KSpace(samples, scan.averages, 1.5, scan.is_measured, calibration, scan.slice_encoded, to_native)
    coils = sense_coils(calibration, full.shape[2], full.shape[1], scan.is_measured)
    assert coils.maps is not None, coils.reason
    image, begun = reconstruct_classical(kspace, scan.encoding, "network", coils)
    assert begun is not None
    prepared = prepare(begun.kspace, begun.maps, begun.image)
    made = network().run(prepared.inputs)["image"]
    by_network = reconstruct_network(network(), begun, scan.encoding).image
    zero_filled = reconstruct_classical(kspace, scan.encoding, "zero-filled").image
    assert all(type(each.data) is np.ndarray for each in (image, by_network, zero_filled))
    steps = {
        "whitened": samples,
        "compressed": begun.kspace.samples,
        "matrix": coils.matrix,
        "maps": begun.maps.maps,
        "cg_sense": begun.image,
        "native": begun.native,
        **prepared.inputs,
        "unprepared": unprepare(made, prepared),
        "kept": keep_measured(begun.kspace, begun.maps, begun.image),
        "root_sum_of_squares": root_sum_of_squares(kspace),
    }
    assert all(array_module(array) is xp for array in steps.values())
    outer = {"noise": np.array([noise_level(each, False) for each in samples])}
    images = {"classical image": image.data, "network image": by_network.data, "zero-filled": zero_filled.data}
    return {name: to_host(array) for name, array in {**steps, **outer, **images}.items()}


OF_A_COIL = ("compressed", "matrix", "maps", "coarse")  # as eigenvectors are: their phase, and weak ones altogether
PAIRS = ("adjoint", "classical")  # real and imaginary part on axis 1


def without_phase(steps: dict[str, Array]) -> dict[str, Array]:
    """What two libraries must agree on, whose eigenvectors are each right: magnitudes, coils taken together."""
    kept = {name: array for name, array in steps.items() if name not in OF_A_COIL}
    kept |= {name: kept[name][:, 0] + 1j * kept[name][:, 1] for name in PAIRS}
    return {name: np.abs(array) if np.iscomplexobj(array) else array for name, array in kept.items()}


@pytest.mark.parametrize("name", ["lattice", "random", "separable"])
def test_a_slice_comes_out_as_on_the_host(device: Device, name: str) -> None:
    scan = case(name)
    wanted, found = way_of_a_slice(scan, np), way_of_a_slice(scan, device.xp)
    assert {step: array.dtype for step, array in found.items()} == {step: array.dtype for step, array in wanted.items()}
    # single precision, through an inverse with a condition number of 1e4 and some 26 steps of conjugate gradients
    tolerance = 2e-4
    if not is_fake(device):
        wanted, found, tolerance = without_phase(wanted), without_phase(found), 1e-3
    for step, array in wanted.items():
        np.testing.assert_allclose(found[step], array, rtol=0, atol=tolerance * np.abs(array).max(), err_msg=step)


def _stream(device: Device | None, raw_path: Path, folder: Path) -> Array:
    raw = open_raw(raw_path)
    scan, exam = read_header(raw.header, "0" * 26)
    chain = Chain(Results(folder, scan, exam), network=network(), device=device)
    for readout in readouts(raw):
        chain.feed(readout)
        chain.work_ahead()
    report = chain.finish("complete", "", lambda: readouts(raw))
    assert report["method"] == "network"
    return np.load(folder / "volume.npy")


def test_the_chain_takes_its_slices_to_the_device_and_back(device: Device, small_scan: Path, tmp_path: Path) -> None:
    found, wanted = _stream(device, small_scan, tmp_path / "a"), _stream(None, small_scan, tmp_path / "b")
    np.testing.assert_allclose(found, wanted, atol=2e-4 * wanted.max())


def test_a_network_on_the_host_answers_in_kind(device: Device) -> None:
    scan = case("lattice")
    on_host = Supply(RECONSTRUCTION, "cpu").network()
    maps, image = smooth_maps(1, 2, 96, 96), 40 * smooth_image(1, 96, 96)
    kspace = KSpace(
        to_kspace(maps * image[:, None], (2,)) * (scan.averages[:1] > 0)[:, None, :, None], scan.averages[:1], 1.0, True
    )
    inputs = prepare(kspace, CoilMaps(maps), image).inputs
    wanted = on_host.run(inputs)["image"]
    found = on_host.run({name: device.upload(array) for name, array in inputs.items()})["image"]
    assert array_module(found) is device.xp
    np.testing.assert_array_equal(to_host(found), wanted)


def test_memory_does_not_grow_with_the_slices(device: Device) -> None:
    scan = case("random", n_x=16, n_coils=3) if is_fake(device) else case("random", n_x=160, n_coils=8)
    warm_up, n = (2, 8) if is_fake(device) else (5, 200)

    def run(times: int) -> int:
        for _ in range(times):
            way_of_a_slice(scan, device.xp)
        gc.collect()
        device.synchronise()
        return device.memory_used()

    run(1)  # imports
    tracemalloc.start()
    try:
        before = run(warm_up)
        host_before = tracemalloc.get_traced_memory()[0]
        assert run(n) <= before
        assert tracemalloc.get_traced_memory()[0] - host_before < scan.native.nbytes  # not one slice stays behind
    finally:
        tracemalloc.stop()


def test_the_host_is_told_by_name_and_a_device_array_never_goes_by_itself(device: Device) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    there = to_device(array, device.xp)
    assert array_module(there) is device.xp
    assert to_device(there, device.xp) is there
    assert to_host(array) is array
    np.testing.assert_array_equal(to_host(there), array)
    np.testing.assert_array_equal(to_device(there, np), array)
    with pytest.raises(TypeError):
        np.asarray(there)
    with pytest.raises(TypeError):
        there + array
