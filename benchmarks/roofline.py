"""Which share of what the machine can do do coil maps, CG-SENSE and the network use, and what limits each?

Measures in one run how fast this machine multiplies matrices (float32, 1024 and 2048, NumPy on one and on all threads,
and ONNX Runtime) and how fast it copies memory; counts the operations and bytes of one slice, of the shipped ONNX graph
from the graph itself (`benchmarks.onnx_count`; needs the package onnx) and of our own code by its formulas; and times
them. The limit of a part is the longer of operations / GEMM rate and bytes / copy rate; "of the limit" is that time
over the measured one. The graph's groups are timed by ONNX Runtime's profiler.

Bytes are counted as if no cache held anything between two nodes, so a part whose data fit the cache may pass 100 %.
FFTs count 5 n log2 n; no FFT reaches the GEMM rate. Coil maps run on one BLAS thread, as in the daemon.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits

from benchmarks.chart import Bars, Segment, counted, write_chart
from benchmarks.coil_maps import phantom, undersample
from benchmarks.figures import new_parser, new_progress, origin, spread
from benchmarks.ours import shipped_network
from benchmarks.record import make_record, write_record
from edge.backends.ort import THREADS
from edge.model import MODEL, RECONSTRUCTION
from recon import coils
from recon.arrays import Array
from recon.scan import KSpace
from recon.sense import SenseOperator, cg_sense
from recon.unrolled import prepare

ACS = 24
_EPILOG = """examples:
  python -m benchmarks.roofline --json roofline.json --png roofline.png
  python -m benchmarks.roofline --matrix 256 --coils 12

Reading it: docs/performance.md."""


def main() -> None:
    """Measure as the command line says; print a table and one JSON record."""
    parser = new_parser("roofline", __doc__, _EPILOG)
    parser.add_argument("--matrix", type=int, default=320, metavar="N", help="(%(default)s)")
    parser.add_argument("--coils", type=int, default=8, metavar="N", help="virtual ones (%(default)s)")
    parser.add_argument("--acceleration", type=int, default=4, metavar="R", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="(%(default)s)")
    args = parser.parse_args()
    if args.quick:
        args.matrix, args.repeats = 128, 3
    if find_spec("onnx") is None:
        raise SystemExit(
            "benchmarks.roofline counts the graph with the package onnx, which is not here: pip install onnx"
        )
    record = measure(args)
    _show(record)
    if args.png:
        draw(record, args.png)
    write_record(record, args.json)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the record: the machine's rates, and for each part its operations, bytes, time, limit and share."""
    from benchmarks.onnx_count import count_graph, total

    network = shipped_network()
    if network is None:
        raise SystemExit("benchmarks.roofline needs the network that comes with the package")
    with new_progress() as progress:
        machine = machine_rates(progress, args.repeats)
        kspace = undersample(phantom(args.matrix, args.coils, 40.0), args.acceleration, ACS)
        assert kspace.calibration is not None
        calibration = kspace.calibration
        with threadpool_limits(limits=1, user_api="blas"):  # as the daemon's worker runs
            maps = coils.estimate_maps(calibration, args.matrix)
            classical = cg_sense(kspace, maps)
            inputs = prepare(kspace, maps, classical).inputs
            counts = count_graph(RECONSTRUCTION / MODEL, {name: array.shape for name, array in inputs.items()})
            ways: dict[str, Callable[[], object]] = {
                "maps": lambda: coils.estimate_maps(calibration, args.matrix),
                "classical": lambda: cg_sense(kspace, maps),
                "network": lambda: network.run(inputs),
            }
            times = {
                name: _timed(run, args.repeats, progress, f"{name} ({args.matrix}×{args.matrix})")
                for name, run in ways.items()
            }
            by_group = profile(RECONSTRUCTION / MODEL, inputs, max(2, args.repeats // 2))
        flops, n_bytes = maps_cost(calibration, args.matrix)
        parts = [_part("coil maps", flops, n_bytes, times["maps"], machine)]
        parts.append(
            _part("CG-SENSE", *sense_cost(kspace, lambda: cg_sense(kspace, maps)), times["classical"], machine)
        )
        whole = total(counts)
        parts.append(_part("network, whole graph", whole.flops, whole.n_bytes, times["network"], machine))
        for group, each in counts.items():
            part = _part(f"network: {group}", each.flops, each.n_bytes, by_group[group], machine)
            parts.append({**part, "nodes": each.n_nodes})
    names = ("matrix", "coils", "acceleration", "repeats", "quick")
    settings = {name: getattr(args, name) for name in names} | {"model": network.card.sha256, "threads": THREADS}
    return make_record("roofline", settings, {"machine": machine, "parts": parts})


def machine_rates(progress: Progress, repeats: int) -> dict[str, Any]:
    """Return the GEMM rates in GFLOP/s and the copy rate in GB/s (read and written), and the best of each."""
    gemm: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for n in (1024, 2048):
        a, b = (rng.standard_normal((n, n), np.float32) for _ in range(2))
        for threads in dict.fromkeys((1, os.cpu_count() or 1)):
            with threadpool_limits(limits=threads, user_api="blas"):
                seconds = _timed(lambda a=a, b=b: a @ b, repeats, progress, f"GEMM {n}")  # type: ignore[misc]
            gemm[f"numpy {n}, {counted(threads, 'thread')}"] = spread(
                [2 * n**3 / s / 1e9 for s in seconds], "gflop_per_s"
            )
    run = _ort_gemm(1024, rng)
    seconds = _timed(run, repeats, progress, "GEMM, ONNX Runtime")
    gemm["onnxruntime 1024"] = spread([2 * 1024**3 / s / 1e9 for s in seconds], "gflop_per_s")
    seconds, n_bytes = _copies(repeats, progress)
    copy = spread([n_bytes / s / 1e9 for s in seconds], "gb_per_s")
    best = max(each["p50_gflop_per_s"] for each in gemm.values())
    return {"gemm": gemm, "copy": copy, "gflop_per_s": best, "gb_per_s": copy["p50_gb_per_s"]}


def _ort_gemm(n: int, rng: np.random.Generator) -> Callable[[], object]:
    import onnx
    import onnxruntime

    f32 = onnx.TensorProto.FLOAT
    a, b, c = (onnx.helper.make_tensor_value_info(name, f32, [n, n]) for name in "abc")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["a", "b"], ["c"])], "gemm", [a, b], [c])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {name: rng.standard_normal((n, n), np.float32) for name in "ab"}
    return lambda: session.run(None, inputs)


def _copies(repeats: int, progress: Progress) -> tuple[list[float], int]:
    """Return the seconds of copies by all cores at once, and the bytes that each reads and writes."""
    n_threads, n = os.cpu_count() or 1, 16 << 20
    pairs = [(np.ones(n, np.float32), np.zeros(n, np.float32)) for _ in range(n_threads)]
    with ThreadPoolExecutor(n_threads) as pool:

        def run() -> object:
            return list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))

        return _timed(run, repeats, progress, "copy"), n_threads * 2 * 4 * n


def _timed(run: Callable[[], object], repeats: int, progress: Progress, what: str) -> list[float]:
    run()  # warm-up
    seconds = []
    for _ in progress.track(range(repeats), description=what):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def profile(model: Path, inputs: dict[str, Array], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each run by group of operators, from ONNX Runtime's profiler."""
    import onnxruntime

    from benchmarks.onnx_count import GROUPS, group_of

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as edge/backends/ort.py
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        for _ in range(repeats + 1):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    starts = sorted(e["ts"] for e in events if e["name"] == "model_run")[1:]  # without the warm-up
    ends = [*starts[1:], math.inf]
    runs: list[dict[str, float]] = []
    for start, end in zip(starts, ends, strict=True):
        sums = dict.fromkeys(GROUPS, 0.0)
        for node in nodes:
            if start <= node["ts"] < end:
                sums[group_of(node["args"]["op_name"])] += node["dur"] / 1e6
        runs.append(sums)
    return {group: [run[group] for run in runs] for group in GROUPS}


def maps_cost(calibration: Array, n_ky: int) -> tuple[float, float]:
    """Return operations and bytes of `recon.coils.estimate_maps` for calibration (slice, coil, ky, x).

    Complex products count 8, complex sums 2. Counted: Gram matrix, its inverse by Cholesky, projectors on the coarse
    grid, power iteration, interpolation. Bytes: each of their large arrays, once for every time it is gone through.
    """
    n_slices, c, n_lines, n_x = calibration.shape
    a, b = min(n_lines, coils.MAX_CALIBRATION), min(n_x, coils.MAX_CALIBRATION)
    ka, kb = (min(coils.MAX_KERNEL, (n + 1) // 2) for n in (a, b))
    rows, places = c * ka * kb, (a - ka + 1) * (b - kb + 1)
    gy, gx = min(n_ky, coils.MAX_GRID), min(n_x, coils.MAX_GRID)
    steps = coils.N_POWER_STEPS + 1
    flops = 8.0 * rows**2 * places + 4.0 * rows**3 + 2.0 * rows**2
    flops += 8.0 * c**2 * gy * (2 * kb - 1) * ((2 * ka - 1) + gx)
    flops += 8.0 * steps * c**2 * gy * gx + 2.0 * (2 * c + 1) * n_ky * gx * (gy + n_x)
    n_bytes = 8.0 * (2 * rows * places + 6 * rows**2 + 3 * steps * c**2 * gy * gx + 3 * c * n_ky * n_x)
    return n_slices * flops, n_slices * n_bytes


def sense_cost(kspace: KSpace, run: Callable[[], object]) -> tuple[float, float]:
    """Return operations and bytes of the normal equations that `run`, a CG-SENSE, works out.

    How often they are is counted while it runs, as the iteration ends when it is good enough. Each costs two FFTs a
    coil along the lines, three products and a sum over coils, and two FFTs of the prior; the vectors of the iteration
    are counted with it.
    """
    flops = n_bytes = 0.0
    with _normals() as calls:
        run()
    for c, n_x, *phase in calls:
        n = math.prod(phase)
        fft = 5.0 * n * math.log2(n) * n_x
        flops += 2 * fft * (c + 1) + n_x * n * (16.0 * c + 40)
        n_bytes += 8.0 * n_x * n * (9 * c + 24)
    return flops, n_bytes


@contextmanager
def _normals() -> Iterator[list[tuple[int, ...]]]:
    """Collect the shapes of the maps for which the normal equations are worked out inside."""
    calls: list[tuple[int, ...]] = []
    plain = SenseOperator.normal

    def counted(self: SenseOperator, image: Array) -> Array:
        calls.append(tuple(self.maps.shape))
        return plain(self, image)

    SenseOperator.normal = counted  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        SenseOperator.normal = plain  # type: ignore[method-assign]


def _part(name: str, flops: float, n_bytes: float, seconds: list[float], machine: dict[str, Any]) -> dict[str, Any]:
    """Return one row: what it costs, what it took, and what it would take at the limit."""
    arithmetic_ms = 1e3 * flops / (1e9 * machine["gflop_per_s"])
    memory_ms = 1e3 * n_bytes / (1e9 * machine["gb_per_s"])
    times = spread([1e3 * s for s in seconds])
    limit_ms = max(arithmetic_ms, memory_ms)
    resource = "arithmetic" if arithmetic_ms >= memory_ms else "memory"
    share = limit_ms / times["p50_ms"] if times["p50_ms"] else 0.0
    return {
        "part": name,
        "gflop": round(flops / 1e9, 4),
        "mb": round(n_bytes / 1e6, 3),
        **times,
        "gflop_per_s": round(flops / 1e6 / times["p50_ms"], 2) if times["p50_ms"] else 0.0,
        "gb_per_s": round(n_bytes / 1e6 / times["p50_ms"], 2) if times["p50_ms"] else 0.0,
        "limit_ms": round(limit_ms, 4),
        "limited_by": resource,
        "of_the_limit": round(share, 4),
        "in_words": _words(share, resource),
    }


def _words(share: float, resource: str) -> str:
    """Say what holds a part up."""
    if share >= 1.2:
        if resource == "arithmetic":
            return "faster than this run's GEMM: the machine was not quiet, so this run tells nothing"
        return "faster than memory would allow without caches: its data stay in them"
    if share >= 0.5:
        return f"{resource} limits it"
    if share >= 0.2:
        return f"{resource} limits it in part; the rest is overhead of small pieces of work"
    return f"neither arithmetic nor memory: overhead of small pieces of work ({resource} would be next)"


def _show(record: dict[str, Any]) -> None:
    console = Console(stderr=True, width=150)
    machine = record["results"]["machine"]
    title = (
        f"of a limit of {machine['gflop_per_s']:.0f} GFLOP/s and {machine['gb_per_s']:.1f} GB/s, measured in this run"
    )
    table = Table(title=title)
    for heading in ("part", "GFLOP", "MB", "median ms", "at the limit ms", "of the limit", "what limits"):
        table.add_column(heading)
    for row in record["results"]["parts"]:
        numbers = [f"{row[name]:.3g}" for name in ("gflop", "mb")]
        times = [f"{row[name]:.1f}" for name in ("p50_ms", "limit_ms")]
        table.add_row(row["part"], *numbers, *times, f"{row['of_the_limit']:.0%}", row["in_words"])
    console.print(table)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw for each part its time, and how much of that the limit explains."""
    rows, notes = [], []
    for part in record["results"]["parts"]:
        inside = min(part["limit_ms"], part["p50_ms"])
        pieces = [Segment(f"at the limit of {part['limited_by']}", 0.0, inside)]
        pieces.append(Segment("above the limit", inside, part["p50_ms"] - inside))
        rows.append((part["part"], pieces))
        notes.append(f"{part['p50_ms']:.1f} ms · {part['of_the_limit']:.0%} of the limit")
    machine, s = record["results"]["machine"], record["settings"]
    names = ["at the limit of arithmetic", "at the limit of memory", "above the limit"]
    panel = Bars("Median time of one slice, and what the limit explains of it", rows, "ms", notes, names=names)
    about = f"{s['matrix']}×{s['matrix']}, {s['coils']} virtual coils, R = {s['acceleration']} · limit: "
    about += f"{machine['gflop_per_s']:.0f} GFLOP/s (GEMM), {machine['gb_per_s']:.1f} GB/s (copy), in the same run"
    write_chart(path, "Roofline", [panel], about, origin(record))


if __name__ == "__main__":
    main()
