"""TensorRT and CuPy as far as `edge.backends.trt` calls them: the same names, addresses in between, no device.

An engine "plan" is the ONNX file's own bytes behind a word, and a launch runs it in ONNX Runtime on whatever lies at
the addresses that the context was given: a wrong binding gives wrong numbers here, as it would there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

PLAN = b"plan "
MEMORY: dict[int, np.ndarray] = {}  # what lies at each address


class Faults:
    """What goes wrong on the device, by the calls that a test lets fail."""

    def __init__(self) -> None:
        self.refuse_shape = self.refuse_start = self.write_nothing = self.lose_device = self.refuse_capture = False
        self.factor = 1.0  # what outputs are multiplied by: an engine that computes badly
        self.offset = 0.0  # and what is added to them


FAULTS = Faults()
LAUNCHES = {"eager": 0, "graph": 0}


class CudaError(RuntimeError):
    """What a driver raises."""


class ndarray(np.ndarray):  # noqa: N801  # its name there
    """An array with an address."""

    def set(self, host: Any, stream: Any = None) -> None:
        """Copy from the host."""
        assert isinstance(stream, Stream)
        assert not isinstance(host, ndarray)
        np.copyto(self, host)

    def get(self, stream: Any = None) -> Any:
        """Copy to the host."""
        if FAULTS.lose_device:
            raise CudaError("an illegal memory access was encountered")
        return np.array(self)

    @property
    def data(self) -> Any:
        """An object with the address as `ptr`."""
        address = self.__array_interface__["data"][0]
        MEMORY[address] = self
        return SimpleNamespace(ptr=address)

    def fill(self, value: float) -> None:
        """Fill, now or when a graph is launched."""
        Stream.do(lambda: np.ndarray.fill(self, value))


def empty(shape: Any, dtype: Any) -> Any:
    """Uninitialised device memory: here full of a number that nobody wants."""
    return np.full(shape, 12345, dtype).view(ndarray)


def asarray(host: Any) -> Any:
    """The host's array on the device."""
    return np.array(host).view(ndarray)


class Graph:
    """What was captured."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        self._work = work

    def launch(self, stream: Any) -> None:
        """Do it all again."""
        LAUNCHES["graph"] += 1
        for each in self._work:
            each()


class Stream:
    """Work is done at once, or noted while a graph is captured."""

    captured: list[Callable[[], None]] | None = None
    ptr = 7

    def __init__(self, non_blocking: bool = False) -> None:
        assert non_blocking

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @classmethod
    def do(cls, work: Callable[[], None]) -> None:
        """Work now, or later in a graph."""
        if cls.captured is not None:
            cls.captured.append(work)
        else:
            work()

    def begin_capture(self) -> None:
        """Note what follows."""
        if FAULTS.refuse_capture:
            raise CudaError("operation not permitted when stream is capturing")
        Stream.captured = []

    def end_capture(self) -> Graph:
        """Return what was noted."""
        work, Stream.captured = Stream.captured, None
        assert work
        return Graph(work)

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing is left to wait for."""


def _properties(_: int) -> dict[str, Any]:
    return {"name": b"Fake GPU", "major": 8, "minor": 7}


def fake_cupy() -> Any:
    """Return the module `cupy`."""
    return SimpleNamespace(
        ndarray=ndarray,
        empty=empty,
        asarray=asarray,
        isfinite=np.isfinite,
        cuda=SimpleNamespace(
            Stream=Stream,
            Device=lambda: SimpleNamespace(id=0),
            get_current_stream=lambda: SimpleNamespace(record=lambda: None),
            runtime=SimpleNamespace(getDeviceCount=lambda: 1, getDeviceProperties=_properties),
        ),
    )


class Context:
    """An execution context."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Note a shape."""
        self._shapes[name] = tuple(shape)
        return not FAULTS.refuse_shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Note an address."""
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """The output's shape follows from the inputs'."""
        if name == "image":
            return self._shapes["classical"]
        assert name in ("placed", "added")
        return (self._shapes["image"][0], 1, self._shapes["place_y"][0], self._shapes["place_x"][0])

    def execute_async_v3(self, stream: int) -> bool:
        """Run on what lies at the addresses."""
        assert stream == Stream.ptr
        if FAULTS.refuse_start:
            return False
        addresses, shapes = dict(self._addresses), dict(self._shapes)

        def work() -> None:
            inputs = {name: np.array(MEMORY[addresses[name]]) for name in shapes}
            assert {name: each.shape for name, each in inputs.items()} == shapes
            outputs = [each.name for each in self._session.get_outputs()]
            for name, made in zip(outputs, self._session.run(outputs, inputs), strict=True):
                if not FAULTS.write_nothing:
                    np.copyto(MEMORY[addresses[name]], made * FAULTS.factor + FAULTS.offset)

        if Stream.captured is None:
            LAUNCHES["eager"] += 1
        Stream.do(work)
        return True


class Engine:
    """A deserialised plan."""

    def __init__(self, model: bytes) -> None:
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._names = [each.name for each in (*self._session.get_inputs(), *self._session.get_outputs())]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        """The name of an input or output."""
        return self._names[index]

    def create_execution_context(self) -> Context:
        """A context of its own."""
        return Context(self._session)


class Runtime:
    """Takes plans of this version."""

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, Logger)

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        """None for what is no plan, as TensorRT does."""
        return Engine(plan[len(PLAN) :]) if plan.startswith(PLAN) else None


class Logger:
    """A logger."""

    ERROR = 1

    def __init__(self, level: int) -> None:
        assert level == Logger.ERROR


def fake_tensorrt() -> Any:
    """Return the module `tensorrt`."""
    return SimpleNamespace(__name__="tensorrt", __version__="10.3.0", Logger=Logger, Runtime=Runtime)
