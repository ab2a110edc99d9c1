"""How fast is a slice on a GPU, by each way that this machine has? `python -m benchmarks.gpu`.

320×320, 8 virtual coils, R = 4 with 24 calibration lines: CuPy for maps, classical image and preparation, then the
network in PyTorch (launch by launch, and as one CUDA graph; never called TensorRT), in ONNX Runtime's CUDA provider and
as a TensorRT engine. Copies to the device and back are in every time. Each way's image is compared with the CPU's in
float32. What is missing is a row with its reason; without a GPU every row is one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks.coil_maps import phantom, undersample
from benchmarks.record import make_record, write_record
from edge.backends import trt
from edge.model import MODEL, RECONSTRUCTION
from edge.supply import Supply
from recon.arrays import Array
from recon.coils import estimate_maps
from recon.engine import profile_of
from recon.errors import BackendError
from recon.parity import compare_planes
from recon.scan import KSpace
from recon.sense import cg_sense
from recon.unrolled import INPUTS, prepare

ACS = 24

Way = Callable[[], Any]  # returns the network's image on the host


def main() -> None:
    """Measure as the command line says, print a table and the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--matrix", type=int, default=320)
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        results = measure(progress, args.matrix, args.coils, args.repeats)
    table = Table(title=f"{args.matrix}×{args.matrix}, {args.coils} virtual coils, R = 4")
    for heading in ("way", "p50 ms", "p95 ms", "SSIM to the CPU", "largest difference"):
        table.add_column(heading)
    for row in results["rows"]:
        if "reason" in row:
            table.add_row(row["way"], escape(f"not measured: {row['reason']}"))
        else:
            table.add_row(row["way"], f"{row['p50_ms']}", f"{row['p95_ms']}", f"{row['ssim']}", f"{row['difference']}")
    console.print(table)
    settings = {"matrix": args.matrix, "coils": args.coils, "acceleration": 4, "acs": ACS, "repeats": args.repeats}
    write_record(make_record("gpu", settings, results), args.json)


def measure(progress: Progress, matrix: int, n_coils: int, repeats: int) -> dict[str, Any]:
    """Return a row for each way: its times and how far its image is from the CPU's, or the reason why there is none."""
    kspace = undersample(phantom(matrix, n_coils, 40.0), 4, ACS)
    reference = Supply(RECONSTRUCTION, "cpu").network()
    assert kspace.calibration is not None
    maps = estimate_maps(kspace.calibration, matrix)
    inputs = prepare(kspace, maps, cg_sense(kspace, maps)).inputs
    wanted = reference.run(inputs)["image"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, tuple[Any, Callable[[], Way]]] = {
            "PyTorch, launch by launch": (wanted, lambda: _torch(inputs, as_graph=False)),
            "PyTorch as a CUDA graph": (wanted, lambda: _torch(inputs, as_graph=True)),
            "ONNX Runtime CUDA": (wanted, lambda: _runtime(inputs)),
            "TensorRT engine": (wanted, lambda: _engine(inputs, Path(folder))),
            "CuPy maps + classical + prepare": (
                inputs["classical"],
                lambda: _before(kspace, inputs["classical"]),
            ),
        }
        for name, (right, make) in progress.track(makers.items(), description="ways"):
            try:
                run = make()
                image = run()
                parity = compare_planes(right, image)
                seconds = [_timed(run) for _ in range(repeats)]
            except BackendError as error:
                rows.append({"way": name, "reason": str(error)})
                continue
            p50, p95 = np.percentile(1e3 * np.array(seconds), (50, 95))
            row = {"way": name, "p50_ms": round(p50, 3), "p95_ms": round(p95, 3), "repeats": repeats}
            rows.append(row | {"ssim": round(parity.ssim, 6), "difference": round(parity.difference, 6)})
    return {"rows": rows}


def _timed(run: Way) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _torch(inputs: dict[str, Any], as_graph: bool) -> Way:
    try:
        import torch

        from export.shipped import load_onnx
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed") from error
    if not torch.cuda.is_available():
        raise BackendError("PyTorch sees no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    network = load_onnx(RECONSTRUCTION / MODEL).cuda()
    host = [torch.from_numpy(inputs[name]).pin_memory() for name in INPUTS]
    placed = [each.cuda() for each in host]

    def forward() -> Any:
        with torch.no_grad():
            return network(*placed)

    def copy() -> None:
        for there, here in zip(placed, host, strict=True):
            there.copy_(here, non_blocking=True)

    if not as_graph:

        def launch() -> Any:
            copy()
            return forward().cpu().numpy()

        return launch
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        image = forward()

    def replay() -> Any:
        copy()
        graph.replay()
        return image.cpu().numpy()

    return replay


def _runtime(inputs: dict[str, Any]) -> Way:
    network = Supply(RECONSTRUCTION, "cuda").network()
    return lambda: network.run(inputs)["image"]


def _engine(inputs: dict[str, Any], folder: Path) -> Way:
    trt.find_device()
    supply = Supply(RECONSTRUCTION, "tensorrt", folder)
    supply.check(supply.start(profile_of(inputs)).finish())
    supply.close()
    network = Supply(RECONSTRUCTION, "tensorrt", folder).network()
    return lambda: network.run(inputs)["image"]


def _before(kspace: KSpace, wanted: Array) -> Way:
    """Return what comes before the network, on the device; its "image" is the classical one as the network gets it.

    The phase of an image is that of an eigenvector, which each library chooses: it is turned to that of `wanted`.
    """
    try:
        import cupy
    except ImportError as error:
        raise BackendError("CuPy is not installed") from error
    if not cupy.cuda.is_available():
        raise BackendError("CuPy sees no CUDA device")

    def run() -> Any:
        placed = KSpace(
            cupy.asarray(kspace.samples),
            kspace.averages,
            kspace.noise_scale,
            kspace.noise_is_measured,
            cupy.asarray(kspace.calibration),
        )
        maps = estimate_maps(placed.calibration, kspace.samples.shape[2])
        found = prepare(placed, maps, cg_sense(placed, maps)).inputs["classical"].get()
        ours, theirs = (pairs[:, 0] + 1j * pairs[:, 1] for pairs in (found, wanted))
        turned = ours * np.exp(-1j * np.angle(np.vdot(theirs, ours)))
        return np.stack((turned.real, turned.imag), 1)

    return run


if __name__ == "__main__":
    main()
