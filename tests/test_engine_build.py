"""Engines of the shipped network, really parsed and built, by TensorRT for RTX: it needs no GPU to build for one.

No plan is run here. `pip install --no-deps tensorrt-rtx tensorrt-rtx-cu13 tensorrt-rtx-cu13-libs
tensorrt-rtx-cu13-bindings` gives what these tests need; without it they skip.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from edge.model import MODEL, RECONSTRUCTION, load_card, model_file
from export.engine import PLAN, Shapes, build, main, shapes_of
from recon.engine import Profile, profile_for
from recon.errors import BackendError
from recon.superres_engine import PROFILE
from triage.score import VIEW

library = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
SMALL = profile_for((96, 104), 4, 16, 3)
CUT = Profile(96, 104, 1, 48, 96, 4, 32)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_shipped_network_is_built(precision: str) -> None:
    path, _ = model_file(RECONSTRUCTION, load_card(RECONSTRUCTION), precision)
    plan = build(path.read_bytes(), *shapes_of(SMALL.name), library, target="SM86")
    assert len(plan) > path.stat().st_size  # it holds the weights


def networks_beside_it() -> dict[str, tuple[Path, Shapes, Shapes, Shapes]]:
    """The other networks: their files, and their inputs' shapes for the least, the most, and to be fastest for."""
    assets = RECONSTRUCTION.parent
    found = {"super_resolution": (assets / "super_resolution" / MODEL, *shapes_of(PROFILE))}
    for path in sorted((assets / "triage").glob(f"*/{MODEL}")):
        found[path.parent.name] = (path, *({"planes": (n, 2, *VIEW)} for n in (1, 8, 1)))
    return found


@pytest.mark.parametrize("name", sorted(networks_beside_it()))
def test_the_networks_beside_it_are_built(name: str) -> None:
    path, *shapes = networks_beside_it()[name]
    plan = build(path.read_bytes(), *shapes, library, target="SM86")
    assert len(plan) > path.stat().st_size / 2  # weights, whose layout is the builder's


def test_shapes_that_no_input_has_are_refused() -> None:
    path, *shapes = networks_beside_it()["super_resolution"]
    with pytest.raises(BackendError, match="there are shapes for"):
        build(path.read_bytes(), *({"image": each["image"]} for each in shapes), library, target="SM86")


def test_a_scan_undersampled_along_both_axes_has_its_engine_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(RECONSTRUCTION / "model_fp16.onnx"), "--profile", CUT.name, "--out", str(tmp_path)]
    assert main([*words, "--library", "tensorrt_rtx", "--target", "SM86"]) == 0
    *steps, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert {"step": "parse"} in steps
    assert any(step.get("of") for step in steps)
    assert last["plan_sha256"] == hashlib.sha256((tmp_path / PLAN).read_bytes()).hexdigest()


def test_what_cannot_be_built_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = (RECONSTRUCTION / MODEL).read_bytes()
    with pytest.raises(BackendError, match="cannot be parsed"):
        build(b"no network", *shapes_of(SMALL.name), library, target="SM86")
    with pytest.raises(BackendError, match=r"cannot be built: .*FP32 GEMM"):
        build(model, *shapes_of(SMALL.name), library, target="SM75")  # data consistency needs float32 products
    words = ["--model", str(tmp_path / "none.onnx"), "--profile", SMALL.name, "--out", str(tmp_path)]
    assert main([*words, "--library", "tensorrt_rtx"]) == 1
    assert "none.onnx" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
