"""Examples drawn by other processes, and a store of them that is learned from many times, changed each time.

The processes are forked before anything touches a GPU and share the planes; they end with the one that started them.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from export.triage_pool import MIN_AREA, Pool
from export.triage_recipes import Recipe
from recon.arrays import Array
from triage.preprocess import MAX_LEVEL

Batch = tuple[Tensor, Tensor, Tensor]
Drawn = tuple[Array, Array, Array]

CHUNK = 16  # examples that are handed over together
WAITING = 4  # chunks a process that may wait to be taken
PATIENCE_S = 300.0  # for the first examples
AGAIN_S = 60.0  # seconds between looks for new planes


def draw_examples(rng: np.random.Generator, recipe: Recipe, pool: Pool, n: int) -> Drawn:
    """Return float32 planes (n, y, x), bool masks (n, y, x) and whether a finding is present (n,).

    Present is 1 or 0, and -1 where the finding is too small to be asked for.
    """
    examples = [recipe.draw(rng, pool) for _ in range(n)]
    present = [-1.0 if 0 < each.mask.sum() < MIN_AREA else float(each.mask.any()) for each in examples]
    images = np.stack([each.image for each in examples]).astype(np.float32)
    return images, np.stack([each.mask for each in examples]), np.array(present, np.float32)


class Workers:
    """Processes that draw examples, started at once."""

    def __init__(self, n: int, seed: int, recipe: Recipe, pool: Pool) -> None:
        context = multiprocessing.get_context("fork")
        self._queue: Any = context.Queue(WAITING * n)
        arguments = (self._queue, recipe, pool, os.getpid())
        self._processes = [
            context.Process(target=_keep_drawing, args=(seed, number, *arguments), daemon=True) for number in range(n)
        ]
        for each in self._processes:
            each.start()

    def take(self, is_waited_for: bool) -> Drawn | None:
        """Return examples, None where there are none yet and they are not waited for.

        Raises RuntimeError where no process is left, or nothing comes.
        """
        for _ in range(int(PATIENCE_S)):
            try:
                found: Drawn = self._queue.get(timeout=1.0) if is_waited_for else self._queue.get_nowait()
            except queue.Empty:
                if not any(each.is_alive() for each in self._processes):
                    raise RuntimeError("no process is left that draws examples") from None
                if not is_waited_for:
                    return None
            else:
                return found
        raise RuntimeError(f"no examples came in {PATIENCE_S:.0f} s")

    def close(self) -> None:
        """End the processes."""
        for each in self._processes:
            each.kill()
            each.join()


def _keep_drawing(seed: int, number: int, examples: Any, recipe: Recipe, pool: Pool, parent: int) -> None:
    """Draw examples until the parent has gone."""
    rng = np.random.default_rng([seed, number + 1])
    looked = time.monotonic()
    while True:
        images, masks, present = draw_examples(rng, recipe, pool, CHUNK)
        chunk = (images.astype(np.float16), masks, present)
        while True:
            if os.getppid() != parent:
                os._exit(0)
            try:
                examples.put(chunk, timeout=5.0)
                break
            except queue.Full:
                continue
        if time.monotonic() - looked > AGAIN_S:
            pool.look_again()
            looked = time.monotonic()


class Store:
    """The newest examples that were drawn, on the device; batches of them, each changed anew."""

    def __init__(self, workers: Workers, n: int, first: int, device: torch.device) -> None:
        """Wait for the `first` examples of `n` that there is room for."""
        self._workers, self._n, self._device = workers, n, device
        self.n_drawn = 0
        self._images: Tensor | None = None
        while self.n_drawn < first:
            self._add(True)

    def _add(self, is_waited_for: bool) -> bool:
        """Put examples in place of the oldest; return whether there were any."""
        drawn = self._workers.take(is_waited_for)
        if drawn is None:
            return False
        images, masks, present = drawn
        if self._images is None:
            shape = (self._n, 1, *images.shape[1:])
            self._images = torch.zeros(shape, dtype=torch.float16, device=self._device)
            self._masks = torch.zeros(shape, dtype=torch.uint8, device=self._device)
            self._present = torch.zeros(self._n, dtype=torch.float32, device=self._device)
        where = (self.n_drawn + torch.arange(len(images), device=self._device)) % self._n
        self._images[where] = self._carried(images[:, None])
        self._masks[where] = self._carried(masks[:, None].astype(np.uint8))
        self._present[where] = self._carried(present)
        self.n_drawn += len(images)
        return True

    def _carried(self, values: Array) -> Tensor:
        """Return values on the device; nothing waits for the copy to a GPU."""
        found = torch.from_numpy(values)
        if self._device.type == "cuda":
            found = found.pin_memory()
        return found.to(self._device, non_blocking=True)

    def batch(self, n: int) -> Batch:
        """Return planes (n, 2, y, x), masks (n, 1, y, x) and whether a finding is present (n,), any of the store."""
        for _ in range(2 * WAITING):
            if not self._add(False):
                break
        assert self._images is not None
        chosen = torch.randint(min(self.n_drawn, self._n), (n,), device=self._device)
        images, masks = changed(self._images[chosen].float(), self._masks[chosen].float())
        planes = torch.cat((images, images.flip(3)), 1).contiguous(memory_format=torch.channels_last)
        return planes, masks, self._present[chosen]


def changed(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return planes and masks, float32 (n, 1, y, x), moved a little, in other light, with noise, half of them mirrored.

    They were drawn with all that scanners and heads do; this keeps one that comes again from being learned by heart.
    """
    n, device = len(images), images.device
    height, width = images.shape[2:]

    def normal() -> Tensor:
        return torch.randn(n, device=device)

    def some(share: float) -> Tensor:
        return (torch.rand(n, device=device) < share).float()

    moved = some(0.6)
    angle, scale = 0.06 * normal() * moved, torch.exp(0.05 * normal() * moved)
    c, s = torch.cos(angle) * scale, torch.sin(angle) * scale
    right, down = 2 / width * 1.5 * normal() * moved, 2 / height * 4 * normal() * moved
    rows = [torch.stack((c, -s * height / width, right), 1), torch.stack((s * width / height, c, down), 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, align_corners=False)
    masks = (functional.grid_sample(masks, grid, align_corners=False) > 0.5).float()
    is_mirrored = some(0.5).bool()[:, None, None, None]
    images = torch.where(is_mirrored, images.flip(3), images)
    masks = torch.where(is_mirrored, masks.flip(3), masks)
    power = torch.exp(0.12 * normal() * some(0.6))[:, None, None, None]
    light = torch.exp(0.06 * normal())[:, None, None, None]
    noise = (0.05 * torch.rand(n, device=device) ** 2 * some(0.4))[:, None, None, None]
    images = images.clamp_min(0) ** power * light
    images = (images + noise * torch.randn_like(images)).abs().clamp_max(MAX_LEVEL)
    return images, masks
