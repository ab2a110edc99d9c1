"""Build a TensorRT engine on the device that will run it: `python -m export.engine --model FILE --profile NAME …`.

Runs in a process of its own, so that a builder that needs more memory than there is takes nothing else with it. Uses
what TensorRT 10.3 (JetPack 6), 11 and TensorRT for RTX have in common: a strongly typed network, whose precisions are
those of the ONNX file; of the builder's flags only TF32 is touched, and cleared. Standard output is a line of JSON for
each step, the last one the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from recon.engine import read_profile
from recon.errors import BackendError, ModelError
from recon.superres_engine import LEAST, MOST, PROFILE, USUAL, input_shapes

PLAN = "engine.plan"
LIBRARIES = ("tensorrt", "tensorrt_rtx")
Shapes = Mapping[str, tuple[int, ...]]  # by the name of the input
WORKSPACE_MIB = 1024  # a Jetson shares its memory with the rest of the system


def main(argv: Sequence[str] | None = None) -> int:
    """Build one engine; 0 done, 1 it cannot be built (the reason is the last line), 2 wrong use."""
    parser = argparse.ArgumentParser(prog="python -m export.engine", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="ONNX file")
    parser.add_argument("--profile", required=True, metavar="NAME", help="sizes, such as 320x320-r4-l24-g80-c8-m1")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"existing folder for {PLAN}")
    parser.add_argument("--library", choices=LIBRARIES, default=LIBRARIES[0], help="(%(default)s)")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel timings, read and added to")
    parser.add_argument("--workspace-mib", type=int, default=WORKSPACE_MIB, help="(default %(default)s)")
    parser.add_argument(
        "--target", metavar="SM", help="compute capability to build for without that GPU, such as SM86 (tensorrt_rtx)"
    )
    args = parser.parse_args(argv)
    try:
        started = time.monotonic()
        plan = build(
            args.model.read_bytes(),
            *shapes_of(args.profile),
            import_module(args.library),
            timing_cache=args.timing_cache,
            workspace_mib=args.workspace_mib,
            target=args.target,
        )
        _write(args.out / PLAN, plan)
    except ImportError as error:
        return _say({"error": f"{args.library} cannot be imported: {error}"}, 1)
    except (BackendError, ModelError) as error:
        return _say({"error": str(error)}, 1)
    except OSError as error:
        return _say({"error": f"{Path(error.filename or args.out).name}: {error.strerror}"}, 1)
    seconds = round(time.monotonic() - started, 1)
    digest = hashlib.sha256(plan).hexdigest()
    return _say({"plan_sha256": digest, "plan_bytes": len(plan), "seconds": seconds}, 0)


def build(
    model: bytes,
    one: Shapes,
    most: Shapes,
    usual: Shapes,
    library: Any,
    *,
    timing_cache: Path | None = None,
    workspace_mib: int = WORKSPACE_MIB,
    target: str | None = None,
) -> bytes:
    """Return the serialised engine of an ONNX `model` for inputs from the shapes `one` to `most`, fastest at `usual`.

    Products of float32 are of float32: TF32, which both libraries would use, is turned off.
    library: the module `tensorrt` or `tensorrt_rtx`. Raises BackendError with the parser's or builder's reason.
    """
    reasons = _reasons(library)
    builder = library.Builder(reasons)
    flags = library.NetworkDefinitionCreationFlag
    strongly_typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strongly_typed)
    parser = library.OnnxParser(network, reasons)
    _say({"step": "parse"})
    if not parser.parse(model):
        words = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"the ONNX file cannot be parsed: {words or reasons.last}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    _add_profile(builder, config, network, one, most, usual)
    config.clear_flag(library.BuilderFlag.TF32)
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(library.ComputeCapability, target), 0)
    # TensorRT for RTX chooses kernels when it runs and has no timings to keep
    cache = None if library.__name__ == "tensorrt_rtx" else _load_timings(config, timing_cache)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(library)
    _say({"step": "build", "layers": network.num_layers})
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"the engine cannot be built: {reasons.last or 'the builder gave no reason'}")
    if cache is not None and timing_cache is not None:
        _write(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def shapes_of(name: str) -> tuple[Shapes, Shapes, Shapes]:
    """Return the shapes of a network's inputs: the least, the largest, and those to be fastest for.

    name: "super-resolution", or a reconstruction profile's: one slice to as many as go through at a time. Raises
    ModelError for another.
    """
    if name == PROFILE:
        return input_shapes(LEAST), input_shapes(MOST), input_shapes(USUAL)
    profile = read_profile(name)
    return profile.shapes(1), profile.shapes(profile.most_slices), profile.shapes(1)


def _add_profile(builder: Any, config: Any, network: Any, one: Shapes, most: Shapes, usual: Shapes) -> None:
    found = {network.get_input(i).name for i in range(network.num_inputs)}
    if found != set(one):
        raise BackendError(f"the graph has inputs {sorted(found)}; there are shapes for {sorted(one)}")
    shapes = builder.create_optimization_profile()
    for name in one:
        shapes.set_shape(name, one[name], usual[name], most[name])
    if config.add_optimization_profile(shapes) < 0:
        raise BackendError(f"the shapes do not fit the graph: {dict(most)}")


def _load_timings(config: Any, path: Path | None) -> Any:
    """Give the builder the timings of earlier builds; a file that it does not take is done without."""
    if path is None:
        return None
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content) or config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)
    return cache


def _reasons(library: Any) -> Any:
    """Return a logger of `library` that remembers the last error and keeps warnings quiet."""

    class Reasons(library.ILogger):  # type: ignore[misc]
        """Remembers what went wrong."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            """Keep an error's words."""
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self.last = message

    return Reasons()


def _monitor(library: Any) -> Any:
    """Return a progress monitor that says each step of the outermost phase."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        """Says how far the builder is."""

        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._outermost: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, n_steps: int) -> None:
            """Note a phase that has no parent."""
            if not parent:
                self._outermost[phase] = n_steps

        def step_complete(self, phase: str, step: int) -> bool:
            """Say a step; True lets the builder go on."""
            if phase in self._outermost:
                _say({"step": "build", "done": step + 1, "of": self._outermost[phase]})
            return True

        def phase_finish(self, phase: str) -> None:
            """Forget the phase."""
            self._outermost.pop(phase, None)

    return Monitor()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _say(line: dict[str, Any], code: int = 0) -> int:
    print(json.dumps(line), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
