"""Train the super-resolution network: `python -m export.superres_train --data DIR --out DIR --minutes N`.

Runs on one core of the CPU, or on a GPU where there is one; `--workers N` makes the planes in processes of their own.
The learning rate follows the time that is left, so any budget ends well. What is learned is the part of the truth that
the measurement leaves open, patch by patch; validation runs the whole graph with its projection on whole planes of
held-out subjects.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.muon import Muon
from export.superres_data import Head, Pair, SimulatedHeads, cut_k_space, load_heads, load_patients, make_thick
from export.superres_network import Detail, Shape, SuperResolution
from export.superres_pool import Planes, Pool, Workers, axes_of
from recon.arrays import Array
from recon.fine_grid import FineAxis
from recon.superres import noise_level


@dataclass(frozen=True)
class Pace:
    """How a machine learns. kept: patches in the pool. new_every: steps, between looks at what is new."""

    batch: int
    rate: float
    kept: int
    new_every: int
    validate_minutes: float


CPU_PACE = Pace(12, 1e-3, 1500, 2, 4.0)  # making a plane costs a sixth of learning from one batch
GPU_PACE = Pace(128, 2e-3, 60_000, 4, 2.0)
WARM_UP, LAST_RATE = 0.02, 0.02
EMA_DECAY = 0.999
CLIP = 5.0
EDGE = 6  # voxels of a patch that see its border: not learned from
FLOOR = 0.006  # root mean square of what is missing, over the image's scale, below which less and less counts
RINGS = (0.95, 1.65, 7)  # of spectra: first and last radius in units of the highest measured frequency, number
RING_WEIGHT, PATCH_WEIGHT = 0.4, 0.2  # beside the squared error
SAVE_S = 45.0


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m export.superres_train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="brain/, stroke_flair/, tumour_t1c/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint.pt and log.csv")
    parser.add_argument("--minutes", type=float, default=50.0, help="wall time of training (default %(default)g)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that make planes (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--from", dest="weights", type=Path, metavar="FILE", help="begin with a checkpoint's weights")
    parser.add_argument("--rate", type=float, help="highest learning rate (default: by machine)")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.data, args.out, args.minutes, args.seed, args.resume, args.workers, args.weights, args.rate)


def train(
    data: Path,
    out: Path,
    minutes: float,
    seed: int,
    resume: bool = False,
    n_workers: int = 0,
    weights: Path | None = None,
    rate: float | None = None,
) -> None:
    """Train for `minutes` of wall time; leave checkpoint.pt and log.csv in `out`. weights: of another training."""
    content = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True) if resume else None
    step = content["step"] if content is not None else 0
    heads = load_heads(data, "train") + load_patients(data)
    held_out = held_out_pairs(load_heads(data, "val"))
    workers = Workers(n_workers, heads, (seed, step), SimulatedHeads()) if n_workers else None  # before CUDA starts
    try:
        source = workers if workers is not None else Planes(heads, (seed, step), SimulatedHeads())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        training = _Training(device, seed + step, content, rate)
        if weights is not None and content is None:
            training.begin_with(weights)
        training.run(source, held_out, out, minutes, seed)
    finally:
        if workers is not None:
            workers.close()


class _Training:
    """Network, optimiser and running mean of the weights, on one device."""

    def __init__(
        self, device: torch.device, seed: int, content: dict[str, Any] | None, rate: float | None = None
    ) -> None:
        torch.manual_seed(seed)
        pace = GPU_PACE if device.type == "cuda" else CPU_PACE
        self.device, self.pace = device, pace if rate is None else replace(pace, rate=rate)
        self.step, self.before = 0, 0.0
        self._prepare(Detail(Shape(**content["shape"]) if content is not None else Shape()))
        if content is not None:
            self.network.load_state_dict(content["network"])
            self.optimiser.load_state_dict(content["optimiser"])
            for mine, name in zip(self.ema, self.names, strict=True):
                mine.copy_(content["ema"][name])
            self.step, self.before = content["step"], content["seconds"]

    def begin_with(self, checkpoint: Path) -> None:
        """Take the running mean of another training's weights; the optimiser begins anew."""
        self._prepare(load_detail(checkpoint)[0].train())

    def _prepare(self, network: Detail) -> None:
        self.network = network.to(self.device)
        device = self.device
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True  # patches and batches have one size
            self.network.to(memory_format=torch.channels_last)
        self.names = [name for name, _ in self.network.named_parameters()]
        self.parameters = list(self.network.parameters())
        self.optimiser = Muon(self.parameters, self.pace.rate)
        self.ema = [each.detach().clone() for each in self.parameters]

    def run(
        self, source: Planes | Workers, held_out: list[tuple[str, Pair]], out: Path, minutes: float, seed: int
    ) -> None:
        """Learn until `minutes` are over, those before a resumption included."""
        pool = Pool(self.pace.kept, self.device)
        started, seconds, end = time.monotonic(), self.before, 60 * minutes
        saved = validated = seconds
        while len(pool) < 20 * self.pace.batch:
            pool.put([source.next()])
        total, n = torch.zeros((), device=self.device), 0
        while seconds < end:
            if self.step % self.pace.new_every == 0:
                pool.put(source.waiting() if isinstance(source, Workers) else [source.next()])
            total += self.learn(pool.draw(self.pace.batch), seconds / end)
            n += 1
            seconds = self.before + time.monotonic() - started
            if seconds - saved > SAVE_S or seconds >= end:
                saved = seconds
                self.save(out, seconds, seed)
            if seconds - validated > 60 * self.pace.validate_minutes or seconds >= end:
                validated = seconds
                row = {"minutes": round(seconds / 60, 2), "step": self.step, "loss": round(float(total) / n, 4)}
                _log(out / "log.csv", {**row, "patches": len(pool), **self.validate(held_out)})
                total.zero_()
                n = 0

    def learn(self, batch: tuple[Tensor, ...], progress: float) -> Tensor:
        """Take one step; return the loss, on the device: nothing here waits for it."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.pace.rate * _rate(progress)
        self.optimiser.zero_grad(set_to_none=True)
        loss = objective(self.network, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for each in self.parameters:
            if each.grad is not None:
                torch.nan_to_num_(each.grad, 0.0, 0.0, 0.0)  # a gradient that is not finite moves nothing
        self.optimiser.step()
        self.step += 1
        with torch.no_grad():
            weight = 1 - min(EMA_DECAY, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.ema, self.parameters, weight)
        return loss.detach()

    def save(self, out: Path, seconds: float, seed: int) -> None:
        """Write the checkpoint, in place of the last."""
        content = {
            "network": {name: each.detach().cpu() for name, each in zip(self.names, self.parameters, strict=True)},
            "ema": {name: each.cpu() for name, each in zip(self.names, self.ema, strict=True)},
            "optimiser": self.optimiser.state_dict(),
            "shape": asdict(self.network.shape),
            "step": self.step,
            "seconds": seconds,
            "seed": seed,
        }
        torch.save(content, out / "checkpoint.part")
        os.replace(out / "checkpoint.part", out / "checkpoint.pt")

    def validate(self, held_out: list[tuple[str, Pair]]) -> dict[str, float]:
        """Return the gains of the running mean of the weights."""
        smooth = Detail(self.network.shape)
        smooth.load_state_dict({name: each.cpu() for name, each in zip(self.names, self.ema, strict=True)})
        tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # every plane has another size
        try:
            return gains(smooth.to(self.device), held_out, self.device)
        finally:
            torch.backends.cudnn.benchmark = tuned


def objective(
    network: Detail, images: Tensor, phases: Tensor, noise: Tensor, targets: Tensor, missed: Tensor
) -> Tensor:
    """Return the loss of patches (n, 1, y, x); `missed` (n,) is the mean square of what each patch's plane misses.

    Squared error over what the plane misses, which is what a gain in PSNR asks for; the same for each ring of the
    spectrum by itself, so that the weak rings far out, which the cut-off is read from, count as much as the first;
    and the error of each patch over its own detail, so that every patch has its say.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        added = network(images, phases, noise)
    error = (added.float() - targets)[:, 0, EDGE:-EDGE, EDGE:-EDGE]
    wanted = targets[:, 0, EDGE:-EDGE, EDGE:-EDGE]
    share = 1 / (missed + FLOOR**2)
    square = ((error**2).mean((1, 2)) * share).mean()
    size = torch.sqrt((wanted**2).mean((1, 2)) + FLOOR**2)
    patch = (torch.sqrt((error**2).mean((1, 2)) + 1e-10) / size).mean()
    window, rings = _rings(error.shape[-1], error.device)
    spectra = [_energy(each * window, share) @ rings for each in (error, wanted)]
    ring = (spectra[0] / (spectra[1] + 0.02 * spectra[1].mean() + 1e-8)).mean()
    return square + RING_WEIGHT * ring + PATCH_WEIGHT * patch


def _energy(patches: Tensor, share: Tensor) -> Tensor:
    """Return the mean energy (frequencies,) of patches (n, y, x) at each frequency of the half spectrum."""
    spectrum = torch.view_as_real(torch.fft.rfft2(patches, norm="ortho"))
    return ((spectrum**2).sum(-1) * share[:, None, None]).mean(0).flatten()


@lru_cache(maxsize=4)
def _rings(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a window (n, n) that fades to the border, and which frequency lies in which ring (frequencies, ring)."""
    fade = np.hanning(n + 2)[1:-1]
    down, across = np.fft.fftfreq(n), np.fft.rfftfreq(n)
    first, last, count = RINGS
    ring = np.floor((np.hypot(down[:, None], across) * 4 - first) / (last - first) * count)
    twice = np.where((across == 0) | (across == 0.5), 1.0, 2.0)  # the half that is left out
    belongs = (ring[..., None] == np.arange(count)) * twice[:, None]
    tensors = (torch.from_numpy(each.astype(np.float32)) for each in (np.outer(fade, fade), belongs.reshape(-1, count)))
    window, rings = (each.to(device) for each in tensors)
    return window, rings


def inputs_of(image: Array, y: FineAxis, x: FineAxis, noise: float) -> tuple[Tensor, ...]:
    """Return the graph's inputs for one measured plane (y, x)."""
    level = torch.full((1, 1, 1, 1), noise)
    arrays = (image[None, None], y.place, x.place, y.basis, x.basis, y.phase, x.phase)
    return *(torch.from_numpy(np.ascontiguousarray(each, np.float32)) for each in arrays), level


def held_out_pairs(heads: list[Head]) -> list[tuple[str, Pair]]:
    """Return a few fixed pairs of every held-out volume, by what they show."""
    pairs = []
    for number, head in enumerate(heads):
        rng = np.random.default_rng([7, number])
        axis = head.slice_axis if not head.is_isotropic else 2
        stack = np.moveaxis(head.voxels, axis, 0).astype(np.float32)
        stack = stack / np.percentile(stack, 99.5)
        for share in (0.45, 0.6):
            truth = stack[int(share * len(stack))]
            truth = truth[: len(truth) // 2 * 2, : truth.shape[1] // 2 * 2]
            image = cut_k_space(rng, truth, 0.01)
            pairs.append((f"{head.contrast}", Pair(image, ("band", 2, "band", 2), truth, noise_level(image[None]))))
        if head.is_isotropic:
            truth = np.moveaxis(head.voxels, 0, 0)[head.voxels.shape[0] // 2 - 12].T.astype(np.float32)
            truth = truth / np.percentile(truth, 99.5)
            truth = truth[: len(truth) // 3 * 3]
            image = make_thick(rng, truth, 3, 0.01)
            pairs.append(
                (f"{head.contrast}-through", Pair(image, ("profile", 3, "kept", 1), truth, noise_level(image[None])))
            )
    return pairs


def gains(network: Detail, pairs: list[tuple[str, Pair]], device: torch.device) -> dict[str, float]:
    """Return by what is shown: mean gain in PSNR over the placed image, dB, of a network on `device`."""
    graph = SuperResolution(network).eval()
    found: dict[str, list[float]] = {}
    for name, pair in pairs:
        y, x = axes_of(pair)
        with torch.no_grad():
            made = graph(*(each.to(device) for each in inputs_of(pair.image, y, x, pair.noise)))
        placed, added = (each[0, 0].float().cpu().numpy()[: y.size, : x.size] for each in made)
        before = placed - pair.truth
        after = before + added
        found.setdefault(name, []).append(10 * math.log10(float((before**2).mean()) / float((after**2).mean())))
    return {name: round(float(np.mean(values)), 3) for name, values in sorted(found.items())}


def load_detail(checkpoint: Path) -> tuple[Detail, dict[str, Any]]:
    """Return the network with the running mean of the weights, ready to evaluate, and the checkpoint."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network = Detail(Shape(**content["shape"]))
    network.load_state_dict(content["ema"])
    return network.eval(), content


def _rate(progress: float) -> float:
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.01)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def _log(path: Path, row: dict[str, Any]) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


if __name__ == "__main__":
    main()
