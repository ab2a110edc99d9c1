"""Train the reconstruction network: `python -m export.train --data DIR --out DIR --minutes N`.

Runs on a GPU where there is one, otherwise on all cores (one process each, gradients averaged). The learning rate
follows the time that is left, so any budget ends well. A run that was stopped goes on from its checkpoint (`--resume`).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, distributed, multiprocessing

from export.muon import Muon
from export.network import Encoding, Shape, UnrolledNetwork
from export.simulated import Draw, Sample, draw_sample
from export.slices import Slice, load_slices
from export.validation import draw_curves, held_out_samples, to_tensors, validate
from recon.arrays import Array

WARM_UP = 0.02  # of the budget
LAST_RATE = 0.02  # of the highest
EMA_DECAY = 0.999
DEEP_WEIGHT = 0.1  # of the loss of each cascade; what counts is the last one's error in unmeasured lines
CLIP = 10.0  # norm of the gradient
FLOOR = 0.03  # relative error below which a sample teaches less and less
KEPT = 64  # batches that may be learned from again
EARLY = Draw(sizes=(96, 104, 112, 120, 128, 144, 160, 168), n_columns=48)  # small samples teach much a second
EARLY_PART = 0.4  # of the budget


@dataclass(frozen=True)
class Settings:
    """One training run: stored in its checkpoint."""

    data: str
    out: str
    minutes: float
    seed: int = 1
    rate: float = 1e-3
    batch: int = 1  # slices a process and step
    processes: int = 1
    validate_minutes: float = 8.0


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m export.train", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with brain/, stroke_flair/, tumour_t1c/"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint.pt, log.csv, curves.png")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time of training (default %(default)g)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default %(default)g)")
    parser.add_argument("--batch", type=int, help="slices a process and step (default: 1 on the CPU, 8 on a GPU)")
    parser.add_argument("--processes", type=int, help="default: one a core on the CPU, 1 on a GPU")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    parser.add_argument(
        "--from", dest="weights", type=Path, metavar="FILE", help="begin with the weights of a checkpoint"
    )
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="(default %(default)s)")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    settings = Settings(
        str(args.data),
        str(args.out),
        args.minutes,
        args.seed,
        args.rate,
        args.batch or (8 if on_gpu else 1),
        args.processes or (1 if on_gpu else os.cpu_count() or 1),
    )
    shape = Shape(**{name: getattr(args, name) for name in asdict(Shape())})
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume and not (args.out / "checkpoint.pt").is_file():
        parser.error(f"--resume: {args.out / 'checkpoint.pt'} is not there")
    if settings.processes == 1:
        _train(0, settings, shape, args.resume, args.weights)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 2000))
    multiprocessing.spawn(_train, (settings, shape, args.resume, args.weights), nprocs=settings.processes)


def _train(rank: int, settings: Settings, shape: Shape, resume: bool, weights: Path | None) -> None:
    """Train in one process; the first of several also validates and writes."""
    device = _set_up(rank, settings)
    network = UnrolledNetwork(shape).to(device)
    state = State(network, Muon(network.parameters(), settings.rate), Path(settings.out))
    if resume:
        state.load(device)
    elif weights is not None:
        state.begin_with(weights, device)
    batches = Batches(settings, rank, load_slices(Path(settings.data), "train"), device)
    validation = held_out_samples(Path(settings.data)) if rank == 0 else []
    forward: Any = torch.compile(network.cascades, dynamic=True) if device.type == "cuda" else network.cascades
    started, before = time.monotonic(), state.seconds
    validated, sums = -math.inf, np.zeros(4)
    while state.seconds < 60 * settings.minutes:
        progress = state.seconds / (60 * settings.minutes)
        for group in state.optimiser.param_groups:
            group["lr"] = settings.rate * _rate(progress)
        sums += (*_learn(forward, state, settings, *batches.draw(state.step, progress < EARLY_PART)), 1)
        state.seconds = _agreed(before + time.monotonic() - started, settings)
        is_due = state.seconds - validated > 60 * settings.validate_minutes
        if rank == 0 and (is_due or state.seconds >= 60 * settings.minutes):
            validated = state.seconds
            _note(state, settings, shape, sums, validation, device)
            sums = np.zeros(4)
    if settings.processes > 1:
        distributed.destroy_process_group()


def _set_up(rank: int, settings: Settings) -> torch.device:
    threadpool_limits(1, user_api="blas")
    torch.manual_seed(settings.seed)
    if settings.processes > 1:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", rank=rank, world_size=settings.processes)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # data consistency stays in float32
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda")


def _learn(
    forward: Any, state: State, settings: Settings, inputs: list[Tensor], target: Tensor
) -> tuple[float, float, float]:
    """Take one step; return the last cascade's loss, its gain on the classical image, and the gradient's norm."""
    encoding = Encoding(*inputs[2:8])
    images = forward(encoding, *inputs[:2], *inputs[8:])
    losses = [relative_error(image, target) for image in images]
    loss = relative_error(unmeasured(encoding, images[-1], target), target)
    for each in losses:
        loss = loss + DEEP_WEIGHT * each
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if settings.processes > 1:
        _average_gradients(state.network, settings.processes)
    norm = float(torch.nn.utils.clip_grad_norm_(state.network.parameters(), CLIP))
    if math.isfinite(norm):
        state.optimiser.step()
    state.step += 1
    state.follow()
    return float(losses[-1].detach()), float(losses[-1].detach() - relative_error(inputs[1], target)), norm


def unmeasured(encoding: Encoding, image: Tensor, target: Tensor) -> Tensor:
    """Return `target` with the error that `image` has in the lines that were not measured: the others are kept."""
    error = image - target
    return target + error - encoding.normal(error)


def _agreed(seconds: float, settings: Settings) -> float:
    """Return the first process's clock: all must agree on when to end."""
    if settings.processes == 1:
        return seconds
    shared = torch.tensor([seconds])
    distributed.broadcast(shared, 0)
    return float(shared)


class State:
    """What a run must remember to go on: weights, their running mean, the optimiser, steps and seconds."""

    def __init__(self, network: UnrolledNetwork, optimiser: torch.optim.Optimizer, out: Path) -> None:
        self.network, self.optimiser, self.out = network, optimiser, out
        self.ema = {name: value.detach().clone() for name, value in network.state_dict().items()}
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []  # of the runs whose weights this one began with

    def follow(self) -> None:
        """Move the running mean of the weights."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for name, value in self.network.state_dict().items():  # detached
            self.ema[name].lerp_(value, 1 - decay)

    def begin_with(self, checkpoint: Path, device: torch.device) -> None:
        """Take the running mean of another run's weights as the start."""
        content = torch.load(checkpoint, map_location=device, weights_only=True)
        self.network.load_state_dict(content["ema"])
        self.history = [*content["history"], stage(content)]
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def save(self, settings: Settings, shape: Shape) -> None:
        """Write the checkpoint in one move."""
        content = {
            "shape": asdict(shape),
            "settings": asdict(settings),
            "network": self.network.state_dict(),
            "ema": self.ema,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }
        torch.save(content, self.out / "checkpoint.part")
        os.replace(self.out / "checkpoint.part", self.out / "checkpoint.pt")

    def load(self, device: torch.device) -> None:
        """Read the checkpoint."""
        content = torch.load(self.out / "checkpoint.pt", map_location=device, weights_only=True)
        self.network.load_state_dict(content["network"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.ema, self.step, self.seconds = content["ema"], content["step"], content["seconds"]
        self.history = content["history"]


def stage(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what a card says of the run behind a checkpoint."""
    settings = checkpoint["settings"]
    n_slices = checkpoint["step"] * settings["batch"] * settings["processes"]
    minutes = round(checkpoint["seconds"] / 60, 1)
    return {"steps": checkpoint["step"], "slices_seen": n_slices, "minutes": minutes, "seed": settings["seed"]}


def load_network(checkpoint: Path) -> tuple[UnrolledNetwork, dict[str, Any]]:
    """Return the network with the running mean of the weights, ready to evaluate, and the checkpoint."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network = UnrolledNetwork(Shape(**content["shape"]))
    network.load_state_dict(content["ema"])
    return network.eval(), content


def relative_error(image: Tensor, target: Tensor) -> Tensor:
    """Return the loss: the logarithms of the relative complex L2 and magnitude L1 errors, a mean over slices.

    A logarithm gives every scan the same say, however noisy or accelerated: a tenth less error is a tenth less error.
    """
    magnitude = torch.sqrt((target**2).sum(1) + 1e-12)
    size_2 = torch.sqrt((magnitude**2).mean((1, 2))).clamp_min(0.05)
    size_1 = magnitude.mean((1, 2)).clamp_min(0.02)
    error_2 = torch.sqrt(((image - target) ** 2).sum(1).mean((1, 2)) + 1e-12) / size_2
    difference = torch.sqrt((image**2).sum(1) + 1e-8) - torch.sqrt((target**2).sum(1) + 1e-8)
    error_1 = difference.abs().mean((1, 2)) / size_1
    return (torch.log(error_2 + FLOOR) + torch.log(error_1 + FLOOR)).mean()


class Batches:
    """The batches of one process. Every process has the same sizes and coils at a step, so that none waits long.

    Simulating takes as long as learning, so every second batch is an earlier one with another phase.
    """

    def __init__(self, settings: Settings, rank: int, slices: list[Slice], device: torch.device) -> None:
        self._settings, self._rank, self._slices, self._device = settings, rank, slices, device
        share = np.array([each.weight for each in slices])
        self._share = share / share.sum()
        self._kept: deque[tuple[list[Tensor], Tensor]] = deque(maxlen=KEPT)

    def draw(self, step: int, is_early: bool) -> tuple[list[Tensor], Tensor]:
        """Return inputs and target of one step."""
        common = np.random.default_rng([self._settings.seed, step])
        if step % 2 and self._kept:
            inputs, target = self._kept[int(common.integers(len(self._kept)))]
            angle = float(common.uniform(0, 2 * np.pi))
            return [*(_rotated(image, angle) for image in inputs[:2]), *inputs[2:]], _rotated(target, angle)
        draw = EARLY if is_early else Draw()
        sizes = int(common.choice(draw.sizes)), int(common.choice(draw.sizes))
        draw = replace(draw, coils=(int(common.choice(draw.coils)),))
        own = np.random.default_rng([self._settings.seed, step, 1 + self._rank])
        chosen = own.choice(len(self._slices), self._settings.batch, p=self._share)
        mask = [self._settings.seed, step, 0]  # the slices of a batch share their mask
        samples = [draw_sample(own, self._slices[index], draw, sizes, np.random.default_rng(mask)) for index in chosen]
        batch = to_tensors(samples, self._device)
        self._kept.append(batch)
        return batch


def _rotated(image: Tensor, angle: float) -> Tensor:
    """Return (slice, 2, y, x) times exp(i angle)."""
    real, imag = image[:, 0], image[:, 1]
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack((c * real - s * imag, s * real + c * imag), 1)


def _average_gradients(network: UnrolledNetwork, n: int) -> None:
    flat = torch.cat([p.grad.reshape(-1) for p in network.parameters() if p.grad is not None])
    distributed.all_reduce(flat)
    flat /= n
    start = 0
    for parameter in network.parameters():
        if parameter.grad is not None:
            size = parameter.grad.numel()
            parameter.grad.copy_(flat[start : start + size].view_as(parameter.grad))
            start += size


def _rate(progress: float) -> float:
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.01)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def _note(
    state: State, settings: Settings, shape: Shape, sums: Array, validation: list[Sample], device: torch.device
) -> None:
    """Validate with the running mean, add a line to the log, draw the curves, save the checkpoint."""
    state.save(settings, shape)
    smooth = UnrolledNetwork(shape).to(device).eval()
    smooth.load_state_dict(state.ema)
    scores = validate(smooth, validation, device)
    row = {
        "minutes": round(state.seconds / 60, 2),
        "step": state.step,
        "loss": round(sums[0] / max(sums[3], 1), 4),
        "against_classical": round(sums[1] / max(sums[3], 1), 4),
        "gradient": round(sums[2] / max(sums[3], 1), 3),
        "psnr_r4": round(scores[0], 3),
        "psnr_r6": round(scores[1], 3),
        "psnr_one_coil_r2": round(scores[2], 3),
    }
    path = state.out / "log.csv"
    is_new = not path.exists() or state.step <= 1
    with path.open("w" if is_new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(json.dumps(row), flush=True)
    draw_curves(path, state.out / "curves.png")


if __name__ == "__main__":
    main()
