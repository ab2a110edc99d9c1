"""The weights of a shipped graph, back in the network that they were trained in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper

from export.network import Shape, UnrolledNetwork


def load_onnx(path: Path) -> UnrolledNetwork:
    """Return the network whose weights are in an ONNX file of `export.onnx.write_onnx`, ready to evaluate."""
    model = onnx.load(str(path))
    stored = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    (shape,) = (each.value for each in model.metadata_props if each.key == "shape")
    network = UnrolledNetwork(Shape(**json.loads(shape)))
    network.load_state_dict({name: torch.from_numpy(stored[name].copy()) for name in network.state_dict()})
    network.eval()
    return network


def stages_of(path: Path) -> list[dict[str, Any]]:
    """Return what the card beside an ONNX file says of the runs behind its weights."""
    card = json.loads((path.parent / "card.json").read_text("utf-8"))
    stages: list[dict[str, Any]] = card["training"]["stages"]
    return stages
