"""Super-resolution on other backends than the CPU: the CPU's answers, or a reason why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import superres_model
from edge.backends.trt import Device, TrtRefiner
from edge.command import main
from edge.doctor import super_resolution_finding
from edge.engines import EngineCache
from edge.model import MODEL
from edge.settings import SuperResolutionSettings
from edge.superres_engines import RefinerEngine
from edge.superres_model import SUPER_RESOLUTION, load_super_card, open_refiner
from edge.supply import Supply
from recon.arrays import Array
from recon.errors import BackendError
from recon.fine_grid import band_axis, kept_axis, profile_axis
from recon.superres import Steps, network_inputs
from recon.superres_engine import LEAST, MOST, PROFILE, check_refiner, fits, input_shapes
from tests import fake_tensorrt
from tests.test_engines import builder, device  # noqa: F401
from tests.test_superres import volume


def plane(n_y: int, n_x: int, seed: int = 0) -> dict[str, Array]:
    """Return the network's inputs for a plane of noise."""
    image = np.random.default_rng(seed).random((1, n_y, n_x)).astype(np.float32)
    return network_inputs(image, band_axis(n_y), band_axis(n_x), 0.01)


@pytest.mark.parametrize("n", [LEAST, 97, MOST])
def test_shapes_of_the_engine_are_those_of_planes(n: int) -> None:
    inputs = plane(n, n)
    assert {name: each.shape for name, each in inputs.items()} == input_shapes(n)
    assert fits(inputs)


def test_what_the_engine_is_not_for_is_known() -> None:
    assert not fits(plane(LEAST - 1, 60))
    assert not fits(plane(60, MOST + 1))
    assert not fits({"image": plane(60, 60)["image"]})
    thick = np.zeros((1, 9, 70), np.float32)
    assert not fits(network_inputs(thick, profile_axis(9, 3), kept_axis(70), 0.01))


def test_an_engine_answers_as_the_cpu_and_keeps_its_answers(device: Device) -> None:  # noqa: F811
    network, cpu = TrtRefiner(fake_tensorrt.PLAN + (SUPER_RESOLUTION / MODEL).read_bytes(), device), open_refiner()
    kept = [
        (network.run(inputs), cpu.network.run(inputs)) for inputs in (plane(50, 63), plane(64, 51), plane(50, 63, 1))
    ]
    for found, wanted in kept:
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-6)
    fake_tensorrt.LAUNCHES.update(eager=0, graph=0)
    for _ in range(3):
        network.run(plane(50, 63))
    assert fake_tensorrt.LAUNCHES["graph"] >= 2
    with pytest.raises(BackendError, match="planes of 48 to 512"):
        network.run(plane(40, 63))
    fake_tensorrt.FAULTS.write_nothing = True
    with pytest.raises(BackendError, match="not finite"):
        network.run(plane(50, 63))
    network.close()
    network.close()
    with pytest.raises(BackendError, match="closed"):
        network.run(plane(50, 63))


def test_the_command_builds_it_and_volumes_are_made_by_it(
    tmp_path: Path,
    device: Device,  # noqa: F811
    builder: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    engines = tmp_path / "engines"
    with pytest.raises(BackendError, match="there is no engine of super-resolution"):
        open_refiner(backend="tensorrt", engines=engines)
    with pytest.raises(BackendError, match="no folder for engines"):
        open_refiner(backend="tensorrt")
    words = ["engines", "build", "--state", str(tmp_path), "--super-resolution"]
    assert main(words) == 0
    assert main(words) == 0
    assert main(["engines", "list", "--state", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert PROFILE in listed
    assert "passed" in listed
    assert [each.identity.profile for _, each in EngineCache(engines) if not isinstance(each, BackendError)] == [
        PROFILE
    ]
    assert (
        "0 engines ready" in Supply(backend="tensorrt", engines=engines).words
    )  # the reconstruction has none of its own
    measured = volume((6, 50, 62))
    for backend in ("tensorrt", "auto"):
        refiner = open_refiner(backend=backend, engines=engines)
        assert refiner.network.backend.startswith("tensorrt 10.3.0 float32 on Fake GPU sm87; onnxruntime")
        steps, reference = Steps(measured, refiner, 2), Steps(measured, open_refiner(), 2)
        assert list(steps) == list(reference)
        made, wanted = steps.result(), reference.result()
        assert "tensorrt" in made.volume.provenance.backend
        np.testing.assert_allclose(made.volume.data, wanted.volume.data, atol=1e-5 * wanted.volume.data.max())
        refiner.network.close()
    settings = SuperResolutionSettings(enabled=True, backend="tensorrt")
    assert "tensorrt 10.3.0" in super_resolution_finding(settings, tmp_path).words


@pytest.mark.parametrize(
    ("fault", "value", "words"), [("factor", 1.05, "differ from the reference"), ("offset", 1e-4, "what was measured")]
)
def test_an_engine_that_computes_otherwise_is_refused(
    tmp_path: Path,
    device: Device,  # noqa: F811
    builder: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    fault: str,
    value: float,
    words: str,
) -> None:
    setattr(fake_tensorrt.FAULTS, fault, value)
    assert main(["engines", "build", "--state", str(tmp_path), "--super-resolution"]) == 1
    assert words in capsys.readouterr().err
    with pytest.raises(BackendError, match=f"refused: .*{words}"):
        open_refiner(backend="tensorrt", engines=tmp_path / "engines")
    refiner = open_refiner(backend="auto", engines=tmp_path / "engines")
    assert refiner.network.backend.startswith("onnxruntime")


def test_a_builder_that_fails_says_why(
    tmp_path: Path,
    device: Device,  # noqa: F811
    builder: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    builder("fail")
    assert main(["engines", "build", "--state", str(tmp_path), "--super-resolution"]) == 1
    assert "out of memory" in capsys.readouterr().err


def test_without_a_device_the_cpu_serves_and_what_is_named_says_why(tmp_path: Path) -> None:
    refiner = open_refiner(backend="auto", engines=tmp_path)
    assert refiner.network.backend.endswith("CPU")
    for backend, words in (("cuda", "has no CUDAExecutionProvider"), ("tensorrt", "CuPy"), ("abacus", "not built in")):
        with pytest.raises(BackendError, match=words):
            open_refiner(backend=backend, engines=tmp_path)
    with pytest.raises(BackendError, match="CuPy"):
        RefinerEngine(SUPER_RESOLUTION / MODEL, load_super_card(SUPER_RESOLUTION), tmp_path)


class Twisted:
    """The CPU's answers, what is added multiplied."""

    backend = "another"

    def __init__(self, factor: float) -> None:
        self.factor, self.is_closed = factor, False
        self.network = open_refiner().network

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = self.network.run(inputs)
        return {**found, "added": found["added"] * np.float32(self.factor)}

    def close(self) -> None:
        self.is_closed = True


def test_another_provider_serves_only_with_the_cpus_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Twisted(1.0), Twisted(3.0)
    opened = superres_model.open_session
    for each in (good, bad):
        monkeypatch.setattr(
            superres_model,
            "open_session",
            lambda model, kind="cpu", each=each: each if kind == "cuda" else opened(model, kind),
        )
        if each is good:
            assert open_refiner(backend="cuda").network is good
        else:
            with pytest.raises(BackendError, match="another is refused: its images differ"):
                open_refiner(backend="cuda")
            assert open_refiner(backend="auto").network.backend.endswith("CPU")
        assert each.is_closed == (each is bad)
    parity, refusal = check_refiner(good, good.network)
    assert parity.difference == 0
    assert not refusal


def test_the_doctor_opens_the_model_and_runs_it(tmp_path: Path) -> None:
    off = super_resolution_finding(SuperResolutionSettings(), tmp_path)
    assert off.level == "ok"
    assert "off in the settings" in off.words
    assert load_super_card(SUPER_RESOLUTION).sha256[:12] in off.words
    folder = tmp_path / "model"
    shutil.copytree(SUPER_RESOLUTION, folder)
    with (folder / MODEL).open("r+b") as file:
        file.seek(5000)
        file.write(b"\x01\x02\x03")
    for enabled, level in ((True, "fault"), (False, "note")):
        found = super_resolution_finding(SuperResolutionSettings(enabled=enabled, model=str(folder)), tmp_path)
        assert found.level == level
        assert "not the same file" in found.words
    shutil.copy(SUPER_RESOLUTION.parent / "reconstruction" / MODEL, folder / MODEL)  # whole, but another network
    card = json.loads((folder / "card.json").read_text())
    reconstruction = json.loads((SUPER_RESOLUTION.parent / "reconstruction" / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "sha256": reconstruction["sha256"]}))
    found = super_resolution_finding(SuperResolutionSettings(enabled=True, model=str(folder)), tmp_path)
    assert found.level == "fault"
    assert "no network" in found.words
