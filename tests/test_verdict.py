"""What a verdict does: early events, the report, which series leads, what DICOM says, the note that asks to rescan."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from edge.chain import Chain
from edge.dicom_quality import quality_note
from edge.exam import Exam
from edge.exam_triage import NOT_YET, ExamTriage, triage_report
from edge.header import read_header
from edge.mrd import NOISE, Readout
from edge.rawfile import RawFile, open_raw
from edge.recon_file import readouts
from edge.results import Results
from edge.simulate import simulate_file
from edge.supply import Supply
from edge.verdict import Handling, Watch, quality_json, summary, verdict_of
from recon.line_faults import Kind, LineFault, LineReport
from recon.protocol import Protocol
from recon.quality import Advice, Level, Reason, Verdict
from recon.scan import ImageKey, Volume
from tests.fake_triage import fake_model
from tests.test_chain import Halving
from tests.test_dicom import EXAM, MEASURED, RECEIVED, SCAN, small
from triage.assess import Site, Tools

MOTION = Reason(
    "motion", "the head moved by 4.1 mm from readout 90 on; 2 is the most", "motion", 4.1, 2.0, Level.UNTRUSTED
)
REPEAT = Advice(True, "the whole series", MOTION.words, 123.4)
BAD = Verdict(Level.UNTRUSTED, (MOTION,), REPEAT, {"motion": 4.1, "residual": float("nan")})
GOOD = Verdict(Level.TRUSTED, (), Advice(False))


@pytest.fixture
def raw(small_scan: Path) -> RawFile:
    return open_raw(small_scan)


def imaging(stream: list[Readout]) -> list[int]:
    return [number for number, each in enumerate(stream) if not int(each.header["flags"]) & NOISE]


def spoiled(stream: list[Readout], numbers: list[int]) -> list[Readout]:
    """The readouts with a NaN in those of these numbers."""
    out = list(stream)
    for number in numbers:
        samples = np.array(out[number].samples)
        samples[0, 0] = np.nan
        out[number] = out[number]._replace(samples=samples)
    return out


def run(raw: RawFile, folder: Path, stream: list[Readout], **options: Any) -> dict[str, Any]:
    scan, exam = read_header(raw.header, "0" * 26)
    chain = Chain(Results(folder, scan, exam, RECEIVED), **options)
    for readout in stream:
        chain.feed(readout)
    chain.finish("complete", "", lambda: stream)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def test_a_clean_scan_keeps_an_open_verdict_and_leaves_no_note(raw: RawFile, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    report = run(raw, tmp_path, list(readouts(raw)), network=Halving(), on_fault=told.append)
    assert report["quality"] == {"verdict": None, "reasons": [], "advice": None, "measures": {}}
    assert not told
    assert not (tmp_path / "dicom" / "quality_note.dcm").exists()
    header = dcmread(next((tmp_path / "dicom" / "network").iterdir()))
    assert "Verdict" not in header.DerivationDescription


def test_one_lost_line_degrades_and_is_announced_while_the_scan_runs(raw: RawFile, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    stream = list(readouts(raw))
    number = imaging(stream)[5]
    report = run(raw, tmp_path, spoiled(stream, [number]), network=Halving(), on_fault=told.append)
    assert [(each["fault"], each["order"], each["early"]) for each in told[:1]] == [("not-finite", number, True)]
    quality = report["quality"]
    assert quality["verdict"] == "degraded"
    reason = quality["reasons"][0]
    assert (reason["code"], reason["lines"], reason["value"], reason["threshold"]) == ("not-finite", [number], 1, 0)
    assert not any(each["code"] == "left-out" for each in quality["reasons"])  # one fault is one reason
    assert quality["advice"]["repeat"]
    assert quality["advice"]["cost_s"] > 0
    assert report["volumes"][0]["series"] == "network"
    header = dcmread(next((tmp_path / "dicom" / "network").iterdir()))
    assert "Verdict on the scan: degraded: 1 of" in header.DerivationDescription


def test_of_an_untrusted_scan_the_classical_series_leads(raw: RawFile, tmp_path: Path) -> None:
    stream = list(readouts(raw))
    rows = [int(each.header["idx"]["kspace_encode_step_1"]) for each in stream]
    lost = [number for number in imaging(stream) if rows[number] in (6, 10, 14)]  # of each slice; none that calibrates
    report = run(raw, tmp_path, spoiled(stream, lost), network=Halving())
    assert report["quality"]["verdict"] == "untrusted"
    (volume,) = report["volumes"]
    assert (volume["series"], volume["network"]["file"], volume["network"]["series"]) == (
        "classical", "network.npy", "network",
    )  # fmt: skip
    lead, classical, network = (np.load(tmp_path / f"{name}.npy") for name in ("volume", "classical", "network"))
    np.testing.assert_array_equal(lead, classical)
    assert not np.array_equal(network, classical)
    assert report["findings"]
    assert {(each["state"], each["why"]) for each in report["findings"]} == {("not assessed", NOT_YET)}
    header = dcmread(next((tmp_path / "dicom" / "network").iterdir()))
    assert header.SeriesDescription.startswith("Scanside network [untrusted]")
    assert "untrusted" in header.DerivationDescription
    assert (tmp_path / "dicom" / "quality_note.dcm").exists()


def test_volumes_before_the_fault_carry_the_verdict_too(raw: RawFile, tmp_path: Path) -> None:
    stream = list(readouts(raw))
    second = [each._replace(header=each.header.copy()) for each in stream]
    for each in second:
        each.header["idx"]["contrast"] = 1
    spoilt = spoiled(second, imaging(second)[1::6])
    report = run(raw, tmp_path, [*stream, *spoilt], network=Halving())
    assert [volume["series"] for volume in report["volumes"]] == ["classical", "classical"]
    np.testing.assert_array_equal(np.load(tmp_path / "volume.npy"), np.load(tmp_path / "classical.npy"))
    run(raw, tmp_path / "clean", stream, network=Halving())
    np.testing.assert_array_equal(np.load(tmp_path / "network.npy"), np.load(tmp_path / "clean" / "volume.npy"))
    for series in ("network", "classical"):
        header = dcmread(next((tmp_path / "dicom" / series).iterdir()))
        assert "Verdict on the scan: untrusted" in header.DerivationDescription


def test_results_forget_a_note_and_a_demoted_series_that_no_longer_hold(tmp_path: Path) -> None:
    results = Results(tmp_path, SCAN, EXAM, RECEIVED)
    pair = {"classical": small(), "network": small(2 * small().data)}
    results.write_volumes(pair, 0, 0, BAD)
    results.write_quality_note(BAD)
    assert (tmp_path / "network.npy").exists()
    said = results.judge_again(0, GOOD)
    results.write_quality_note(GOOD)
    assert said["series"] == "network"
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["classical.npy", "volume.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "volume.npy"), pair["network"].data)
    assert not (tmp_path / "dicom" / "quality_note.dcm").exists()
    header = dcmread(next((tmp_path / "dicom" / "network").iterdir()))
    assert "Verdict on the scan: trusted." in header.DerivationDescription


def test_the_report_holds_every_number_and_only_what_json_can(tmp_path: Path) -> None:
    said = json.loads(json.dumps(quality_json(BAD), allow_nan=False))
    assert said["reasons"][0] == {
        "code": "motion", "words": MOTION.words, "measure": "motion", "value": 4.1, "threshold": 2.0,
        "level": "untrusted", "slices": [], "lines": [],
    }  # fmt: skip
    assert said["advice"] == {"repeat": True, "what": "the whole series", "why": MOTION.words, "cost_s": 123.4}
    assert said["measures"] == {"motion": 4.1, "residual": None}
    assert summary(said) == f"untrusted: {MOTION.words}"
    assert summary(quality_json(GOOD)) == "trusted"
    assert summary(quality_json(None)) == ""


def test_an_untrusted_scan_is_not_assessed_whoever_could(tmp_path: Path) -> None:
    results = Results(tmp_path, SCAN, EXAM)
    nobody = ExamTriage(Tools(()), Site())
    for triage in (nobody, ExamTriage(Tools((fake_model(),)), Site())):
        found = triage_report(triage, results, quality_json(BAD))["findings"]
        assert {each["state"] for each in found} == {"not assessed"}
        assert {each["why"] for each in found} == {f"the scan is untrusted: {MOTION.words}"}
    assert "triage network" in triage_report(nobody, results, quality_json(GOOD))["findings"][0]["why"]


def report_of(*faults: LineFault, n_readouts: int = 100, duration_s: float | None = None) -> LineReport:
    keys = [ImageKey(0, number, 0, 0, 0, 0) for number in range(2)]
    counts = Counter(fault.kind for fault in faults)
    return LineReport(faults, counts, n_readouts, {key: np.ones((1, 50), bool) for key in keys}, duration_s)


def fault_of(kind: Kind, number: int | None = 0, from_start: bool = False) -> LineFault:
    key = None if number is None else ImageKey(0, number, 0, 0, 0, 0)
    return LineFault(kind, key, 3, 7, 1, 5.0, 1.0, f"a {kind.value} in words", from_start)


def test_levels_follow_from_what_a_fault_does_to_the_image() -> None:
    def level(*faults: LineFault) -> Level | None:
        verdict = verdict_of(SCAN, report_of(*faults), Handling())
        return None if verdict is None else verdict.level

    assert level() is None
    assert level(fault_of(Kind.CALIBRATION)) is Level.UNTRUSTED
    assert level(fault_of(Kind.DEAD_COIL)) is Level.UNTRUSTED
    assert level(fault_of(Kind.DEAD_COIL, from_start=True)) is Level.DEGRADED
    assert level(*[fault_of(Kind.NOT_FINITE)] * 5) is Level.DEGRADED
    assert level(*[fault_of(Kind.NOT_FINITE)] * 6) is Level.UNTRUSTED
    for kind in (Kind.SPIKE, Kind.CLIPPED, Kind.DUPLICATE, Kind.SAMPLING, Kind.GAIN_JUMP, Kind.INTERFERENCE):
        assert level(fault_of(kind)) is Level.DEGRADED


@settings(deadline=None)
@given(st.lists(st.sampled_from(list(Kind)), min_size=1, max_size=20), st.booleans())
def test_any_mixture_of_faults_gives_a_verdict_with_a_reason_each(kinds: list[Kind], is_timed: bool) -> None:
    report = report_of(*(fault_of(kind) for kind in kinds), duration_s=60.0 if is_timed else None)
    verdict = verdict_of(SCAN, report, Handling())
    assert verdict is not None
    assert {reason.code for reason in verdict.reasons} == {kind.value for kind in kinds}
    assert any(reason.level is verdict.level for reason in verdict.reasons)
    if verdict.advice.repeat:
        assert verdict.advice.why
        # The header's TR of 4 s times the 50 lines of an image, where no time stamps tell.
        assert verdict.advice.cost_s == pytest.approx(60.0 if is_timed else 200.0)
    json.dumps(quality_json(verdict), allow_nan=False)


def test_advice_names_the_slices_and_repeats_nothing_in_vain() -> None:
    one = verdict_of(SCAN, report_of(fault_of(Kind.SPIKE, 1)), Handling())
    assert one is not None
    assert one.advice.what == "slice 1"
    both = verdict_of(SCAN, report_of(fault_of(Kind.SPIKE, 1), fault_of(Kind.SPIKE, 0)), Handling())
    assert both is not None
    assert both.advice.what == "the whole series"
    vain = verdict_of(SCAN, report_of(fault_of(Kind.SAMPLING)), Handling())
    assert vain is not None
    assert not vain.advice.repeat
    cut = verdict_of(SCAN, report_of(), Handling(Counter({"compressed": 4}), [ImageKey(0, 1, 0, 0, 0, 0)], "failed"))
    assert cut is not None
    assert [reason.code for reason in cut.reasons] == ["left-out", "set-aside", "interrupted"]


def test_a_broken_scanner_does_not_flood_those_who_listen(raw: RawFile) -> None:
    told: list[dict[str, Any]] = []
    scan, _ = read_header(raw.header, "0" * 26)
    watch = Watch(scan, None, told.append)
    faults = [replace(fault_of(Kind.NOT_FINITE), order=order) for order in range(1000)]
    for fault in faults:
        watch._tell([fault, fault_of(Kind.SPIKE)])
    assert 2 <= len(told) <= 6  # one of each kind, and perhaps those of a second or two on a busy machine
    assert {each["fault"] for each in told} == {"not-finite", "spike"}
    assert watch._found == {"not-finite": 1000, "spike": 1000}


def note_of(tmp_path: Path, verdict: Verdict, exam: Exam, received_at: datetime | None) -> Path:
    images = [("network", 0, 3), ("classical", 0, 3)]
    path = tmp_path / "quality_note.dcm"
    path.write_bytes(quality_note(verdict, images, SCAN, exam, received_at))
    return path


def test_the_note_names_the_images_the_cause_and_the_advice(tmp_path: Path) -> None:
    spikes = Reason("spike", "readout 9 has a spike", "spike", 90.0, 30.0, Level.DEGRADED, (1,), (9,))
    verdict = Verdict(Level.DEGRADED, (spikes,), Advice(True, "slice 1", spikes.words, 60.0))
    note = dcmread(note_of(tmp_path, verdict, EXAM, RECEIVED))
    assert note.ConceptNameCodeSequence[0].CodeValue == "113010"
    items = note.ContentSequence
    codes = [item.ConceptCodeSequence[0].CodeValue for item in items if item.ValueType == "CODE"]
    assert codes == ["111207", "121007"]
    (text,) = [item.TextValue for item in items if item.ValueType == "TEXT"]
    assert "slice 1" in text
    assert "60 s" in text
    shown = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items if item.ValueType == "IMAGE"]
    series = note.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    listed = [each.ReferencedSOPInstanceUID for one in series for each in one.ReferencedSOPSequence]
    assert shown == listed
    assert len(shown) == 2  # slice 1 of either series
    all_of_them = dcmread(note_of(tmp_path, BAD, EXAM, RECEIVED))
    assert sum(item.ValueType == "IMAGE" for item in all_of_them.ContentSequence) == 6
    with pytest.raises(ValueError, match="no image"):
        quality_note(BAD, [], SCAN, EXAM, RECEIVED)


def test_the_note_refers_to_the_files_that_were_written(tmp_path: Path) -> None:
    volume: Volume = small(provenance=MEASURED)
    results = Results(tmp_path, SCAN, EXAM, RECEIVED)
    results.write_volumes({"classical": volume}, 0, 0, BAD)
    results.write_quality_note(BAD)
    note = dcmread(tmp_path / "dicom" / "quality_note.dcm")
    images = [dcmread(path) for path in sorted((tmp_path / "dicom" / "classical").glob("*.dcm"))]
    evidence = note.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.StudyInstanceUID == note.StudyInstanceUID == images[0].StudyInstanceUID
    (series,) = evidence.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == images[0].SeriesInstanceUID
    assert [each.ReferencedSOPInstanceUID for each in series.ReferencedSOPSequence] == [
        i.SOPInstanceUID for i in images
    ]


@pytest.mark.peer
@pytest.mark.parametrize("received_at", [None, RECEIVED, datetime(2026, 1, 2, tzinfo=timezone.utc)])
@pytest.mark.parametrize("exam", [EXAM, Exam()], ids=["full", "empty"])
def test_dciodvfy_finds_no_error_in_the_note(tmp_path: Path, exam: Exam, received_at: datetime | None) -> None:
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy is not installed")
    path = note_of(tmp_path, BAD, exam, received_at)
    done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False, timeout=60)
    lines = (done.stdout + done.stderr).splitlines()
    assert any("KeyObjectSelectionDocument" in line for line in lines), lines
    assert not [line for line in lines if line.startswith("Error")]


def moving(folder: Path, motion_mm: float) -> RawFile:
    """A scan of the simulated head, which moves half way through each slice."""
    protocol = Protocol(matrix=(128, 128), n_slices=2, n_coils=8, acceleration=2, snr=40.0)
    protocol = replace(protocol, motion_mm=motion_mm, motion_deg=motion_mm / 2)
    simulate_file(folder / "scan.h5", protocol, seed=11)
    return open_raw(folder / "scan.h5")


def scanned(folder: Path, told: list[dict[str, Any]], motion_mm: float) -> dict[str, Any]:
    """The report on such a scan by the network that is shipped; what was announced goes to `told`."""
    raw = moving(folder, motion_mm)
    network = Supply(backend="cpu").network()
    return run(raw, folder / "out", list(readouts(raw)), network=network, on_fault=told.append)


def test_a_clean_scan_is_trusted_by_its_slices(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    quality = scanned(tmp_path, told, 0.0)["quality"]
    assert (quality["verdict"], quality["reasons"], quality["advice"]["repeat"]) == ("trusted", [], False)
    assert {"held_out", "inconsistency", "novelty", "odds", "snr", "g_mean"} <= set(quality["measures"])
    assert not told


def test_a_head_that_moves_is_not_trusted_and_is_announced_with_its_lines(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    quality = scanned(tmp_path, told, 6.0)["quality"]
    assert quality["verdict"] in ("degraded", "untrusted")
    motion = next(reason for reason in quality["reasons"] if reason["code"] == "motion")
    assert motion["value"] > motion["threshold"]
    assert motion["lines"][0] > 0
    early = next(fault for fault in told if fault["fault"] == "motion")
    assert early["early"]
    assert early["order"] in motion["lines"]


def test_a_coil_that_only_the_image_shows_to_be_dead_is_announced_and_belies_the_scan(tmp_path: Path) -> None:
    raw = moving(tmp_path, 0.0)
    lines = list(readouts(raw))
    noise = next(each.samples for each in lines if int(each.header["flags"]) & NOISE)
    rng = np.random.default_rng(5)
    for number in range(len(lines) - 28, len(lines)):  # behind the centre of k-space, where no line stands out
        samples = lines[number].samples.copy()
        samples[3] = rng.permutation(noise[3])[: samples.shape[1]]
        lines[number] = lines[number]._replace(samples=samples)
    told: list[dict[str, Any]] = []
    quality = run(raw, tmp_path / "out", lines, network=Supply(backend="cpu").network(), on_fault=told.append)[
        "quality"
    ]
    (reason,) = [each for each in quality["reasons"] if each["code"] == "dead-coil"]
    assert "of what the image lets expect of it" in reason["words"]
    assert (quality["verdict"], reason["level"]) == ("untrusted", "untrusted")
    assert reason["lines"] == [len(lines) - 28]
    assert [(each["coil"], each["order"]) for each in told if each["fault"] == "dead-coil"] == [(3, len(lines) - 28)]


def test_slices_are_judged_when_no_image_waits(tmp_path: Path) -> None:
    raw = moving(tmp_path, 6.0)
    scan, exam = read_header(raw.header, "0" * 26)
    told: list[dict[str, Any]] = []
    images: list[str] = []
    chain = Chain(
        Results(tmp_path / "out", scan, exam, RECEIVED),
        network=Supply(backend="cpu").network(),
        on_fault=told.append,
        on_image=lambda image: images.append(image.series),
    )
    for readout in readouts(raw):
        chain.feed(readout)
    assert len(images) == 4
    assert not told
    assert "judge" not in chain.clock.ms
    while chain.work_ahead():
        pass
    assert "motion" in {fault["fault"] for fault in told}
