"""ONNX Runtime: on the CPU, where it is always there, and by its CUDA and TensorRT providers where a build has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import edge.backends.offline  # noqa: F401  before the library

# isort: split
import numpy as np
import onnxruntime

from recon.arrays import Array, array_module, to_device, to_host
from recon.errors import BackendError, ModelError
from recon.network import Card

THREADS = 2
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
WORDS = {"cpu": "CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}


class OrtSession:
    """A network in an ONNX Runtime session, whatever its inputs and outputs are called."""

    def __init__(self, model: Path, kind: str, cache: Path | None, precision: str) -> None:
        """Open the model file on the provider of `kind`, which keeps what it builds in `cache`.

        Raises BackendError where the runtime cannot, or would quietly use another provider.
        """
        words = () if precision == "float32" else (precision,)
        self.backend = " ".join(("onnxruntime", onnxruntime.__version__, WORDS[kind], *words))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        # Threads that spin between runs take the core that the rest of the chain works on (measured: 1.3 to 1.5 times).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False  # an arena keeps the largest scan's memory for ever
        options.log_severity_level = 3
        chosen = providers(kind, cache)
        try:
            self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
                str(model), options, providers=chosen
            )
        except Exception as error:  # the runtime's errors share no class but this one
            raise BackendError(f"onnxruntime cannot open the network: {type(error).__name__}") from error
        if self._session.get_providers()[0] != PROVIDERS[kind]:
            raise BackendError(f"onnxruntime cannot use {PROVIDERS[kind]} on this machine")
        self._names = [each.name for each in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return fresh arrays by name; raise BackendError where the run fails or gives no finite numbers.

        Arrays of a device make their way through the host: the answer is of the inputs' module (NumPy or CuPy).
        """
        if self._session is None:
            raise BackendError("the network was closed")
        try:
            host = {name: np.ascontiguousarray(to_host(array)) for name, array in inputs.items()}
            arrays = self._session.run(self._names, host)
        except Exception as error:
            raise BackendError(f"onnxruntime failed to run the network: {type(error).__name__}") from error
        if not all(np.isfinite(array).all() for array in arrays):
            raise BackendError("the network gave values that are not finite numbers")
        xp = array_module(next(iter(inputs.values())))
        return {name: to_device(array, xp) for name, array in zip(self._names, arrays, strict=True)}

    def close(self) -> None:
        """Let go of the session."""
        self._session = None


class OrtNetwork(OrtSession):
    """A reconstruction network in an ONNX Runtime session; see `recon.network.Network`."""

    def __init__(self, model: Path, card: Card, kind: str, cache: Path | None, precision: str) -> None:
        """Open the model file that `card` describes; see `OrtSession`."""
        super().__init__(model, kind, cache, precision)
        self.card = card


def providers(kind: str, cache: Path | None) -> list[Any]:
    """Return the providers of a session of `kind` with their options, the CPU's last: it takes what others do not.

    Data consistency stays in float32 (no TF32). Raises BackendError where this build of the runtime lacks the provider.
    """
    cpu = PROVIDERS["cpu"]
    if kind == "cpu":
        return [cpu]
    missing = lacks(kind)
    if missing:
        raise BackendError(missing)
    cuda = (PROVIDERS["cuda"], {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
    if kind == "cuda":
        return [cuda, cpu]
    options = {"trt_engine_cache_enable": "True", "trt_timing_cache_enable": "True"} if cache is not None else {}
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        options |= {"trt_engine_cache_path": str(cache), "trt_timing_cache_path": str(cache)}
    return [(PROVIDERS["tensorrt"], options), cuda, cpu]


def lacks(kind: str) -> str:
    """Return why this build of the runtime cannot run on `kind`; "" where it can."""
    if PROVIDERS[kind] in onnxruntime.get_available_providers():
        return ""
    return f"this build of onnxruntime {onnxruntime.__version__} has no {PROVIDERS[kind]}"


def open_network(
    model: Path, card: Card, kind: str = "cpu", cache: Path | None = None, precision: str = "float32"
) -> OrtNetwork:
    """Return the network in `model`, an ONNX file that `card` describes. Raises BackendError."""
    if not model.is_file():
        raise ModelError(f"the model folder has no {model.name}")
    return OrtNetwork(model, card, kind, cache, precision)


def open_session(model: Path, kind: str = "cpu") -> OrtSession:
    """Return the network in `model`, an ONNX file. Raises ModelError where there is none, BackendError."""
    if not model.is_file():
        raise ModelError(f"the model folder has no {model.name}")
    return OrtSession(model, kind, None, "float32")
