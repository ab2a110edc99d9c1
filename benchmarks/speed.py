"""How fast is one slice, from calibration lines to image, next to BART and SigPy? Part of `python -m benchmarks.peers`.

320×320, 8 virtual coils, R = 4 with 24 calibration lines, side by side in turns in one run; medians. Ours run from
arrays in memory as the daemon's worker does; BART's time is that of its two commands, which read and write files and
start in about 3 ms; SigPy's is its two apps from memory. All use both cores. The classical image, which is made for
every scan anyway and from which the network starts, is counted on a row of its own and in "all of it".
The error is the NRMSE against the phantom's truth inside the head, after one least-squares scale, of the image that was
timed; coil maps alone give none, and the network alone is scored without the step that puts the measured lines back.
Debian's `ismrmrd_recon_cartesian_2d` knows no acceleration: it gets all lines of the same phantom, in a file.
Peak memory is what a second run adds for a while to a process that holds its inputs and libraries; for BART and
Debian's program, whose processes last for one command, it is all of the larger command's.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.progress import Progress
from threadpoolctl import threadpool_limits

from benchmarks.bart import bart, centred, read_cfl, write_cfl
from benchmarks.cases import write_scan
from benchmarks.coil_maps import phantom, undersample
from benchmarks.ours import shipped_network
from benchmarks.scores import compare
from edge.model import MODEL, RECONSTRUCTION
from recon.arrays import Array
from recon.coils import estimate_maps
from recon.fourier import resize_centred, to_image
from recon.scan import KSpace
from recon.sense import cg_sense
from recon.unrolled import INPUTS, prepare, reconstruct_unrolled

ACS = 24
BART_ITERATIONS = SIGPY_ITERATIONS = 50
SLOW = {"SigPy": 2}  # repeats, where that is less than asked for
MAPS_NETWORK, ALL, BART, SIGPY = "maps + network", "all of it", "BART ecalib + pics l1-wavelet", "SigPy"
RUNTIME, EAGER = "network alone, as shipped", "network alone, PyTorch eager"
ISMRMRD = "ismrmrd_recon_cartesian_2d, all lines"
_SNR = 40.0
_MEASURE = """import os, sys
out = os.open(os.devnull, os.O_WRONLY)
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out, 1)])
print(os.wait4(pid, 0)[2].ru_maxrss)"""


def measure_speed(progress: Progress, matrix: int = 320, n_coils: int = 8, repeats: int = 7) -> dict[str, Any]:
    """Return median milliseconds, error and peak memory of each contender, and the ratios of their medians to ours."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = contenders(matrix, n_coils, folder)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        errors = {way: _error(way, run(), folder, matrix, n_coils) for way, run in ways.items()}  # warm-up as well
        for number in progress.track(range(repeats), description="speed"):
            for way, run in ways.items():
                if number < SLOW.get(way, repeats):
                    start = time.perf_counter()
                    run()
                    seconds[way].append(time.perf_counter() - start)
        memory = {way: _peak_mib(way, matrix, n_coils, folder) for way in ways}
    medians = {way: float(np.median(times)) for way, times in seconds.items()}
    rows = [
        {
            "method": way,
            "median_ms": round(1e3 * medians[way], 1),
            "least_ms": round(1e3 * min(seconds[way]), 1),
            "repeats": len(seconds[way]),
            "peak_mib": memory[way],
            "nrmse": errors[way],
            "samples_ms": [round(1e3 * s, 3) for s in seconds[way]],
        }
        for way in ways
    ]
    pairs = {"BART / maps + network": (BART, MAPS_NETWORK), "BART / all of it": (BART, ALL)}
    pairs |= {"SigPy / maps + network": (SIGPY, MAPS_NETWORK), "SigPy / all of it": (SIGPY, ALL)}
    pairs["PyTorch eager / as shipped"] = (EAGER, RUNTIME)
    ratios = {name: round(medians[a] / medians[b], 2) for name, (a, b) in pairs.items() if a in medians}
    return {"matrix": matrix, "virtual_coils": n_coils, "acceleration": 4, "acs": ACS, "rows": rows, "ratios": ratios}


def contenders(matrix: int, n_coils: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Return the ways to an image of one slice, each ready to run."""
    threadpool_limits(limits=1, user_api="blas")  # as the daemon's worker runs; its own threads work side by side
    network = shipped_network()
    assert network is not None, "the package comes without its network"
    kspace = undersample(phantom(matrix, n_coils, _SNR), 4, ACS)
    assert kspace.calibration is not None
    maps = estimate_maps(kspace.calibration, matrix)
    classical = cg_sense(kspace, maps)
    inputs = prepare(kspace, maps, classical).inputs
    lines = _lines(kspace)
    write_cfl(folder / "k", np.moveaxis(lines, 0, -1)[:, :, None])

    def maps_network() -> object:
        return reconstruct_unrolled(network, kspace, estimate_maps(kspace.calibration, matrix), classical)

    def everything() -> object:
        found = estimate_maps(kspace.calibration, matrix)
        return reconstruct_unrolled(network, kspace, found, cg_sense(kspace, found))

    def run_bart() -> object:
        bart("ecalib", "-m1", "-r", ACS, folder / "k", folder / "s")
        return bart("pics", "-S", "-R", "W:3:0:0.001", "-i", BART_ITERATIONS, folder / "k", folder / "s", folder / "o")

    def run_sigpy() -> object:
        from sigpy.mri.app import EspiritCalib, L1WaveletRecon

        with warnings.catch_warnings(), threadpool_limits(limits=os.cpu_count(), user_api="blas"):
            warnings.simplefilter("ignore")  # of SigPy's own making
            found = EspiritCalib(lines, calib_width=ACS, show_pbar=False).run()
            return L1WaveletRecon(lines, found, 0.001, max_iter=SIGPY_ITERATIONS, show_pbar=False).run()

    ways: dict[str, Callable[[], object]] = {
        "maps": lambda: estimate_maps(kspace.calibration, matrix),
        "classical": lambda: cg_sense(kspace, maps),
        MAPS_NETWORK: maps_network,
        ALL: everything,
        BART: run_bart,
        SIGPY: run_sigpy,
        RUNTIME: lambda: network.run(inputs),
    }
    if find_spec("torch") is not None:
        ways[EAGER] = _eager(inputs)
    if shutil.which("ismrmrd_recon_cartesian_2d"):
        ways[ISMRMRD] = _ismrmrd(matrix, n_coils, folder / "all_lines.h5")
    return ways


def _ismrmrd(matrix: int, n_coils: int, path: Path) -> Callable[[], object]:
    """Return Debian's reconstruction of all lines, which reads `path` and adds an image to it."""
    write_scan(path, to_image(phantom(matrix, n_coils, _SNR).lines, (1, 2)))

    def run() -> object:
        return subprocess.run(["ismrmrd_recon_cartesian_2d", path], check=True, capture_output=True)

    return run


def _error(way: str, result: Any, folder: Path, matrix: int, n_coils: int) -> float | None:
    """Return the NRMSE of what a contender returned or wrote, None where that is no image."""
    if way == "maps":
        return None
    image: Array
    if way == BART:
        image = centred(np.abs(read_cfl(folder / "o")))
    elif way == ISMRMRD:
        with h5py.File(folder / "all_lines.h5", locking=False) as file:
            image = np.asarray(file["dataset/cpp/data"][-1], np.float32).reshape(matrix, matrix)
    elif way in (RUNTIME, EAGER):  # padded, real and imaginary part
        pairs = np.asarray(result["image"] if way == RUNTIME else result)[0]
        image = resize_centred(resize_centred(np.hypot(pairs[0], pairs[1]), 0, matrix), 1, matrix)
    else:
        image = np.abs(result).reshape(matrix, matrix)
    truth = phantom(matrix, n_coils, _SNR).truth
    return round(math.sqrt(compare(truth[None], image[None]).nmse), 5)


def _eager(inputs: dict[str, Any]) -> Callable[[], object]:
    """Return the shipped weights in PyTorch, without a graph."""
    import torch

    from export.shipped import load_onnx

    network = load_onnx(RECONSTRUCTION / MODEL)
    tensors = [torch.from_numpy(inputs[name]) for name in INPUTS]

    def run() -> object:
        with torch.no_grad():
            return network(*tensors)

    return run


def _lines(kspace: KSpace) -> Any:
    """Return k-space (coil, ky, kx) of the one slice."""
    from recon.fourier import to_kspace

    return np.ascontiguousarray(to_kspace(kspace.samples[0], (2,)))


def _peak_mib(way: str, matrix: int, n_coils: int, folder: Path) -> int | None:
    """Return the peak memory of one run, MiB."""
    if way == ISMRMRD:
        return _command_mib(["ismrmrd_recon_cartesian_2d", str(folder / "all_lines.h5")])
    if way == BART:
        commands = (
            ("ecalib", "-m1", "-r", ACS, folder / "k", folder / "s"),
            ("pics", "-S", "-R", "W:3:0:0.001", "-i", BART_ITERATIONS, folder / "k", folder / "s", folder / "o"),
        )
        return max(_command_mib(["bart", *map(str, words)]) for words in commands)
    context = get_context("spawn")
    queue: SimpleQueue[int] = context.SimpleQueue()
    child = context.Process(target=_grow, args=(queue, way, matrix, n_coils, folder))
    child.start()
    child.join()
    return queue.get() if child.exitcode == 0 else None


def _grow(queue: SimpleQueue[int], way: str, matrix: int, n_coils: int, folder: Path) -> None:
    run = contenders(matrix, n_coils, folder)[way]
    run()  # imports and first allocations
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status_kib("VmRSS")
    run()
    queue.put(max(0, _status_kib("VmHWM") - before) >> 10)


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _command_mib(words: list[str]) -> int:
    # From a small process: what one of ours holds when it forks would count as the command's.
    started = subprocess.run([sys.executable, "-S", "-c", _MEASURE, *words], capture_output=True, check=True)
    return int(started.stdout.split()[-1]) >> 10
