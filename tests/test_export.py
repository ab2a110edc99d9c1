"""The factory: the network in PyTorch solves the problem it is given, trains, and comes out as ONNX unchanged."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: the factory's tests need it")
pytest.importorskip("onnx", reason="onnx is not installed: the factory's tests need it")
pytest.importorskip("nibabel", reason="nibabel is not installed: the factory's tests need it")

import onnx
import torch

from edge.model import MODEL, RECONSTRUCTION
from export import train, validation
from export.muon import Muon, _orthogonal
from export.network import Encoding, Shape, UnrolledNetwork, solve
from export.onnx import check_parity, load_onnx, main, to_half, write_onnx
from export.simulated import draw_sample
from export.validation import to_tensors
from recon.unrolled import INPUTS
from tests.fake_network import normal
from tests.test_simulated import PLAIN, disc

SMALL = Shape(n_cascades=2, n_steps=2, width=4, n_memory=2)


def network() -> UnrolledNetwork:
    torch.manual_seed(0)
    made = UnrolledNetwork(SMALL)
    for parameter in made.parameters():  # no two alike, so that each is found again in the file
        parameter.data += 0.01 * torch.randn_like(parameter)
    return made.eval()


def test_the_operator_is_the_one_that_the_inputs_describe() -> None:
    for seed in range(3):
        sample = draw_sample(np.random.default_rng(seed), disc(), PLAIN)
        inputs, target = to_tensors(sample, torch.device("cpu"))
        found = Encoding(*inputs[2:8]).normal(target).numpy()
        wanted = normal(sample.prepared.inputs, sample.target)
        np.testing.assert_allclose(found[:, 0] + 1j * found[:, 1], wanted, atol=1e-5 * np.abs(wanted).max())


def test_many_steps_solve_the_problem() -> None:
    sample = draw_sample(np.random.default_rng(1), disc(), PLAIN)
    inputs, _ = to_tensors(sample, torch.device("cpu"))
    named = dict(zip(INPUTS, inputs, strict=True))
    encoding = Encoding(*inputs[2:8])
    weight = 0.05 / named["variance"] ** 0.3
    found = solve(encoding, weight, named["measured"], named["adjoint"], named["classical"], 60)
    left = named["adjoint"] - encoding.normal(found) - weight * (found - named["classical"])
    assert (left.norm() / named["adjoint"].norm()).item() < 1e-4


def test_what_counts_is_the_error_in_lines_that_were_not_measured() -> None:
    sample = draw_sample(np.random.default_rng(1), disc(), PLAIN)
    inputs, target = to_tensors(sample, torch.device("cpu"))
    encoding = Encoding(*inputs[2:8])
    right_where_measured = target + 0.1 * encoding.normal(torch.randn_like(target))
    error = train.unmeasured(encoding, right_where_measured, target) - target
    assert (error.norm() / (right_where_measured - target).norm()).item() < 0.9
    torch.testing.assert_close(train.unmeasured(encoding, target, target), target)


def test_onnx_computes_what_pytorch_does_and_gives_the_weights_back(tmp_path: Path) -> None:
    made = network()
    path = tmp_path / "model.onnx"
    write_onnx(made, draw_sample(np.random.default_rng(2), disc(), PLAIN), path)
    assert check_parity(made, path, [disc()], 1e-4) <= 1e-4
    again = load_onnx(path)
    for one, two in zip(made.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    operators = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert not operators & {"DFT", "STFT", "ScatterND", "GridSample", "Loop", "If"}, operators
    to_half(path, tmp_path / "half.onnx")
    assert check_parity(made, tmp_path / "half.onnx", [disc()], 2e-2) > 1e-7
    with pytest.raises(ValueError, match="differs from PyTorch"):
        check_parity(UnrolledNetwork(SMALL), path, [disc()], 1e-4)


def test_half_precision_leaves_data_consistency_alone(tmp_path: Path) -> None:
    to_half(RECONSTRUCTION / MODEL, tmp_path / "half.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / "half.onnx"))).graph
    half = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    by_type: dict[str, list[bool]] = {}
    for node in graph.node:
        by_type.setdefault(node.op_type, []).append(any(name in half for name in node.output))
    assert all(by_type["Conv"])
    assert not any(by_type["MatMul"])
    assert not any(by_type["ReduceSum"])


def test_muon_moves_layers_by_orthogonal_steps() -> None:
    matrices = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    gram = _orthogonal(matrices) @ _orthogonal(matrices).mT
    assert (torch.linalg.eigvalsh(gram) - 1).abs().max().item() < 0.6  # five iterations bring them near 1
    weight = torch.nn.Parameter(torch.zeros(4, 3, 3, 3))
    bias = torch.nn.Parameter(torch.zeros(()))
    optimiser = Muon([weight, bias], 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        (((weight - 0.05) ** 2).sum() + (bias - 1) ** 2).backward()
        optimiser.step()
    assert (weight - 0.05).abs().max().item() < 0.03
    assert (bias - 1).abs().item() < 0.2


def test_a_run_learns_stops_in_time_goes_on_and_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_slices", lambda folder, split, every=2: [disc()])
    monkeypatch.setattr("export.onnx.load_slices", lambda folder, split, every=2: [disc()])
    monkeypatch.setattr(validation, "load_slices", lambda folder, split, every=2: [disc()])
    monkeypatch.setattr(validation, "N_VALIDATION", 3)
    size = [
        f"--{name.replace('_', '-')}={getattr(SMALL, name)}" for name in ("n_cascades", "n_steps", "width", "n_memory")
    ]
    common = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--processes", "1", *size]
    train.main([*common, "--minutes", "0.03"])
    first = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert first["step"] >= 1
    train.main([*common, "--minutes", "0.06", "--resume"])
    second = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"]
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows][-1] == second["step"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    main(
        [
            "--checkpoint",
            str(tmp_path / "run" / "checkpoint.pt"),
            "--data",
            str(tmp_path),
            "--out",
            str(tmp_path / "m"),
            "--per-case",
            "1",
        ]
    )
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {"model.onnx", "model_fp16.onnx", "card.json"}
    with pytest.raises(SystemExit):
        train.main(["--data", str(tmp_path), "--out", str(tmp_path / "none"), "--resume", "--processes", "1"])
