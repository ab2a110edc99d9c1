"""Train a triage network: `python -m export.triage_train --finding infarct --planes DIR --out DIR --minutes N`.

The planes are those of `export.triage_images`; more of them may appear while it trains. What a network is shown, and
what it should find there, is drawn by its `Recipe` (`export/triage_recipes.py`). The learning rate follows the time
that is left. `--fold K/N` leaves out every N-th patient instead of the suggested validation split.
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
from export.triage_images import Plane, load
from export.triage_network import WIDTHS, TriageNetwork
from export.triage_recipes import RECIPES, Recipe
from triage.preprocess import SIZE
from triage.score import WINDOW, middle_of

MIDDLE = middle_of(SIZE)
BATCH = 8
RATE = 3e-3
WARM_UP = 0.08
LAST_RATE = 0.01
FIRST_LOOK = 6  # batches that give a model.onnx its statistics back
KEPT = 48  # batches that are learned from again, turned
EMA = 0.995
CLIP = 3.0
MAP_WEIGHTS = (1.0, 0.5)  # cross-entropy of pixels, soft Dice of the batch
PLANE_WEIGHTS = (0.2, 0.2)  # cross-entropy of the highest window, of the whole plane
LOSSES = ("pixels", "dice", "window", "plane")
AGAIN_S = 120.0  # seconds between looks for new planes
HELD_OUT_SHAPES = 8  # every so many patients' outlines are for held-out examples
MIN_AREA = 100  # mm²: fewer are too small to be asked for


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
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


def train(args: argparse.Namespace) -> None:
    """Train for the given time and write the checkpoint."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    recipe = RECIPES[args.finding]
    pool = Pool(args.planes, recipe, args.fold)
    network = begin(args.weights, rng, recipe, pool).to(memory_format=torch.channels_last)
    optimiser = Muon(network.parameters(), args.rate)
    kept: deque[Batch] = deque(maxlen=KEPT)
    ema = {name: value.detach().clone() for name, value in network.state_dict().items()}
    started, step, sums, noted = time.monotonic(), 0, np.zeros(1 + len(LOSSES)), 0.0
    while (seconds := time.monotonic() - started) < 60 * args.minutes:
        progress = seconds / (60 * args.minutes)
        for group in optimiser.param_groups:
            group["lr"] = args.rate * rate(progress)
        network.train()
        if step % 2 and kept:  # drawing an example takes a third as long as learning from it
            planes, masks, present = turned(kept[int(rng.integers(len(kept)))])
        else:
            planes, masks, present = batch(rng, recipe, pool)
            kept.append((planes, masks, present))
        losses = loss_of(network, planes, masks, present)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimiser.step()
        step += 1
        follow(ema, network, min(EMA, (1 + step) / (10 + step)))
        sums += [1.0, *(each.item() for each in losses)]
        if seconds - noted > AGAIN_S or step == 1:
            noted = seconds
            pool.look_again()
            row = {"minutes": round(seconds / 60, 1), "step": step, "planes": pool.n}
            row |= {name: round(v, 4) for name, v in zip(LOSSES, sums[1:] / sums[0], strict=True)}
            sums = sums * 0
            note(args, ema, step, seconds, row)
    note(args, ema, step, seconds, {"minutes": round(seconds / 60, 1), "step": step, "planes": pool.n})


def begin(weights: Path | None, rng: np.random.Generator, recipe: Recipe, pool: Pool) -> TriageNetwork:
    """Return the network to train: a new one, or that of a checkpoint or a model.onnx."""
    if weights is not None and weights.suffix == ".onnx":
        return from_onnx(weights, torch.cat([batch(rng, recipe, pool)[0] for _ in range(FIRST_LOOK)]))
    network = TriageNetwork(WIDTHS)
    if weights is not None:
        network.load_state_dict(torch.load(weights, weights_only=True)["ema"])
    return network


def note(args: argparse.Namespace, ema: dict[str, Tensor], step: int, seconds: float, row: dict[str, Any]) -> None:
    """Write the checkpoint and a line of the log."""
    content = {
        "ema": ema, "widths": WIDTHS, "step": step, "minutes": round(seconds / 60, 1), "finding": args.finding,
        "fold": args.fold, "seed": args.seed, "batch": BATCH,
    }  # fmt: skip
    torch.save(content, args.out / "checkpoint.part")
    os.replace(args.out / "checkpoint.part", args.out / "checkpoint.pt")
    line = json.dumps(row)
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
    for name, value in network.state_dict().items():
        if value.dtype.is_floating_point:
            ema[name].lerp_(value.detach(), 1 - decay)


def loss_of(network: TriageNetwork, planes: Tensor, masks: Tensor, present: Tensor) -> tuple[Tensor, ...]:
    """Return the weighted losses: of pixels, of their overlap, of the highest window, of the plane as a whole.

    present: (n,) 1 or 0, and -1 for planes whose finding is too small to be asked for.
    """
    logits, _, whole = network(planes)
    pixels = functional.binary_cross_entropy_with_logits(logits, masks)
    maps = torch.sigmoid(logits)
    overlap = (2 * (maps * masks).sum() + 20) / (maps.sum() + masks.sum() + 20)
    window = functional.avg_pool2d(maps, WINDOW, 1, WINDOW // 2).amax((1, 2, 3)).clamp(1e-4, 1 - 1e-4)
    asked = (present >= 0).float()
    wanted = present.clamp_min(0)
    n = asked.sum().clamp_min(1)
    highest = (functional.binary_cross_entropy(window, wanted, reduction="none") * asked).sum() / n
    plane = (functional.binary_cross_entropy_with_logits(whole, wanted, reduction="none") * asked).sum() / n
    return (
        10 * MAP_WEIGHTS[0] * pixels,
        MAP_WEIGHTS[1] * (1 - overlap),
        PLANE_WEIGHTS[0] * highest,
        PLANE_WEIGHTS[1] * plane,
    )


class Pool:
    """The training planes of a recipe (or those held out), by what they are drawn for; grows as files appear."""

    def __init__(self, folder: Path, recipe: Recipe, fold: str, is_held_out: bool = False) -> None:
        self._folder, self._recipe, self._fold, self._is_held_out = folder, recipe, fold, is_held_out
        self._seen: set[Path] = set()
        self.by_kind: dict[str, list[Plane]] = {}
        self.look_again()

    @property
    def n(self) -> int:
        """How many planes there are."""
        return sum(map(len, self.by_kind.values()))

    def look_again(self) -> None:
        """Read the files that were not there before."""
        complete = (path for path in sorted(self._folder.glob("*.npz")) if "part" not in path.name)
        new = [path for path in complete if path not in self._seen]
        self._seen |= set(new)
        for path in new:
            for plane in load([path]):
                kind = self._recipe.kind(plane)
                if kind and is_training(plane, self._fold) != self._is_held_out:
                    kept = Plane(plane.image[MIDDLE].copy(), plane.mask[MIDDLE].copy(), plane.label)
                    self.by_kind.setdefault(kind, []).append(kept)

    def draw(self, rng: np.random.Generator, kind: str) -> Plane:
        """Return any plane of a kind."""
        planes = self.by_kind[kind]
        return planes[int(rng.integers(len(planes)))]


def is_training(plane: Plane, fold: str) -> bool:
    """Return whether a plane may be trained on; folds leave out every N-th patient of the stroke set."""
    if plane.label.source == "shapes":
        return int(plane.label.group.split("-")[1]) % HELD_OUT_SHAPES != 0
    if fold and plane.label.source == "stroke_flair":
        left_out, n = (int(each) for each in fold.split("/"))
        return int(plane.label.group.split("-")[1]) % n != left_out
    return plane.label.split == "train"


Batch = tuple[Tensor, Tensor, Tensor]


def turned(examples: Batch) -> Batch:
    """Return examples the other way round: a plane and its mirror image change places."""
    planes, masks, present = examples
    return planes.flip(3).contiguous(memory_format=torch.channels_last), masks.flip(3), present


def batch(rng: np.random.Generator, recipe: Recipe, pool: Pool) -> Batch:
    """Return planes (n, 2, y, x), masks (n, 1, y, x) and whether a finding is present (n,)."""
    examples = [recipe.draw(rng, pool) for _ in range(BATCH)]
    present = [-1.0 if 0 < each.mask.sum() < MIN_AREA else float(each.mask.any()) for each in examples]
    stacked = np.stack([each.image for each in examples])
    planes = np.stack((stacked, stacked[:, :, ::-1]), 1).astype(np.float32)
    layout = torch.from_numpy(planes).contiguous(memory_format=torch.channels_last)
    masks = np.stack([each.mask for each in examples])[:, None].astype(np.float32)
    return layout, torch.from_numpy(masks), torch.tensor(present)


def load_triage(path: Path) -> tuple[TriageNetwork, dict[str, Any]]:
    """Return the network of a checkpoint with the running mean of its weights, and the checkpoint.

    path: a checkpoint, or a model.onnx that has its card.json beside it.
    """
    if path.suffix == ".onnx":
        card = json.loads((path.parent / "card.json").read_text("utf-8"))
        known = {"finding": card["name"].removeprefix("scanside-"), "widths": card["network"]["widths"], "fold": ""}
        return from_onnx(path), known | card["training"]
    content = torch.load(path, weights_only=True)
    network = TriageNetwork(tuple(content["widths"]))
    network.load_state_dict(content["ema"])
    return network.eval(), content


if __name__ == "__main__":
    main()
