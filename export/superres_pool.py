"""Patches to learn super-resolution from: cut from degraded planes, kept in one pool, drawn again and again.

Making a plane costs the processor tens of milliseconds, learning from it costs a GPU hardly any. Worker processes make
planes while the trainer draws; without workers it makes one itself now and then. A process never outlives the trainer.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from export.superres_data import PATCH, Head, Pair, SimulatedHeads, draw_pair
from recon.arrays import Array
from recon.fine_grid import FineAxis, band_axis, kept_axis, profile_axis

WINDOWS = 12  # patches of a plane
SHARE_THROUGH = 0.15  # of planes: across thick slices, which are learned sooner
SIGNAL, LEAST_SIGNAL, MOST_AIR = 0.1, 0.3, 0.1  # a patch shows a head on 0.3 of it, but for one in ten
WAITING = 48  # planes between workers and trainer
PATIENCE_S, WATCH_S = 120.0, 2.0

Block = tuple[Array, Array, Array]
"""Patches of one plane: float16 (n, 2, y, x) placed image and target, float16 (n, 2, side) phases down and across,
float32 (n, 3) noise, mean square of what the plane misses, 1 where both axes are alike."""


@lru_cache(maxsize=512)
def axis_of(kind: str, n: int, factor: int) -> FineAxis:
    """Return the fine axis of `n` measured values."""
    return kept_axis(n) if kind == "kept" else band_axis(n) if kind == "band" else profile_axis(n, factor)


def axes_of(pair: Pair) -> tuple[FineAxis, FineAxis]:
    """Return the fine axes of a pair's plane."""
    kind_y, factor_y, kind_x, factor_x = pair.axes
    return axis_of(kind_y, pair.image.shape[0], factor_y), axis_of(kind_x, pair.image.shape[1], factor_x)


def prepared(pair: Pair) -> tuple[Array, Array]:
    """Return the placed image (y, x) and what it misses of what the measurement leaves open, float32."""
    y, x = axes_of(pair)
    placed = y.place[: y.size] @ pair.image @ x.place[: x.size].T
    missing = pair.truth - placed
    known = y.basis[: y.size].T @ missing @ x.basis[: x.size]
    target = missing - y.basis[: y.size] @ known @ x.basis[: x.size].T
    return placed.astype(np.float32), target.astype(np.float32)


class Planes:
    """Patches of degraded planes, one plane after the other."""

    def __init__(self, heads: list[Head], seed: tuple[int, ...], simulated: SimulatedHeads | None) -> None:
        self._heads, self._simulated = heads, simulated
        self._rng = np.random.default_rng(seed)

    def next(self) -> Block:
        """Return the patches of the next plane that has any."""
        while True:
            pair = draw_pair(self._rng, self._heads, SHARE_THROUGH, self._simulated)
            placed, target = prepared(pair)
            corners = self._corners(placed)
            if corners:
                break
        y, x = axes_of(pair)
        inside = placed > SIGNAL
        missed = float((target[inside] ** 2).mean()) if inside.mean() > 0.02 else float((target**2).mean())
        about = (pair.noise, missed, float(pair.axes[:2] == pair.axes[2:]))
        images = [np.stack((placed, target))[:, i : i + PATCH, j : j + PATCH] for i, j in corners]
        phases = [np.stack((y.phase[i : i + PATCH], x.phase[j : j + PATCH])) for i, j in corners]
        numbers = np.tile(np.array(about, np.float32), (len(corners), 1))
        return np.stack(images).astype(np.float16), np.stack(phases).astype(np.float16), numbers

    def _corners(self, placed: Array) -> list[tuple[int, int]]:
        if min(placed.shape) < PATCH:
            return []
        found: list[tuple[int, int]] = []
        for _ in range(4 * WINDOWS):
            y, x = (2 * int(self._rng.integers((n - PATCH) // 2 + 1)) for n in placed.shape)
            shown = float((placed[y : y + PATCH, x : x + PATCH] > SIGNAL).mean())
            if shown >= LEAST_SIGNAL or self._rng.random() < MOST_AIR:
                found.append((y, x))
            if len(found) == WINDOWS:
                break
        return found


class Workers:
    """Processes that make planes. Start them before CUDA is: a fork would take half of it along."""

    def __init__(self, n: int, heads: list[Head], seed: tuple[int, ...], simulated: SimulatedHeads | None) -> None:
        context = multiprocessing.get_context("fork")
        self._queue: multiprocessing.Queue[Block] = context.Queue(WAITING)
        self._processes = [
            context.Process(
                target=_work, args=(self._queue, heads, (*seed, 1 + number), simulated, os.getpid()), daemon=True
            )
            for number in range(n)
        ]
        for process in self._processes:
            process.start()

    def waiting(self) -> list[Block]:
        """Return what has been made since, without waiting for more."""
        found: list[Block] = []
        while len(found) < WAITING:
            try:
                found.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return found

    def next(self) -> Block:
        """Return the patches of the next plane; raise RuntimeError where none comes."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and any(process.is_alive() for process in self._processes):
            try:
                return self._queue.get(timeout=WATCH_S)
            except queue.Empty:
                continue
        raise RuntimeError(f"no plane from {len(self._processes)} workers within {PATIENCE_S:g} s")

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(5.0)


def _work(
    out: multiprocessing.Queue[Block],
    heads: list[Head],
    seed: tuple[int, ...],
    simulated: SimulatedHeads | None,
    parent: int,
) -> None:
    os.nice(5)
    planes = Planes(heads, seed, simulated)
    while os.getppid() == parent:
        block = planes.next()
        while os.getppid() == parent:
            try:
                out.put(block, timeout=WATCH_S)
                break
            except queue.Full:
                continue
    os._exit(0)  # not waiting for a queue that nobody reads any more


class Pool:
    """The last `size` patches, on the device that learns from them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device, self._size = device, size
        self._images = torch.zeros((size, 2, PATCH, PATCH), dtype=torch.float16, device=device)
        self._phases = torch.zeros((size, 2, PATCH), dtype=torch.float16, device=device)
        self._about = torch.zeros((size, 3), dtype=torch.float32, device=device)
        self._n_put = 0

    def __len__(self) -> int:
        return min(self._n_put, self._size)

    def put(self, blocks: list[Block]) -> None:
        """Keep the patches of `blocks` in place of the oldest."""
        if not blocks:
            return
        parts = [self._sent(np.concatenate(part)[-self._size :]) for part in zip(*blocks, strict=True)]
        n = len(parts[0])
        places = (torch.arange(n, device=self._device) + self._n_put) % self._size
        for kept, new in zip((self._images, self._phases, self._about), parts, strict=True):
            kept[places] = new
        self._n_put += n

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return placed images (n, 1, y, x), phases (n, 2, y, x), noise (n, 1, 1, 1), targets (n, 1, y, x) and the mean
        square (n,) of what their planes miss; every second patch transposed where both axes are alike.
        """
        chosen = torch.randint(len(self), (n,), device=self._device)
        images, about = self._images[chosen].float(), self._about[chosen]
        down, across = self._phases[chosen].float().unbind(1)
        phases = torch.stack(
            (down[:, :, None].expand(-1, -1, PATCH), across[:, None, :].expand(-1, PATCH, -1)),
            1,
        )
        turn = ((torch.rand(n, device=self._device) < 0.5) & (about[:, 2] > 0.5))[:, None, None, None]
        images = torch.where(turn, images.mT, images)
        phases = torch.where(turn, phases.flip(1).mT, phases)
        return images[:, :1], phases, about[:, 0, None, None, None], images[:, 1:], about[:, 1]

    def _sent(self, part: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(part))
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)
