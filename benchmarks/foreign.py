"""Images that triage must not assess: noise, phantoms, other parts of the body, and spoiled brains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from recon.scan import Geometry, Provenance, Volume

SHAPE = (10, 160, 160)
STEP_MM = 1.4


def foreign(rng: np.random.Generator) -> Iterator[tuple[str, Volume]]:
    """Yield volumes in which no head is."""
    y, x = (((np.arange(n) - n // 2) * STEP_MM) for n in SHAPE[1:])
    z = (np.arange(SHAPE[0]) - (SHAPE[0] - 1) / 2) * 6.0
    grid = (z[:, None, None], y[None, :, None], x[None, None])
    white = np.abs(rng.standard_normal(SHAPE) + 1j * rng.standard_normal(SHAPE))
    yield "noise", _volume(white)
    yield "smooth noise", _volume(np.abs(ndimage.gaussian_filter(rng.standard_normal(SHAPE), (0, 4, 4))))
    yield "nothing", _volume(np.zeros(SHAPE))
    yield "one value", _volume(np.ones(SHAPE))
    board = ((np.arange(SHAPE[1])[:, None] // 8 + np.arange(SHAPE[2]) // 8) % 2).astype(float)
    yield "chequers", _volume(np.broadcast_to(board, SHAPE))
    yield "ball phantom", _noisy(_ellipse(grid, (0, 0, 0), (85, 85, 85)), rng)
    bottle = _ellipse(grid, (0, 0, 0), (1e3, 90, 70)) * 0.8
    for k in range(5):
        bottle += 0.6 * _ellipse(grid, (0, -40 + 20 * k, -30 + 14 * k), (1e3, 4 + k, 4 + k))
    yield "bottle phantom with inserts", _noisy(bottle, rng)
    yield (
        "bars phantom",
        _noisy(bottle * (1 - 0.8 * (np.sin(x / 3)[None, None] > 0) * (np.abs(y) < 30)[None, :, None]), rng),
    )
    knee = 0.35 * _ellipse(grid, (0, 0, 0), (1e3, 78, 70)) + 0.65 * _ellipse(grid, (0, -15, 0), (1e3, 30, 36))
    knee += 0.3 * _ellipse(grid, (0, 30, 22), (1e3, 16, 14)) - 0.3 * _ellipse(grid, (0, 35, -20), (1e3, 12, 22))
    yield "knee", _textured(knee, rng)
    belly = 0.3 * _ellipse(grid, (0, 0, 0), (1e3, 95, 108)) + 0.5 * _ellipse(grid, (0, -10, -45), (1e3, 55, 50))
    belly += 0.5 * _ellipse(grid, (0, 10, 60), (1e3, 26, 22)) + 0.7 * _ellipse(grid, (0, 58, 0), (1e3, 18, 22))
    belly -= 0.25 * _ellipse(grid, (0, -45, 20), (1e3, 25, 38))
    yield "abdomen", _textured(belly, rng)
    chest = 0.5 * _ellipse(grid, (0, 0, 0), (1e3, 85, 108))
    for side in (-1, 1):
        chest -= 0.48 * _ellipse(grid, (0, -5, 50 * side), (1e3, 58, 36))
    yield "chest", _textured(chest + 0.5 * _ellipse(grid, (0, -20, 12), (1e3, 34, 30)), rng)
    neck = 0.4 * _ellipse(grid, (0, 0, 0), (1e3, 62, 58)) + 0.4 * _ellipse(grid, (0, 22, 0), (1e3, 20, 22))
    neck -= 0.35 * _ellipse(grid, (0, -26, 0), (1e3, 9, 11))
    yield "neck", _textured(neck, rng)
    thighs = sum(
        0.7 * _ellipse(grid, (0, 0, 55 * s), (1e3, 62, 48)) - 0.5 * _ellipse(grid, (0, 0, 52 * s), (1e3, 12, 12))
        for s in (-1, 1)
    )
    yield "thighs", _textured(thighs, rng)


def spoiled(head: Volume, rng: np.random.Generator) -> Iterator[tuple[str, Volume]]:
    """Yield a head as it should not be read: drowned in noise, ghosted, moved, cut, turned or torn."""
    data = head.data.astype(np.float64)
    tissue = float(np.median(data[data > 0.15 * np.percentile(data, 99)]))
    for name, level in (("noise at SNR 1.5", 1.5), ("noise at SNR 1", 1.0)):
        noise = rng.standard_normal((2, *data.shape)) * tissue / level
        yield name, _with(head, np.abs(data + noise[0] + 1j * noise[1]))
    yield "ghost of 70 %", _with(head, data + 0.7 * np.roll(data, data.shape[1] // 2, axis=1))
    yield "three ghosts", _with(head, sum(0.6 * np.roll(data, k * data.shape[1] // 4, axis=1) for k in range(4)))
    lines = np.fft.fft(data, axis=1)
    shake = np.exp(2j * np.pi * np.fft.fftfreq(data.shape[1])[:, None] * rng.normal(0, 7, (data.shape[1], 1)))
    yield "moving all the time", _with(head, np.abs(np.fft.ifft(lines * shake, axis=1)))
    spike = np.fft.fft2(data)
    spike[:, data.shape[1] // 9, data.shape[2] // 7] += 0.5 * np.abs(spike).max(axis=(1, 2))
    yield "a spark in every slice", _with(head, np.abs(np.fft.ifft2(spike)))
    half = data.copy()
    half[:, data.shape[1] // 2 :] = 0
    yield "the back half missing", _with(head, half)
    side = data.copy()
    side[:, :, : data.shape[2] // 2] = 0
    yield "one side missing", _with(head, side)
    yield "front to back", _with(head, data[:, ::-1])
    yield "clipped", _with(head, np.minimum(data, 0.6 * tissue))
    yield "inverted", _with(head, np.where(data > 0.1 * tissue, np.maximum(2.2 * tissue - data, 0), 0))
    yield "wrapped", _with(head, data + np.roll(data, data.shape[2] // 2, axis=2))
    yield (
        "blurred by 8 mm",
        _with(head, ndimage.gaussian_filter(data, (0, *(8 / mm for mm in head.geometry.spacing_mm[1:])))),
    )
    yield "half its size", _scaled(head, 0.5)
    yield "twice its size", _scaled(head, 2.0)


def spoiled_otherwise(head: Volume, rng: np.random.Generator) -> Iterator[tuple[str, Volume]]:
    """Yield a head spoiled in ways that no part of the gate was made with in view; its limits are of clean heads."""
    data = head.data.astype(np.float64)
    n_y, n_x = data.shape[1:]
    tissue = float(np.median(data[data > 0.15 * np.percentile(data, 99)]))
    yield "ghost of 35 % at a third, across", _with(head, data + 0.35 * np.roll(data, n_x // 3, axis=2))
    yield "ghost of 25 % at half", _with(head, data + 0.25 * np.roll(data, n_y // 2, axis=1))
    yield "five ghosts", _with(head, sum(0.4 * np.roll(data, k * n_y // 5, axis=1) for k in range(5)))
    spectrum = np.fft.fft2(data)
    for _ in range(3):
        y, x = (int(rng.integers(n // 12, n // 5)) for n in (n_y, n_x))
        spectrum[:, y, x] += 0.25 * np.abs(spectrum).max(axis=(1, 2))
    yield "three sparks", _with(head, np.abs(np.fft.ifft2(spectrum)))
    yield "half turned round", _with(head, data[:, ::-1, ::-1])
    yield "a quarter turned", _with(head, np.rot90(data, 1, (1, 2))) if n_y == n_x else _with(head, data[:, ::-1])
    yield "clipped at the median", _with(head, np.minimum(data, tissue))
    yield "two levels", _with(head, np.where(data > 0.5 * tissue, tissue, 0.0))
    order = rng.permutation(n_y)
    order[n_y // 4 :] = np.sort(order[n_y // 4 :])
    yield "lines in disorder", _with(head, data[:, order])
    yield "every other line lost", _with(head, np.where(np.arange(n_y)[:, None] % 2, data, 0.0))
    other = np.flip(data, 0)
    yield "two heads at once", _with(head, 0.5 * data + 0.5 * np.roll(other, (n_y // 6, n_x // 8), axis=(1, 2)))


def _volume(data: Array) -> Volume:
    n_slices, ny, nx = data.shape
    centres = ((np.arange(n_slices) - (n_slices - 1) / 2) * 6.0)[:, None] * np.array([0.0, 0, 1])
    geometry = Geometry.from_centres(centres, (1, 0, 0), (0, 1, 0), (ny, nx), (6.0, STEP_MM, STEP_MM), 5.0)
    return Volume(np.ascontiguousarray(data, np.float32), geometry, Provenance("unknown", "benchmark"))


def _with(head: Volume, data: Array) -> Volume:
    return replace(head, data=np.asarray(data, np.float32))


def _scaled(head: Volume, factor: float) -> Volume:
    g = head.geometry
    spacing = (g.spacing_mm[0], g.spacing_mm[1] * factor, g.spacing_mm[2] * factor)
    return replace(head, geometry=replace(g, spacing_mm=spacing))


def _ellipse(grid: tuple[Array, Array, Array], centre: tuple[float, ...], semi: tuple[float, ...]) -> Array:
    square = sum(((axis - c) / s) ** 2 for axis, c, s in zip(grid, centre, semi, strict=True))
    return np.asarray(square <= 1, float) * np.ones(SHAPE)


def _noisy(data: Array, rng: np.random.Generator) -> Volume:
    smooth = ndimage.gaussian_filter(data, (0, 0.8, 0.8))
    noise = 0.02 * rng.standard_normal((2, *data.shape))
    return _volume(np.abs(smooth + noise[0] + 1j * noise[1]))


def _textured(data: Array, rng: np.random.Generator) -> Volume:
    grain = 1 + 0.12 * ndimage.gaussian_filter(rng.standard_normal(data.shape), (0, 1.5, 1.5)) * 4
    return _noisy(np.maximum(data, 0) * grain, rng)
