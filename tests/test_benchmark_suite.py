"""Latency, throughput, load and roofline at their smallest size, and the verdicts of `benchmarks.compare`.

What a record holds is checked, never how long anything took.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import compare, latency, load, record, roofline, soak, throughput
from benchmarks.chart import Bars, Curves, linear_ticks, stacked, write_chart
from benchmarks.figures import spread
from benchmarks.sender import EncodedScan, Place, encode_scan, send_scan
from benchmarks.server import HOST, MeasuredDaemon
from edge.clock import StageClock
from edge.mrd import DEFAULT_LIMITS, MessageId, messages
from edge.rawfile import open_raw
from recon.errors import DeliveryError
from tests.conftest import SMALL


def run(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> dict[str, Any]:
    """Run a benchmark's command line and return its record."""
    found = [str(folder / "record.json"), str(folder / "chart.png")]
    monkeypatch.setattr(sys, "argv", [module.__name__, *words.split(), "--json", found[0], "--png", found[1]])
    module.main()
    with Image.open(found[1]) as chart:
        assert chart.width == 1240
    made: dict[str, Any] = json.loads(Path(found[0]).read_text())
    assert {"benchmark", "at", "commit", "device", "versions", "settings", "results"} <= set(made)
    return made


# The sender


def test_a_scan_is_encoded_once_and_whole(small_scan: Path) -> None:
    raw = open_raw(small_scan)
    scan = encode_scan(raw, "default")
    found = list(messages(scan.messages, 0, DEFAULT_LIMITS))
    assert [m.id for m in found[:2]] == [MessageId.CONFIG_FILE, MessageId.HEADER]
    assert found[-1].id is MessageId.CLOSE
    readouts = [m for m in found if m.id is MessageId.ACQUISITION]
    assert [m.end for m in readouts] == scan.ends.tolist()
    assert readouts[0].start == scan.begin
    assert b"".join(scan.messages[m.start : m.end] for m in readouts) == b"".join(raw.acquisitions())


def test_the_last_readout_of_each_image_is_known(small_scan: Path) -> None:
    raw = open_raw(small_scan)
    scan = encode_scan(raw)
    assert sorted(place.slice for place in scan.lasts) == list(range(SMALL.n_slices))
    assert list(scan.lasts.values()) == sorted(scan.lasts.values())
    for place, index in scan.lasts.items():
        assert raw.heads[index]["idx"]["slice"] == place.slice
        assert not (raw.heads["idx"]["slice"][index + 1 :] == place.slice).any()


def test_the_sender_keeps_order_pace_and_gate(small_scan: Path) -> None:
    scan = encode_scan(open_raw(small_scan))
    gates: list[Place] = []
    counts: list[int] = []
    with MeasuredDaemon() as daemon:
        sent = send_scan(
            scan, HOST, daemon.port, rate=20000.0, gate=gates.append, on_sent=counts.append, keep_images=True
        )
        begin = daemon.events.wait(0, lambda header: header["kind"] == "scan.done")
    assert sent.problem == ""
    assert gates == list(scan.lasts)
    assert counts == sorted(counts)
    assert counts[-1] == scan.n_readouts == begin.header["readouts"]
    assert sent.missing(scan) == []
    assert {place for place, _, _ in sent.image_s} == set(scan.lasts)
    assert len(sent.images) == len(sent.image_s)
    assert sent.begun_s <= min(sent.last_readout_s.values()) <= sent.sent_s <= sent.ended_s


def test_an_image_event_says_where_its_time_went(small_scan: Path) -> None:
    with MeasuredDaemon() as daemon:
        send_scan(encode_scan(open_raw(small_scan)), HOST, daemon.port)
        daemon.events.wait(0, lambda header: header["kind"] == "scan.done")
        images = [event.header for event in daemon.events.since(0, "image")]
    assert len(images) >= SMALL.n_slices
    for image in images:
        at = image["moments_s"]
        assert set(at) == {"spooled", "begun", "made", "sent"}
        assert at["begun"] <= at["made"] <= at["sent"]
        assert at["spooled"] is None or at["spooled"] <= at["sent"]
        assert {"assemble", "classical"} <= set(image["stage_ms"])
        assert sum(image["stage_ms"].values()) <= 1e3 * (at["made"] - at["begun"]) + 0.1


def test_a_clock_tells_what_was_added() -> None:
    clock = StageClock()
    with clock.stage("before"):
        pass
    before = dict(clock.ms)
    clock.ms["new"] = 2.0
    assert clock.since(before) == {"new": 2.0}
    assert clock.since({}).keys() >= {"new"}


def test_nobody_listens() -> None:
    with pytest.raises(DeliveryError, match="no server answers"):
        send_scan(EncodedScan(b"", 0, np.zeros(0, np.int64), {}), HOST, 1)


# The benchmarks


def test_latency_explains_its_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--matrix 96 --coils 4 --acceleration 2 --slices 2 --scans 1 --cold 1 --rate 5000"
    made = run(latency, tmp_path, monkeypatch, words)
    (case,) = made["results"]
    assert case["case"] == "96×96, 4 coils, R = 2"
    for series in ("classical", "network"):
        assert len(case["cold"][series]["samples_ms"]) == 1
        assert len(case["warm"][series]["samples_ms"]) == 2  # slices
        assert {"receive", "wait", "assemble", "classical", "publish", "deliver", "unexplained"} <= set(
            case["stages"][series]
        )
        assert 0 <= case["unexplained_share"][series] <= 1
        totals = case["warm"][series]["samples_ms"]
        parts = [each["samples_ms"] for each in case["stages"][series].values()]
        assert np.sum(parts, axis=0) == pytest.approx(totals, abs=0.01)
    assert "network" in case["stages"]["network"]
    assert "network" not in case["stages"]["classical"]
    assert "write" in case["scan_stages"]
    assert {(image["slice"], image["series"]) for image in case["example_images"]} >= {(0, "classical"), (1, "network")}


def test_throughput_counts_scans_memory_and_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "AXES", {"slices": [1, 2, 3]})
    words = "--scanners 2 --scans 1 --repeats 1 --matrix 64 --coils 2 --slices 1 --acceleration 2"
    results = run(throughput, tmp_path, monkeypatch, words)["results"]
    (row,) = results["sustained"]
    assert row["scanners"] == 2
    assert len(row["scan"]["samples_s"]) == 2
    assert row["slices_per_h"] == pytest.approx(row["scans_per_h"], abs=0.1)  # one slice a scan
    assert {"daemon", "worker", "triage"} <= set(row["peak_mib"]) <= {"daemon", "worker", "worker 2", "triage"}
    assert [point["value"] for point in results["cost"]["slices"]["points"]] == [1, 2, 3]
    assert {"exponent", "factor", "residual"} <= set(results["cost"]["slices"])


def test_a_power_law_is_found() -> None:
    fit = throughput.power_law([(n, 0.5 * n**1.5) for n in (2, 4, 8)])
    assert fit["exponent"] == pytest.approx(1.5)
    assert fit["factor"] == pytest.approx(0.5)
    assert fit["residual"] == pytest.approx(0, abs=1e-9)
    assert throughput.power_law([(1, 1), (2, 2)])["residual"] is None


def test_load_sees_images_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_scan: Path) -> None:
    words = f"--file {small_scan} --scanners 2 --repeats 1"
    made = run(load, tmp_path, monkeypatch, words)
    assert made["settings"]["scan"]["images"] == SMALL.n_slices
    assert made["settings"]["server"] == "scanside"
    (row,) = made["results"]
    assert row["scans"] == 2
    assert row["images_missing"] == 0
    assert row["problems"] == {}
    assert row["images_by_series"]["1"] == 2 * SMALL.n_slices
    assert "Simulated" not in json.dumps(made)  # no name of a patient


def test_soak_counts_what_is_lost_and_how_memory_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(soak, tmp_path, monkeypatch, "--quick --no-triage")["results"]
    assert not any(results["lost"].values())
    assert results["together"]["scans"] >= 2
    assert results["together"]["images"]["classical"] == 2 * results["together"]["scans"]
    assert set(results["p95_ratio"]) >= {"classical"}
    assert soak._course([(60.0 * n, 100.0 + 2 * n) for n in range(10)])["mib_per_minute"] == pytest.approx(2.0)


def test_load_knows_a_wrong_address(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["load", "--to", "nowhere"])
    with pytest.raises(SystemExit) as end:
        load.main()
    assert end.value.code == 2
    assert "HOST:PORT is needed" in capsys.readouterr().err


def test_roofline_counts_and_times_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    made = run(roofline, tmp_path, monkeypatch, "--matrix 96 --coils 4 --repeats 2")
    assert made["results"]["machine"]["gflop_per_s"] > 0
    parts = {part["part"]: part for part in made["results"]["parts"]}
    assert {"coil maps", "CG-SENSE", "network, whole graph", "network: conv", "network: matmul"} <= set(parts)
    groups = [part for name, part in parts.items() if name.startswith("network: ")]
    assert sum(part["gflop"] for part in groups) == pytest.approx(parts["network, whole graph"]["gflop"], rel=1e-3)
    assert all(part["limited_by"] in ("arithmetic", "memory") and part["in_words"] for part in parts.values())


def test_a_graph_is_counted_node_by_node(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from benchmarks.onnx_count import count_graph, total

    helper, f32 = onnx.helper, onnx.TensorProto.FLOAT
    x = helper.make_tensor_value_info("x", f32, ["n", 2, 8, "w"])
    y = helper.make_tensor_value_info("y", f32, ["n", 4, 8, 5])
    conv = onnx.numpy_helper.from_array(np.ones((4, 2, 3, 3), np.float32), "conv")
    right = onnx.numpy_helper.from_array(np.ones((6, 5), np.float32), "right")
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["a", "right"], ["b"]),
        helper.make_node("Exp", ["b"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "small", [x], [y], [conv, right])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "small.onnx"))
    counts = count_graph(tmp_path / "small.onnx", {"x": (1, 2, 8, 6)})
    assert counts["conv"].flops == 2 * (4 * 8 * 6) * (2 * 3 * 3)
    assert counts["conv"].n_bytes == 4 * (2 * 8 * 6 + 4 * 2 * 9 + 4 * 8 * 6)
    assert counts["matmul"].flops == 2 * (4 * 8 * 5) * 6
    assert counts["elementwise"].flops == 4 * 8 * 5
    assert total(counts).n_nodes == 3


# The verdicts


def made_of(samples: list[float], unit: str = "ms", **settings: Any) -> dict[str, Any]:
    """Return a record with one figure."""
    results = [{"case": "one", "warm": spread(samples, unit)}]
    return {"benchmark": "b", "device": {"cpu": "c"}, "settings": settings, "results": results}


def verdicts(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str]]:
    """Return verdict and reason of each figure."""
    return [(row.verdict, row.why) for row in compare.compare(a, b)]


def test_verdicts_respect_noise() -> None:
    rng = np.random.default_rng(0)
    quiet = rng.normal(100, 1, 30).tolist()
    loud = rng.normal(100, 30, 30).clip(10).tolist()
    half = [value / 2 for value in quiet]
    assert verdicts(made_of(quiet), made_of(half)) == [("faster", "")]
    assert verdicts(made_of(half), made_of(quiet)) == [("slower", "")]
    assert verdicts(made_of(half, "per_s"), made_of(quiet, "per_s")) == [("faster", "")]
    assert verdicts(made_of(quiet), made_of([value * 1.001 for value in quiet])) == [("no difference seen", "")]
    assert verdicts(made_of(loud), made_of([value * 1.05 for value in loud])) == [("no difference seen", "")]
    assert verdicts(made_of([1.0, 2.0]), made_of([3.0, 4.0])) == [("too few repeats: no verdict", "")]


def test_what_cannot_be_compared_says_why() -> None:
    a = made_of([1.0] * 9, matrix=256)
    ((verdict, why),) = verdicts(a, made_of([1.0] * 9, matrix=320))
    assert verdict == "not comparable"
    assert "matrix 256 in A, 320 in B" in why
    ((verdict, why),) = verdicts(a, {**a, "device": {"cpu": "d"}})
    assert (verdict, "another device" in why) == ("not comparable", True)
    assert verdicts(a, {**a, "results": []}) == [("not comparable", "record B lacks it")]
    assert verdicts(a, {**a, "benchmark": "c"})[0][0] == "not comparable"


@pytest.mark.parametrize(
    "path", sorted((Path(compare.__file__).parent / "results").glob("*.json")), ids=lambda p: p.stem
)
def test_records_of_old_are_read(path: Path) -> None:
    old = json.loads(path.read_text())
    rows = list(compare.compare(old, old))
    assert rows
    assert {row.verdict for row in rows} <= {compare.ONE, compare.FEW, compare.SAME}


def test_slower_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, factor in zip(paths, (1, 2), strict=True):
        made = made_of([factor * (10 + k / 10) for k in range(9)])
        path.write_text(json.dumps({**made, "at": "2020-01-01T00:00:00", "commit": "0"}))
    words = [*map(str, paths), "--png", str(tmp_path / "c.png"), "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    compare.main()
    assert "1 slower" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text())[0]["verdict"] == "slower"
    monkeypatch.setattr(sys, "argv", ["compare", *words, "--fail-on-slower"])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 1


# Pictures and records


def test_charts_hold_any_numbers(tmp_path: Path) -> None:
    panels = [
        Bars("none", [], "ms"),
        Bars("zero", [("a", stacked({"x": 0.0}))], "ms"),
        Bars("some", [("a", stacked({"x": 1e-3, "y": 1e5}))], "ms", ["much"]),
        Curves("nothing", {}, "x", "y"),
        Curves("one point", {"a": [(3.0, 5.0)]}, "x", "y"),
        Curves("decades", {"a": [(1.0, 1e-3), (1e4, 1e4)], "b": [(7.0, 2.0)]}, "x", "y", log_y=False),
    ]
    write_chart(tmp_path / "chart.png", "title – ≥ σ", panels, "subtitle", "footer")
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.mode == "RGB"


@pytest.mark.parametrize("most", [0.003, 1.0, 7.3, 99.0, 12500.0])
def test_ticks_are_round_and_few(most: float) -> None:
    ticks = linear_ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] <= most * 1.000001
    assert 4 <= len(ticks) <= 9


def test_a_record_names_the_machine_and_nobody(tmp_path: Path) -> None:
    made = record.make_record("b", {}, {"samples_ms": [1.5, 2.25, -3e-05]})
    assert made["device"]["cores"] >= 1
    record.write_record(made, tmp_path / "r.json")
    content = (tmp_path / "r.json").read_text()
    assert '"samples_ms": [1.5, 2.25, -3e-05]' in content
    assert json.loads(content) == made
