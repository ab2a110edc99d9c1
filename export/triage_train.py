"""Train a triage network: `python -m export.triage_train --finding infarct --planes DIR --out DIR --minutes N`.

The planes are those of `export.triage_images`; more of them may appear while it trains. What a network is shown, and
what it should find there, is drawn by its `Recipe` (`export/triage_recipes.py`). The learning rate follows the time
that is left. `--fold K/N` leaves out every N-th patient instead of the suggested validation split. Where there is a
GPU it learns there, from what `--workers N` other processes draw.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from export.muon import Muon
from export.triage_again import from_onnx
from export.triage_network import WIDE, WIDTHS, TriageNetwork
from export.triage_pool import Pool
from export.triage_recipes import RECIPES, Recipe
from export.triage_workers import AGAIN_S, Batch, Store, Workers, draw_examples
from triage.score import WINDOW

BATCH = 8
GPU_BATCH = 32
STORED, GPU_STORED = 1024, 8192  # examples of other processes that are learned from again, changed
FIRST_STORED, GPU_FIRST_STORED = 16, 512
DECAY = 0.1  # of convolutions, and
DROPOUT = 0.1  # of the deepest features, of wide networks
RATE = 3e-3
WARM_UP = 0.08
LAST_RATE = 0.01
FIRST_LOOK = 6  # batches that give a model.onnx its statistics back
KEPT = 48  # batches that are learned from again, turned
EMA_STEPS = 200  # at least: what the running mean of the weights covers, else
EMA_SHARE = 0.04  # of all steps
CLIP = 3.0
MAP_WEIGHTS = (1.0, 0.5)  # cross-entropy of pixels, soft Dice of the batch
PLANE_WEIGHTS = (0.2, 0.2)  # cross-entropy of the highest windows inside and outside, of the whole plane
MARGIN = 4  # mm around a finding where a window may be high
LOSSES = ("pixels", "dice", "window", "plane")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m export.triage_train", description=__doc__)
    parser.add_argument("--finding", required=True, choices=sorted(RECIPES))
    parser.add_argument("--planes", type=Path, required=True, metavar="DIR", help="made by export.triage_images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint.pt, log.jsonl")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--fold", default="", metavar="K/N", help="cross-validation over patients")
    parser.add_argument(
        "--from",
        dest="weights",
        type=Path,
        metavar="FILE",
        help="begin with the weights of a checkpoint, or of a model.onnx",
    )
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw examples, for a GPU")
    parser.add_argument("--wide", action="store_true", help="a larger network, for long training")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


def train(args: argparse.Namespace) -> None:
    """Train for the given time and write the checkpoint."""
    ends = time.monotonic() + 60 * args.minutes
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    recipe = RECIPES[args.finding]
    pool = Pool(args.planes, recipe, args.fold)
    workers = Workers(args.workers, args.seed, recipe, pool) if args.workers else None  # before anything of CUDA
    try:
        network = begin(args, rng, recipe, pool)
        device = the_device()
        on_gpu = device.type == "cuda"
        network = network.to(device, memory_format=torch.channels_last)
        store = None
        if workers is not None:
            room, first = (GPU_STORED, GPU_FIRST_STORED) if on_gpu else (STORED, FIRST_STORED)
            store = Store(workers, room, first, device)
        learn(args, ends, network, Examples(rng, recipe, pool, store, device, GPU_BATCH if on_gpu else BATCH))
    finally:
        if workers is not None:
            workers.close()


def the_device() -> torch.device:
    """Return a GPU where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


class Examples:
    """Batches to learn from: drawn here and kept for a while, or of other processes."""

    def __init__(
        self,
        rng: np.random.Generator,
        recipe: Recipe,
        pool: Pool,
        store: Store | None,
        device: torch.device,
        n: int,
    ) -> None:
        self._rng, self._recipe, self.pool, self.store = rng, recipe, pool, store
        self.device, self.n = device, n
        self._kept: deque[Batch] = deque(maxlen=KEPT)
        self._is_again = False

    def next(self) -> Batch:
        """Return a batch on the device."""
        if self.store is not None:
            return self.store.batch(self.n)
        if self._is_again:  # drawing an example takes a third as long as learning from it
            found = turned(self._kept[int(self._rng.integers(len(self._kept)))])
        else:
            found = batch(self._rng, self._recipe, self.pool, self.n)
            self._kept.append(found)
        self._is_again = not self._is_again
        planes, masks, present = (each.to(self.device) for each in found)
        return planes.contiguous(memory_format=torch.channels_last), masks, present


def learn(args: argparse.Namespace, ends: float, network: TriageNetwork, examples: Examples) -> None:
    """Take steps until the time is over, or with the first one after it."""
    decay = DECAY if network.widths == WIDE else 0.0
    optimiser = Muon(network.parameters(), args.rate, decay)
    ema = {name: value.detach().clone() for name, value in network.state_dict().items()}
    began = time.monotonic()
    step, noted, n_noted = 0, began, 0
    sums = torch.zeros(len(LOSSES), device=examples.device)
    network.train()
    while step == 0 or time.monotonic() < ends:
        progress = min(1.0, (time.monotonic() - began) / max(ends - began, 1.0))
        for group in optimiser.param_groups:
            group["lr"] = args.rate * rate(progress)
        losses = torch.stack(loss_of(network, *examples.next()))
        optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimiser.step()
        step += 1
        covered = max(EMA_STEPS, EMA_SHARE * step / max(progress, 0.05))
        follow(ema, network, min(1 - 1 / covered, (1 + step) / (10 + step)))
        sums += losses.detach()
        now = time.monotonic()
        if now - noted > AGAIN_S or step == 1:
            if examples.store is None:
                examples.pool.look_again()
            means = (sums / (step - n_noted)).tolist()
            note(args, network, ema, step, began, examples, dict(zip(LOSSES, means, strict=True)))
            sums.zero_()
            noted, n_noted = now, step
    note(args, network, ema, step, began, examples, {})


def begin(args: argparse.Namespace, rng: np.random.Generator, recipe: Recipe, pool: Pool) -> TriageNetwork:
    """Return the network to train: a new one, or that of a checkpoint or a model.onnx."""
    weights: Path | None = args.weights
    if weights is not None and weights.suffix == ".onnx":
        network = from_onnx(weights, torch.cat([batch(rng, recipe, pool, BATCH)[0] for _ in range(FIRST_LOOK)]))
    elif weights is not None:
        content = torch.load(weights, weights_only=True, map_location="cpu")
        network = TriageNetwork(tuple(content["widths"]))
        network.load_state_dict(content["ema"])
    else:
        network = TriageNetwork(WIDE if args.wide else WIDTHS)
    network.dropout = DROPOUT if network.widths == WIDE else 0.0
    return network


def note(
    args: argparse.Namespace,
    network: TriageNetwork,
    ema: dict[str, Tensor],
    step: int,
    began: float,
    examples: Examples,
    losses: dict[str, float],
) -> None:
    """Write the checkpoint and a line of the log."""
    minutes = round((time.monotonic() - began) / 60, 1)
    content = {
        "ema": {name: value.cpu() for name, value in ema.items()}, "widths": network.widths, "step": step,
        "minutes": minutes, "finding": args.finding, "fold": args.fold, "seed": args.seed, "batch": examples.n,
    }  # fmt: skip
    torch.save(content, args.out / "checkpoint.part")
    os.replace(args.out / "checkpoint.part", args.out / "checkpoint.pt")
    row: dict[str, Any] = {"minutes": minutes, "step": step, "planes": examples.pool.n, "device": examples.device.type}
    if examples.store is not None:
        row["drawn"] = examples.store.n_drawn
    line = json.dumps(row | {name: round(value, 4) for name, value in losses.items()})
    with (args.out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def rate(progress: float) -> float:
    """Return the share of the highest learning rate: a short rise, then half a cosine."""
    if progress < WARM_UP:
        return 0.05 + 0.95 * progress / WARM_UP
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def follow(ema: dict[str, Tensor], network: TriageNetwork, decay: float) -> None:
    """Move the running mean of weights and statistics."""
    now = network.state_dict()
    names = [name for name, value in now.items() if value.dtype.is_floating_point]
    with torch.no_grad():
        torch._foreach_lerp_([ema[name] for name in names], [now[name] for name in names], 1 - decay)


def loss_of(network: TriageNetwork, planes: Tensor, masks: Tensor, present: Tensor) -> tuple[Tensor, ...]:
    """Return the weighted losses: of pixels, of their overlap, of the highest windows, of the plane as a whole.

    The highest window inside a finding should be sure of it, and the highest outside of it of nothing: then the peak
    of the map is in the finding.
    present: (n,) 1 or 0, and -1 for planes whose finding is too small to be asked for.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=planes.is_cuda):
        logits, _, whole = network(planes)
    logits, whole = logits.float(), whole.float()
    pixels = functional.binary_cross_entropy_with_logits(logits, masks)
    maps = torch.sigmoid(logits)
    overlap = (2 * (maps * masks).sum() + 20) / (maps.sum() + masks.sum() + 20)
    windows = functional.avg_pool2d(maps, WINDOW, 1, WINDOW // 2)
    near = functional.max_pool2d(masks, 2 * MARGIN + 1, 1, MARGIN)
    inside = (windows * masks).amax((1, 2, 3)).clamp(1e-4, 1 - 1e-4)
    outside = (windows * (1 - near)).amax((1, 2, 3)).clamp(1e-4, 1 - 1e-4)
    asked = (present >= 0).float()
    wanted = present.clamp_min(0)
    n = asked.sum().clamp_min(1)
    highest = -(wanted * inside.log()).sum() / n - (asked * (1 - outside).log()).sum() / n
    plane = (functional.binary_cross_entropy_with_logits(whole, wanted, reduction="none") * asked).sum() / n
    return (
        10 * MAP_WEIGHTS[0] * pixels,
        MAP_WEIGHTS[1] * (1 - overlap),
        PLANE_WEIGHTS[0] * highest,
        PLANE_WEIGHTS[1] * plane,
    )


def turned(examples: Batch) -> Batch:
    """Return examples the other way round: a plane and its mirror image change places."""
    planes, masks, present = examples
    return planes.flip(3).contiguous(memory_format=torch.channels_last), masks.flip(3), present


def batch(rng: np.random.Generator, recipe: Recipe, pool: Pool, n: int) -> Batch:
    """Return planes (n, 2, y, x), masks (n, 1, y, x) and whether a finding is present (n,)."""
    images, masks, present = draw_examples(rng, recipe, pool, n)
    planes = torch.from_numpy(np.stack((images, images[:, :, ::-1]), 1))
    shown = torch.from_numpy(masks[:, None].astype(np.float32))
    return planes.contiguous(memory_format=torch.channels_last), shown, torch.from_numpy(present)


def load_triage(path: Path) -> tuple[TriageNetwork, dict[str, Any]]:
    """Return the network of a checkpoint with the running mean of its weights, and the checkpoint.

    path: a checkpoint, or a model.onnx that has its card.json beside it.
    """
    if path.suffix == ".onnx":
        card = json.loads((path.parent / "card.json").read_text("utf-8"))
        known = {"finding": card["name"].removeprefix("scanside-"), "widths": card["network"]["widths"], "fold": ""}
        return from_onnx(path), known | card["training"]
    content = torch.load(path, weights_only=True, map_location="cpu")
    network = TriageNetwork(tuple(content["widths"]))
    network.load_state_dict(content["ema"])
    return network.eval(), content


if __name__ == "__main__":
    main()
