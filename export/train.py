"""Train the reconstruction network: `python -m export.train --data DIR --out DIR --minutes N`.

Runs on a GPU where there is one, otherwise on all cores (one process each, gradients averaged). `--workers N` leaves
the simulation to N processes, so that a GPU need not wait for it. The learning rate follows the time that is left, so
any budget ends well. A run that was stopped goes on from its checkpoint (`--resume`).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, distributed, multiprocessing

from export.batches import Batches, Pool, Source
from export.muon import Muon
from export.network import Encoding, Shape, UnrolledNetwork
from export.objective import objective, relative_error
from export.simulated import Sample
from export.slices import load_slices
from export.validation import draw_curves, held_out_samples, validate

WARM_UP = 0.02  # of the budget
LAST_RATE = 0.02  # of the highest
EMA_DECAY = 0.999
CLIP = 10.0  # norm of the gradient
EARLY_PART = 0.4  # of the budget of a run that begins with nothing: batches of small samples
BATCH = 16  # slices, of a process that learns alone
SAVE_S = 60.0  # between checkpoints, and lines of progress


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
    workers: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m export.train", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with brain/, stroke_flair/, tumour_t1c/"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint.pt, log.csv, curves.png")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="wall time of training (default %(default)g); with --workers of everything but the last validation",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default %(default)g)")
    parser.add_argument("--batch", type=int, help="slices a process and step (default: 1 on the CPU, 16 on a GPU)")
    parser.add_argument("--processes", type=int, help="default: one a core on the CPU; 1 on a GPU or with --workers")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that only simulate, for one that learns on a GPU (default 0)"
    )
    parser.add_argument("--validate-minutes", type=float, help="between validations (default: 8; with --workers 2.5)")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    parser.add_argument(
        "--from",
        dest="weights",
        type=Path,
        metavar="FILE",
        help="begin with the weights of a checkpoint, or of a model.onnx with its card.json",
    )
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="(default %(default)s)")
    args = parser.parse_args(argv)
    if args.workers and (args.processes or 1) > 1:
        parser.error("--workers feed one process; leave out --processes")
    # with workers, nothing may be asked of a GPU before they are forked
    is_alone = args.workers or torch.cuda.is_available()
    settings = Settings(
        str(args.data),
        str(args.out),
        args.minutes,
        args.seed,
        args.rate,
        args.batch or (BATCH if is_alone else 1),
        args.processes or (1 if is_alone else os.cpu_count() or 1),
        args.validate_minutes or (2.5 if args.workers else 8.0),
        args.workers,
    )
    shape = Shape(**{name: getattr(args, name) for name in asdict(Shape())})
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume and not (args.out / "checkpoint.pt").is_file():
        parser.error(f"--resume: {args.out / 'checkpoint.pt'} is not there")
    if settings.processes == 1:
        _train(0, settings, shape, args.resume, args.weights, begun if args.workers else None)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 2000))
    multiprocessing.spawn(_train, (settings, shape, args.resume, args.weights), nprocs=settings.processes)


def _train(
    rank: int, settings: Settings, shape: Shape, resume: bool, weights: Path | None, started: float | None = None
) -> None:
    """Train in one process; the first of several also validates and writes.

    started: when the clock did, monotonic; None where it does once all is ready.
    """
    source = Source(load_slices(Path(settings.data), "train"), settings.batch, settings.seed)
    pool = None
    if settings.workers:
        first, is_early = 0, weights is None
        if resume:
            content = torch.load(Path(settings.out) / "checkpoint.pt", map_location="cpu", weights_only=True)
            first, is_early = 1_000_000 * (1 + content["step"] // 1000), False  # of batches that none has seen
        pool = Pool(source, settings.workers, first, is_early)  # forks: before anything is asked of a GPU
    try:
        device = _set_up(rank, settings)
        network = UnrolledNetwork(shape).to(device)
        state = State(network, Muon(network.parameters(), settings.rate), Path(settings.out))
        if resume:
            state.load(device)
        elif weights is not None:
            state.begin_with(weights, device)
        validation = held_out_samples(Path(settings.data)) if rank == 0 else []
        if pool is not None:
            pool.fill(settings.workers, device)
        batches = Batches(source, rank, device) if pool is None else pool
        _run(rank, state, settings, shape, batches, validation, device, started)
    finally:
        if pool is not None:
            pool.close()
    if settings.processes > 1:
        distributed.destroy_process_group()


def _run(
    rank: int,
    state: State,
    settings: Settings,
    shape: Shape,
    batches: Batches | Pool,
    validation: list[Sample],
    device: torch.device,
    started: float | None,
) -> None:
    """Learn until the time is up."""
    budget_s, before, n_before = 60 * settings.minutes, state.seconds, state.n_simulated
    early_part = 0.0 if state.history else EARLY_PART
    validated, saved = -math.inf, 0.0
    sums = torch.zeros(4, device=device)
    if rank == 0 and not state.step:  # what the run began with
        _note(state, settings, shape, sums, validation, device)
        validated = state.seconds
    started = time.monotonic() if started is None else started
    state.seconds = _agreed(before + time.monotonic() - started, settings)
    began = 0.0 if state.step else min(state.seconds, budget_s / 2)  # the clock of a run with workers starts earlier
    while state.seconds < budget_s:
        progress = (state.seconds - began) / (budget_s - began)
        for group in state.optimiser.param_groups:
            group["lr"] = settings.rate * _rate(progress)
        sums += _learn(state, settings, *batches.draw(state.step, progress < early_part))
        state.n_simulated = n_before + batches.n_simulated * settings.batch * settings.processes
        state.seconds = _agreed(before + time.monotonic() - started, settings)
        if rank > 0:
            continue
        if state.seconds - saved > SAVE_S:
            saved = state.seconds
            state.save(settings, shape)
            _tell(state, sums, batches)
        if state.seconds - validated > 60 * settings.validate_minutes or state.seconds >= budget_s:
            validated = state.seconds
            _note(state, settings, shape, sums, validation, device)
            sums = torch.zeros_like(sums)


def _set_up(rank: int, settings: Settings) -> torch.device:
    threadpool_limits(1, user_api="blas")
    torch.manual_seed(settings.seed)
    if settings.processes > 1 or settings.workers:
        torch.set_num_threads(1)
    if settings.processes > 1:
        distributed.init_process_group("gloo", rank=rank, world_size=settings.processes)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # data consistency stays in float32
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda")


def _learn(state: State, settings: Settings, inputs: list[Tensor], target: Tensor) -> Tensor:
    """Take one step.

    Returns the last cascade's loss, its gain on the classical image, the gradient's norm, and 1: float32 (4) on the
    device, so that a GPU is waited for once a step only.
    """
    encoding = Encoding(*inputs[2:8])
    images = state.network.cascades(encoding, *inputs[:2], *inputs[8:])
    loss, last = objective(encoding, images, target)
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if settings.processes > 1:
        _average_gradients(state.network, settings.processes)
    norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), CLIP)
    if math.isfinite(float(norm)):
        state.optimiser.step()
    state.step += 1
    state.follow()
    with torch.no_grad():
        gain = last - relative_error(inputs[1], target)
        return torch.stack((last, gain, norm.detach(), torch.ones_like(gain)))


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
        self.n_simulated = 0  # slices
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []  # of the runs whose weights this one began with

    def follow(self) -> None:
        """Move the running mean of the weights."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        new = self.network.state_dict()  # detached
        torch._foreach_lerp_([self.ema[name] for name in new], list(new.values()), 1 - decay)

    def begin_with(self, weights: Path, device: torch.device) -> None:
        """Take the running mean of another run's weights as the start: those of its checkpoint, or a shipped graph's.

        Raises ValueError where they are of a network of another shape.
        """
        if weights.suffix == ".onnx":
            from export.shipped import load_onnx, stages_of  # a machine that only trains may lack onnx

            shipped = load_onnx(weights)
            shape, values, self.history = asdict(shipped.shape), shipped.state_dict(), stages_of(weights)
        else:
            content = torch.load(weights, map_location=device, weights_only=True)
            shape, values, self.history = content["shape"], content["ema"], [*content["history"], stage(content)]
        if shape != asdict(self.network.shape):
            raise ValueError(f"{weights.name} holds a network of {shape}; this run's is {asdict(self.network.shape)}")
        self.network.load_state_dict(values)
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
            "simulated": self.n_simulated,
            "seconds": self.seconds,
            "history": self.history,
        }
        torch.save(content, self.out / "checkpoint.part")
        os.replace(self.out / "checkpoint.part", self.out / "checkpoint.pt")

    def load(self, device: torch.device) -> None:
        """Read the checkpoint."""
        content = torch.load(self.out / "checkpoint.pt", map_location="cpu", weights_only=True)
        self.network.load_state_dict(content["network"])
        self.optimiser.load_state_dict(content["optimiser"])  # moves to the weights' device what belongs there
        self.ema = {name: value.to(device) for name, value in content["ema"].items()}
        self.step, self.seconds, self.history = content["step"], content["seconds"], content["history"]
        self.n_simulated = content.get("simulated", 0)


def stage(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what a card says of the run behind a checkpoint."""
    settings = checkpoint["settings"]
    n_slices = checkpoint["step"] * settings["batch"] * settings["processes"]
    minutes = round(checkpoint["seconds"] / 60, 1)
    told = {"steps": checkpoint["step"], "slices_seen": n_slices, "minutes": minutes, "seed": settings["seed"]}
    return told | ({"slices_simulated": checkpoint["simulated"]} if "simulated" in checkpoint else {})


def load_network(checkpoint: Path) -> tuple[UnrolledNetwork, dict[str, Any]]:
    """Return the network with the running mean of the weights, ready to evaluate, and the checkpoint."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network = UnrolledNetwork(Shape(**content["shape"]))
    network.load_state_dict(content["ema"])
    return network.eval(), content


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


def _tell(state: State, sums: Tensor, batches: Batches | Pool) -> None:
    """Print how far the run is."""
    values = sums.tolist()
    told = {
        "minutes": round(state.seconds / 60, 2),
        "step": state.step,
        "loss": round(values[0] / max(values[3], 1), 4),
        "against_classical": round(values[1] / max(values[3], 1), 4),
        "gradient": round(values[2] / max(values[3], 1), 3),
        "simulated": state.n_simulated,
    }
    if isinstance(batches, Pool):
        told |= {"pool": len(batches), "workers": batches.n_workers}
    print(json.dumps(told), flush=True)


def _note(
    state: State, settings: Settings, shape: Shape, sums: Tensor, validation: list[Sample], device: torch.device
) -> None:
    """Save the checkpoint, validate with the running mean, add a line to the log, draw the curves."""
    state.save(settings, shape)
    smooth = UnrolledNetwork(shape).to(device).eval()
    smooth.load_state_dict(state.ema)
    scores = validate(smooth, validation, device)
    values = sums.tolist()
    row = {
        "minutes": round(state.seconds / 60, 2),
        "step": state.step,
        "loss": round(values[0] / max(values[3], 1), 4),
        "against_classical": round(values[1] / max(values[3], 1), 4),
        "gradient": round(values[2] / max(values[3], 1), 3),
        "psnr_r4": round(scores[0], 3),
        "psnr_r6": round(scores[1], 3),
        "psnr_one_coil_r2": round(scores[2], 3),
        "kept_r4": round(scores[3], 3),
        "kept_r6": round(scores[4], 3),
        "kept_one_coil_r2": round(scores[5], 3),
    }
    path = state.out / "log.csv"
    is_new = not path.exists() or not state.step
    with path.open("w" if is_new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(json.dumps(row), flush=True)
    if state.seconds >= 60 * settings.minutes and find_spec("matplotlib"):
        draw_curves(path, state.out / "curves.png")


if __name__ == "__main__":
    main()
