"""Train the super-resolution network: `python -m export.superres_train --data DIR --out DIR --minutes N`.

Runs on one core of the CPU. The learning rate follows the time that is left, so any budget ends well. What is learned
is the part of the truth that the measurement leaves open, patch by patch; validation runs the whole graph with its
projection on whole planes of held-out subjects.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.muon import Muon
from export.superres_data import PATCH, Head, Pair, cut_k_space, draw_pair, load_heads, make_thick
from export.superres_network import Detail, Shape, SuperResolution
from recon.arrays import Array
from recon.fine_grid import FineAxis, band_axis, kept_axis, profile_axis
from recon.superres import noise_level

RATE = 1e-3
BATCH = 12
WINDOWS = 8  # patches of a plane
NEW_EVERY = 2  # steps: making a plane costs a sixth of learning from one batch
KEPT = 1500  # patches that wait to be learned from
SHARE_THROUGH = 0.2  # of planes: across thick slices, which are learned sooner
WARM_UP, LAST_RATE = 0.02, 0.02
EMA_DECAY = 0.999
CLIP = 5.0
EDGE = 6  # voxels of a patch that see its border: not learned from
FLOOR = 0.01  # root mean square of detail, over the image's scale, below which less and less counts
PATCH_WEIGHT, L1_WEIGHT, SPECTRUM_WEIGHT = 0.7, 0.1, 0.02  # beside the squared error of the whole batch
VALIDATE_MINUTES = 4.0


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m export.superres_train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with brain/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint.pt and log.csv")
    parser.add_argument("--minutes", type=float, default=50.0, help="wall time of training (default %(default)g)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.data, args.out, args.minutes, args.seed, args.resume)


def train(data: Path, out: Path, minutes: float, seed: int, resume: bool = False) -> None:
    """Train for `minutes` of wall time; leave checkpoint.pt and log.csv in `out`."""
    network = Detail(Shape())
    optimiser = Muon(network.parameters(), RATE)
    ema = {name: value.detach().clone() for name, value in network.state_dict().items()}
    step, before = 0, 0.0
    if resume:
        content = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        network.load_state_dict(content["network"])
        optimiser.load_state_dict(content["optimiser"])
        ema, step, before = content["ema"], content["step"], content["seconds"]
    patches = Patches(load_heads(data, "train"), seed, step)
    held_out = held_out_pairs(load_heads(data, "val"))
    started, validated, sums = time.monotonic(), -math.inf, np.zeros(2)
    seconds = before
    while seconds < 60 * minutes:
        for group in optimiser.param_groups:
            group["lr"] = RATE * _rate(seconds / (60 * minutes))
        loss = objective(network, *patches.draw())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP))
        if math.isfinite(norm):
            optimiser.step()
        step += 1
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            ema[name].lerp_(value, 1 - decay)
        sums += (float(loss.detach()), 1)
        seconds = before + time.monotonic() - started
        if seconds - validated > 60 * VALIDATE_MINUTES or seconds >= 60 * minutes:
            validated = seconds
            state = {"network": network.state_dict(), "ema": ema, "optimiser": optimiser.state_dict()}
            _save(out, {**state, "shape": asdict(network.shape), "step": step, "seconds": seconds, "seed": seed})
            smooth = Detail(network.shape)
            smooth.load_state_dict(ema)
            row = {
                "minutes": round(seconds / 60, 2),
                "step": step,
                "loss": round(float(sums[0]) / max(float(sums[1]), 1), 4),
            }
            _log(out / "log.csv", {**row, **gains(smooth, held_out)})
            sums[:] = 0


def objective(network: Detail, images: Tensor, phases: Tensor, noise: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of patches (n, 1, y, x): squared error over the batch's energy, and relative errors a patch.

    The first is what PSNR asks for, where detail is strongest; the others (L2, L1, L1 of the spectrum) let every patch
    have its say.
    """
    error = (network(images, phases, noise) - targets)[:, 0, EDGE:-EDGE, EDGE:-EDGE]
    wanted = targets[:, 0, EDGE:-EDGE, EDGE:-EDGE]
    square = (error**2).mean() / ((wanted**2).mean() + FLOOR**2)
    size = torch.sqrt((wanted**2).mean((1, 2)) + FLOOR**2)
    spectrum = torch.view_as_real(torch.fft.rfft2(error, norm="ortho"))
    relative = PATCH_WEIGHT * torch.sqrt((error**2).mean((1, 2)) + 1e-10) + L1_WEIGHT * error.abs().mean((1, 2))
    relative = relative + SPECTRUM_WEIGHT * torch.sqrt((spectrum**2).sum(-1) + 1e-10).mean((1, 2))
    return square + (relative / size).mean()


class Patches:
    """Patches of degraded planes, drawn again and again while new planes come in at a steady pace."""

    def __init__(self, heads: list[Head], seed: int, step: int) -> None:
        self._heads = heads
        self._rng = np.random.default_rng([seed, step])
        self._n = 0
        self._kept: deque[tuple[Array, Array, float, Array]] = deque(maxlen=KEPT)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return placed images, phases, noise levels and targets of one batch."""
        self._n += 1
        while len(self._kept) < 20 * BATCH:
            self._add()
        if self._n % NEW_EVERY == 0:
            self._add()
        chosen = [self._kept[int(i)] for i in self._rng.integers(len(self._kept), size=BATCH)]
        images, phases, noise, targets = zip(*chosen, strict=True)
        levels = torch.tensor(noise, dtype=torch.float32)[:, None, None, None]
        return (
            torch.from_numpy(np.stack(images)[:, None]),
            torch.from_numpy(np.stack(phases)),
            levels,
            torch.from_numpy(np.stack(targets)[:, None]),
        )

    def _add(self) -> None:
        pair = draw_pair(self._rng, self._heads, SHARE_THROUGH)
        placed, phase, target = prepared(pair)
        ny, nx = placed.shape
        if min(ny, nx) < PATCH:
            return
        found = 0
        for _ in range(4 * WINDOWS):
            y, x = (2 * int(self._rng.integers((n - PATCH) // 2 + 1)) for n in (ny, nx))
            here = slice(y, y + PATCH), slice(x, x + PATCH)
            if self._rng.random() > 0.1 and float((placed[here] > 0.1).mean()) < 0.3:
                continue
            seen = phase[:, here[0], here[1]].copy()
            self._kept.append((placed[here].copy(), seen, pair.noise, target[here].copy()))
            found += 1
            if found == WINDOWS:
                return


@lru_cache(maxsize=512)
def axis_of(kind: str, n: int, factor: int) -> FineAxis:
    """Return the fine axis of `n` measured values."""
    return kept_axis(n) if kind == "kept" else band_axis(n) if kind == "band" else profile_axis(n, factor)


def axes_of(pair: Pair) -> tuple[FineAxis, FineAxis]:
    """Return the fine axes of a pair's plane."""
    kind_y, factor_y, kind_x, factor_x = pair.axes
    return axis_of(kind_y, pair.image.shape[0], factor_y), axis_of(kind_x, pair.image.shape[1], factor_x)


def prepared(pair: Pair) -> tuple[Array, Array, Array]:
    """Return the placed image (y, x), phases (2, y, x) and what it misses of what the measurement leaves open."""
    y, x = axes_of(pair)
    placed = y.place[: y.size] @ pair.image @ x.place[: x.size].T
    missing = pair.truth - placed
    known = y.basis[: y.size].T @ missing @ x.basis[: x.size]
    target = missing - y.basis[: y.size] @ known @ x.basis[: x.size].T
    phase = np.stack(np.broadcast_arrays(y.phase[: y.size, None], x.phase[None, : x.size]))
    return placed.astype(np.float32), phase.astype(np.float32), target.astype(np.float32)


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


def gains(network: Detail, pairs: list[tuple[str, Pair]]) -> dict[str, float]:
    """Return by what is shown: mean gain in PSNR over the placed image, dB."""
    graph = SuperResolution(network).eval()
    found: dict[str, list[float]] = {}
    for name, pair in pairs:
        y, x = axes_of(pair)
        with torch.no_grad():
            placed, added = graph(*inputs_of(pair.image, y, x, pair.noise))
        before = placed[0, 0].numpy()[: y.size, : x.size] - pair.truth
        after = before + added[0, 0].numpy()[: y.size, : x.size]
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


def _save(out: Path, content: dict[str, Any]) -> None:
    torch.save(content, out / "checkpoint.part")
    os.replace(out / "checkpoint.part", out / "checkpoint.pt")


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
