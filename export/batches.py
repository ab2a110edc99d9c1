"""What a step of training learns from: batches of simulated scans, drawn here or by other processes.

Simulating takes a core as long as learning. On a CPU every second batch is an earlier one again; a GPU is fed by
processes that do nothing but simulate (`Pool`), and goes back to earlier batches while it waits for them.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from export.simulated import Draw, draw_sample
from export.slices import Slice
from export.validation import join, to_tensors
from recon.arrays import Array

KEPT = 64  # batches that may be learned from again, where none are simulated meanwhile
POOL_BYTES = {"cuda": 6 << 30, "cpu": 1 << 30}
SAMPLE_BYTES, SHARED_BYTES = 4 << 20, 8 << 20  # more than a sample, and what a batch shares, can be
PATIENCE_S = 1.0  # between two looks whether anyone still waits for batches
EARLY = Draw(sizes=(96, 104, 112, 120, 128, 144, 160, 168), n_columns=48)  # small samples teach much a second
BY_VOXEL = (0, 1, 3, 4, 8)  # inputs whose last axis is x; see `recon.unrolled.INPUTS`

Batch = tuple[list[Tensor], Tensor]  # inputs and target


@dataclass(frozen=True)
class Source:
    """Slices to simulate scans of, `n` a batch, and the seed of all of it."""

    slices: list[Slice]
    n: int
    seed: int

    def draw(self, number: int, who: int, is_early: bool, common: np.random.Generator) -> list[Any]:
        """Return the samples of batch `number` of process `who`: one size and one mask, `common` draws the size."""
        draw = EARLY if is_early else Draw()
        sizes = int(common.choice(draw.sizes)), int(common.choice(draw.sizes))
        draw = replace(draw, coils=(int(common.choice(draw.coils)),))
        own = np.random.default_rng([self.seed, number, 1 + who])
        share = np.array([each.weight for each in self.slices])
        chosen = own.choice(len(self.slices), self.n, p=share / share.sum())
        mask = [self.seed, number, 0]
        return [draw_sample(own, self.slices[index], draw, sizes, np.random.default_rng(mask)) for index in chosen]


class Batches:
    """The batches of one process. Every process has the same sizes and coils at a step, so that none waits long."""

    def __init__(self, source: Source, rank: int, device: torch.device) -> None:
        self._source, self._rank, self._device = source, rank, device
        self._kept: deque[Batch] = deque(maxlen=KEPT)
        self.n_simulated = 0

    def draw(self, step: int, is_early: bool) -> Batch:
        """Return inputs and target of one step."""
        common = np.random.default_rng([self._source.seed, step])
        if step % 2 and self._kept:
            return varied(self._kept[int(common.integers(len(self._kept)))], common)
        batch = to_tensors(self._source.draw(step, self._rank, is_early, common), self._device)
        self.n_simulated += 1
        self._kept.append(batch)
        return batch

    def close(self) -> None:
        """There is nothing to end."""


class Pool:
    """Batches that other processes simulate, kept on the device; a new one is learned from first.

    The processes are forked, so they share the slices and must be started before anything is asked of a GPU. Each
    writes into memory that it shares with this process, and ends when this process does.
    """

    def __init__(self, source: Source, n_workers: int, first: int, is_early: bool) -> None:
        """Start the workers; their batches are numbered from `first` on."""
        self._rng = np.random.default_rng([source.seed, first])
        self._workers: dict[Connection, tuple[mmap.mmap, Any]] = {}
        self._new: deque[Batch] = deque()
        self._kept: deque[Batch] = deque()
        self._n_bytes = 0
        self._is_early = is_early
        self._device = torch.device("cpu")
        self.n_simulated = 0
        context = multiprocessing.get_context("fork")
        sys.stdout.flush()
        for who in range(n_workers):
            ours, theirs = context.Pipe()
            memory = mmap.mmap(-1, source.n * SAMPLE_BYTES + SHARED_BYTES)
            words = (theirs, memory, source, (who, n_workers, first), is_early, os.getpid())
            process = context.Process(target=_work, args=words, daemon=True)
            with warnings.catch_warnings():  # about threads that hold locks: what is forked here computes with NumPy
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            ours.send(is_early)
            self._workers[ours] = (memory, process)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def n_workers(self) -> int:
        """How many still work."""
        return len(self._workers)

    def fill(self, n: int, device: torch.device) -> None:
        """Wait for the first `n` batches, which come to `device` as all others will."""
        self._device = device
        while len(self._kept) < n:
            self._gather(None)

    def draw(self, step: int, is_early: bool) -> Batch:
        """Return inputs and target of one step: what just came, or what came earlier, seen differently."""
        self._is_early = is_early
        self._gather(0.0)
        if self._new:
            return self._new.popleft()
        return varied(self._kept[int(self._rng.integers(len(self._kept)))], self._rng)

    def close(self) -> None:
        """End the workers."""
        for connection, (_, process) in self._workers.items():
            process.terminate()
            process.join()
            connection.close()
        self._workers.clear()

    def _gather(self, timeout: float | None) -> None:
        """Take what is ready; wait for something where `timeout` is None.

        Raises RuntimeError where something must come and no worker is left.
        """
        if timeout is None and not self._workers:
            raise RuntimeError("all processes that simulate scans have ended; nothing is left to learn from")
        for connection in wait(list(self._workers), timeout) if self._workers else []:
            assert isinstance(connection, Connection)
            memory, process = self._workers[connection]
            try:
                layout = connection.recv()
                batch = _read(memory, layout, self._device)
                connection.send(self._is_early)
            except (EOFError, OSError):
                process.join()
                print(f'{{"worker_ended": {process.exitcode}, "left": {len(self._workers) - 1}}}', flush=True)
                del self._workers[connection]
                continue
            self._add(batch)

    def _add(self, batch: Batch) -> None:
        self.n_simulated += 1
        self._new.append(batch)
        self._kept.append(batch)
        self._n_bytes += _size(batch)
        while self._n_bytes > POOL_BYTES[self._device.type] and len(self._kept) > 1:
            self._n_bytes -= _size(self._kept.popleft())
        while len(self._new) > max(self.n_workers, 1):  # a slow learner sees the latest ones
            self._new.popleft()


def _work(
    connection: Connection, memory: mmap.mmap, source: Source, place: tuple[int, int, int], is_early: bool, parent: int
) -> None:
    """Simulate batches until no one takes them any more.

    place: number of this worker, of all workers, and of the first batch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    who, n_workers, first = place
    with threadpool_limits(1, user_api="blas"), suppress(EOFError, OSError):
        for number in count(first + who, n_workers):
            common = np.random.default_rng([source.seed, number])
            arrays = join(source.draw(number, who, is_early, common))
            while not connection.poll(PATIENCE_S):
                if os.getppid() != parent:
                    return
            is_early = connection.recv()
            connection.send(_write(memory, arrays))


def _write(memory: mmap.mmap, arrays: Sequence[Array]) -> list[tuple[int, ...]]:
    """Copy float32 arrays one behind the other; return their shapes."""
    start = 0
    for array in arrays:
        if start + array.nbytes > len(memory):
            raise ValueError(f"a batch of {sum(a.nbytes for a in arrays)} bytes; there is room for {len(memory)}")
        np.frombuffer(memory, np.float32, array.size, start).reshape(array.shape)[...] = array
        start += array.nbytes
    return [array.shape for array in arrays]


def _read(memory: mmap.mmap, shapes: list[tuple[int, ...]], device: torch.device) -> Batch:
    """Return copies of what `_write` left, on `device`."""
    tensors, start = [], 0
    for shape in shapes:
        view = np.frombuffer(memory, np.float32, math.prod(shape), start).reshape(shape)
        tensors.append(torch.from_numpy(view).to(device, copy=True))
        start += view.nbytes
    return tensors[:-1], tensors[-1]


def _size(batch: Batch) -> int:
    return sum(each.numel() * each.element_size() for each in (*batch[0], batch[1]))


def varied(batch: Batch, rng: np.random.Generator) -> Batch:
    """Return a batch with another phase and, half of the time, mirrored along the readout."""
    inputs, target = batch
    angle = float(rng.uniform(0, 2 * math.pi))
    inputs = [*(_rotated(image, angle) for image in inputs[:2]), *inputs[2:]]
    target = _rotated(target, angle)
    return mirrored(inputs, target) if rng.random() < 0.5 else (inputs, target)


def mirrored(inputs: list[Tensor], target: Tensor) -> Batch:
    """Return scans mirrored along x, along which nothing is encoded: a scan that might have been."""
    inputs = [each.flip(-1) if index in BY_VOXEL else each for index, each in enumerate(inputs)]
    aliases = inputs[2]
    by_column = aliases.reshape(*aliases.shape[:4], -1, target.shape[-1])
    inputs[2] = by_column.flip(-1).reshape(aliases.shape)
    return inputs, target.flip(-1)


def _rotated(image: Tensor, angle: float) -> Tensor:
    """Return (slice, 2, y, x) times exp(i angle)."""
    real, imag = image[:, 0], image[:, 1]
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack((c * real - s * imag, s * real + c * imag), 1)
