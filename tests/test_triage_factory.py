"""The triage factory at its smallest: planes are made, a network trains, and comes out as ONNX with its card."""

from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: the factory's tests need it")
pytest.importorskip("onnx", reason="onnx is not installed: the factory's tests need it")
pytest.importorskip("nibabel", reason="nibabel is not installed: the factory's tests need it")

import nibabel
import onnx
import torch

from export import triage_card, triage_checks, triage_images, triage_likeness, triage_train, triage_validation
from export.muon import Muon, _move_padded
from export.triage_again import from_onnx
from export.triage_augment import add_skull, add_white_matter_disease, decoy, is_stripped, look, paste
from export.triage_images import Label, Plane, load, to_plane
from export.triage_lesions import insert_bleed, insert_infarct, insert_mass, to_diffusion, to_gradient_echo
from export.triage_network import TriageNetwork
from export.triage_onnx import open_triage, run_once, run_triage, write_triage
from export.triage_recipes import RECIPES
from export.triage_sizes import LEVELS, Sizes, best_level, by_area, spread, tried
from export.triage_statistics import auc, balanced_threshold, fit, proportion
from export.triage_train import load_triage
from export.triage_workers import changed
from recon.arrays import Array
from triage.card import CALIBRATION, read_calibration, read_triage_card
from triage.preprocess import SIZE
from triage.score import middle_of

WIDTHS = (4, 4, 8, 8, 8)


def brain(rng: np.random.Generator, n: tuple[int, int] = (189, 157)) -> Array:
    """A skull-stripped oval with dark ventricles and grain, uint8."""
    y, x = (np.linspace(-1.1, 1.1, each) for each in n)
    radius = np.hypot(y[:, None], x)
    image = np.where(radius < 1, 110 + 6 * rng.standard_normal(n), 0)
    image[(np.abs(y[:, None]) < 0.3) & (np.abs(np.abs(x) - 0.15) < 0.06)] = 25
    return np.clip(image, 0, 255).astype(np.uint8)


def plane(rng: np.random.Generator) -> Array:
    found = to_plane(brain(rng), None, (1.0, 1.0), Label("a", "b", "train", "flair", "none"))
    assert found is not None
    return found.image.astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of its usual layout: eight stroke patients, four of them with an infarct, and two brain volumes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    stroke = folder / "stroke_flair"
    (stroke / "lesion_masks_mni").mkdir(parents=True)
    images = np.stack([brain(rng) for _ in range(8)])
    lesion = np.zeros(images.shape, bool)
    lesion[::2, 60:85, 40:62] = True
    images[lesion] = 230
    np.savez(stroke / "axial.npz", image=images, lesion=np.packbits(lesion, axis=-1))
    rows = [
        {"row": i, "subject_id": f"sub-{i}", "patient_group": i, "suggested_split": "val" if i > 3 else "train"}
        for i in range(8)
    ]
    _write(stroke / "index.csv", rows)
    for i in range(0, 8, 2):
        mask = np.zeros((157, 189, 12), np.uint8)
        mask[50:75, 80:110, 3:9] = 1
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), stroke / "lesion_masks_mni" / f"sub-{i}.nii.gz")
    (folder / "brain").mkdir()
    rows = []
    for name, split in (("one", "train"), ("two", "val")):
        volume = np.stack([brain(rng) for _ in range(4)], -1).transpose(1, 0, 2)[::-1, ::-1]
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 5, 1])), folder / "brain" / f"{name}.nii.gz")
        rows.append({"file": f"{name}.nii.gz", "subject": name, "split": split, "contrast": "FLAIR"})
    _write(folder / "brain" / "index.csv", rows)
    return folder


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_planes_train_a_network_that_comes_out_with_its_card(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes, run, out = tmp_path / "planes", tmp_path / "run", tmp_path / "model"
    sets = ["stroke", "brain", "shapes", "stroke-chain", "heads-flair", "exams-flair"]
    for name, limit in zip(sets, (8, 8, 8, 1, 2, 5), strict=True):
        arguments = [name, "--data", str(data), "--out", str(planes), "--heads", "1", "--limit", str(limit)]
        triage_images.main(arguments)
    made = load(sorted(planes.glob("*.npz")))
    assert {each.label.source for each in made} == {"stroke_flair", "brain", "shapes", "heads", "exams"}
    stroke = [each for each in made if each.label.source == "stroke_flair" and each.label.factor == 0]
    assert all(each.image[each.mask].min() > 1.5 for each in stroke if each.mask.any())
    monkeypatch.setattr(triage_train, "WIDTHS", WIDTHS)
    monkeypatch.setattr(triage_train, "BATCH", 2)
    triage_train.main(
        ["--finding", "infarct", "--planes", str(planes), "--out", str(run), "--minutes", "0.03", "--fold", ""]
    )
    arguments = ["--finding", "infarct", "--planes", str(planes), "--out", str(run / "again"), "--minutes", "0.03"]
    triage_train.main([*arguments, "--workers", "2", "--from", str(run / "checkpoint.pt")])
    log = [json.loads(line) for line in (run / "again" / "log.jsonl").read_text("utf-8").splitlines()]
    assert log[-1]["drawn"] >= 16
    assert load_triage(run / "again" / "checkpoint.pt")[0].widths == WIDTHS
    assert not multiprocessing.active_children()
    for module, name, value in (
        (triage_validation, "DRAWS", 1),
        (triage_validation, "SLICES", 6),
        (triage_likeness, "N_PLANES", 20),
        (triage_checks, "N_TRIALS", 2),
    ):
        monkeypatch.setattr(module, name, value)
    checkpoint = str(run / "checkpoint.pt")
    triage_card.main(["--checkpoint", checkpoint, "--planes", str(planes), "--out", str(out), "--folds", checkpoint])
    card = json.loads((out / "card.json").read_text("utf-8"))
    read = read_triage_card(card)
    assert read.contrasts["flair"].evidence == "real"
    assert card["cross_validation"]["positive"] == 2  # of four held-out patients
    with np.load(out / CALIBRATION) as arrays:
        calibration = read_calibration(arrays, "flair")
    assert calibration.is_positive.any()
    assert len(calibration.ood_mean) == WIDTHS[-1] + 12
    page = (out / "CARD.md").read_text("utf-8")
    assert "Not for diagnosis" in page
    assert "| flair | real | slices (patients) |" in page


def test_the_level_with_least_scatter_is_chosen_and_tried_on_other_patients() -> None:
    rng = np.random.default_rng(3)
    n = 80
    truth = rng.uniform(0.2, 4.0, n)
    found = np.stack([truth * np.exp(rng.normal(-0.4, 0.5, n)) for _ in LEVELS])
    found[4] = truth * np.exp(rng.normal(-0.3, 0.1, n))
    sizes = {"volume_ml": truth, "diameter_mm": 10 * truth}
    outlined = {"volume_ml": found, "diameter_mm": 10 * found, "extent_mm": np.ones_like(found)}
    cases = Sizes(np.array([f"p{k // 2}" for k in range(n)]), sizes, outlined, True)
    level = best_level(cases)
    assert level == 4
    fitted = spread(cases, "volume_ml", level)
    assert (fitted.floor, fitted.floor_mm2) == (0.0, 100.0)
    assert fitted.scale == pytest.approx(np.exp(0.3), rel=0.05)
    seen = tried(cases, "volume_ml")
    assert (seen["cases"], seen["patients"]) == (n, n // 2)
    assert seen["bias_at_one_half"] < -0.2
    assert abs(seen["bias"]) < 0.02
    assert seen["held_by_95"] > 0.9
    assert sum(row["cases"] for row in by_area(cases, level)) == n


def test_examples_that_come_again_are_changed_together_with_their_masks() -> None:
    torch.manual_seed(0)
    images = torch.zeros(64, 1, 192, 160)
    images[:, :, 60:90, 40:70] = 1.0
    moved, masks = changed(images, images.clone())
    assert moved.shape == masks.shape == images.shape
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    inside = (moved * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))
    assert float((inside - 1).abs().max()) < 0.3
    assert float((moved * (1 - masks)).mean((1, 2, 3)).max()) < 0.06
    centre = (masks * torch.arange(160)).sum((1, 2, 3)) / masks.sum((1, 2, 3))
    assert 10 < int((centre > 80).sum()) < 54  # about half are mirrored
    assert float(masks.sum((1, 2, 3)).std()) > 10


def test_white_matter_disease_is_bright_and_inside() -> None:
    rng = np.random.default_rng(2)
    image = plane(rng)
    made = [add_white_matter_disease(rng, image) for _ in range(12)]
    assert sum(bool((each > image + 0.1).any()) for each in made) >= 8
    for each in made:
        assert (each >= image).all()
        np.testing.assert_array_equal(each[image == 0], 0)
        assert ((each > image + 0.1).sum() / (image > 0.5).sum()) < 0.2


def test_all_layers_at_once_move_as_one_by_one() -> None:
    torch.manual_seed(0)
    layers = [torch.zeros(n) for n in ((4, 3, 3, 3), (12, 2, 2, 2), (4, 3, 3, 3), (6, 1, 2, 2))]
    changes = [torch.randn(each.shape) for each in layers]
    _move_padded(layers, changes, 0.1)
    for layer, change in zip(layers, changes, strict=True):
        weight = torch.nn.Parameter(torch.zeros(layer.shape))
        weight.grad = change / 1.95  # the first step looks ahead by as much as Nesterov does
        Muon([weight], 0.1).step()
        torch.testing.assert_close(layer, weight.detach(), atol=1e-5, rtol=1e-3)


def test_the_graph_is_plain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = TriageNetwork(WIDTHS)
    path = tmp_path / "model.onnx"
    write_triage(network, path)
    operators = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert operators <= {
        "Conv", "Relu", "Add", "MaxPool", "ConvTranspose", "Concat", "ReduceMean", "ReduceMax", "Gemm", "Unsqueeze",
        "Identity",
        "Constant",
    }  # fmt: skip
    images = np.random.default_rng(0).random((3, *SIZE)).astype(np.float32)
    y, x = middle_of(SIZE)
    shown = images[:, y, x]
    planes = np.stack((shown, shown[..., ::-1]), 1)
    with torch.no_grad():
        wanted = network.eval()(torch.from_numpy(planes))[0]
    np.testing.assert_allclose(run_once(open_triage(path), planes)[0], wanted.numpy(), atol=1e-4)
    logits, features = run_triage(open_triage(path), images)
    assert logits.shape == (3, 1, *SIZE)
    assert features.shape == (3, WIDTHS[-1])
    turned, _ = run_triage(open_triage(path), images[..., ::-1])
    np.testing.assert_allclose(turned[..., ::-1], logits, atol=1e-4)


def test_findings_lie_where_their_masks_say() -> None:
    rng = np.random.default_rng(1)
    outline = np.zeros(SIZE, bool)
    outline[90:120, 60:90] = True
    image = plane(rng)
    assert is_stripped(image)
    changes = {
        "mass": lambda: insert_mass(rng, image, "t1ce"),
        "bleed": lambda: insert_bleed(rng, image, "swi"),
        "infarct": lambda: insert_infarct(rng, image, outline),
        "pasted": lambda: paste(rng, image, np.zeros(SIZE, bool), np.where(outline, 2.0, image), outline),
    }
    for name, change in changes.items():
        found = [made for made in (change() for _ in range(12)) if made is not None]
        assert len(found) > 6, name
        for made, mask in found:
            assert made.dtype == np.float32
            assert made.min() >= 0
            changed = np.abs(made - image)
            assert mask.any() or name == "bleed"
            if mask.sum() > 60:
                assert changed[mask].mean() > 2 * changed[~mask].mean(), name


def test_nothing_is_made_out_of_range() -> None:
    rng = np.random.default_rng(2)
    image = plane(rng)
    for _ in range(15):
        skull = add_skull(rng, image)
        np.testing.assert_array_equal(skull[image > 0.1], image[image > 0.1])
        for made in (look(rng, skull), to_diffusion(rng, image, "flair"), to_gradient_echo(rng, image, "t2")):
            assert np.isfinite(made).all()
            assert made.min() >= 0
        assert np.abs(decoy(rng, image, image > 1) - image).max() < 0.4


def test_every_recipe_draws_from_what_is_there() -> None:
    rng = np.random.default_rng(3)
    mask = np.zeros(SIZE, bool)
    mask[100:125, 60:85] = True
    image = plane(rng).astype(np.float16)

    class Everything:
        by_kind: dict[str, list[Plane]]

        def draw(self, rng: np.random.Generator, kind: str) -> Plane:
            return self.by_kind[kind][0]

    for name, recipe in RECIPES.items():
        pool = Everything()
        pool.by_kind = {}
        for source, contrast, finding in (
            ("stroke_flair", "flair", "infarct"), ("tumour_t1c", "t1ce", "glioma"), ("brain", "t1", "none"),
            ("brain", "t2", "none"), ("brain", "flair", "none"), ("shapes", "none", "infarct"),
            ("heads", "flair", "mass"), ("heads", "flair", "bleed"), ("heads", "dwi", "infarct"),
        ):  # fmt: skip
            label = Label(source, "group-1", "train", contrast, finding)
            shown = mask if source != "brain" else np.zeros_like(mask)
            each = Plane(image, shown, label)
            if kind := recipe.kind(each):
                pool.by_kind.setdefault(kind, []).append(each)
        found = [recipe.draw(rng, pool) for _ in range(25)]
        assert all(each.image.shape == SIZE and np.isfinite(each.image).all() for each in found), name
        shares = np.mean([each.mask.any() for each in found])
        assert 0.1 < shares < 1, name


def test_statistics() -> None:
    rng = np.random.default_rng(4)
    positive, negative = rng.normal(2, 1, 300), rng.normal(0, 1, 300)
    area, low, high = auc(positive, negative)
    assert area == pytest.approx(0.921, abs=0.02)  # Φ(2 / √2)
    assert low < area < high
    assert auc(np.ones(5), np.zeros(5))[0] == 1.0
    assert proportion(90, 100) == pytest.approx((0.9, 0.8238, 0.9510), abs=1e-4)  # Clopper & Pearson's tables
    assert proportion(0, 10)[1] == 0.0
    score = np.concatenate((positive, negative))
    is_positive = np.arange(600) < 300
    assert balanced_threshold(score, is_positive) == pytest.approx(1, abs=0.25)
    assert (negative < balanced_threshold(score, is_positive, 0.97)).mean() >= 0.97
    slope, offset = fit(score, is_positive)
    assert (slope, offset) == pytest.approx((2, -2), abs=0.5)  # the ratio of two normal densities


def test_a_shipped_network_can_be_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = TriageNetwork()
    with torch.no_grad():
        for module in first.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.bias.uniform_(-0.2, 0.2)
    write_triage(first, tmp_path / "model.onnx")
    planes = torch.rand(4, 2, 64, 64)
    again = from_onnx(tmp_path / "model.onnx", planes)
    plain = from_onnx(tmp_path / "model.onnx")
    first.eval()
    with torch.no_grad():
        wanted, shown = first(planes)[0], again(planes)[0]
        torch.testing.assert_close(shown, wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(plain(planes)[0], wanted, atol=1e-3, rtol=1e-3)
        again.train()
        torch.testing.assert_close(again(planes)[0], wanted, atol=0.05, rtol=0.05)  # the batch's own statistics
    small = TriageNetwork(WIDTHS)
    for name, parameter in small.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # equal ones are stored once
    write_triage(small, tmp_path / "small.onnx")
    assert from_onnx(tmp_path / "small.onnx").widths == WIDTHS
