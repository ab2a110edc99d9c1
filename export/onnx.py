"""Ship a trained reconstruction network: `python -m export.onnx --checkpoint FILE --data DIR --out DIR`.

Writes model.onnx (float32), model_fp16.onnx (float16 convolutions, data consistency in float32), card.json and the
training curves, after checking that what ONNX Runtime computes is what PyTorch computes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from export.network import UnrolledNetwork
from export.simulated import MAX_COILS, Draw, Sample, draw_sample
from export.slices import SETS, Slice, load_slices
from export.train import load_network, stage
from export.validation import (
    CASES,
    N_BOOTSTRAP,
    N_PER_CASE,
    case_words,
    draw_case,
    draw_of,
    feed,
    psnr,
    run_session,
    to_tensors,
)
from recon.unrolled import INPUTS, SHARED

OPSET = 17
NAME = "scanside-reconstruction"
VERSION = "1"
AXES = {
    "classical": ("slice", "", "y", "x"),
    "variance": ("slice", "", "y", "x"),
    "adjoint": ("slice", "", "y", "x"),
    "aliases": ("slice", "", "alias", "alias", "folded"),
    "support": ("slice", "", "y", "x"),
    "coarse": ("slice", "", "coarse", "coil", "x"),
    "rows": ("lines", "coarse_pairs"),
    "resample": ("coarse", "y"),
    "missing": ("missing", "x_pairs"),
    "sigma": ("slice", "", "", ""),
    "measured": ("slice", "", "", ""),
    "image": ("slice", "", "y", "x"),
}
MAX_PARITY = 1e-4  # of the image's maximum, float32 against PyTorch
MAX_PARITY_FP16 = 2e-2


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, export, check and write the card."""
    parser = argparse.ArgumentParser(prog="python -m export.onnx", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="checkpoint.pt of export.train")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="the training data; held-out subjects score"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument(
        "--per-case", type=int, default=N_PER_CASE, help="simulated scans a metric (default %(default)s)"
    )
    args = parser.parse_args(argv)
    network, checkpoint = load_network(args.checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    slices = load_slices(args.data, "val", every=20)
    probe = draw_sample(np.random.default_rng(5), slices[0], draw_of(8, 4, 0.01))
    write_onnx(network, probe, args.out / "model.onnx")
    parity = check_parity(network, args.out / "model.onnx", slices, MAX_PARITY)
    to_half(args.out / "model.onnx", args.out / "model_fp16.onnx")
    parity_half = check_parity(network, args.out / "model_fp16.onnx", slices, MAX_PARITY_FP16)
    (args.out / "model.int8.onnx").unlink(missing_ok=True)  # of other weights: `export.quantise` makes it anew
    card = make_card(args.out, network, checkpoint, load_slices(args.data, "train"), slices, probe, args.per_case)
    card["parity"] = {"float32_to_pytorch": parity, "float16_to_pytorch": parity_half, "unit": "of the maximum"}
    (args.out / "card.json").write_text(json.dumps(card, indent=1, allow_nan=False) + "\n", "utf-8")
    log = args.checkpoint.parent
    for name in ("curves.png", "log.csv"):
        if (log / name).is_file():
            shutil.copy(log / name, args.out / f"training_{name}")
    print(json.dumps({"parity": parity, "parity_fp16": parity_half, "metrics": card["metrics"]}, indent=1))


def write_onnx(network: UnrolledNetwork, probe: Sample, path: Path) -> None:
    """Write the network as one ONNX graph with free sizes; `probe` traces it."""
    inputs, _ = to_tensors(probe, torch.device("cpu"))
    axes = {name: {i: axis for i, axis in enumerate(names) if axis} for name, names in AXES.items()}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the tracer's own deprecation; sizes that it calls constant are checked by parity
        torch.onnx.export(
            network.eval(),
            tuple(inputs),
            str(path),
            input_names=list(INPUTS),
            output_names=["image"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=False,  # weights keep their names: `export.shipped` reads them back
        )
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {"shape": json.dumps(asdict(network.shape))})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def to_half(source: Path, path: Path) -> None:
    """Write the graph of `source` with its convolutions in float16, by explicit casts around each chain of them.

    Everything else, data consistency above all, keeps float32: a strongly typed engine computes as the types say.
    """
    model = onnx.load(str(source))
    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    half_of: dict[str, str] = {}  # float32 value to its float16 twin
    float_of: dict[str, str] = {}
    nodes: list[Any] = []
    is_half: set[str] = set()
    for node in graph.node:
        chain = node.op_type in ("Conv", "ConvTranspose") or (
            node.op_type in ("Relu", "Add") and all(n in is_half for n in node.input)
        )
        if chain:
            for index, name in enumerate(node.input):
                if name in is_half or not name:
                    continue
                if name in weights:
                    if weights[name].data_type == TensorProto.FLOAT:
                        array = numpy_helper.to_array(weights[name]).astype(np.float16)
                        weights[name].CopyFrom(numpy_helper.from_array(array, name))
                    continue
                if name not in half_of:
                    half_of[name] = f"{name}_half"
                    nodes.append(helper.make_node("Cast", [name], [half_of[name]], to=TensorProto.FLOAT16))
                node.input[index] = half_of[name]
            is_half.update(node.output)
        else:
            for index, name in enumerate(node.input):
                if name in is_half:
                    if name not in float_of:
                        float_of[name] = f"{name}_float"
                        nodes.append(helper.make_node("Cast", [name], [float_of[name]], to=TensorProto.FLOAT))
                    node.input[index] = float_of[name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def check_parity(network: UnrolledNetwork, path: Path, slices: list[Slice], limit: float) -> float:
    """Return the largest difference between ONNX Runtime and PyTorch over several shapes, relative to the maximum.

    Raises ValueError where it is above `limit`.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(9)
    worst = 0.0
    draw = Draw(n_columns=None, blank_share=0.0)
    for sizes, coils, lattice in (((192, 160), 8, 1.0), ((117, 128), 1, 1.0), ((256, 96), 4, 0.0), ((101, 99), 2, 1.0)):
        one = replace(draw, coils=(coils,), lattice_share=lattice)
        inputs, _ = to_tensors(
            draw_sample(rng, slices[int(rng.integers(len(slices)))], one, sizes), torch.device("cpu")
        )
        with torch.no_grad():
            wanted = network(*inputs).numpy()
        found = session.run(["image"], feed(inputs))[0]
        worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    if worst > limit:
        raise ValueError(
            f"{path.name} differs from PyTorch by {worst:.1e} of the maximum; at most {limit:g} is allowed"
        )
    return worst


def make_card(
    folder: Path,
    network: UnrolledNetwork,
    checkpoint: dict[str, Any],
    training: list[Slice],
    held_out: list[Slice],
    probe: Sample,
    per_case: int,
) -> dict[str, Any]:
    """Return the model card as JSON values; the metrics are measured here, with the exported file."""
    content = (folder / "model.onnx").read_bytes()
    draw = Draw()
    used = sorted({each.source for each in training})
    return {
        "name": NAME,
        "version": VERSION,
        "task": "undersampled Cartesian brain MRI: k-space and coil maps to one complex image a slice",
        "sha256": hashlib.sha256(content).hexdigest(),
        "files": {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx"))},
        "precisions": {
            "float16": {
                "file": "model_fp16.onnx",
                "sha256": hashlib.sha256((folder / "model_fp16.onnx").read_bytes()).hexdigest(),
            }
        },
        "network": {**checkpoint["shape"], "parameters": sum(p.numel() for p in network.parameters())},
        "opset": OPSET,
        "inputs": {name: list(AXES[name]) for name in INPUTS},
        "shared_inputs": list(SHARED),
        "trained_range": {
            "matrix": [96, 512],
            "acceleration": max(draw.accelerations),
            "calibration_lines": draw.acs[0],
            "coils": 12,
            "measured_extent": 0.625,
        },
        "training": {
            "stages": [*checkpoint.get("history", []), stage(checkpoint)],
            "masks": "lattices of R = 1 to 8 at any offset (80 %), random lines, partial Fourier to 5/8",
            "calibration_lines": list(draw.acs),
            "matrix": [min(draw.sizes), max(draw.sizes)],
            "coils": f"{min(draw.coils)} to {max(draw.coils)} simulated loops, at most {MAX_COILS} virtual",
            "maps": "estimated from the noisy calibration lines, as at run time",
            "noise": list(draw.sigma),
        },
        "data": [
            {
                "set": name,
                "what": SETS[name][0],
                "licence": SETS[name][1],
                "subjects": len({each.subject for each in training if each.source == name}),
                "slices": sum(each.source == name for each in training),
                "held_out_subjects": len({each.subject for each in held_out if each.source == name}),
            }
            for name in used
        ],
        "subjects": {
            "train": sorted({each.subject for each in training if each.source == "brain"}),
            "held_out": sorted({each.subject for each in held_out if each.source == "brain"}),
        },
        "cost": _cost(network, probe),
        "metrics": measure(folder / "model.onnx", held_out, per_case),
        "limits": [
            "trained on simulated k-space of real magnitude images only; no measured k-space was used for training",
            "coil maps are assumed right: wrong ones (motion between calibration and scan) give ghosts as in SENSE",
            "one image a set of lines; motion, spikes and interference are not corrected",
            "an estimate: where lines are missing the picture is what the prior expects",
            "adult heads; one child of 3 years was seen in training, no neonates, no implants, no other organ",
        ],
        "not_for": "diagnosis",
    }


def _cost(network: UnrolledNetwork, probe: Sample) -> dict[str, Any]:
    """Return the arithmetic of one slice; milliseconds depend on the device and are in the benchmarks' records."""
    inputs, _ = to_tensors(probe, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    n_coils, (n_y, n_x) = probe.maps.maps.shape[1], probe.maps.maps.shape[2:]
    gflop = round(counter.get_total_flops() / 1e9, 2)
    return {"gflop": gflop, "of": f"{n_y} × {n_x}, {n_coils} virtual coils, R = {probe.acceleration}; products only"}


def measure(path: Path, slices: list[Slice], per_case: int) -> list[dict[str, Any]]:
    """Return for each case mean PSNR (dB) and its gain over CG-SENSE with bootstrap 95 % intervals over scans."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for number in range(len(CASES)):
        scores, gains = [], []
        for _, sample in draw_case(number, slices, per_case):
            scores.append(psnr(run_session(session, sample), sample))
            gains.append(scores[-1] - psnr(sample.classical, sample))
        found.append(
            {
                "case": case_words(number),
                "scans": per_case,
                "psnr_db": _interval(scores),
                "gain_over_cg_sense_db": _interval(gains),
            }
        )
    return found


def _interval(values: list[float]) -> list[float]:
    """Return the mean and the ends of its bootstrap 95 % interval, rounded to 0.01."""
    array = np.array(values)
    rng = np.random.default_rng(0)
    means = array[rng.integers(0, len(array), (N_BOOTSTRAP, len(array)))].mean(1)
    return [round(float(v), 2) for v in (array.mean(), *np.percentile(means, [2.5, 97.5]))]


if __name__ == "__main__":
    main()
