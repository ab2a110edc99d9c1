"""Every backend that runs networks, and the folder they come from: right answers, fresh ones, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge.backends import ort
from edge.command import main
from edge.model import MODEL, RECONSTRUCTION, load_card
from edge.simulate import simulate_file
from edge.supply import Supply
from recon.errors import BackendError, ModelError
from recon.network import Network, read_card
from recon.protocol import Protocol
from recon.scan import CoilMaps
from recon.unrolled import prepare
from tests.test_unrolled import lines, scan, smooth_image, smooth_maps

BACKENDS = ("cpu",)


@pytest.fixture(scope="module", params=BACKENDS)
def network(request: pytest.FixtureRequest) -> Network:
    return Supply(RECONSTRUCTION, request.param).network()


def _inputs(n_y: int = 96, n_x: int = 104, seed: int = 0) -> dict[str, np.ndarray]:
    maps, image = smooth_maps(2, 3, n_y, n_x), 40 * smooth_image(2, n_y, n_x)
    return prepare(scan(lines(n_y, 3, seed % 3, 16), maps, image), CoilMaps(maps), image).inputs


def test_a_second_run_leaves_the_first_answer_untouched(network: Network) -> None:
    one = network.run(_inputs())["image"]
    kept = one.copy()
    two = network.run(_inputs(seed=1))["image"]
    np.testing.assert_array_equal(one, kept)
    assert one.shape == two.shape == (2, 2, 96, 104)
    assert one.dtype == np.float32
    assert np.abs(one - two).max() > 0


def test_equal_inputs_give_equal_bits(network: Network) -> None:
    inputs = _inputs(117, 99)
    np.testing.assert_array_equal(network.run(inputs)["image"], network.run(inputs)["image"])


def test_slices_do_not_know_of_each_other(network: Network) -> None:
    inputs = _inputs()
    together = network.run(inputs)["image"]
    shared = ("rows", "resample", "missing")
    alone = [
        network.run({name: a if name in shared else a[i : i + 1] for name, a in inputs.items()})["image"]
        for i in range(2)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=2e-5 * np.abs(together).max())


def test_what_cannot_be_run_raises(network: Network) -> None:
    inputs = _inputs()
    with pytest.raises(BackendError, match="failed to run"):
        network.run({name: array for name, array in inputs.items() if name != "rows"})
    with pytest.raises(BackendError, match="failed to run"):
        network.run({**inputs, "adjoint": inputs["adjoint"][..., :-8]})
    with pytest.raises(BackendError, match="not finite"):
        network.run({**inputs, "adjoint": np.full_like(inputs["adjoint"], np.nan)})
    np.testing.assert_array_equal(network.run(inputs)["image"].shape, (2, 2, 96, 104))  # and goes on


def test_a_closed_network_says_so() -> None:
    network = ort.open_network(RECONSTRUCTION / MODEL, load_card(RECONSTRUCTION))
    network.close()
    network.close()
    with pytest.raises(BackendError, match="closed"):
        network.run(_inputs())


def test_the_shipped_card_is_whole_and_small() -> None:
    card = json.loads((RECONSTRUCTION / "card.json").read_text())
    assert load_card(RECONSTRUCTION).sha256 == card["sha256"]
    for name in ("data", "subjects", "training", "metrics", "trained_range", "parity", "limits", "cost"):
        assert card[name], name
    assert not set(card["subjects"]["train"]) & set(card["subjects"]["held_out"])
    assert all(each["licence"] for each in card["data"])
    for metric in card["metrics"]:
        mean, low, high = metric["gain_over_cg_sense_db"]
        assert low <= mean <= high
    assert card["parity"]["float32_to_pytorch"] <= 1e-4
    assert sum(path.stat().st_size for path in RECONSTRUCTION.parent.rglob("*.onnx")) < 40 << 20


def test_weights_that_are_not_the_cards_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(RECONSTRUCTION, folder)
    with (folder / MODEL).open("r+b") as file:
        file.seek(5000)
        file.write(b"\x01\x02\x03")
    with pytest.raises(ModelError, match="not the same weights"):
        Supply(folder)
    (folder / "card.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        Supply(folder)
    (folder / "card.json").unlink()
    with pytest.raises(ModelError, match=r"lacks card\.json"):
        Supply(folder)


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    content = b"no network"
    (tmp_path / MODEL).write_bytes(content)
    card = json.loads((RECONSTRUCTION / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "sha256": hashlib.sha256(content).hexdigest()}))
    with pytest.raises(BackendError, match="cannot open"):
        Supply(tmp_path)
    with pytest.raises(BackendError, match="not built in"):
        Supply(RECONSTRUCTION, "abacus")


def with_int8(folder: Path, **changes: object) -> Path:
    """Return a model folder that offers int8, its file the float32 one: what matters is which file is opened."""
    shutil.copytree(RECONSTRUCTION, folder)
    shutil.copy(folder / MODEL, folder / "model.int8.onnx")
    with (folder / "model.int8.onnx").open("ab") as file:
        file.write(b"\x72\x00")  # an empty metadata entry: the same network, another hash
    digest = hashlib.sha256((folder / "model.int8.onnx").read_bytes()).hexdigest()
    int8 = {"file": "model.int8.onnx", "sha256": digest, "offered": True, "why_not": "", **changes}
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "precisions": {**card["precisions"], "int8": int8}}))
    return folder


def test_int8_is_opened_where_the_card_offers_it(tmp_path: Path) -> None:
    folder = with_int8(tmp_path / "model")
    plain, int8 = Supply(folder).network(), Supply(folder, "cpu", precision="int8").network()
    assert int8.backend == f"{plain.backend} int8"
    assert "int8" not in plain.backend
    assert int8.card.sha256 == plain.card.precisions["int8"].sha256
    assert int8.card.sha256 != plain.card.sha256
    inputs = _inputs()
    np.testing.assert_array_equal(int8.run(inputs)["image"], plain.run(inputs)["image"])


def test_int8_that_loses_too_much_is_refused_in_words(tmp_path: Path) -> None:
    why_not = "it loses 0.75 dB on average for coils 8, R = 2; at most 0.2 are allowed"
    folder = with_int8(tmp_path / "model", offered=False, why_not=why_not)
    with pytest.raises(ModelError, match=r"does not offer int8: it loses 0\.75 dB on average for coils 8, R = 2"):
        Supply(folder, "cpu", precision="int8")
    assert Supply(folder).card.sha256 == load_card(folder).sha256  # float32 goes on


def test_int8_that_was_never_measured_or_is_another_file_is_refused(tmp_path: Path) -> None:
    folder = with_int8(tmp_path / "model")
    (folder / "model.int8.onnx").write_bytes((folder / MODEL).read_bytes())
    with pytest.raises(ModelError, match=r"model\.int8\.onnx has sha256 .* not the same weights"):
        Supply(folder, "cpu", precision="int8")
    (folder / "model.int8.onnx").unlink()
    with pytest.raises(ModelError, match=r"lacks model\.int8\.onnx"):
        Supply(folder, "cpu", precision="int8")
    card = json.loads((folder / "card.json").read_text())
    del card["precisions"]["int8"]
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="comes in float32, float16; there is no int8"):
        Supply(folder, "cpu", precision="int8")
    with pytest.raises(ModelError, match="there is no int4"):
        Supply(folder, "cpu", precision="int4")


def test_an_int8_section_that_cannot_be_read_is_a_model_error() -> None:
    card = json.loads((RECONSTRUCTION / "card.json").read_text())
    for broken in ({"int8": {}}, {"int8": {"file": "x"}}, {"int8": 3}, 3):
        with pytest.raises(ModelError, match="card"):
            read_card({**card, "precisions": broken})


def test_recon_takes_the_precision_and_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan_file = tmp_path / "head.h5"
    simulate_file(scan_file, Protocol(matrix=(96, 96), n_slices=1, n_coils=4, acceleration=2, snr=40.0), "none", 1)
    folder = with_int8(tmp_path / "model")
    words = ["recon", str(scan_file), "--method", "network", "--model", str(folder), "--precision", "int8"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    (volume,) = json.loads((tmp_path / "out" / "report.json").read_text())["volumes"]
    assert volume["backend"].endswith("CPU int8")
    assert volume["model_sha256"] == hashlib.sha256((folder / "model.int8.onnx").read_bytes()).hexdigest()
    (folder / "model.int8.onnx").unlink()
    assert main([*words, "--out", str(tmp_path / "none")]) == 1
    assert "lacks model.int8.onnx" in capsys.readouterr().err


def test_the_library_reports_to_nobody(tmp_path: Path) -> None:
    code = "import os, edge.backends.ort; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    home = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    home.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert list(tmp_path.rglob("*")) == []  # no identifier of this device
