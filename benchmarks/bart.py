"""BART as a peer: its coil maps and its regularised SENSE, at the strength that is best against the reference."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from recon.arrays import Array

L2 = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.05, 0.1)
WAVELET = (0.0005, 0.001, 0.003, 0.01, 0.02, 0.03)
WAVELET_ITERATIONS = 60


def write_cfl(path: Path, array: Array) -> None:
    """Write complex64 `array` as BART's pair of files, first axis fastest."""
    array = np.asarray(array, np.complex64)
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, array.shape)) + "\n")
    array.ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> Array:
    """Read BART's pair of files; axes of length 1 are dropped."""
    shape = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()]
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(shape, order="F").squeeze()


def bart(*words: object) -> float:
    """Run one BART command and return its seconds; raises RuntimeError with BART's words."""
    start = time.perf_counter()
    done = subprocess.run(["bart", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bart {words[0]}: {done.stderr or done.stdout}")
    return time.perf_counter() - start


def centred(image: Array) -> Array:
    """Return BART's image (y, x) with its centre at n // 2: along an odd axis BART puts it one voxel further."""
    return np.roll(image, [-(n % 2) for n in image.shape], axis=(0, 1))


def best_sense(
    kspace: Array, acs: int, score: Callable[[Array], float], strengths: Sequence[float] = L2
) -> tuple[Array, float, float]:
    """Return the volume float32 (slice, y, x), the strength and the seconds of BART's best l2-regularised SENSE.

    kspace: complex (slice, coil, ky, kx), unmeasured lines zero. score: higher is better; picks the strength, which no
    one without a reference could.
    """
    return _best(kspace, acs, score, {strength: ("-l2", "-r", strength) for strength in strengths})


def best_wavelet(
    kspace: Array, acs: int, score: Callable[[Array], float], strengths: Sequence[float] = WAVELET
) -> tuple[Array, float, float]:
    """Return what `best_sense` returns, of BART's l1-wavelet-regularised SENSE."""
    ways = {s: ("-R", f"W:3:0:{s:g}", "-i", WAVELET_ITERATIONS) for s in strengths}  # 3: along y and x
    return _best(kspace, acs, score, ways)


def _best(
    kspace: Array, acs: int, score: Callable[[Array], float], ways: Mapping[float, tuple[object, ...]]
) -> tuple[Array, float, float]:
    """Return volume, strength and seconds of the best of `ways`, a strength's words of regularisation for `pics`."""
    volumes: dict[float, list[Array]] = {strength: [] for strength in ways}
    seconds = dict.fromkeys(ways, 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for plane in kspace:
            write_cfl(folder / "k", np.moveaxis(plane, 0, -1)[:, :, None, :])
            maps_s = bart("ecalib", "-m1", "-r", acs, folder / "k", folder / "s")
            for strength, words in ways.items():
                seconds[strength] += maps_s + bart("pics", "-S", *words, folder / "k", folder / "s", folder / "o")
                volumes[strength].append(centred(np.abs(read_cfl(folder / "o"))))
    stacked = {strength: np.stack(planes).astype(np.float32) for strength, planes in volumes.items()}
    best = max(stacked, key=lambda strength: score(stacked[strength]))
    return stacked[best], best, seconds[best]
