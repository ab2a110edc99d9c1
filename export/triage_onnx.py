"""The trained triage network as ONNX, with batch normalisation folded into its convolutions."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from export.onnx import OPSET
from export.triage_network import TriageNetwork
from recon.arrays import Array
from triage.score import VIEW, middle_of, read_both_ways

INPUT = "planes"
OUTPUTS = ("lesion", "features")
MAX_DIFFERENCE = 2e-3  # of logits, ONNX Runtime against PyTorch


class _Answers(nn.Module):
    """The two outputs that run time needs."""

    def __init__(self, network: TriageNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Return lesion logits (n, 1, y, x) and features (n, k)."""
        lesion, features, _ = self.network(planes)
        return lesion, features


def write_triage(network: TriageNetwork, path: Path) -> None:
    """Write `network` as one graph for any number of planes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own deprecation
        torch.onnx.export(
            _Answers(network).eval(),
            (torch.zeros(2, 2, *VIEW),),
            str(path),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_axes={name: {0: "plane"} for name in (INPUT, *OUTPUTS)},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    if any(node.op_type == "BatchNormalization" for node in model.graph.node):
        raise ValueError("batch normalisation was not folded")


def open_triage(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """Return a session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_triage(session: onnxruntime.InferenceSession, images: Array) -> tuple[Array, Array]:
    """Return lesion logits (n, 1, y, x) and features (n, k) of planes (n, y, x), as at run time: read both ways."""
    found = []
    for start in range(0, len(images), 8):
        part = images[start : start + 8].astype(np.float32)
        found.append(read_both_ways(lambda planes: run_once(session, planes), np.stack((part, part[..., ::-1]), 1)))
    logits, features = zip(*found, strict=True)
    return np.concatenate(logits), np.concatenate(features)


def run_once(session: onnxruntime.InferenceSession, planes: Array) -> tuple[Array, Array]:
    """Return lesion logits and features of planes (n, 2, y, x)."""
    logits, features = session.run(list(OUTPUTS), {INPUT: planes})
    return logits, features


def check_triage(network: TriageNetwork, path: Path, images: Array) -> float:
    """Return the largest difference of logits between ONNX Runtime and PyTorch.

    Raises ValueError where it is above MAX_DIFFERENCE.
    """
    y, x = middle_of(images.shape[1:])
    seen = images[:, y, x]
    planes = np.stack((seen, seen[..., ::-1]), 1).astype(np.float32)
    with torch.no_grad():
        wanted = network.eval()(torch.from_numpy(planes))[0]
    worst = float(np.abs(run_once(open_triage(path), planes)[0] - wanted.numpy()).max())
    if worst > MAX_DIFFERENCE:
        raise ValueError(f"{path.name} differs from PyTorch by {worst:.1e} in a logit; {MAX_DIFFERENCE:g} is allowed")
    return worst
