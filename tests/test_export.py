"""The factory: the network in PyTorch solves the problem it is given, trains, and comes out as ONNX unchanged."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: the factory's tests need it")
pytest.importorskip("onnx", reason="onnx is not installed: the factory's tests need it")
pytest.importorskip("nibabel", reason="nibabel is not installed: the factory's tests need it")

import onnx
import torch

from edge.model import MODEL, RECONSTRUCTION
from edge.supply import Supply
from export import quantise, train, validation
from export.batches import Pool, Source, mirrored
from export.muon import Muon, _orthogonal
from export.network import Encoding, Shape, UnrolledNetwork, solve
from export.objective import unmeasured
from export.onnx import check_parity, main, to_half, write_onnx
from export.shipped import load_onnx
from export.simulated import draw_sample
from export.validation import join, to_tensors
from recon.errors import ModelError
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
    error = unmeasured(encoding, right_where_measured, target) - target
    assert (error.norm() / (right_where_measured - target).norm()).item() < 0.9
    torch.testing.assert_close(unmeasured(encoding, target, target), target)


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


def test_int8_takes_the_chosen_convolutions_alone(tmp_path: Path) -> None:
    source, path = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    sample = draw_sample(np.random.default_rng(2), disc(), PLAIN)
    write_onnx(network(), sample, source)
    seen = quantise.observe(source, [sample])
    quantise.write_int8(source, path, seen, quantise.Recipe(99.9, ("enter", "leave"), 1))
    graph = onnx.load(str(path)).graph
    made_by = {name: node for node in graph.node for name in node.output}
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    n_int8 = 0
    for node in graph.node:
        sources = [made_by[name].op_type if name in made_by else "" for name in node.input]
        weight = node.input[1] if node.op_type in ("Conv", "ConvTranspose") else ""
        if weight.startswith("regularisers.0.") and "enter" not in weight and "leave" not in weight:
            assert sources == ["DequantizeLinear", "DequantizeLinear", ""]  # biases stay
            levels, scales, zeros = (stored[name] for name in made_by[weight].input)
            assert levels.dtype == np.int8
            assert len(scales) == levels.shape[0 if node.op_type == "Conv" else 1]
            assert not zeros.any()
            assert stored[made_by[node.input[0]].input[2]] == 0  # symmetric, as TensorRT wants it
            n_int8 += 1
        elif node.op_type != "QuantizeLinear":
            assert "DequantizeLinear" not in sources
    assert n_int8 == 11


def test_int8_is_read_by_tensorrts_parser(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: no parser for engines")
    source, path = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    sample = draw_sample(np.random.default_rng(2), disc(), PLAIN)
    write_onnx(network(), sample, source)
    quantise.write_int8(source, path, quantise.observe(source, [sample]), quantise.Recipe(100.0))
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    parsed = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(parsed, log)
    assert parser.parse(path.read_bytes()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    kinds = [parsed.get_layer(i).type for i in range(parsed.num_layers)]
    assert (
        kinds.count(trt.LayerType.QUANTIZE) >= 20
    )  # what goes into the 13 convolutions of two cascades, shared ones once


@pytest.mark.parametrize("limit_db", [100.0, -100.0])
def test_int8_is_offered_by_what_it_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_db: float) -> None:
    monkeypatch.setattr(quantise, "load_slices", lambda folder, split, every=2: [disc()])
    monkeypatch.setattr(quantise, "MAX_LOSS_DB", limit_db)
    monkeypatch.setattr(quantise, "IN_FLOAT", (((), 0),))
    monkeypatch.setattr(quantise, "PERCENTILES", (100.0, 99.9))
    monkeypatch.setattr(quantise, "CASES", validation.CASES[-1:])
    monkeypatch.setattr(validation, "CASES", validation.CASES[-1:])
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    write_onnx(network(), draw_sample(np.random.default_rng(2), disc(), PLAIN), model / MODEL)
    card = json.loads((RECONSTRUCTION / "card.json").read_text())
    card |= {"sha256": quantise._sha256(model / MODEL), "files": {}}
    (model / "card.json").write_text(json.dumps(card))
    words = ["--model", str(model), "--data", str(tmp_path), "--calibration", "2", "--tuning", "1", "--per-case", "2"]
    quantise.main([*words, "--out", str(out)])
    written = json.loads((out / "card.json").read_text())
    (loss,) = written["precisions"]["int8"]["loss"]
    assert loss["interval_db"][0] <= loss["mean_db"] <= loss["interval_db"][1]
    assert loss["worst_db"] >= loss["mean_db"]
    assert len(written["precisions"]["int8"]["tried_on_training_subjects"]) == 2
    assert (model / "card.json").read_text() == json.dumps(card)  # only `out` is written
    if limit_db > 0:
        assert Supply(out, "cpu", precision="int8").network().card.sha256 == written["precisions"]["int8"]["sha256"]
        assert set(written["files"]) == {quantise.INT8_MODEL}
    else:
        assert not (out / quantise.INT8_MODEL).exists()
        with pytest.raises(ModelError, match="does not offer int8: it loses"):
            Supply(out, "cpu", precision="int8")
    (model / MODEL).write_bytes(b"another network")
    with pytest.raises(SystemExit, match="not the network"):
        quantise.main(words)


def test_the_interval_of_a_loss_knows_whose_scans_they_are() -> None:
    values = [0.0, 0.0, 1.0, 1.0] * 10
    alone = quantise._interval(values, [str(n) for n in range(40)])
    two = quantise._interval(values, ["a", "a", "b", "b"] * 10)
    assert two[1] - two[0] > alone[1] - alone[0]
    assert quantise._interval([0.3, 0.3], ["a", "b"]) == pytest.approx((0.3, 0.3))


def test_a_batch_is_its_scans_even_where_they_keep_different_numbers_of_coils() -> None:
    draw = replace(PLAIN, coils=(4,), n_columns=48)
    samples = [
        draw_sample(np.random.default_rng(seed), disc(), draw, (96, 96), np.random.default_rng(0)) for seed in (1, 2, 3)
    ]
    few = samples[0].prepared.inputs
    few = few | {"coarse": few["coarse"][:, :, :, :2]}
    samples[0] = replace(samples[0], prepared=replace(samples[0].prepared, inputs=few))
    made = network()
    inputs, target = to_tensors(samples, torch.device("cpu"))
    with torch.no_grad():
        together = made(*inputs)
        for index, sample in enumerate(samples):
            alone, own = to_tensors(sample, torch.device("cpu"))
            torch.testing.assert_close(together[index : index + 1], made(*alone), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(target[index : index + 1], own)


@pytest.mark.parametrize("lattice", [0.0, 1.0])
def test_a_mirrored_scan_is_a_scan(lattice: float) -> None:
    draw = replace(PLAIN, coils=(4,), n_columns=48, lattice_share=lattice, accelerations=(3,))
    inputs, target = to_tensors(draw_sample(np.random.default_rng(1), disc(), draw, (96, 96)), torch.device("cpu"))
    other, mirror = mirrored(list(inputs), target)
    wanted = Encoding(*inputs[2:8]).normal(target).flip(-1)
    torch.testing.assert_close(Encoding(*other[2:8]).normal(mirror), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other[0], inputs[0].flip(-1))
    assert (inputs[2].shape[2] > 1) == (lattice > 0)


def test_workers_hand_over_what_they_simulate_and_end() -> None:
    source = Source([disc()], 2, 5)
    pool = Pool(source, 2, 40, False)
    processes = [process for _, process in pool._workers.values()]
    try:
        pool.fill(3, torch.device("cpu"))
        found = {tuple(target.shape): target for _, target in pool._kept}
        common = np.random.default_rng([5, 40])
        wanted = torch.from_numpy(join(source.draw(40, 0, False, common))[-1])
        torch.testing.assert_close(found[tuple(wanted.shape)], wanted)
        inputs, target = pool.draw(0, False)
        assert len(target) == 2
        assert len(inputs) == len(INPUTS)
        processes[0].kill()
        processes[0].join()
        while pool.n_workers == 2:  # found out when it is next asked
            pool.draw(0, False)
        pool.draw(0, False)
    finally:
        pool.close()
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(RuntimeError, match="all processes"):
        pool._gather(None)


def test_a_run_with_workers_goes_on_from_a_shipped_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_slices", lambda folder, split, every=2: [disc()])
    monkeypatch.setattr(validation, "load_slices", lambda folder, split, every=2: [disc()])
    monkeypatch.setattr(validation, "N_VALIDATION", 3)
    made = network()
    (tmp_path / "shipped").mkdir()
    shipped = tmp_path / "shipped" / "model.onnx"
    write_onnx(made, draw_sample(np.random.default_rng(2), disc(), PLAIN), shipped)
    (shipped.parent / "card.json").write_text(json.dumps({"training": {"stages": [{"steps": 3}]}}))
    size = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(SMALL).items()]
    common = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--workers", "2", "--batch", "2"]
    words = [*common, *size, "--minutes", "0.15", "--from", str(shipped)]
    train.main([*words, "--rate", "0"])
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert content["step"] >= 1
    assert content["simulated"] >= 2
    assert content["history"] == [{"steps": 3}]
    for name, value in made.state_dict().items():
        torch.testing.assert_close(content["ema"][name], value, rtol=0, atol=1e-6)
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [0, content["step"]]
    train.main([*common, *size, "--minutes", str(content["seconds"] / 60 + 0.15), "--resume"])
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] > content["step"]
    with pytest.raises(ValueError, match="this run's is"):
        train.main([*common, "--minutes", "0.1", "--from", str(shipped)])


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


def test_muon_moves_many_parameters_together_as_it_would_one_by_one() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 4, 3, 3), (6, 4, 3, 3), (8, 4, 2, 2), (6,), (12,), (), (9, 5)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    together = [torch.nn.Parameter(value.clone()) for value in values]
    one_by_one = [torch.nn.Parameter(value.clone()) for value in values]
    optimisers = [Muon(together, 1e-2), *(Muon([each], 1e-2) for each in one_by_one)]
    expected = [value.clone() for value in values]
    moments = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    for step in range(1, 6):
        for index, value in enumerate(values):
            gradient = torch.randn(value.shape, generator=generator)
            together[index].grad, one_by_one[index].grad = gradient.clone(), gradient.clone()
            first, second = (each[index] for each in moments)
            if value.ndim == 4:
                first.mul_(0.95).add_(gradient)
                flat = (gradient + 0.95 * first).reshape(len(value), -1)
                expected[index] -= 1e-2 * 0.2 * max(flat.shape) ** 0.5 * _orthogonal(flat[None])[0].reshape(value.shape)
            else:
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient**2, 0.01)
                size = (second / (1 - 0.99**step)).sqrt() + 1e-8
                expected[index] -= 1e-2 * (10 if value.numel() < 8 else 1) * first / (1 - 0.9**step) / size
        for optimiser in optimisers:
            optimiser.step()
    for one, two, three in zip(together, one_by_one, expected, strict=True):
        torch.testing.assert_close(one.data, three, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two.data, three, rtol=1e-5, atol=1e-6)


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
    train.main([*common, "--minutes", str(first["seconds"] / 60 + 0.03), "--resume"])  # however long a step took
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
