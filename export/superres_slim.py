"""Narrow a trained super-resolution network: `python -m export.superres_slim --checkpoint FILE --data DIR --out DIR`.

Convolutions at half resolution cost most of a slice's time, and runtimes work on blocks of 16 channels: 56 cost as much
as 64. The channels that held-out patches miss least are taken out, those that blocks share and those inside of blocks;
`export.superres_train --from` goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from export.superres_data import SimulatedHeads, load_heads, load_patients
from export.superres_network import Block, Detail
from export.superres_pool import Planes, Pool
from export.superres_train import load_detail, objective

PATCHES = 96


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, narrow, write DIR/checkpoint.pt."""
    parser = argparse.ArgumentParser(prog="python -m export.superres_slim", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="of export.superres_train")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="brain/, stroke_flair/, tumour_t1c/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fine", type=int, default=48, metavar="N", help="channels at half resolution (%(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, content = load_detail(args.checkpoint)
    planes = Planes(load_heads(args.data, "train") + load_patients(args.data), (11,), SimulatedHeads())
    pool = Pool(PATCHES, torch.device("cpu"))
    while len(pool) < PATCHES:
        pool.put([planes.next()])
    batch = pool.draw(PATCHES)
    slim = narrowed(network, args.fine, lambda each: float(objective(each, *batch)))
    args.out.mkdir(parents=True, exist_ok=True)
    known = {name: content[name] for name in ("step", "seconds", "seed")}
    torch.save(known | {"ema": slim.state_dict(), "shape": asdict(slim.shape)}, args.out / "checkpoint.pt")
    print(f"loss {float(objective(network, *batch).detach()):.4f} -> {float(objective(slim, *batch).detach()):.4f}")


def narrowed(network: Detail, fine: int, loss: Callable[[Detail], float]) -> Detail:
    """Return a network with `fine` channels at half resolution, those whose absence costs the least `loss`."""
    if not 0 < fine <= network.shape.fine:
        raise ValueError(f"of {network.shape.fine} channels {fine} can't be kept")
    blocks = [network.fine, *network.merge_1]
    with torch.no_grad():
        shared = _kept(network, _stream(network), fine, loss)
        inside = [_kept(network, _hidden(block), fine, loss) for block in blocks]
    slim = Detail(replace(network.shape, fine=fine))
    state = network.state_dict()
    for name, axis in _axes():
        state[name] = state[name].index_select(axis, shared)
    for prefix, kept in zip(("fine", "merge_1.0", "merge_1.1"), inside, strict=True):
        for name, axis in (("first.weight", 0), ("first.bias", 0), ("second.weight", 1)):
            state[f"{prefix}.{name}"] = state[f"{prefix}.{name}"].index_select(axis, kept)
    slim.load_state_dict(state)
    slim.eval()
    return slim


def _axes() -> list[tuple[str, int]]:
    """Return which axes of which weights are the channels that the blocks at half resolution share."""
    found = [("enter.weight", 0), ("enter.bias", 0), ("down_1.weight", 1), ("up_1.weight", 1), ("up_1.bias", 0)]
    for prefix in ("fine", "merge_1.0", "merge_1.1"):
        found += [(f"{prefix}.first.weight", 1), (f"{prefix}.second.weight", 0), (f"{prefix}.second.bias", 0)]
    return [*found, ("leave.weight", 1)]


def _stream(network: Detail) -> list[tuple[Tensor, int]]:
    """Return the weights, and along which axis, that carry shared channels on: 0 there, and a channel is gone."""
    blocks: list[Block] = [network.fine, *network.merge_1]
    readers: list[nn.Module] = [network.down_1, network.leave, *(block.first for block in blocks)]
    return [(each.weight, 1) for each in readers if isinstance(each, nn.Conv2d)]


def _hidden(block: Block) -> list[tuple[Tensor, int]]:
    return [(block.second.weight, 1)]


def _kept(network: Detail, weights: list[tuple[Tensor, int]], n: int, loss: Callable[[Detail], float]) -> Tensor:
    """Return the `n` channels (in order) without which `loss` would grow most, one taken away at a time."""
    size = weights[0][0].shape[weights[0][1]]
    cost = torch.empty(size)
    for channel in range(size):
        saved = [each.select(axis, channel).clone() for each, axis in weights]
        for each, axis in weights:
            each.select(axis, channel).zero_()
        cost[channel] = loss(network)
        for (each, axis), before in zip(weights, saved, strict=True):
            each.select(axis, channel).copy_(before)
    return cost.argsort(descending=True)[:n].sort().values


if __name__ == "__main__":
    main()
