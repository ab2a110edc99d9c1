"""Every backend that runs networks, and the folder they come from: right answers, fresh ones, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge.backends import ort
from edge.model import MODEL, RECONSTRUCTION, load_card
from edge.supply import Supply
from recon.errors import BackendError, ModelError
from recon.network import Network
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
    import hashlib

    content = b"no network"
    (tmp_path / MODEL).write_bytes(content)
    card = json.loads((RECONSTRUCTION / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "sha256": hashlib.sha256(content).hexdigest()}))
    with pytest.raises(BackendError, match="cannot open"):
        Supply(tmp_path)
    with pytest.raises(BackendError, match="not built in"):
        Supply(RECONSTRUCTION, "abacus")
