"""ONNX Runtime on the CPU: the backend that is always there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from recon.arrays import Array, array_module, to_device, to_host
from recon.errors import BackendError, ModelError
from recon.network import Card

THREADS = 2


class OrtNetwork:
    """A network in an ONNX Runtime session; see `recon.network.Network`."""

    def __init__(self, model: Path, card: Card) -> None:
        """Open the model file; raise BackendError where the runtime cannot."""
        self.card = card
        self.backend = f"onnxruntime {onnxruntime.__version__} CPU"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        # Threads that spin between runs take the core that the rest of the chain works on (measured: 1.3 to 1.5 times).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False  # an arena keeps the largest scan's memory for ever
        options.log_severity_level = 3
        try:
            self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's errors share no class but this one
            raise BackendError(f"onnxruntime cannot open the network: {type(error).__name__}") from error
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


def open_network(model: Path, card: Card) -> OrtNetwork:
    """Return the network in `model`, an ONNX file that `card` describes. Raises BackendError."""
    if not model.is_file():
        raise ModelError(f"the model folder has no {model.name}")
    return OrtNetwork(model, card)
