"""Arithmetic and traffic of an ONNX graph for given input shapes, counted node by node from inferred shapes.

Shapes that the graph works out while it runs are first folded to constants by ONNX Runtime's basic optimisation, which
keeps the operators as they are; onnx then infers every shape. Both packages are needed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = ("conv", "matmul", "elementwise", "movement")
_CONV = {"Conv", "FusedConv", "ConvTranspose"}
_MATMUL = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
_ELEMENTWISE = {
    *("Mul", "Add", "Sub", "Div", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Neg", "Abs", "Pow"),
    *("Greater", "Less", "Where", "Max", "Min", "Clip", "Cast", "ReduceSum", "ReduceMean", "ReduceMax", "Erf", "Sum"),
}
_VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Identity", "Shape", "Constant", "Flatten"}  # no byte moves


class Count(NamedTuple):
    """Floating-point operations (a multiply-add is two), bytes that nodes read and write, and how many nodes."""

    flops: float
    n_bytes: float
    n_nodes: int


def group_of(operator: str) -> str:
    """Return which of `GROUPS` an operator belongs to."""
    if operator in _CONV:
        return "conv"
    if operator in _MATMUL:
        return "matmul"
    return "elementwise" if operator in _ELEMENTWISE else "movement"


def count_graph(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Count]:
    """Return what the graph in `path` costs by group, for inputs of `shapes`.

    A byte counts each time a node reads or writes it, as if nothing stayed in a cache between nodes. Raises ValueError
    where a shape stays unknown: the count would be short.
    """
    model = _folded(path, shapes)
    sizes = _sizes(model)
    counts = dict.fromkeys(GROUPS, Count(0.0, 0.0, 0))
    for node in model.graph.node:
        names = [name for name in (*node.input, *node.output) if name]
        unknown = [name for name in names if name not in sizes]
        if unknown and node.op_type not in _VIEWS:
            raise ValueError(f"the shape of {unknown[0]!r}, at a {node.op_type}, could not be inferred")
        n_bytes = 0.0 if node.op_type in _VIEWS else sum(math.prod(sizes[n][0]) * sizes[n][1] for n in names)
        flops = 0.0 if node.op_type in _VIEWS else _flops(node, sizes)
        group = group_of(node.op_type)
        before = counts[group]
        counts[group] = Count(before.flops + flops, before.n_bytes + n_bytes, before.n_nodes + 1)
    return counts


def total(counts: Mapping[str, Count]) -> Count:
    """Return the sum over groups."""
    flops, n_bytes, n_nodes = (sum(each) for each in zip(*counts.values(), strict=True))
    return Count(flops, n_bytes, int(n_nodes))


def _folded(path: Path, shapes: Mapping[str, Sequence[int]]) -> Any:
    """Return the model for inputs of `shapes`, its shape arithmetic folded and every shape inferred."""
    import onnx
    import onnxruntime

    model = onnx.load(str(path))
    for each in model.graph.input:
        for dimension, n in zip(each.type.tensor_type.shape.dim, shapes[each.name], strict=True):
            dimension.dim_value = n
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(out)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(str(out))
    return onnx.shape_inference.infer_shapes(folded, data_prop=True)


def _sizes(model: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return shape and bytes an element of every tensor whose shape is known."""
    import onnx

    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            found[value.name] = (tuple(d.dim_value for d in tensor.shape.dim), itemsize)
    for constant in model.graph.initializer:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(constant.data_type).itemsize
        found[constant.name] = (tuple(constant.dims), itemsize)
    return found


def _flops(node: Any, sizes: Mapping[str, tuple[tuple[int, ...], int]]) -> float:
    """Return the operations of one node; a bias counts with its convolution."""
    out = math.prod(sizes[node.output[0]][0])
    first = sizes[node.input[0]][0] if node.input else ()
    if node.op_type in _CONV:
        kernel = sizes[node.input[1]][0]  # (out, in / group, *size), or (in, out / group, *size) transposed
        places = math.prod(first) if node.op_type == "ConvTranspose" else out
        bias = out if len(node.input) > 2 else 0
        return 2.0 * places * math.prod(kernel[1:]) + bias
    if node.op_type in _MATMUL:
        is_turned = any(a.name in ("transA",) and a.i for a in node.attribute)
        return 2.0 * out * first[-2 if is_turned else -1]
    if node.op_type.startswith("Reduce"):
        return float(math.prod(first))
    return float(out) if group_of(node.op_type) == "elementwise" else 0.0
