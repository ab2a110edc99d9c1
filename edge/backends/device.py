"""Where the arrays of a scan live: in the host's memory, or on a CUDA device by way of CuPy.

Only this module moves whole slices between the two. CuPy is imported when a CUDA device is opened, never before.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from recon.arrays import Array, to_host
from recon.errors import BackendError

DEVICES = ("auto", "cpu", "cuda")


class Device:
    """The host itself: arrays stay as they are, and nothing is waited for.

    xp: the module that its arrays belong to (numpy or cupy). name: what it is, in words. reason: why it is not the
    CUDA device that "auto" would have preferred; "" where it is, or where the host was asked for.
    """

    xp: ModuleType = np
    name = "CPU"

    def __init__(self, reason: str = "") -> None:
        """Nothing has to be opened."""
        self.reason = reason

    def upload(self, host: Array) -> Array:
        """Return `host`, a NumPy array of any shape and dtype, as an array of this device; raise BackendError.

        On the host that is the array itself. On a CUDA device it is a new one, and `host` may be changed at once.
        """
        return host

    def download(self, array: Array) -> Array:
        """Return an array of this device as a NumPy array, after the work that makes it has ended."""
        return to_host(array)

    def synchronise(self) -> None:
        """Wait until all work that was given to the device has ended."""

    def memory_used(self) -> int:
        """Return how many bytes of device memory the arrays that are alive hold; 0 on the host."""
        return 0


class CudaDevice(Device):
    """The current CUDA device. One thread at a time uploads."""

    def __init__(self, cupy: ModuleType) -> None:
        """Open it and run one small kernel, so that a driver or toolkit that cannot is known here; CuPy's errors."""
        super().__init__()
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        self.xp = cupy
        self.name = f"{properties['name'].decode()} (CuPy {cupy.__version__})"
        self._copies = cupy.cuda.Stream(non_blocking=True)
        self._copied = cupy.cuda.Event(disable_timing=True)
        self._staging: Any = None  # pinned memory, through which copies run beside the host's own work
        self._n_staged = 0
        if int(cupy.arange(3).sum()) != 3:
            raise BackendError("the CUDA device cannot add")

    def upload(self, host: Array) -> Array:
        """Return `host` as a new array of the device: work given to the current stream from now on finds it whole.

        The host does not wait for the copy, only for the one before it, whose staging buffer is used again.
        Raises BackendError where memory runs out or the device fails.
        """
        cuda = self.xp.cuda
        try:
            array = self.xp.empty(host.shape, host.dtype)
            if not host.nbytes:
                return array
            staged = self._staged(host)
            current = cuda.get_current_stream()
            # The pool may have given memory that work of the current stream still reads: the copy queues behind it.
            self._copies.wait_event(current.record())
            array.set(staged, stream=self._copies)
            self._copied.record(self._copies)
            current.wait_event(self._copied)
        except (MemoryError, RuntimeError) as error:  # CuPy's out of memory is the one, the runtime's errors the other
            raise BackendError(f"{host.nbytes >> 20} MiB did not go to the device: {type(error).__name__}") from error
        return array

    def synchronise(self) -> None:
        """Wait until all work on the device has ended; raise BackendError where some of it failed."""
        try:
            self.xp.cuda.Device().synchronize()
        except RuntimeError as error:
            raise BackendError(f"work on the device failed: {type(error).__name__}") from error

    def memory_used(self) -> int:
        """Return how many bytes of CuPy's memory pool are in use."""
        return int(self.xp.get_default_memory_pool().used_bytes())

    def _staged(self, host: Array) -> Array:
        """Return a copy of `host` in the staging buffer, once the copy before has left it; it grows as needed."""
        self._copied.synchronize()  # an event that was never recorded is over at once
        if self._n_staged < host.nbytes:
            self._staging = None  # before the new one, so that the two are never held together
            self._staging = self.xp.cuda.alloc_pinned_memory(host.nbytes)
            self._n_staged = host.nbytes
        staged = np.frombuffer(self._staging, host.dtype, host.size).reshape(host.shape)
        staged[...] = host
        return staged


def open_device(choice: str = "auto") -> Device:
    """Return where arrays shall live: "cpu", "cuda", or "auto" for CUDA where there is a device that works.

    Raises BackendError with the reason where CUDA is asked for and cannot be had, or for any other name.
    """
    if choice not in DEVICES:
        raise BackendError(f"device {choice!r} is not known; there are {', '.join(DEVICES)}")
    if choice == "cpu":
        return Device()
    try:
        return _open_cuda()
    except BackendError as error:
        if choice == "cuda":
            raise
        return Device(str(error))


def _open_cuda() -> CudaDevice:
    try:
        import cupy
    except ImportError as error:
        raise BackendError("no CUDA device without CuPy: pip install 'scanside[gpu]'") from error
    try:
        found = int(cupy.cuda.runtime.getDeviceCount())
    except RuntimeError as error:
        raise BackendError(f"no CUDA device was found: {_status(error)}") from error
    if not found:
        raise BackendError("no CUDA device was found")
    try:
        return CudaDevice(cupy)
    except BackendError:
        raise
    except Exception as error:  # CuPy's compiler, driver and libraries each have errors of their own
        raise BackendError(f"the CUDA device cannot be used: {_status(error)}") from error


def _status(error: Exception) -> str:
    """Return the name of a CUDA error ("cudaErrorInsufficientDriver"), which its message begins with, or its type."""
    name = str(error).partition(":")[0]
    return name if name.startswith("cudaError") and name.isidentifier() else type(error).__name__
