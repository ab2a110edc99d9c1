"""Super-resolved volumes from a file and from the daemon: written beside the measured ones, marked, read by nobody."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest

from edge.chain import Chain
from edge.child import DaemonProcess
from edge.command import main
from edge.dicom_read import read_series
from edge.exam_triage import contrast_of_scan
from edge.header import read_header
from edge.mrd_write import encode_header
from edge.rawfile import open_raw
from edge.recon_file import readouts
from edge.results import Results
from edge.simulate import simulate_file
from edge.spool import Spool
from edge.super_resolution import Choice, super_resolve_scan
from edge.superres_job import MOST_ATTEMPTS, end_job, jobs, leave_job
from edge.superres_model import SUPER_RESOLUTION, open_refiner
from recon.errors import AcquisitionError, ModelError
from recon.fine_grid import band_axis, kept_axis, profile_axis
from recon.fourier import resize_centred, to_kspace
from recon.protocol import Protocol
from recon.superres import network_inputs
from recon.superres_card import Refiner
from tests.test_daemon import Listener, replay

HEAD = Protocol(matrix=(96, 96), n_slices=5, n_coils=4, acceleration=1, n_calibration=24, gap_mm=0.5)


@pytest.fixture(scope="module")
def refiner() -> Refiner:
    return open_refiner()


@pytest.fixture(scope="module")
def head_scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated FLAIR head of 5 slices that touch."""
    path = tmp_path_factory.mktemp("scans") / "head.h5"
    simulate_file(path, HEAD, "none", 3)
    return path


@pytest.fixture(scope="module")
def made(head_scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of `scanside recon --super-resolve`."""
    out = tmp_path_factory.mktemp("out")
    words = ["recon", str(head_scan), "--out", str(out), "--super-resolve", "--seven-tesla-style", "0.5"]
    assert main(words) == 0
    return out


@pytest.mark.parametrize("axes", [(band_axis(60), band_axis(51)), (profile_axis(9, 3), kept_axis(50))])
def test_the_shipped_graph_puts_measured_content_back(refiner: Refiner, axes: tuple) -> None:
    y, x = axes
    rng = np.random.default_rng(0)
    image = rng.random((1, y.place.shape[1], x.place.shape[1])).astype(np.float32)
    out = refiner.network.run(network_inputs(image, y, x, 0.02))
    added = out["added"][0, 0, : y.size, : x.size].astype(np.float64)
    kept = y.basis[: y.size].T.astype(np.float64) @ added @ x.basis[: x.size]
    assert np.linalg.norm(kept) < 1e-5 * np.linalg.norm(image)
    if x.factor == 2:
        fine = (out["placed"][0, 0, : y.size, : x.size] + added).astype(np.complex128)
        found = resize_centred(resize_centred(to_kspace(fine, (0, 1)) / 2, 0, 60), 1, 51)
        wanted = to_kspace(image[0].astype(np.complex128), (0, 1))
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_it_lies_beside_the_measured_volume(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    (said,) = report["super_resolution"]
    assert said["state"] == "made", said
    assert said["in_band_difference"] < 1e-5
    assert 0 < said["estimated"]["share_of_energy"] < 0.05
    fine, measured = np.load(made / said["file"]), np.load(made / "volume.npy")
    assert fine.shape == (5, 192, 192)
    assert fine.dtype == np.float32
    assert measured.shape == (5, 96, 96)
    assert report["volumes"][0]["method"] in ("network", "sense")  # what leads is measured
    assert np.load(made / said["estimated"]["file"]).shape == fine.shape
    assert np.load(made / said["style"]["file"]).shape == fine.shape
    assert (made / said["preview"]).stat().st_size > 1000


def test_its_series_are_marked_synthetic_and_triage_refuses_them(made: Path, tmp_path: Path) -> None:
    for name in ("super-resolved", "super-resolved-style"):
        files = sorted((made / "dicom" / name).glob("*.dcm"))
        assert len(files) == 5
        header = pydicom.dcmread(files[0])
        assert header.SyntheticData == "YES"
        assert header.SeriesDescription.startswith("AI-SR – not for diagnostic use")
        assert header.DerivationDescription.startswith("Detail beyond the measured resolution was added")
        assert "Not for diagnostic use" in header.DerivationDescription
        assert header.MagneticFieldStrength == pytest.approx(3, abs=0.2)
        purposes = {each.PurposeOfReferenceCodeSequence[0].CodeValue for each in header.ContributingEquipmentSequence}
        assert purposes == {"109100", "109102"}
        (series,) = read_series(made / "dicom" / name)
        assert not isinstance(series, AcquisitionError)
        assert not series.volume.provenance.is_measured
        assert main(["triage", str(made / "dicom" / name), "--out", str(tmp_path / name)]) == 0
        (found,) = json.loads((tmp_path / name / "findings.json").read_text())
        assert all(each["state"] == "not assessed" and "synthetic" in each["why"] for each in found["findings"])


def test_series_and_instances_are_its_own(made: Path) -> None:
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted((made / "dicom").glob("*/*.dcm"))]
    images = [each for each in headers if each.Modality == "MR"]
    assert len({each.SOPInstanceUID for each in images}) == len(images)
    series = {each.SeriesInstanceUID for each in images}
    assert len(series) == len({each.SeriesNumber for each in images}) == len(list((made / "dicom").glob("*/0001.dcm")))
    assert len({each.StudyInstanceUID for each in images}) == 1


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
@pytest.mark.parametrize("name", ["super-resolved", "super-resolved-style"])
def test_dciodvfy_finds_no_error(made: Path, name: str) -> None:
    file = made / "dicom" / name / "0001.dcm"
    said = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False).stderr
    errors = [line for line in said.splitlines() if line.startswith("Error")]
    # (0008,001C), Synthetic Data, is newer than the program
    assert [line for line in errors if "0x0008,0x001c" not in line] == []


def test_thinner_slices_keep_each_slice(head_scan: Path, tmp_path: Path) -> None:
    assert main(["recon", str(head_scan), "--out", str(tmp_path), "--super-resolve", "--thin-slices", "2"]) == 0
    (said,) = json.loads((tmp_path / "report.json").read_text())["super_resolution"]
    assert said["shape"] == [10, 192, 192]
    assert said["in_band_difference"] < 1e-5
    assert said["spacing_mm"][0] == pytest.approx(5.5 / 2)
    thick = pydicom.dcmread(tmp_path / "dicom" / "classical" / "0001.dcm", stop_before_pixels=True)
    thin = pydicom.dcmread(tmp_path / "dicom" / "super-resolved" / "0001.dcm", stop_before_pixels=True)
    assert thin.SliceThickness == pytest.approx(2.75)
    assert thin.SliceLocation == pytest.approx(float(thick.SliceLocation) - 5.5 / 4)


@pytest.mark.parametrize(
    "words",
    [
        ["--thin-slices", "2"],
        ["--super-resolve", "--thin-slices", "9"],
        ["--super-resolve", "--seven-tesla-style", "2"],
    ],
)
def test_wrong_use_is_exit_code_2(words: list[str], head_scan: Path, tmp_path: Path) -> None:
    assert main(["recon", str(head_scan), "--out", str(tmp_path), *words]) == 2


def test_weights_that_are_not_the_cards_are_refused(tmp_path: Path) -> None:
    shutil.copytree(SUPER_RESOLUTION, tmp_path / "model")
    with (tmp_path / "model" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match="not the same file"):
        open_refiner(tmp_path / "model")
    with pytest.raises(ModelError, match=r"lacks card\.json"):
        open_refiner(tmp_path / "none")


def chained(head_scan: Path, folder: Path, scan_id: str) -> Results:
    """Return the results of a classical reconstruction."""
    raw = open_raw(head_scan)
    scan, exam = read_header(raw.header, scan_id)
    results = Results(folder, scan, exam)
    chain = Chain(results, method="sense")
    for readout in readouts(raw):
        chain.feed(readout)
    chain.finish("complete", "", lambda: readouts(raw))
    return results


def test_what_cannot_be_made_is_reported_with_why(head_scan: Path, tmp_path: Path, refiner: Refiner) -> None:
    results = chained(head_scan, tmp_path, "0" * 26)
    assert contrast_of_scan(results) == "flair"
    (said,) = super_resolve_scan(results, refiner, Choice(), "untrusted")
    assert (said["state"], said["why"]) == ("refused", "the scan is untrusted")
    (said,) = super_resolve_scan(results, ModelError("no network"), Choice(), "")
    assert (said["state"], said["why"]) == ("refused", "no network")
    picky = replace(refiner, card=replace(refiner.card, contrasts=("t2",)))
    (said,) = super_resolve_scan(results, picky, Choice(), "")
    assert "the contrast is flair" in said["why"]
    assert not list(tmp_path.glob("super_resolved*"))


def test_a_job_outlives_its_process_and_gives_the_same_files(head_scan: Path, tmp_path: Path, refiner: Refiner) -> None:
    spool = Spool(tmp_path / "spool")
    writer = spool.create()
    writer.append(encode_header(open_raw(head_scan).header))
    writer.finish("complete")
    results = chained(head_scan, tmp_path / "results", writer.scan_id)
    super_resolve_scan(results, refiner, Choice(), "trusted")
    first = (tmp_path / "results" / "dicom" / "super-resolved" / "0001.dcm").read_bytes()
    shutil.rmtree(tmp_path / "results" / "dicom" / "super-resolved")

    received = replace(results, received_at=datetime(2024, 1, 2, 3, 4, 5))
    leave_job(tmp_path / "jobs", received, spool.path(writer.scan_id), "trusted")
    (job,) = jobs(tmp_path / "jobs")
    assert job.scan_id == writer.scan_id
    recalled = replace(job.results(), received_at=None)
    assert job.verdict == "trusted"
    super_resolve_scan(recalled, refiner, Choice(), job.verdict)
    assert (tmp_path / "results" / "dicom" / "super-resolved" / "0001.dcm").read_bytes() == first
    for _ in range(MOST_ATTEMPTS):
        (job,) = jobs(tmp_path / "jobs")
        assert job.begin()
    (job,) = jobs(tmp_path / "jobs")
    assert not job.begin()
    job.settle()
    (job,) = jobs(tmp_path / "jobs")
    assert job.begin()
    end_job(tmp_path / "jobs", job.scan_id)
    assert not list(jobs(tmp_path / "jobs"))


def test_the_daemon_makes_it_last_and_shows_what_it_is(head_scan: Path, tmp_path: Path) -> None:
    config = tmp_path / "scanside.toml"
    config.write_text("[super_resolution]\nenabled = true\n[worker]\nmethod = 'sense'\n")
    with DaemonProcess(tmp_path / "state", tmp_path / "log", ["--config", str(config)]) as daemon:
        heard = Listener(daemon.events)
        try:
            replayed = replay(open_raw(head_scan), daemon)
            (done,) = heard.wait("scan.super-resolved")
        finally:
            heard.close()
    assert [each["state"] for each in done["volumes"]] == ["made"]
    kinds = [(header["kind"], header.get("series")) for header, _ in heard.events]
    fine = [i for i, kind in enumerate(kinds) if kind == ("image", "super-resolved")]
    assert len(fine) == 5
    assert min(fine) > kinds.index(("scan.done", None)) > kinds.index(("findings", None))
    header, payload = heard.events[fine[2]]
    assert header["is_synthetic"]
    folder = tmp_path / "state" / "results" / done["scan_id"]
    assert payload is not None
    pixels = np.frombuffer(payload, "<f4").reshape(header["shape"])
    np.testing.assert_array_equal(pixels, np.load(folder / "super_resolved.npy")[2])
    assert len(replayed.images) == 5  # the scanner was not kept waiting for it
    report = json.loads((folder / "report.json").read_text())
    assert report["super_resolution"][0]["state"] == "made"
    assert not list((tmp_path / "state" / "super_resolution").glob("*.json"))


def test_a_daemon_that_was_killed_makes_what_waited(head_scan: Path, tmp_path: Path) -> None:
    config = tmp_path / "scanside.toml"
    config.write_text("[super_resolution]\nenabled = true\n[worker]\nmethod = 'sense'\n")
    arguments = ["--config", str(config)]
    state = tmp_path / "state"
    with DaemonProcess(state, tmp_path / "log", arguments) as daemon:
        heard = Listener(daemon.events)
        replay(open_raw(head_scan), daemon)
        heard.wait("scan.done")
        daemon.kill()
        heard.close()
    with DaemonProcess(state, tmp_path / "log", arguments) as daemon:
        heard = Listener(daemon.events)
        try:
            if list((state / "super_resolution").glob("*.json")):  # it may have been quick
                heard.wait("scan.super-resolved")
        finally:
            heard.close()
    (report,) = state.glob("results/*/report.json")
    assert json.loads(report.read_text())["super_resolution"][0]["state"] == "made"
