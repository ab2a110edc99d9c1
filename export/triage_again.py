"""A shipped triage network as one that can be trained on: its ONNX weights, with batch normalisation put back.

At export each normalisation was folded into its convolution. Here it is put back with the statistics of planes that
are shown once, so that the network answers as before, in training (up to a batch's own statistics) and out of it.
The convolutions get the size of a trained one's: what folding took from them, the normalisation gives back.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.triage_network import WIDTHS, TriageNetwork
from recon.arrays import Array

SIZE_OF_WEIGHTS = 0.1  # root mean square of a convolution's weights: steps are as large relative to it as they were


def from_onnx(path: Path, planes: Tensor | None = None) -> TriageNetwork:
    """Return the network of a model.onnx that `export.triage_onnx` wrote; the head of the whole plane starts anew.

    planes: float32 (n, 2, y, x), training planes that the statistics are taken from; None where it is not to be
    trained on.
    Raises ValueError where the graph is not this network's.
    """
    graph = onnx.load(str(path)).graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    network = TriageNetwork(_widths(stored))
    network.eval()
    pairs = [
        (sequence[0], sequence[1])
        for sequence in network.modules()
        if isinstance(sequence, nn.Sequential) and isinstance(sequence[1], nn.BatchNorm2d)
    ]
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    if len(nodes) != len(pairs):
        raise ValueError(f"{path.name} has {len(nodes)} convolutions; this network has {len(pairs)}")
    with torch.no_grad():
        for node, (convolution, norm) in zip(nodes, pairs, strict=True):
            _fill(convolution.weight, stored[node.input[1]])
            _fill(norm.bias, stored[node.input[2]])
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
        for name, parameter in network.named_parameters():
            if name.startswith(("up.", "leave.")):
                _fill(parameter, stored[f"network.{name}"])
        if planes is not None:
            _normalise(network, pairs, planes)
    return network


def _widths(stored: dict[str, Array]) -> tuple[int, ...]:
    """Return the widths, from the top, that the ways up lead through."""
    found: list[int] = []
    while (name := f"network.up.{len(found)}.weight") in stored:
        found.append(stored[name].shape[0])
    last = stored["network.leave.weight"].shape[0] if "network.leave.weight" in stored else 0
    return (last, *found[::-1]) if found and last else WIDTHS


def _fill(parameter: Tensor, value: Array) -> None:
    if tuple(parameter.shape) != value.shape:
        raise ValueError(f"weights of {value.shape} where {tuple(parameter.shape)} are right")
    parameter.copy_(torch.from_numpy(value.copy()))


def _normalise(network: TriageNetwork, pairs: list[tuple[nn.Module, nn.Module]], planes: Tensor) -> None:
    """Give every normalisation the statistics of its inputs, and the scale and offset that undo them."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[norm] = (inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), unbiased=False))

    hooks = [norm.register_forward_pre_hook(look) for _, norm in pairs]
    network(planes)
    for hook in hooks:
        hook.remove()
    for convolution, norm in pairs:
        mean, variance = seen[norm]
        size = convolution.weight.square().mean((1, 2, 3)).sqrt().clamp_min(1e-8)
        factor = SIZE_OF_WEIGHTS / size
        convolution.weight.mul_(factor[:, None, None, None])
        norm.bias.add_(mean)
        norm.running_mean.copy_(mean * factor)
        norm.running_var.copy_(variance * factor**2)
        # (f x - f m) / sqrt(f² v + eps) · w + b + m is x + b where w = sqrt(f² v + eps) / f
        norm.weight.copy_((variance * factor**2 + norm.eps).sqrt() / factor)
