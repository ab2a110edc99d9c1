"""TensorRT, natively: plans that were built on this device, with device memory shared with CuPy.

Uses what TensorRT 10.3 (JetPack 6), 11 and TensorRT for RTX have in common. Arrays that are on the device already are
given to the engine where they lie. A launch whose sizes and addresses were seen before replays its CUDA graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from recon.arrays import Array
from recon.engine import Profile, Shape, fit, profile_of
from recon.errors import BackendError, ShapeError
from recon.network import Card
from recon.superres_engine import LEAST, MOST, OUTPUTS, PROFILE, fits, input_shapes

LIBRARIES = ("tensorrt", "tensorrt_rtx")
_GRAPHS = 8  # kept; each holds addresses only


class Device(NamedTuple):
    """What engines are built for and run on.

    library: the module `tensorrt` or `tensorrt_rtx`. cupy: that module. runtime: the library's name and version.
    """

    library: Any
    cupy: Any
    gpu: str
    runtime: str


def find_device() -> Device:
    """Return the GPU and the TensorRT of this machine; raises BackendError that names what is missing."""
    try:
        cupy = import_module("cupy")
        n_devices = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise BackendError("CuPy is not installed; pip install 'scanside[gpu]'") from error
    except Exception as error:  # the driver's errors have a class of their own in each version
        raise BackendError(f"there is no usable CUDA device ({type(error).__name__})") from error
    if not n_devices:
        raise BackendError("there is no CUDA device")
    library = None
    for name in LIBRARIES:
        with suppress(ImportError):
            library = import_module(name)
            break
    if library is None:
        raise BackendError(f"neither {' nor '.join(LIBRARIES)} can be imported")
    about = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    gpu = f"{about['name'].decode()} sm{about['major']}{about['minor']}"
    return Device(library, cupy, gpu, f"{library.__name__} {library.__version__}")


class Launcher:
    """An engine that is loaded: arrays by name to arrays by name, whatever they are called."""

    def __init__(self, plan: bytes, of: str, names: set[str], precision: str, device: Device) -> None:
        """Load the plan `of` something, whose inputs and outputs must be `names`.

        Raises BackendError where this TensorRT does not take it.
        """
        self.backend = f"{device.runtime} {precision} on {device.gpu}"
        self._cupy = device.cupy
        self._graphs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._seen: tuple[int, ...] = ()
        self._may_capture = True
        try:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
            # the runtime lends its logger to the engine: all three must live as long
            self._logger = device.library.Logger(device.library.Logger.ERROR)
            self._runtime = device.library.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            self._context: Any = None if self._engine is None else self._engine.create_execution_context()
        except Exception as error:
            raise BackendError(f"{device.runtime} cannot load the engine: {type(error).__name__}") from error
        if self._context is None:
            raise BackendError(f"{device.runtime} does not take the engine of {of}")
        if {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)} != names:
            raise BackendError(f"the engine of {of} has other inputs or outputs than {', '.join(sorted(names))}")
        self._buffers: dict[tuple[str, tuple[int, ...]], Any] = {}

    def launch(self, values: Mapping[str, Array], shapes: Mapping[str, Shape], on_device: bool) -> dict[str, Array]:
        """Return fresh outputs of `shapes`, on the device where the values are; raise BackendError for any failure.

        Outputs are filled with NaN before each run, so that a run which wrote nothing cannot pass for one that did.
        """
        try:
            outputs = self._launch(values, shapes, on_device)
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"TensorRT failed to run the network: {type(error).__name__}") from error
        xp = self._cupy if on_device else np
        if not all(bool(xp.isfinite(output).all()) for output in outputs.values()):
            raise BackendError("the network gave values that are not finite numbers")
        return outputs

    def close(self) -> None:
        """Give back the device's memory; a second call does nothing."""
        self._graphs.clear()
        self._buffers.clear()
        self._context = self._engine = self._runtime = None

    def _launch(self, values: Mapping[str, Array], shapes: Mapping[str, Shape], on_device: bool) -> dict[str, Array]:
        cupy, stream = self._cupy, self._stream
        if on_device:  # what made them may still be at work on its own stream
            stream.wait_event(cupy.cuda.get_current_stream().record())
        with stream:
            placed = {name: self._place(name, value) for name, value in values.items()}
            outputs = {name: self._buffer(name, shape) for name, shape in shapes.items()}
            key = tuple(number for array in placed.values() for number in (*array.shape, array.data.ptr))
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._enqueue(placed, outputs, key)
            if graph is not None:
                graph.launch(stream)
            found = {name: each.copy() if on_device else each.get(stream=stream) for name, each in outputs.items()}
            stream.synchronize()
        return found

    def _enqueue(self, placed: Mapping[str, Array], outputs: Mapping[str, Array], key: tuple[int, ...]) -> Any:
        """Run once without a graph, or return one to launch where the same run was seen just before."""
        if key != self._seen:
            for name, array in placed.items():
                if not self._context.set_input_shape(name, array.shape):
                    raise BackendError(f"the engine does not take {name} of shape {array.shape}")
                self._context.set_tensor_address(name, array.data.ptr)
            for name, output in outputs.items():
                self._context.set_tensor_address(name, output.data.ptr)
                if tuple(self._context.get_tensor_shape(name)) != output.shape:
                    raise BackendError(f"the engine's {name} has another shape than the scan's")
        elif self._may_capture:
            graph = self._capture(outputs)
            if graph is not None:
                self._graphs[key] = graph
                if len(self._graphs) > _GRAPHS:
                    self._graphs.popitem(last=False)
                return graph
        self._seen = ()
        self._execute(outputs)
        self._seen = key
        return None

    def _capture(self, outputs: Mapping[str, Array]) -> Any:
        """Return the run as a CUDA graph, or None where the driver or the engine does not allow it."""
        try:
            self._stream.begin_capture()
            try:
                self._execute(outputs)
            finally:
                graph = self._stream.end_capture()
        except Exception:  # said once, by the absence of a graph: runs go on without
            self._may_capture = False
            return None
        return graph

    def _execute(self, outputs: Mapping[str, Array]) -> None:
        for output in outputs.values():
            output.fill(np.nan)
        if not self._context.execute_async_v3(self._stream.ptr):
            raise BackendError("TensorRT failed to run the network: it would not start")

    def _place(self, name: str, value: Array) -> Array:
        """Return `value` on the device: itself where it is there already, else a buffer that is used again."""
        if isinstance(value, self._cupy.ndarray) and value.dtype == np.float32 and value.flags.c_contiguous:
            return value
        buffer = self._buffer(name, value.shape)
        if isinstance(value, self._cupy.ndarray):
            buffer[...] = value
        else:
            buffer.set(np.ascontiguousarray(value, np.float32), stream=self._stream)
        return buffer

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Array:
        found = self._buffers.get((name, shape))
        if found is None:
            found = self._buffers[name, shape] = self._cupy.empty(shape, np.float32)
        return found


class TrtNetwork(Launcher):
    """The engine of a reconstruction; see `recon.network.Network`. It runs inputs of its profile and no others."""

    def __init__(self, plan: bytes, profile: Profile, card: Card, precision: str, device: Device) -> None:
        """Load the plan; raises BackendError where this TensorRT does not take it."""
        super().__init__(plan, profile.name, {*profile.shapes(1), "image"}, precision, device)
        self.card = card
        self._profile = profile

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return {"image"}, fresh, on the device where `inputs` are; raise BackendError for any failure."""
        if self._context is None:
            raise BackendError("the network was closed")
        try:
            found = profile_of(inputs)
            if found != self._profile:
                raise BackendError(f"the engine is for {self._profile.name}; the scan needs {found.name}")
            values = fit(inputs, self._profile)
        except (KeyError, ShapeError) as error:
            raise BackendError(f"TensorRT failed to run the network: {type(error).__name__}") from error
        shape = (values["adjoint"].shape[0], 2, self._profile.y, self._profile.x)
        return self.launch(values, {"image": shape}, isinstance(inputs["adjoint"], self._cupy.ndarray))


class TrtRefiner(Launcher):
    """The engine of super-resolution; see `recon.superres_card.Session`. It runs planes that `fits` and no others."""

    def __init__(self, plan: bytes, device: Device) -> None:
        """Load the plan; raises BackendError where this TensorRT does not take it."""
        super().__init__(plan, PROFILE, {*input_shapes(LEAST), *OUTPUTS}, "float32", device)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return what is placed and what is added, fresh, on the host; raise BackendError for any failure."""
        if self._context is None:
            raise BackendError("the network was closed")
        if not fits(inputs):
            raise BackendError(f"the engine of {PROFILE} is for planes of {LEAST} to {MOST} voxels a side")
        shape = (len(inputs["image"]), 1, len(inputs["place_y"]), len(inputs["place_x"]))
        return self.launch(inputs, dict.fromkeys(OUTPUTS, shape), False)
