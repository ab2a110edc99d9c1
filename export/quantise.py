"""The network with 8-bit convolutions, for those who ask for it: `python -m export.quantise --model DIR --data DATA`.

Writes model.int8.onnx beside model.onnx and the section "precisions.int8" of card.json. Weights become int8 with a
scale for each channel, what goes into a convolution int8 with one scale, both symmetric, as Q/DQ pairs that TensorRT
and ONNX Runtime take; sums, biases and all of data consistency keep float32. Where values are clipped, and which
layers stay in float32, is chosen on training subjects: as little in float32 as keeps the loss there small, clipped
where it is least. Then the loss is measured on held-out subjects, and int8 is offered only where it is small
everywhere; where it is not, the card says by how much and the file is not kept.

Sources: Nagel et al., arXiv:2106.08295 (2021), for clipping, and first and last layers that stay as they are; NVIDIA,
"Working with quantized types", for what TensorRT takes: symmetric, weights by channel, Q/DQ at the inputs alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from export.simulated import Draw, Sample, draw_sample
from export.slices import Slice, load_slices
from export.validation import CASES, N_BOOTSTRAP, N_PER_CASE, case_words, draw_case, psnr, run_session
from recon.arrays import Array
from recon.errors import BackendError, ModelError
from recon.network import Card, read_card
from recon.unrolled import run_on_nothing

FLOAT_MODEL, INT8_MODEL = "model.onnx", "model.int8.onnx"
CONVOLUTIONS = ("Conv", "ConvTranspose")
MAX_LOSS_DB = 0.2  # mean PSNR, of any case
ROOM_DB = 0.05  # below it on training subjects, because the held-out ones are others
N_CALIBRATION = 48
N_TUNING = 4  # scans a case
N_KEPT = 8192  # values of each tensor and scan
SEED_TUNING = 37


@dataclass(frozen=True)
class Recipe:
    """Where values are clipped and what stays in float32.

    percentile: of the sizes of a tensor's values; 100 clips none. float_layers: of every cascade's network.
    float_cascades: the last so many, whole.
    """

    percentile: float
    float_layers: tuple[str, ...] = ()
    float_cascades: int = 0

    def __str__(self) -> str:
        """Say it in words."""
        kept = [*self.float_layers, *([f"last {self.float_cascades} whole"] if self.float_cascades else [])]
        return f"{self.percentile:g} %; float32: {', '.join(kept) or '–'}"


EDGES = ("enter", "leave")  # image and memory come and go through these
FINE = (*EDGES, "fine", "down_1", "up_1", "merge_1")  # all of the finest level
IN_FLOAT: tuple[tuple[tuple[str, ...], int], ...] = (((), 0), (EDGES, 0), (EDGES, 1), (FINE, 0))
PERCENTILES = (100.0, 99.99, 99.9, 99.7)


class Scored(NamedTuple):
    """A scan, whose it is, and the float32 network's PSNR (dB)."""

    subject: str
    sample: Sample
    psnr_db: float


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, quantise, measure, and write file and card."""
    parser = argparse.ArgumentParser(prog="python -m export.quantise", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of model.onnx and card.json")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the training data, as it was trained")
    parser.add_argument("--out", type=Path, metavar="DIR", help="another folder for the result (the model's own)")
    parser.add_argument("--calibration", type=int, default=N_CALIBRATION, help="scans (default %(default)s)")
    parser.add_argument("--tuning", type=int, default=N_TUNING, help="scans a case to choose on (default %(default)s)")
    parser.add_argument("--per-case", type=int, default=N_PER_CASE, help="held-out scans a case (default %(default)s)")
    args = parser.parse_args(argv)
    folder = args.out or args.model
    card = json.loads((args.model / "card.json").read_bytes())
    source = args.model / FLOAT_MODEL
    if _sha256(source) != card["sha256"]:
        raise SystemExit(f"{source} is not the network that card.json describes")
    if folder != args.model:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / FLOAT_MODEL)
    console = Console(stderr=True, width=150)
    with Progress(console=console) as progress:
        training = load_slices(args.data, "train", every=20)
        scans = calibration_samples(training, args.calibration)
        seen = observe(source, progress.track(scans, args.calibration, description="calibration"))
        float32 = open_session(source)
        tuning = [scored(float32, n, training, args.tuning, SEED_TUNING, progress) for n in range(len(CASES))]
        recipe, tried = choose(source, folder / INT8_MODEL, seen, tuning, progress)
        held_out = load_slices(args.data, "val", every=20)
        loss = measure_loss(source, folder / INT8_MODEL, held_out, args.per_case, progress)
    why_not = refuse(folder / INT8_MODEL, loss, read_card(card))
    show(tried, loss, console)
    card.setdefault("precisions", {})["int8"] = {
        "file": INT8_MODEL,
        "sha256": _sha256(folder / INT8_MODEL),
        "of": card["sha256"],
        "offered": not why_not,
        "why_not": why_not,
        "limit_db": MAX_LOSS_DB,
        "recipe": asdict(recipe),
        "calibration": {
            "data": "simulated scans of training subjects, as in training",
            "sets": sorted({each.source for each in training}),
            "subjects": len({each.subject for each in training}),
            "scans": args.calibration,
            "tuning_scans": args.tuning * len(CASES),
        },
        "loss": loss,
        "tried_on_training_subjects": tried,
    }
    card["files"].pop(INT8_MODEL, None)
    if why_not:
        (folder / INT8_MODEL).unlink()
        console.print(f"int8 is not offered, {INT8_MODEL} is not kept: {why_not}")
    else:
        card["files"][INT8_MODEL] = (folder / INT8_MODEL).stat().st_size
        console.print(f"int8 is offered: {folder / INT8_MODEL}")
    (folder / "card.json").write_text(json.dumps(card, indent=1, allow_nan=False) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_session(path: Path) -> Any:
    """Return an ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def calibration_samples(slices: list[Slice], n: int) -> Iterator[Sample]:
    """Yield `n` scans as in training, without the empty ones."""
    rng = np.random.default_rng(29)
    weight = np.array([each.weight for each in slices])
    draw = Draw(blank_share=0.0)
    for _ in range(n):
        yield draw_sample(rng, slices[rng.choice(len(slices), p=weight / weight.sum())], draw)


def observe(path: Path, samples: Iterable[Sample]) -> dict[str, Array]:
    """Return sizes of values that go into each convolution, float32 (value): a random part, the largest among them."""
    model = onnx.load(str(path))
    names = sorted({node.input[0] for node in model.graph.node if node.op_type in CONVOLUTIONS})
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(11)
    found: dict[str, list[Array]] = {name: [] for name in names}
    for sample in samples:
        for name, array in zip(names, session.run(names, sample.prepared.inputs), strict=True):
            sizes = np.abs(array).ravel()
            found[name] += [rng.choice(sizes, min(N_KEPT, sizes.size), replace=False), sizes.max(keepdims=True)]
    return {name: np.concatenate(each) for name, each in found.items()}


def write_int8(source: Path, path: Path, seen: Mapping[str, Array], recipe: Recipe) -> None:
    """Write the network of `source` with its convolutions in int8, as `recipe` says, for values as `seen`."""
    model = onnx.load(str(source))
    nodes = [node for node in model.graph.node if node.op_type in CONVOLUTIONS]
    chosen = [node.name for node in nodes if not stays_float(node.input[1], recipe, _n_cascades(nodes))]
    limits = {name: np.float32(np.percentile(sizes, recipe.percentile) or 1.0) for name, sizes in seen.items()}
    ranges = {name: (-limit, limit) for name, limit in limits.items()}
    quantizer = QDQQuantizer(
        model,
        True,  # a scale for each channel of weights
        False,
        QuantType.QInt8,
        QuantType.QInt8,
        TensorsData(CalibrationMethod.MinMax, ranges),
        chosen,
        [],
        list(CONVOLUTIONS),
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(CONVOLUTIONS),
        },
    )
    quantizer.quantize_model()
    _leave_others(quantizer.model.model.graph, set(chosen))
    quantizer.model.save_model_to_file(str(path), False)
    onnx.checker.check_model(onnx.load(str(path)))


def _leave_others(graph: Any, chosen: set[str]) -> None:
    """Give all nodes but the chosen ones what they had before: a skip connection is not rounded with its neighbour."""
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.name in chosen or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            if name in made_by and made_by[name].op_type == "DequantizeLinear":
                node.input[index] = made_by[made_by[name].input[0]].input[0]


def _n_cascades(nodes: Sequence[Any]) -> int:
    return 1 + max(int(node.input[1].split(".")[1]) for node in nodes)


def stays_float(weight: str, recipe: Recipe, n_cascades: int) -> bool:
    """Say whether the layer with this weight, "regularisers.CASCADE.LAYER…", stays in float32."""
    _, cascade, layer, *_ = weight.split(".")
    return layer in recipe.float_layers or int(cascade) >= n_cascades - recipe.float_cascades


def scored(
    session: Any, number: int, slices: list[Slice], n: int, seed: int | None, progress: Progress
) -> list[Scored]:
    """Return `n` scans of `CASES[number]` with the PSNR of the network in `session`; the card's own without `seed`."""
    draws = draw_case(number, slices, n) if seed is None else draw_case(number, slices, n, seed)
    return [
        Scored(subject, sample, psnr(run_session(session, sample), sample))
        for subject, sample in progress.track(draws, n, description=f"scans, {case_words(number)}")
    ]


def choose(
    source: Path, path: Path, seen: Mapping[str, Array], tuning: list[list[Scored]], progress: Progress
) -> tuple[Recipe, list[dict[str, Any]]]:
    """Write the network by the best recipe to `path`; return it and what each recipe that was tried lost, dB."""
    tried: list[dict[str, Any]] = []
    found: dict[Recipe, float] = {}
    for layers, cascades in progress.track(IN_FLOAT, description="recipes"):
        for percentile in PERCENTILES:
            recipe = Recipe(percentile, layers, cascades)
            write_int8(source, path, seen, recipe)
            session = open_session(path)
            means = [float(np.mean([_loss(session, each) for each in case])) for case in tuning]
            tried.append({"recipe": str(recipe), "mean_loss_db": [round(mean, 3) for mean in means]})
            found[recipe] = max(means)
        if min(found.values()) <= MAX_LOSS_DB - ROOM_DB:
            break
    best = min(found, key=lambda recipe: found[recipe])
    write_int8(source, path, seen, best)
    return best, tried


def _loss(session: Any, scan: Scored) -> float:
    return scan.psnr_db - psnr(run_session(session, scan.sample), scan.sample)


def measure_loss(
    source: Path, path: Path, slices: list[Slice], per_case: int, progress: Progress
) -> list[dict[str, Any]]:
    """Return for each case what the network in `path` loses against that in `source`, PSNR in dB, on `slices`.

    Mean with a bootstrap 95 % interval over subjects, and the scan that loses most.
    """
    float32, int8 = open_session(source), open_session(path)
    found = []
    for number in range(len(CASES)):
        scans = scored(float32, number, slices, per_case, None, progress)
        losses = [_loss(int8, scan) for scan in scans]
        low, high = _interval(losses, [scan.subject for scan in scans])
        found.append(
            {
                "case": case_words(number),
                "acceleration": CASES[number][1],
                "scans": len(scans),
                "subjects": len({scan.subject for scan in scans}),
                "psnr_float32_db": round(float(np.mean([scan.psnr_db for scan in scans])), 2),
                "mean_db": round(float(np.mean(losses)), 3),
                "interval_db": [round(low, 3), round(high, 3)],
                "worst_db": round(max(losses), 3),
            }
        )
    return found


def _interval(values: list[float], subjects: list[str]) -> tuple[float, float]:
    """Return the ends of the mean's 95 % interval, subjects drawn with replacement and with all of their values."""
    groups = [[v for v, s in zip(values, subjects, strict=True) if s == subject] for subject in sorted(set(subjects))]
    sums, counts = (np.array([f(group) for group in groups], float) for f in (sum, len))
    drawn = np.random.default_rng(0).integers(0, len(groups), (N_BOOTSTRAP, len(groups)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def refuse(path: Path, loss: list[dict[str, Any]], card: Card) -> str:
    """Return why the network in `path` is not offered, "" where it is.

    Once there are triage networks, what they find belongs here too: a finding that changes between the images of the
    float32 and of the int8 network is a reason, whatever the PSNR.
    """
    worst = max(loss, key=lambda each: each["mean_db"])
    if worst["mean_db"] > MAX_LOSS_DB:
        return f"it loses {worst['mean_db']:.2f} dB on average for {worst['case']}; at most {MAX_LOSS_DB:g} are allowed"
    try:
        run_on_nothing(_Ready(path, card))
    except (ModelError, BackendError) as error:
        return str(error)
    return ""


class _Ready:
    """A model file as `recon.network.Network`, for the check that the run time makes when it opens one."""

    backend = "onnxruntime CPU int8"

    def __init__(self, path: Path, card: Card) -> None:
        self.card = card
        self._session = open_session(path)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"image": self._session.run(["image"], dict(inputs))[0]}

    def close(self) -> None:
        """Nothing is held."""


def show(tried: list[dict[str, Any]], loss: list[dict[str, Any]], console: Console) -> None:
    """Print what was tried and what the chosen one loses."""
    table = Table(title="mean loss on training subjects, dB PSNR")
    table.add_column("clipped at; what stays", no_wrap=True)
    for coils, acceleration, _ in CASES:
        table.add_column(f"{coils} coils R{acceleration}")
    for row in tried:
        table.add_row(row["recipe"], *(f"{mean:+.3f}" for mean in row["mean_loss_db"]))
    console.print(table)
    table = Table(title="loss of the chosen one on held-out subjects, dB PSNR")
    for heading in ("scans", "mean", "95 % interval", "worst"):
        table.add_column(heading)
    for row in loss:
        low, high = row["interval_db"]
        table.add_row(row["case"], f"{row['mean_db']:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{row['worst_db']:+.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
