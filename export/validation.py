"""How good a network is: tensors of simulated scans, held-out ones and their scores, and the curves of a run's log."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.network import UnrolledNetwork
from export.simulated import Draw, Sample, draw_sample
from export.slices import Slice, load_slices
from recon.arrays import Array
from recon.sense import keep_measured
from recon.unrolled import INPUTS, SHARED, unprepare

N_VALIDATION = 18
CASES = ((8, 2, 0.01), (8, 4, 0.01), (8, 6, 0.01), (8, 8, 0.01), (1, 2, 0.03))  # coils, acceleration, σ: on the card
N_PER_CASE = 24
N_BOOTSTRAP = 1000


def to_tensors(sample: Sample | Sequence[Sample], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Return a network's inputs and target of samples that share their mask."""
    arrays = join([sample] if isinstance(sample, Sample) else sample)
    *inputs, target = (torch.from_numpy(each).to(device) for each in arrays)
    return inputs, target


def join(samples: Sequence[Sample]) -> list[Array]:
    """Return a network's inputs and, last, the target of samples that share their mask, float32 and contiguous.

    Some scans keep fewer virtual coils than others: they get empty ones, which see nothing and change nothing.
    """
    arrays = []
    for name in INPUTS:
        each = [s.prepared.inputs[name] for s in samples]
        if name == "coarse":
            most = max(maps.shape[3] for maps in each)
            each = [np.pad(maps, [(0, 0)] * 3 + [(0, most - maps.shape[3]), (0, 0)]) for maps in each]
        arrays.append(each[0] if name in SHARED else np.concatenate(each))
    arrays.append(np.concatenate([np.stack((s.target.real, s.target.imag), 1) for s in samples]))
    return [np.ascontiguousarray(each, np.float32) for each in arrays]


def held_out_samples(data: Path) -> list[Sample]:
    """Return whole slices of held-out subjects: eight coils at R = 4 and 6, one coil at R = 2."""
    slices = load_slices(data, "val", every=20)
    rng = np.random.default_rng(20)
    weight = np.array([each.weight for each in slices])
    samples = []
    for number in range(N_VALIDATION):
        coils, factor, sigma = ((8, 4, 0.01), (8, 6, 0.01), (1, 2, 0.03))[number % 3]
        draw = Draw((192, 208, 256), None, (factor,), (16, 24), (sigma, sigma), (coils,), 1.0, 0.0, 0.0, 0.0)
        samples.append(draw_sample(rng, slices[rng.choice(len(slices), p=weight / weight.sum())], draw))
    return samples


def draw_of(coils: int, acceleration: int, sigma: float) -> Draw:
    """Return whole slices of one kind: a lattice with 24 calibration lines."""
    return Draw((192, 224, 256), None, (acceleration,), (24, 24), (sigma, sigma), (coils,), 1.0, 0.0, 0.0, 0.0)


def draw_case(number: int, slices: list[Slice], n: int, seed: int = 31) -> Iterator[tuple[str, Sample]]:
    """Yield `n` scans of `CASES[number]`, the same for the same seed, each with its subject."""
    rng = np.random.default_rng([seed, number])
    weight = np.array([each.weight for each in slices])
    for _ in range(n):
        source = slices[rng.choice(len(slices), p=weight / weight.sum())]
        yield source.subject, draw_sample(rng, source, draw_of(*CASES[number]))


def case_words(number: int) -> str:
    """Return what the scans of `CASES[number]` are."""
    coils, acceleration, sigma = CASES[number]
    return f"coils {coils}, R = {acceleration}, 24 calibration lines, noise {sigma:g} of the peak"


def run_session(session: Any, sample: Sample) -> Array:
    """Return what the network in an ONNX Runtime session makes of a scan, as at run time: complex64 (slice, y, x)."""
    inputs, _ = to_tensors(sample, torch.device("cpu"))
    image = unprepare(session.run(["image"], feed(inputs))[0], sample.prepared)
    return keep_measured(sample.kspace, sample.maps, image)


def feed(inputs: Sequence[Tensor]) -> dict[str, Array]:
    """Return a network's inputs by name."""
    return {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)}


def psnr(image: Array, sample: Sample) -> float:
    """PSNR in dB of magnitudes where coils see anything, the peak being the truth's 99.9th percentile."""
    truth = np.abs(sample.target) * sample.prepared.scale[:, None, None]
    inside = np.abs(sample.maps.maps).sum(1) > 0
    error = np.abs(image)[inside] - truth[inside]
    return float(10 * np.log10(np.percentile(truth[inside], 99.9) ** 2 / np.mean(error**2)))


def validate(network: UnrolledNetwork, samples: list[Sample], device: torch.device) -> list[float]:
    """Return the mean PSNR of magnitudes in dB for each kind of validation sample, of two images.

    First (peak 1) what the network says, then what is made of it at run time, where measured lines stay (see `psnr`).
    """
    found: list[list[float]] = [[] for _ in range(6)]
    for number, sample in enumerate(samples):
        inputs, target = to_tensors(sample, device)
        with torch.no_grad():
            image = network(*inputs)
        error = torch.sqrt((image**2).sum(1)) - torch.sqrt((target**2).sum(1))
        inside = inputs[1].pow(2).sum((1, 3)) > 0
        found[number % 3].append(-10 * math.log10(float(error[inside].pow(2).mean())))
        estimate = unprepare(image.cpu().numpy(), sample.prepared)
        found[3 + number % 3].append(psnr(keep_measured(sample.kspace, sample.maps, estimate), sample))
    return [float(np.mean(each)) for each in found]


def _read(path: Path) -> Iterator[dict[str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {name: float(value) for name, value in row.items()}


def draw_curves(log: Path, path: Path) -> None:
    """Draw the training loss and the validation PSNR over minutes from a run's log, once it holds two points."""
    import matplotlib

    rows = list(_read(log))
    if len(rows) < 2:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    minutes = [row["minutes"] for row in rows]
    left.plot(minutes[1:], [row["loss"] for row in rows[1:]])
    left.set(xlabel="minutes", ylabel="training loss", title="mean since the point before")
    for name, label in (
        ("psnr_r4", "8 coils, R = 4"),
        ("psnr_r6", "8 coils, R = 6"),
        ("psnr_one_coil_r2", "1 coil, R = 2"),
    ):
        right.plot(minutes, [row[name] for row in rows], label=label)
    right.set(xlabel="minutes", ylabel="PSNR (dB)", title="held-out subjects, mean of weights")
    right.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
