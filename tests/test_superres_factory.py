"""The super-resolution factory: pairs as a scanner measures them, a network that begins at sinc, a sound export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recon.arrays import Array
from recon.fourier import to_image, to_kspace
from recon.head_likeness import NAMES

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install 'scanside[train]')")
pytest.importorskip("onnx", reason="onnx is not installed")

from export.superres_data import Head, Pair, cut_k_space, draw_pair, make_thick, plain_contrast  # noqa: E402
from export.superres_likeness import Known, fit  # noqa: E402
from export.superres_network import Detail, Shape, SuperResolution  # noqa: E402
from export.superres_onnx import check_superres, write_superres  # noqa: E402
from export.superres_pool import Planes, Pool, Workers, axes_of, prepared  # noqa: E402
from export.superres_train import inputs_of, main, objective  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def head() -> Head:
    """Return an ellipsoid with folds."""
    rng = np.random.default_rng(0)
    z, y, x = np.mgrid[-1:1:104j, -1:1:112j, -1:1:108j]
    inside = (z / 0.9) ** 2 + (y / 0.9) ** 2 + (x / 0.8) ** 2 < 1
    voxels = np.clip(inside * (130 + 40 * np.sin(20 * y) * np.cos(18 * x)) + 5 * rng.standard_normal(z.shape), 0, 255)
    return Head(voxels.astype(np.uint8), (1.0, 1.0, 1.0), "one", "T1w", True)


def test_contrasts_lose_the_number_of_their_study() -> None:
    assert plain_contrast("FLAIR-s2") == "FLAIR"
    assert plain_contrast("T1w-Gd") == "T1w-Gd"


def test_k_space_is_cut_and_values_keep_their_size() -> None:
    y, x = np.mgrid[-1:1:64j, -1:1:48j]
    truth = np.exp(-6 * (y**2 + x**2)).astype(np.float32)
    image = cut_k_space(np.random.default_rng(0), truth, 0.0)
    assert image.shape == (32, 24)
    np.testing.assert_allclose(image, truth[::2, ::2], atol=0.02)
    noisy = cut_k_space(np.random.default_rng(0), np.zeros((64, 64), np.float32), 0.1)
    assert noisy.mean() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.05)  # Rayleigh


def test_thick_slices_are_means_of_fine_ones() -> None:
    truth = np.repeat(np.arange(12.0)[:, None], 5, axis=1)
    thick = make_thick(np.random.default_rng(0), truth, 3, 0.0, width=1.0)
    np.testing.assert_allclose(thick[1:-1, 0], [4, 7], atol=1e-6)


@pytest.mark.parametrize("share_through", [0.0, 1.0])
def test_what_is_to_be_added_lies_outside_the_measurement(share_through: float) -> None:
    rng = np.random.default_rng(4)
    for _ in range(3):
        pair = draw_pair(rng, [head()], share_through)
        placed, target = prepared(pair)
        y, x = axes_of(pair)
        assert placed.shape == target.shape == pair.truth.shape == (y.size, x.size)
        kept = y.basis[: y.size].T @ target @ x.basis[: x.size]
        assert np.linalg.norm(kept) < 1e-4 * np.linalg.norm(placed)


def test_it_begins_as_zero_filling_and_learns() -> None:
    torch.manual_seed(0)
    network = Detail(Shape(8, 8, 8))
    pool = Pool(40, torch.device("cpu"))
    pool.put([Planes([head()], (0,), None).next()])
    batch = pool.draw(2)
    assert not network(*batch[:3]).any()
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for _ in range(50):
        loss = objective(network, *batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]


def test_a_pool_keeps_the_last_and_turns_image_phases_and_target_together() -> None:
    torch.manual_seed(0)
    pool, side = Pool(5, torch.device("cpu")), np.arange(96.0)
    for value in (9, 1, 2):  # the first is gone when three blocks of two patches have come
        images = np.broadcast_to(value + side[:, None] / 100, (2, 2, 96, 96)).astype(np.float16)
        phases = np.stack((np.full(96, 0.25), np.full(96, 0.5)))[None].repeat(2, 0).astype(np.float16)
        pool.put([(images, phases, np.tile(np.float32([0.01, 4.0, 1.0]), (2, 1)))])
    assert len(pool) == 5
    placed, phases, noise, targets, missed = pool.draw(64)
    assert placed.shape == targets.shape == (64, 1, 96, 96)
    assert phases.shape == (64, 2, 96, 96)
    torch.testing.assert_close(noise, torch.full((64, 1, 1, 1), 0.01))
    torch.testing.assert_close(missed, torch.full((64,), 4.0))
    turned = placed[:, 0, 0, -1] - placed[:, 0, 0, 0] > 0.5
    assert 16 < int(turned.sum()) < 48
    torch.testing.assert_close(placed, targets)
    assert (phases[turned, 0] == 0.5).all()
    assert (phases[~turned, 0] == 0.25).all()


def test_workers_make_planes_and_end() -> None:
    workers = Workers(2, [head()], (3,), None)
    try:
        images, phases, about = workers.next()
        assert images.shape[1:] == (2, 96, 96)
        assert phases.shape[1:] == (2, 96)
        assert about.shape == (len(images), 3)
        assert images.dtype == np.float16
    finally:
        workers.close()
    with pytest.raises(RuntimeError, match="no plane"):
        workers.next()


@pytest.mark.real_data
@pytest.mark.skipif(not (DATA / "brain" / "index.csv").is_file(), reason="the data folder is not there")
def test_training_begins_and_goes_on(tmp_path: Path) -> None:
    arguments = ["--data", str(DATA), "--out", str(tmp_path), "--workers", "1"]
    main([*arguments, "--minutes", "0.001"])
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    main([*arguments, "--minutes", str(first["seconds"] / 60 + 0.001), "--resume"])
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"]
    assert second["seconds"] > first["seconds"]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_the_exported_graph_is_the_network_and_projects(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Detail(Shape(8, 8, 8))
    torch.nn.init.normal_(network.leave.weight, 0, 0.1)
    write_superres(network, tmp_path / "model.onnx")
    assert check_superres(network, tmp_path / "model.onnx") < 1e-4
    truth = head().voxels[50][:, :100].astype(np.float32) / 200
    image = cut_k_space(np.random.default_rng(0), truth, 0.01)
    pair = Pair(image, ("band", 2, "band", 2), truth, 0.01)
    y, x = axes_of(pair)
    with torch.no_grad():
        placed, added = SuperResolution(network)(*inputs_of(image, y, x, 0.01))
    fine = (placed + added)[0, 0].numpy()[: y.size, : x.size]
    assert np.abs(fine - placed[0, 0].numpy()[: y.size, : x.size]).max() > 1e-3
    found = to_kspace(fine.astype(np.complex128), (0, 1))[28:84, 25:75] / 2
    np.testing.assert_allclose(to_image(found, (0, 1)).real, image, atol=1e-5)


def test_the_limit_of_likeness_is_what_left_out_subjects_keep() -> None:
    rng = np.random.default_rng(2)
    numbers: Array = rng.standard_normal((60, len(NAMES))).astype(np.float32)
    real = Known(numbers[:50], tuple(f"subject {k // 5}" for k in range(50)))
    likeness = fit(real, Known(numbers[50:], ("simulated",) * 10))
    assert likeness.known.shape == numbers.shape
    away = [likeness.distance(each[None]) for each in rng.standard_normal((200, len(NAMES)))]
    assert np.mean(np.array(away) < likeness.limit) > 0.9
    assert likeness.distance(np.full((1, len(NAMES)), 10.0)) > 3 * likeness.limit


@pytest.mark.real_data
@pytest.mark.skipif(not (DATA / "brain" / "index.csv").is_file(), reason="the data folder is not there")
def test_subjects_stay_on_one_side() -> None:
    from export.superres_data import load_heads

    train, held_out = ({each.subject for each in load_heads(DATA, split)} for split in ("train", "val"))
    assert not train & held_out
    contrasts = {each.contrast for each in load_heads(DATA, "val")}
    assert contrasts >= {"T1w", "T2w", "FLAIR"}
