"""The trained super-resolution network as one ONNX graph for any matrix, projection included."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from export.onnx import OPSET
from export.superres_network import Detail, SuperResolution
from recon.arrays import Array
from recon.fine_grid import band_axis, kept_axis, profile_axis
from recon.superres import network_inputs

INPUTS = ("image", "place_y", "place_x", "basis_y", "basis_x", "phase_y", "phase_x", "noise")
OUTPUTS = ("placed", "added")
AXES = {
    "image": {0: "slice", 2: "y", 3: "x"},
    "place_y": {0: "fine_y", 1: "y"},
    "place_x": {0: "fine_x", 1: "x"},
    "basis_y": {0: "fine_y", 1: "known_y"},
    "basis_x": {0: "fine_x", 1: "known_x"},
    "phase_y": {0: "fine_y"},
    "phase_x": {0: "fine_x"},
    "noise": {0: "slice"},
    "placed": {0: "slice", 2: "fine_y", 3: "fine_x"},
    "added": {0: "slice", 2: "fine_y", 3: "fine_x"},
}
MAX_DIFFERENCE = 1e-4  # of an image whose scale is 1, ONNX Runtime against PyTorch


def write_superres(detail: Detail, path: Path) -> None:
    """Write `detail` with its projection to `path`, opset 17, float32; raises ValueError where the graph is unsound."""
    example = network_inputs(np.zeros((1, 24, 20), np.float32), band_axis(24), band_axis(20), 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own deprecation
        torch.onnx.export(
            SuperResolution(detail).eval(),
            tuple(torch.from_numpy(np.ascontiguousarray(example[name])) for name in INPUTS),
            str(path),
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes=AXES,
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(onnx.load(str(path)), full_check=True)


def open_superres(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """Return a session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_superres(detail: Detail, path: Path) -> float:
    """Return the largest difference between ONNX Runtime and PyTorch over odd and even sizes and both kinds of axis.

    Raises ValueError where it is above MAX_DIFFERENCE.
    """
    session, graph = open_superres(path), SuperResolution(detail).eval()
    rng = np.random.default_rng(0)
    worst = 0.0
    for y, x in (
        (band_axis(48), band_axis(40)),
        (band_axis(41), band_axis(36)),
        (profile_axis(13, 3), kept_axis(50)),
    ):
        image = _smooth(rng, (y.place.shape[1], x.place.shape[1]))
        inputs = network_inputs(image[None], y, x, 0.02)
        found = session.run(list(OUTPUTS), inputs)
        with torch.no_grad():
            wanted = graph(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in INPUTS))
        worst = max(worst, *(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, wanted, strict=True)))
    if not worst <= MAX_DIFFERENCE:
        raise ValueError(f"{path.name} differs from PyTorch by {worst:.1e}; {MAX_DIFFERENCE:g} is allowed")
    return worst


def _smooth(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    noise = rng.random(shape)
    return np.asarray((noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3, np.float32)
