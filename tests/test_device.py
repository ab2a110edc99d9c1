"""Where arrays live: what is opened and why not, and that nothing is lost on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge.backends.device import CudaDevice, Device, open_device
from recon.errors import BackendError
from tests import fake_cupy

RNG = np.random.default_rng(0)


@pytest.fixture
def fake() -> Iterator[Any]:
    """The fake in CuPy's place."""
    with fake_cupy.installed() as cupy:
        yield cupy


@pytest.fixture(params=["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Every kind of device."""
    if request.param == "fake":
        with fake_cupy.installed():
            yield open_device("cuda")
        return
    try:
        found = open_device(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    yield found


def test_what_goes_up_comes_down(device: Device) -> None:
    arrays = [
        RNG.standard_normal(shape).astype(dtype)
        for shape, dtype in [((3, 4), "f4"), ((70, 50), "c8"), ((2, 1), "u2"), ((5, 0), "f4"), ((), "f8"), ((9,), "?")]
    ]
    arrays.append(arrays[1].T[::2])
    there = [device.upload(array) for array in arrays]  # through one staging buffer, before any is read
    for array, found in zip(arrays, there, strict=True):
        assert isinstance(found, device.xp.ndarray)
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(device.download(found), array)
    device.synchronise()


def test_an_array_may_be_changed_once_it_is_up(device: Device) -> None:
    array = np.ones(1000, np.float32)
    there = device.upload(array)
    if device.xp is np:
        assert there is array
        return
    array[:] = 2
    np.testing.assert_array_equal(device.download(there + 1), np.full(1000, 2, np.float32))


def test_memory_is_counted_while_arrays_are_alive(device: Device) -> None:
    before = device.memory_used()
    array = device.upload(np.ones((256, 1024), np.float32))
    assert device.memory_used() - before == (0 if device.xp is np else array.nbytes)
    del array
    assert device.memory_used() == before


def test_the_host_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # its import fails
    array = np.ones(3)
    host = open_device("cpu")
    assert host.upload(array) is array
    assert host.download(array) is array
    assert (host.name, host.reason, host.xp) == ("CPU", "", np)


def test_without_cupy_auto_is_the_host_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = open_device("auto")
    assert type(found) is Device
    assert "CuPy" in found.reason
    with pytest.raises(BackendError, match="pip install"):
        open_device("cuda")
    with pytest.raises(BackendError, match="not known"):
        open_device("abacus")


def test_a_device_that_works_is_taken_and_named(fake: Any) -> None:
    found = open_device("auto")
    assert isinstance(found, CudaDevice)
    assert found.xp is fake
    assert found.name.startswith("Fake device")
    assert not found.reason


def test_no_device_and_a_broken_one_are_named(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise fake_cupy.CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    monkeypatch.setattr(fake, "arange", fail)
    with pytest.raises(BackendError, match="cannot be used: cudaErrorInsufficientDriver"):
        open_device("cuda")
    monkeypatch.setattr(fake.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(BackendError, match="no CUDA device was found"):
        open_device("cuda")
    monkeypatch.setattr(fake.cuda.runtime, "getDeviceCount", fail)
    with pytest.raises(BackendError, match="no CUDA device was found: cudaErrorInsufficientDriver"):
        open_device("cuda")
    assert "cudaErrorInsufficientDriver" in open_device("auto").reason


def test_memory_that_runs_out_is_a_backends_failure(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise MemoryError

    device = open_device("cuda")
    monkeypatch.setattr(fake, "empty", run_out)
    with pytest.raises(BackendError, match="3 MiB did not go to the device: MemoryError"):
        device.upload(np.zeros(3 << 20, np.uint8))


def test_the_fake_tells_when_a_copy_is_not_waited_for(fake: Any) -> None:
    """What keeps `upload` honest: without its events these two are what happens."""
    copies, buffer = fake.cuda.Stream(non_blocking=True), np.ones(3)
    array = fake.empty(3)
    array.set(buffer, stream=copies)
    with pytest.raises(RuntimeError, match="still on its way"):
        array + 1
    fake.cuda.get_current_stream().wait_event(copies.record())
    buffer[:] = 7  # the staging buffer, used again too early
    np.testing.assert_array_equal((array + 1).get(), [8, 8, 8])
