"""The JSON record that every benchmark leaves: what was measured, on what, with which versions and settings."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("scanside", "numpy", "scipy", "sigpy", "ismrmrd", "pyzmq", "onnxruntime", "onnxruntime-gpu", "onnx", "torch"),
    *("cupy", "cupy-cuda12x", "cupy-cuda13x", "tensorrt", "tensorrt_rtx"),
)
_NUMBERS = re.compile(r"\[\s+((?:-?[\d.e+-]+,\s+)*-?[\d.e+-]+)\s+\]")
_MODEL = Path("/proc/device-tree/model")  # of a Jetson and other boards


def make_record(name: str, settings: dict[str, Any], results: Any) -> dict[str, Any]:
    """Return the record of one run: JSON values only."""
    return {
        "benchmark": name,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device(),
        "versions": {"python": platform.python_version(), **_versions(), "bart": _bart()},
        "settings": settings,
        "results": results,
    }


def device() -> dict[str, Any]:
    """Return what is measured on: processor, and where there are any, graphics cards, board and power mode.

    A Jetson's power mode is read, never set.
    """
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if gpus := _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines():
        found["gpu"] = gpus
    try:
        found["board"] = _MODEL.read_text("utf-8", "replace").strip("\0\n ")
    except OSError:
        return found
    if mode := _output("nvpmodel", "-q"):
        found["power_mode"] = " ".join(mode.split())
    return found


def write_record(record: dict[str, Any], path: Path | None) -> None:
    """Print the record as JSON, or write it to `path`."""
    content = json.dumps(record, indent=1, allow_nan=False)
    content = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", content)  # samples: one line a figure
    if path is None:
        print(content)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", "utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _output(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _commit() -> str:
    commit = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD")
    dirty = _output("git", "-C", str(Path(__file__).parent), "status", "--porcelain", "-uno")
    return commit + ("+changes" if dirty else "")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _bart() -> str:
    return _output("bart", "version")
