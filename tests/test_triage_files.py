"""`scanside triage` on files of others: NIfTI and DICOM in, findings, report, segments and heat maps out."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread

import edge.triage_file
from edge.command import main
from edge.contrast_name import contrast_of_timing, contrast_of_words
from edge.dicom import write_series
from edge.dicom_read import DicomSeries, read_series
from edge.dicom_sr import SCHEME
from edge.nifti import read_nifti
from recon.errors import AcquisitionError
from recon.quality import Advice, Level, Reason, Verdict
from recon.scan import Geometry, Volume
from tests.fake_triage import fake_model, head
from tests.letter import letter_intensity
from tests.test_dicom import EXAM, PLANES, RECEIVED, SCAN, letter_at
from triage.assess import Tools
from triage.findings import LABELS

TOOLS = Tools(tuple(fake_model(label, ("flair", "t2")) for label in LABELS))


@pytest.fixture(autouse=True)
def _networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.triage_file, "open_tools", lambda folder: (TOOLS, ()))


def write_nifti(path: Path, volume: Volume, order: tuple[int, int, int] = (2, 1, 0), coded: bool = True) -> Path:
    """Write a volume with its axes in `order` (2, 1, 0: x, y, slice)."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.geometry.affine()  # of (x, y, slice)
    data = volume.data.transpose(order)
    image = nibabel.Nifti1Image(data, affine[:, [2 - axis for axis in order] + [3]])
    image.header.set_qform(image.affine, code=1 if coded else 0)
    image.header.set_sform(image.affine, code=1 if coded else 0)
    nibabel.save(image, path)
    return path


def write_dicom(folder: Path, volume: Volume, protocol: str = "flair_tra", **kwargs: Any) -> Path:
    scan = replace(SCAN, protocol=protocol)
    exam = replace(EXAM, series_description=protocol)
    write_series(volume, scan, exam, "network", folder, series_number=1, received_at=RECEIVED, **kwargs)
    return folder


def triage(out: Path, *words: str | Path) -> list[dict[str, Any]]:
    assert main(["triage", *map(str, words), "--out", str(out)]) == 0
    found: list[dict[str, Any]] = json.loads((out / "findings.json").read_text())
    return found


# --- what can be read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_a_nifti_file_lies_where_it_should(plane: str, order: tuple[int, int, int], tmp_path: Path) -> None:
    volume = letter_at(plane)
    read = read_nifti(write_nifti(tmp_path / "letter.nii.gz", volume, order))
    assert read.data.shape in (volume.data.shape, (23, *volume.data.shape[:0:-1]))
    g = read.geometry
    z, y, x = np.indices(read.data.shape)
    points = (
        g.origin_mm[z]
        + y[..., None] * np.asarray(g.col_dir) * g.spacing_mm[1]
        + x[..., None] * np.asarray(g.row_dir) * g.spacing_mm[2]
    )
    assert np.abs(letter_intensity(points) - read.data).mean() < 1e-3  # voxels on an edge may fall on its other side
    assert g.spacing_mm[0] == pytest.approx(7.0)
    assert g.is_known


def test_one_slice_and_no_orientation(tmp_path: Path) -> None:
    assert read_nifti(write_nifti(tmp_path / "a.nii", head(1))).data.shape == head(1).data.shape
    plain = nibabel.Nifti1Image(np.ones((5, 6), np.float32), None)
    nibabel.save(plain, tmp_path / "b.nii")
    read = read_nifti(tmp_path / "b.nii")
    assert read.data.shape == (1, 6, 5)
    assert not read.geometry.is_known


def test_what_is_no_nifti_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.nii", b"nothing"), ("b.nii.gz", b"\x1f\x8b\x08nothing")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AcquisitionError):
            read_nifti(tmp_path / name)


@pytest.mark.parametrize("plane", PLANES)
def test_a_dicom_series_comes_back(plane: str, tmp_path: Path) -> None:
    volume = letter_at(plane)
    (read,) = read_series(write_dicom(tmp_path, volume))
    assert isinstance(read, DicomSeries)
    order = np.argsort(volume.geometry.origin_mm @ volume.geometry.normal)
    np.testing.assert_allclose(read.volume.data, volume.data[order], atol=1e-4)
    np.testing.assert_allclose(read.volume.geometry.origin_mm, volume.geometry.origin_mm[order], atol=1e-6)
    assert read.contrast == "flair"
    assert read.volume.provenance.is_measured


def test_a_gap_in_a_series_is_an_error(tmp_path: Path) -> None:
    (write_dicom(tmp_path, head()) / "0006.dcm").unlink()
    (read,) = read_series(tmp_path)
    assert isinstance(read, AcquisitionError)
    assert "missing" in str(read)


@pytest.mark.parametrize(
    ("words", "contrast"),
    [
        ("msLong01_FLAIR-s1.nii.gz", "flair"),
        ("Ax T2 FLAIR", "flair"),
        ("t2_tse_dark-fluid", "flair"),
        ("x_T1w-Gd.nii", "t1ce"),
        ("t1_mprage_post", "t1ce"),
        ("tumour_t1c_01", "t1ce"),
        ("T1w", "t1"),
        ("ep2d_diff_b1000", "dwi"),
        ("ADC map", "adc"),
        ("t2star axial", "swi"),
        ("sub-01_T2w", "t2"),
        ("localizer", ""),
    ],
)
def test_contrast_of_names(words: str, contrast: str) -> None:
    assert contrast_of_words(words) == contrast


@pytest.mark.parametrize(
    ("te", "tr", "ti", "is_gre", "contrast"),
    [(95, 9000, 2430, False, "flair"), (100, 5000, 0, False, "t2"), (12, 600, 0, False, "t1"),
     (20, 700, 0, True, "swi"), (0, 0, 0, False, "")],
)  # fmt: skip
def test_contrast_of_times(te: float, tr: float, ti: float, is_gre: bool, contrast: str) -> None:
    assert contrast_of_timing([te], [tr], [ti] if ti else [], is_gre) == contrast


# --- the command ------------------------------------------------------------------------------------------------------


def test_nifti_in_findings_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bright = write_nifti(tmp_path / "a_FLAIR.nii.gz", head(lesion=2.6))
    plain = write_nifti(tmp_path / "b_flair.nii", head())
    slice_ = write_nifti(tmp_path / "c.nii", head(1))
    records = triage(tmp_path / "out", bright, plain, slice_)
    assert [Path(each["source"]).name for each in records] == ["a_FLAIR.nii.gz", "b_flair.nii", "c.nii"]
    assert [each["contrast"] for each in records] == ["flair", "flair", None]
    assert all(set(each) == {"source", "contrast", "findings", "measurements"} for each in records)
    keys = {"finding", "state", "probability", "conformal", "why", "evidence", "volume_ml", "box_mm", "key_slice"}
    assert all(keys <= set(finding) for each in records for finding in each["findings"])
    assert {finding["state"] for finding in records[0]["findings"]} == {"flagged"}
    assert {finding["state"] for finding in records[1]["findings"]} == {"not flagged"}
    assert {finding["state"] for finding in records[2]["findings"]} == {"not assessed"}
    assert "contrast is not known" in records[2]["findings"][0]["why"]
    assert records[0]["measurements"]["mass_volume_ml"]["side"] == "left"
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 300
    assert "normal" not in capsys.readouterr().out.lower()


def test_a_given_contrast_is_taken_and_an_unsuited_one_said(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "c.nii", head(1, 2.6))
    assert triage(tmp_path / "a", path, "--contrast", "flair")[0]["findings"][0]["state"] == "flagged"
    (record,) = triage(tmp_path / "b", path, "--contrast", "dwi")
    assert {finding["state"] for finding in record["findings"]} == {"not assessed"}
    assert "no suitable contrast" in record["findings"][0]["why"]


def test_wrong_use_and_unreadable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["triage", str(tmp_path / "nothing.nii"), "--out", str(tmp_path)]) == 2
    good = write_nifti(tmp_path / "flair.nii", head(1))
    bad = tmp_path / "bad_flair.nii"
    bad.write_bytes(b"no image")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["triage", str(bad), str(empty), str(good), "--out", str(tmp_path / "out")]) == 1
    records = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert [each["findings"][0]["state"] for each in records] == ["not assessed", "not assessed", "not flagged"]
    said = capsys.readouterr().err
    assert "not a NIfTI file" in said
    assert "no MR images" in said
    assert main(["triage", str(good), "--out", str(tmp_path), "--alpha", "2"]) == 2


def test_a_synthetic_series_is_refused_by_its_tags(tmp_path: Path) -> None:
    write_dicom(tmp_path / "sr", head(lesion=2.6, is_measured=False))
    (record,) = triage(tmp_path / "a", tmp_path / "sr")
    assert {finding["state"] for finding in record["findings"]} == {"not assessed"}
    assert "synthetic" in record["findings"][0]["why"]

    def keep_only(tag: str, value: Any) -> None:
        for path in write_dicom(tmp_path / tag, head(lesion=2.6)).glob("*.dcm"):
            file = dcmread(path)
            setattr(file, tag, value)
            file.save_as(path)

    keep_only("SyntheticData", "YES")
    keep_only("ImageType", ["DERIVED", "PRIMARY", "OTHER", "SUPER_RESOLVED"])
    for tag in ("SyntheticData", "ImageType"):
        assert triage(tmp_path / f"out {tag}", tmp_path / tag)[0]["findings"][0]["state"] == "not assessed"


def test_an_untrusted_series_of_ours_is_refused(tmp_path: Path) -> None:
    reason = Reason("motion", "the head moved", "motion", 4.0, 2.0, Level.UNTRUSTED)
    write_dicom(tmp_path / "in", head(lesion=2.6), verdict=Verdict(Level.UNTRUSTED, (reason,), Advice(True)))
    (record,) = triage(tmp_path / "out", tmp_path / "in")
    assert {finding["state"] for finding in record["findings"]} == {"not assessed"}
    assert "untrusted" in record["findings"][0]["why"]


def test_series_of_one_study_are_one_exam(tmp_path: Path) -> None:
    write_dicom(tmp_path / "in" / "a", head(lesion=2.6), image_index=0)
    write_dicom(tmp_path / "in" / "b", head(), "t2_tra", image_index=1)
    assert len(triage(tmp_path / "out", tmp_path / "in")) == 2
    (exam,) = json.loads((tmp_path / "out" / "exams.json").read_text())
    assert len(exam["sources"]) == 2
    assert {each["contrast"] for each in exam["findings"]} == {"flair"}


# --- DICOM out --------------------------------------------------------------------------------------------------------


def items(container: Dataset) -> Iterator[Dataset]:
    for item in container.get("ContentSequence", []):
        yield item
        yield from items(item)


def meaning(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeMeaning) if "ConceptNameCodeSequence" in item else ""


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    write_dicom(tmp_path / "in", head(lesion=2.6))
    triage(tmp_path / "out", tmp_path / "in", "--research")
    return tmp_path


def test_the_report_gives_the_numbers_back(evidence: Path) -> None:
    (record,) = json.loads((evidence / "out" / "findings.json").read_text())
    report = dcmread(evidence / "out" / "dicom" / "0001" / "findings.dcm")
    flags = (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag)
    assert flags == ("PARTIAL", "UNVERIFIED", "PRELIMINARY")
    assert "SyntheticData" not in report
    groups = [item for item in items(report) if meaning(item) == "Measurement Group"]
    assert len(groups) == len(LABELS)
    for group, finding in zip(groups, record["findings"], strict=True):
        inside = {meaning(item): item for item in group.ContentSequence}
        assert inside["Tracking Identifier"].TextValue == finding["finding"]
        state = inside["Triage state"].ConceptCodeSequence[0]
        assert (state.CodingSchemeDesignator, state.CodeValue) == (SCHEME, "flagged")
        probability = inside["Probability of the finding"]
        assert float(probability.MeasuredValueSequence[0].NumericValue) == finding["probability"]
        assert finding["model_sha256"] in inside["Algorithm Parameters"].TextValue
        volume = inside["Volume"]
        assert float(volume.MeasuredValueSequence[0].NumericValue) == finding["volume_ml"]
        assert volume.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == "ml"
        source = next(item for item in volume.ContentSequence if item.ValueType == "IMAGE")
        images = sorted((evidence / "in").glob("*.dcm"))
        key = dcmread(images[finding["key_slice"]])
        assert source.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == key.SOPInstanceUID
    assert report.StudyInstanceUID == key.StudyInstanceUID
    listed = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert len(listed) == len(images)


def test_segments_and_heat_maps_lie_on_the_images(evidence: Path) -> None:
    folder = evidence / "out" / "dicom" / "0001"
    segments = dcmread(folder / "segments.dcm")
    assert [each.SegmentLabel for each in segments.SegmentSequence] == list(LABELS)
    assert segments.SegmentSequence[0].SegmentAlgorithmType == "AUTOMATIC"
    frames = segments.pixel_array
    assert frames.any(axis=(1, 2)).all()
    first = segments.PerFrameFunctionalGroupsSequence[0]
    z = float(first.PlanePositionSequence[0].ImagePositionPatient[2])
    near = min(head().geometry.origin_mm[:, 2], key=lambda value: abs(value - z))
    assert z == pytest.approx(near, abs=1e-6)
    heat = dcmread(folder / "heat_map_mass.dcm")
    values = np.frombuffer(heat.FloatPixelData, "<f4").reshape(heat.NumberOfFrames, heat.Rows, heat.Columns)
    assert values.shape == head().data.shape
    assert 0.9 < values.max() <= 1
    assert (heat.ContentQualification, segments.ContentQualification) == ("RESEARCH", "RESEARCH")


def test_no_marks_outside_of_research(tmp_path: Path) -> None:
    write_dicom(tmp_path / "in", head(lesion=2.6))
    triage(tmp_path / "out", tmp_path / "in")
    assert [path.name for path in (tmp_path / "out" / "dicom" / "0001").iterdir()] == ["findings.dcm"]


@pytest.mark.peer
@pytest.mark.parametrize("name", ["findings.dcm", "segments.dcm", "heat_map_infarct.dcm"])
def test_dciodvfy_finds_no_error(evidence: Path, name: str) -> None:
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy is not installed")
    path = evidence / "out" / "dicom" / "0001" / name
    done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False, timeout=60)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
    assert not errors, errors


def test_not_assessed_is_in_the_report_too(tmp_path: Path) -> None:
    write_dicom(tmp_path / "in", head(), "localizer")
    triage(tmp_path / "out", tmp_path / "in", "--contrast", "adc")
    report = dcmread(tmp_path / "out" / "dicom" / "0001" / "findings.dcm")
    codes = [i.ConceptCodeSequence[0].CodeValue for i in items(report) if meaning(i) == "Triage state"]
    assert codes == ["not-assessed"] * len(LABELS)


def test_geometry_needs_right_angles(tmp_path: Path) -> None:
    volume = head(3)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.geometry.affine()
    affine[0, 1] = 0.5
    nibabel.save(nibabel.Nifti1Image(volume.data.transpose(2, 1, 0), affine), tmp_path / "skew.nii")
    with pytest.raises(AcquisitionError, match="right angles"):
        read_nifti(tmp_path / "skew.nii")
    assert isinstance(volume.geometry, Geometry)
