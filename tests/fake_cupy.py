"""CuPy without a device, for tests: its arrays refuse what CuPy's refuse, and only what is on a list here exists.

An array wraps a NumPy array rather than being a subclass of one: `np.asarray` of a subclass succeeds whatever the
subclass says, and CuPy's arrays refuse it. Where CuPy's versions differ, or where it allows what moves data unasked
(NumPy's own functions on its arrays, NumPy arrays as indices or values), this refuses.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import scipy.fft


def _names(text: str) -> list[str]:
    return text.split()


# Names that CuPy has, in the versions that pyproject allows; np.block, for one, is not among them.
NUMBERS = _names(
    "bool_ complex64 complex128 dtype e float32 float64 inf int32 int64 integer nan newaxis pi uint8 uint16 uint32"
)
MAKERS = _names("arange empty eye full linspace ones zeros")
FUNCTIONS = _names(
    "abs absolute add all angle any argmax argmin argsort around atleast_1d bincount broadcast_to ceil clip "
    "concatenate conj convolve cos cumsum diag diff divide dot einsum empty_like equal exp expand_dims flatnonzero "
    "flip floor full_like hypot imag isfinite isnan log log2 logical_and logical_not logical_or matmul max maximum "
    "mean median min minimum moveaxis nonzero ones_like outer pad percentile power prod quantile ravel real repeat "
    "reshape rint roll searchsorted sign sin sort sqrt square squeeze stack std sum swapaxes take tanh tensordot tile "
    "transpose tril triu unique var vdot where zeros_like"
)
LINALG = _names("cholesky det eigh eigvalsh inv matrix_power norm pinv qr slogdet solve svd")
FFT = _names("fft fftn fftshift ifft ifftn ifftshift irfft rfft")
METHODS = _names(
    "argmax argmin argsort astype conj cumsum diagonal dot flatten nonzero ravel repeat reshape round squeeze "
    "swapaxes take trace transpose view"
)
REDUCTIONS = _names("all any max mean min prod std sum var")
OPERATORS = _names(
    "absolute add bitwise_and bitwise_or bitwise_xor conjugate divide equal floor_divide greater greater_equal invert "
    "left_shift less less_equal matmul multiply negative not_equal positive power remainder right_shift subtract "
    "true_divide"
)


class CUDARuntimeError(RuntimeError):
    """What the runtime raises."""


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801 – CuPy's name
    """An array of the device that is not there."""

    def __init__(self, host: Any) -> None:
        """Hold `host`, a NumPy array that nobody else writes to."""
        self._memory = host
        self._coming: _Copy | None = None
        _count(host)

    @property
    def _host(self) -> Any:
        """The NumPy array; a copy that is still on its way must be one that the current stream waits for."""
        if self._coming is not None:
            if not self._coming.is_awaited:
                raise RuntimeError("the array is read while its copy is still on its way")
            self._coming.run()
        return self._memory

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`.")

    def __array_function__(self, function: Callable[..., Any], *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} of a device array: its own module's function is wanted")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        if method != "__call__" or ufunc.__name__ not in {*OPERATORS, *FUNCTIONS}:
            raise TypeError(f"numpy.{ufunc.__name__}.{method} has no counterpart here")
        if out is None:
            return _wrap(ufunc(*_unwrap(inputs), **_unwrap(kwargs)))
        ufunc(*_unwrap(inputs), out=_unwrap(out), **_unwrap(kwargs))
        return out[0]

    def __getitem__(self, index: Any) -> Any:
        return _wrap(self._host[_index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[_index(index)] = _unwrap(value)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._memory)

    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __complex__(self) -> complex:
        return complex(self._host)

    __hash__ = None  # type: ignore[assignment]

    shape, dtype, ndim, size, nbytes, strides, itemsize = (
        property(lambda self, name=name: getattr(self._memory, name))
        for name in ("shape", "dtype", "ndim", "size", "nbytes", "strides", "itemsize")
    )

    @property
    def T(self) -> Any:  # noqa: N802
        return _wrap(self._host.T)

    @property
    def real(self) -> Any:
        return _wrap(self._host.real)

    @real.setter
    def real(self, value: Any) -> None:
        self._host.real = _unwrap(value)

    @property
    def imag(self) -> Any:
        return _wrap(self._host.imag)

    @imag.setter
    def imag(self, value: Any) -> None:
        self._host.imag = _unwrap(value)

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self._memory.__array_interface__["data"][0])

    @property
    def flags(self) -> SimpleNamespace:
        flags = self._memory.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata)

    def copy(self, order: str = "C") -> Any:
        return _wrap(self._host.copy(order))

    def fill(self, value: Any) -> None:
        self._host.fill(_unwrap(value))

    def sort(self, axis: int = -1) -> None:
        self._host.sort(axis)

    def item(self, *args: int) -> Any:
        return self._host.item(*args)

    def tolist(self) -> Any:
        return self._host.tolist()

    def get(self) -> Any:
        return self._host.copy()

    def set(self, host: Any, stream: Stream | None = None) -> None:
        """Take the values of `host`; on a stream they come later, as `host` is by then."""
        if type(host) is not np.ndarray or host.dtype != self.dtype or host.shape != self.shape:
            raise TypeError("only a NumPy array of the same shape and dtype can be set")
        self._coming = _Copy(self, host)
        if stream is None:
            self._coming.run()
        else:
            stream.pending.append(self._coming)


def _method(name: str, allowed: set[str] | None = None) -> Callable[..., Any]:
    def call(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        if allowed is not None and (len(args) > 1 or not set(kwargs) <= allowed):
            raise TypeError(f"{name}() takes {sorted(allowed)} here")
        return _wrap(getattr(self._host, name)(*_unwrap(args), **_unwrap(kwargs)))

    return call


for _name in METHODS:
    setattr(ndarray, _name, _method(_name))
for _name in REDUCTIONS:
    setattr(ndarray, _name, _method(_name, {"axis", "dtype", "keepdims"}))


def _unwrap(value: Any) -> Any:
    """Return `value` with device arrays as NumPy's; a NumPy array in it is what CuPy calls an unsupported type."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (tuple, list)):
        return type(value)(_unwrap(each) for each in value)
    if isinstance(value, dict):
        return {name: _unwrap(each) for name, each in value.items()}
    return value


def _wrap(value: Any) -> Any:
    """Return `value` with NumPy's arrays and numbers as device arrays: CuPy's reductions and items stay there too."""
    if isinstance(value, (np.ndarray, np.generic)):
        return ndarray(np.asarray(value))
    return tuple(_wrap(each) for each in value) if isinstance(value, (tuple, list)) else value


def _index(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if isinstance(part, (np.ndarray, list)):
            raise IndexError(f"Unsupported type {type(part)} as an index; a device array is wanted")
    return tuple(_unwrap(part) for part in parts)


def _function(function: Callable[..., Any], needs_array: bool = True) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if needs_array and not any(isinstance(each, ndarray) for each in _flat((args, kwargs))):
            raise TypeError(f"{function.__name__} of no device array")
        return _wrap(function(*_unwrap(args), **_unwrap(kwargs)))

    return call


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _flat(each)
    else:
        yield value


def _array(value: Any, dtype: Any = None) -> Any:
    """Return a new device array of a NumPy array, a list, a number or a device array."""
    return ndarray(np.array(value._host if isinstance(value, ndarray) else value, dtype))


def _asarray(value: Any, dtype: Any = None) -> Any:
    is_same = isinstance(value, ndarray) and dtype in (None, value.dtype)
    return value if is_same else _array(value, dtype)


def _ascontiguousarray(value: Any, dtype: Any = None) -> Any:
    value = _asarray(value, dtype)
    return value if value.flags.c_contiguous else value.copy()


# Memory: every buffer that a device array holds, by its address in Python, until it is let go of.
_held: dict[int, int] = {}


def _count(host: Any) -> None:
    while isinstance(host.base, np.ndarray):
        host = host.base
    if id(host) not in _held:
        _held[id(host)] = host.nbytes
        weakref.finalize(host, _held.pop, id(host))


class _Copy:
    """A copy to the device that has not run yet; it takes what the host's buffer holds when it does."""

    def __init__(self, array: ndarray, source: Any) -> None:
        self.is_awaited = False
        self.is_done = False
        self._array = weakref.ref(array)
        self._source = source

    def run(self) -> None:
        array = self._array()
        if array is not None and not self.is_done:
            array._memory[...] = self._source
            array._coming = None
        self.is_done = True
        self._source = None


class Event:
    """What was queued on a stream when it was recorded."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.copies: list[_Copy] = []

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or CURRENT
        stream.pending = [copy for copy in stream.pending if not copy.is_done]
        self.copies = list(stream.pending)

    def synchronize(self) -> None:
        for copy in self.copies:
            copy.run()


class Stream:
    """Copies in the order in which they were queued."""

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.pending: list[_Copy] = []

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if self is CURRENT:  # where everything but copies runs
            for copy in event.copies:
                copy.is_awaited = True

    def synchronize(self) -> None:
        self.record().synchronize()


CURRENT = Stream()


def _cuda() -> SimpleNamespace:
    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        getDeviceProperties=lambda _: {"name": b"Fake device"},
    )
    return SimpleNamespace(
        Stream=Stream,
        Event=Event,
        Device=lambda: SimpleNamespace(synchronize=CURRENT.synchronize),
        alloc_pinned_memory=bytearray,
        get_current_stream=lambda: CURRENT,
        runtime=runtime,
    )


def _module(name: str, **attributes: Any) -> Any:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def make() -> dict[str, ModuleType]:
    """Return the modules by name: cupy and the part of cupyx that transforms."""
    cupy = _module("cupy", __version__="0 (fake)", ndarray=ndarray, cuda=_cuda())
    vars(cupy).update({name: getattr(np, name) for name in NUMBERS})
    vars(cupy).update({name: _function(getattr(np, name), needs_array=False) for name in MAKERS})
    vars(cupy).update({name: _function(getattr(np, name)) for name in FUNCTIONS})
    cupy.array, cupy.asarray, cupy.ascontiguousarray = _array, _asarray, _ascontiguousarray
    cupy.asnumpy = lambda array: array.get() if isinstance(array, ndarray) else np.asarray(array)
    cupy.get_array_module = lambda *arrays: cupy if any(isinstance(each, ndarray) for each in arrays) else np
    cupy.get_default_memory_pool = lambda: SimpleNamespace(used_bytes=lambda: sum(_held.values()))
    cupy.linalg = _module("cupy.linalg", **{name: _function(getattr(np.linalg, name)) for name in LINALG})
    cupy.fft = _module("cupy.fft", **{name: _function(getattr(np.fft, name)) for name in FFT})
    window = np.lib.stride_tricks.sliding_window_view
    cupy.lib = SimpleNamespace(stride_tricks=SimpleNamespace(sliding_window_view=_function(window)))
    fft = _module("cupyx.scipy.fft", **{name: _function(getattr(scipy.fft, name)) for name in FFT})
    of_scipy = _module("cupyx.scipy", fft=fft)
    return {
        "cupy": cupy,
        "cupyx": _module("cupyx", scipy=of_scipy),
        "cupyx.scipy": of_scipy,
        "cupyx.scipy.fft": fft,
    }


@contextmanager
def installed() -> Iterator[Any]:
    """Put the fake in the place of CuPy, give it, and take it away again."""
    modules = make()
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield modules["cupy"]
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
