"""Engines: built for one protocol and device, found again, never trusted when damaged, and judged before they serve."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.backends import trt
from edge.backends.trt import Device, TrtNetwork, find_device
from edge.command import main
from edge.engines import PLAN, EngineCache
from edge.model import MODEL, RECONSTRUCTION, load_card
from edge.supply import Supply
from recon.engine import Identity, Profile, fit, profile_for, profile_of, read_profile
from recon.errors import BackendError, ModelError, ShapeError
from recon.parity import Parity, check_parity, compare_planes, fixed_scan
from tests import fake_tensorrt
from tests.test_backends import _inputs

SMALL = profile_for((96, 104), 3, 16, 3)
PYTHON = sys.executable
CARD = load_card(RECONSTRUCTION)
ABOUT = Identity("Fake GPU sm87", "tensorrt 10.3.0", "a" * 64, SMALL.name, "float16")
BUILDER = """\
import hashlib, json, pathlib, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("chatter of a library")
for done in (1, 2):
    print(json.dumps({"step": "build", "done": done, "of": 2}), flush=True)
if "CODE" == "fail":
    print(json.dumps({"error": "out of memory"}))
    sys.exit(1)
if "CODE" == "die":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
plan = b"plan " + pathlib.Path(words["--model"]).read_bytes()
(pathlib.Path(words["--out"]) / "engine.plan").write_bytes(plan)
print(json.dumps({"plan_sha256": hashlib.sha256(plan).hexdigest(), "plan_bytes": len(plan), "seconds": 1.5}))
"""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device behind TensorRT's and CuPy's calls."""
    monkeypatch.setitem(sys.modules, "cupy", fake_tensorrt.fake_cupy())
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.fake_tensorrt())
    monkeypatch.setattr(fake_tensorrt, "FAULTS", fake_tensorrt.Faults())
    fake_tensorrt.LAUNCHES.update(eager=0, graph=0)
    yield find_device()
    fake_tensorrt.MEMORY.clear()


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A builder's process that makes plans for the fake device; call it with "fail" or "die" to have it do so."""

    def make(code: str = "") -> None:
        script = tmp_path / "builder.py"
        script.write_text(BUILDER.replace("CODE", code))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nshift 2\nexec {PYTHON} {script} "$@"\n')  # without "-m export.engine"
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr("edge.engines.sys.executable", str(python))

    make()
    return make


def engine_network(device: Device, profile: Profile = SMALL) -> TrtNetwork:
    plan = fake_tensorrt.PLAN + (RECONSTRUCTION / MODEL).read_bytes()
    return TrtNetwork(plan, profile, CARD, "float16", device)


# profiles


@pytest.mark.parametrize(("n_y", "n_x"), [(96, 104), (117, 99), (128, 128)])
def test_zeros_that_fill_a_profile_change_nothing(n_y: int, n_x: int) -> None:
    network, inputs = Supply(RECONSTRUCTION, "cpu").network(), _inputs(n_y, n_x)
    filled = fit(inputs, profile_of(inputs))
    assert {name: array.shape for name, array in filled.items()} == profile_of(inputs).shapes(2)
    wanted = network.run(inputs)["image"]
    np.testing.assert_allclose(network.run(filled)["image"], wanted, atol=2e-6 * np.abs(wanted).max())


def test_a_profile_has_a_name_that_reads_back_and_fits_its_own_fixed_scan() -> None:
    cut = Profile(96, 104, 1, 48, 96, 4, 32)
    for profile in (SMALL, profile_for((320, 320), 4, 24, 8), profile_for((192, 160), 1, 24, 4), cut):
        assert read_profile(profile.name) == profile
        assert profile_of(fixed_scan(profile)) == profile
    assert profile_for((320, 320), 4, 24, 8).name == "320x320-r4-l24-g80-c8-m1"
    for wrong in ("320x320", "", "320x320-r4-l24-g80-c8-m1x"):
        with pytest.raises(ModelError, match="no engine profile"):
            read_profile(wrong)
    with pytest.raises(ShapeError):
        fit(_inputs(), replace(SMALL, coils=2))


def test_parity_sees_what_would_be_seen() -> None:
    wanted = fixed_scan(SMALL)["classical"]
    assert compare_planes(wanted, wanted) == Parity(1.0, 0.0)
    assert compare_planes(wanted, wanted * 1.001).is_passed
    spot = wanted.copy()
    spot[0, 0, 40, 50] += 0.05 * np.abs(wanted).max()
    found = compare_planes(wanted, spot)
    assert not found.is_passed
    assert found.difference == pytest.approx(0.05, rel=0.05)
    assert "at most 2%" in str(found)
    noise = np.random.default_rng(0).standard_normal(wanted.shape).astype(np.float32)
    assert not compare_planes(wanted, wanted + 0.005 * noise).is_passed


# the runner


def test_an_engine_answers_as_the_reference_and_keeps_its_answers(device: Device) -> None:
    network, reference = engine_network(device), Supply(RECONSTRUCTION, "cpu").network()
    assert "tensorrt 10.3.0 float16 on Fake GPU sm87" in network.backend
    kept = []
    for seed in (0, 3, 6, 0):  # the same mask offset, other images
        inputs = _inputs(seed=seed)
        kept.append((network.run(inputs)["image"], reference.run(inputs)["image"]))
    for found, wanted in kept:
        np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    assert check_parity(network, reference, SMALL).is_passed


def test_the_steady_state_is_one_graph_and_other_sizes_are_run_again(device: Device) -> None:
    network, inputs = engine_network(device), _inputs()
    one = {name: a if name in ("rows", "resample", "missing") else a[:1] for name, a in inputs.items()}
    for _ in range(4):
        network.run(inputs)
    assert fake_tensorrt.LAUNCHES == {"eager": 1, "graph": 3}
    alone = network.run(one)["image"]
    network.run(inputs)
    assert fake_tensorrt.LAUNCHES == {"eager": 2, "graph": 4}
    np.testing.assert_allclose(alone, network.run(inputs)["image"][:1], atol=2e-5 * np.abs(alone).max())
    fake_tensorrt.FAULTS.refuse_capture = True
    other = engine_network(device)
    for _ in range(3):
        other.run(inputs)
    assert fake_tensorrt.LAUNCHES["eager"] == 5


def test_device_arrays_are_run_where_they_lie(device: Device) -> None:
    network, inputs = engine_network(device), _inputs()
    wanted = network.run(inputs)["image"]
    placed = {name: device.cupy.asarray(array) for name, array in fit(inputs, SMALL).items()}
    fake_tensorrt.MEMORY.clear()
    found = network.run(placed)["image"]
    assert isinstance(found, device.cupy.ndarray)
    assert placed["adjoint"].data.ptr in fake_tensorrt.MEMORY
    np.testing.assert_array_equal(np.asarray(found), wanted)
    found[:] = 0
    np.testing.assert_array_equal(np.asarray(network.run(placed)["image"]), wanted)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("refuse_shape", "does not take"),
        ("refuse_start", "would not start"),
        ("write_nothing", "not finite"),
        ("lose_device", "failed to run the network: CudaError"),
    ],
)
def test_a_run_that_fails_raises_and_never_gives_an_earlier_answer(device: Device, fault: str, words: str) -> None:
    network, inputs = engine_network(device), _inputs()
    if fault != "refuse_shape":  # the others also after good runs, in a graph as without
        network.run(inputs)
        network.run(inputs)
    if fault == "refuse_start":
        inputs = _inputs(seed=3)
        network = engine_network(device)
    setattr(fake_tensorrt.FAULTS, fault, True)
    with pytest.raises(BackendError, match=words):
        network.run(inputs)
    setattr(fake_tensorrt.FAULTS, fault, False)
    assert np.isfinite(network.run(inputs)["image"]).all()


def test_an_engine_runs_its_own_profile_only(device: Device) -> None:
    network = engine_network(device)
    with pytest.raises(BackendError, match=r"the engine is for 96x104-r3.*the scan needs 128x128"):
        network.run(_inputs(128, 128))
    with pytest.raises(BackendError, match="failed to run"):
        network.run({"adjoint": _inputs()["adjoint"]})
    network.close()
    network.close()
    with pytest.raises(BackendError, match="closed"):
        network.run(_inputs())
    with pytest.raises(BackendError, match="does not take the engine"):
        TrtNetwork(b"plan of another version", SMALL, CARD, "float16", device._replace(library=_refusing(device)))


def _refusing(device: Device) -> Any:
    class Refusing(fake_tensorrt.Runtime):
        def deserialize_cuda_engine(self, plan: bytes) -> None:
            return None

    library = fake_tensorrt.fake_tensorrt()
    library.Runtime = Refusing
    return library


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match="CuPy is not installed"):
        find_device()
    cupy = fake_tensorrt.fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for name in trt.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match="neither tensorrt nor tensorrt_rtx"):
        find_device()
    cupy.cuda.runtime.getDeviceCount = lambda: 0
    with pytest.raises(BackendError, match="no CUDA device"):
        find_device()


# the cache


def test_an_engine_is_found_by_exactly_what_it_was_built_for(tmp_path: Path, builder: Any) -> None:
    cache = EngineCache(tmp_path / "engines")
    build = cache.build(ABOUT, RECONSTRUCTION / MODEL, "tensorrt")
    while not build.wait(0.1):
        assert cache.find(ABOUT) is None
    assert (build.done, build.of) == (2, 2)
    engine = build.finish()
    assert cache.find(ABOUT) == engine
    for field, other in (
        ("gpu", "Other GPU sm90"),
        ("runtime", "tensorrt 10.4.0"),
        ("model_sha256", "b" * 64),
        ("profile", replace(SMALL, coils=8).name),
        ("precision", "float32"),
    ):
        assert cache.find(replace(ABOUT, **{field: other})) is None, field
    assert not list((tmp_path / "engines").glob(".*"))


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "no plan", "no words", "not json", "renamed"])
def test_a_damaged_engine_is_as_good_as_none(tmp_path: Path, builder: Any, harm: str) -> None:
    cache = EngineCache(tmp_path / "engines")
    folder = cache.build(ABOUT, RECONSTRUCTION / MODEL, "tensorrt").finish().folder
    plan, about = folder / PLAN, folder / "engine.json"
    wanted = ABOUT
    if harm == "flip":
        content = bytearray(plan.read_bytes())
        content[len(content) // 2] ^= 1
        plan.write_bytes(content)
    elif harm == "cut":
        plan.write_bytes(plan.read_bytes()[:-1000])
    elif harm == "empty":
        plan.write_bytes(b"")
    elif harm == "no plan":
        plan.unlink()
    elif harm == "no words":
        about.unlink()
    elif harm == "not json":
        about.write_text("{")
    else:
        wanted = replace(ABOUT, gpu="Other GPU sm90")
        folder.rename(folder.with_name(wanted.key))
    assert [type(found) for _, found in cache] == [BackendError]
    assert cache.find(wanted) is None
    assert not list((tmp_path / "engines").glob("*/"))
    cache.build(ABOUT, RECONSTRUCTION / MODEL, "tensorrt").finish()
    assert cache.find(ABOUT) is not None


@pytest.mark.parametrize(("code", "words"), [("fail", "out of memory"), ("die", "killed, perhaps for want of memory")])
def test_a_builder_that_fails_leaves_its_reason_and_nothing_else(
    tmp_path: Path, builder: Any, code: str, words: str
) -> None:
    builder(code)
    cache = EngineCache(tmp_path / "engines")
    with pytest.raises(BackendError, match=words):
        cache.build(ABOUT, RECONSTRUCTION / MODEL, "tensorrt").finish()
    assert not [path for path in (tmp_path / "engines").iterdir() if "timings" not in path.name]
    stopped = cache.build(ABOUT, RECONSTRUCTION / MODEL, "tensorrt")
    stopped.stop()
    assert cache.find(ABOUT) is None


# the supply


def test_scans_are_served_while_an_engine_is_built_and_by_it_from_the_next_scan_on(
    tmp_path: Path, device: Device, builder: Any
) -> None:
    supply = Supply(RECONSTRUCTION, "auto", tmp_path / "engines")
    assert [each.backend for each in supply.tried] == ["tensorrt", "cuda", "cpu"]
    assert supply.tried[0].why_not == supply.tried[2].why_not == ""
    assert "CUDAExecutionProvider" in supply.tried[1].why_not
    assert "0 engines ready" in supply.words
    first, inputs = supply.network(), _inputs()
    wanted = first.run(inputs)["image"]
    assert "onnxruntime" in first.backend
    supply.tend()
    assert supply._build is not None
    supply._build.wait(60)
    supply.tend()
    assert "1 engine ready" in supply.words
    first.run(inputs)
    assert "onnxruntime" in first.backend  # what it began with
    second = supply.network()
    np.testing.assert_allclose(second.run(inputs)["image"], wanted, atol=1e-3 * np.abs(wanted).max())
    assert "tensorrt 10.3.0 float16" in second.backend
    supply.close()
    (engine,) = [found for _, found in EngineCache(tmp_path / "engines")]
    assert not isinstance(engine, BackendError)
    assert engine.parity is not None
    again = Supply(RECONSTRUCTION, "tensorrt", tmp_path / "engines")
    only = again.network()
    only.run(inputs)
    assert "tensorrt 10.3.0 float16" in only.backend
    with pytest.raises(BackendError, match="there is no engine for 128x128"):
        only.run(_inputs(128, 128))
    again.close()


def test_an_engine_whose_images_differ_is_refused_with_the_figure(
    tmp_path: Path, device: Device, builder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake_tensorrt.FAULTS.factor = 1.03
    supply = Supply(RECONSTRUCTION, "auto", tmp_path / "engines")
    supply.want(SMALL)
    supply.tend()
    assert supply._build is not None
    supply._build.wait(60)
    supply.tend()
    assert "largest difference 3.0" in caplog.text
    network = supply.network()
    network.run(_inputs())
    assert "onnxruntime" in network.backend
    supply.tend()
    assert supply._build is None  # it is not built again and again
    supply.close()
    after = Supply(RECONSTRUCTION, "auto", tmp_path / "engines")
    assert "0 engines ready" in after.words
    after.close()


def test_without_a_device_the_cpu_serves_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    supply = Supply(RECONSTRUCTION, "auto", tmp_path / "engines")
    assert supply.words.endswith("CPU")
    supply.network().run(_inputs())
    supply.tend()
    with pytest.raises(BackendError, match="CuPy is not installed"):
        Supply(RECONSTRUCTION, "tensorrt", tmp_path / "engines")
    with pytest.raises(BackendError, match="no CUDAExecutionProvider"):
        Supply(RECONSTRUCTION, "cuda", tmp_path / "engines")
    assert main(["engines", "build", "--state", str(tmp_path), "--matrix", "96x96"]) == 1
    assert "CuPy is not installed" in capsys.readouterr().err
    assert main(["engines", "list", "--state", str(tmp_path)]) == 0
    assert "no engines in" in capsys.readouterr().out
    assert main(["engines", "build", "--state", str(tmp_path), "--matrix", "96"]) == 2
    assert main(["engines", "build", "--state", str(tmp_path), "--profile", "x"]) == 2


def test_the_command_builds_checks_and_lists(
    tmp_path: Path, device: Device, builder: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["engines", "build", "--state", str(tmp_path), "--profile", SMALL.name]
    assert main(words) == 0
    assert main(["engines", "list", "--state", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert SMALL.name in out
    assert "passed" in out
    (folder,) = (tmp_path / "engines").glob("*/")
    built = (folder / PLAN).stat().st_mtime_ns
    assert main(words) == 0
    assert (folder / PLAN).stat().st_mtime_ns == built
    assert main([*words, "--force"]) == 0
    assert (folder / PLAN).stat().st_mtime_ns > built
    about = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**about, "refusal": "SSIM 0.9"}))
    assert main(words) == 1
    assert "is refused: SSIM 0.9" in capsys.readouterr().err
    (folder / PLAN).write_bytes(b"")
    assert main(["engines", "list", "--state", str(tmp_path)]) == 0
    assert "unusable" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_real_engine_gives_the_references_images(tmp_path: Path) -> None:
    try:
        find_device()
    except BackendError as error:
        pytest.skip(str(error))
    supply = Supply(RECONSTRUCTION, "tensorrt", tmp_path)
    engine = supply.check(supply.start(SMALL).finish())
    assert engine.refusal == ""
    supply.close()
