"""DICOM series: conformant, where they should be in the patient, whatever the header holds, the same every time."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from edge.dicom import TOP_LEVEL, quantise, write_series
from edge.dicom_mr import SYNTHETIC_TITLE
from edge.dicom_values import as_code, as_date, as_decimal, as_identifier, as_name, as_text, as_time
from edge.exam import Equipment, Exam, Study, Subject
from edge.uids import derive_uid, frame_of_reference_uid, is_uid, study_uid
from recon.errors import ScanError, ShapeError
from recon.scan import Encoding, Geometry, Matrix, Provenance, Scan, Size, Volume
from tests.letter import BALL_RADIUS_MM, LANDMARKS, letter_intensity, letter_volume

ENCODING = Encoding(Matrix(256, 128, 1), Size(440, 220, 5), Matrix(128, 128, 1), Size(220, 220, 5), acceleration=(4, 1))
SCAN = Scan("01JD0000000000000000000000", (ENCODING,), 2.89, (90.0, 120.0), (4000.0,), (), (150.0,), "t2_tse_tra")
MEASURED = Provenance("network", "scanside 0.1.0", ("coil maps", "8 iterations"), True, "5e" * 32, "ort-cpu")
RECEIVED = datetime(2026, 11, 21, 14, 30, 5, 250000, tzinfo=timezone(timedelta(hours=1)))
EXAM = Exam(
    Subject("Doe^Jane", "PAT-7", "19700131", "F", 61.5, 1.7),
    Study("1.2.840.99999.1.5", "S77", "ACC1234", "20261121", "141500", "Head", "House^Gregory", "HEAD"),
    Equipment("SIEMENS", "Prisma", "Somewhere", "MR3", "12345", 123_200_000),
    "meas-1",
    "HFS",
    "T2 tra",
    "1.2.840.99999.1.6",
    "TurboSpinEcho",
)

# Row and column direction and the direction in which the slices follow each other, as a scanner may choose them.
_TILT = Rotation.from_euler("xyz", (17.0, -24.0, 31.0), degrees=True).as_matrix()
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0), 1),
    "axial, head first to feet": ((1, 0, 0), (0, 1, 0), -1),
    "sagittal": ((0, 1, 0), (0, 0, -1), -1),
    "coronal": ((1, 0, 0), (0, 0, -1), 1),
    "read to the feet": ((0, 0, -1), (-1, 0, 0), 1),
    "double oblique": (tuple(_TILT[:, 0]), tuple(_TILT[:, 1]), 1),
    "double oblique, backwards": (tuple(_TILT[:, 1]), tuple(-_TILT[:, 2]), -1),
}
SHAPE = (97, 84)  # odd and even; 2.3 × 2.1 mm, every 7 mm with a gap of 1.5 mm: nothing equal to anything


def letter_at(plane: str, n_slices: int = 23, provenance: Provenance = MEASURED) -> Volume:
    """Return the letter phantom on a slightly off-centre stack in `plane`."""
    row, col, sign = PLANES[plane]
    step = np.cross(row, col) * sign * 7.0
    centres = np.array([3.0, -5.5, 2.0]) + np.arange(-(n_slices // 2), n_slices - n_slices // 2)[:, None] * step
    geometry = Geometry.from_centres(centres, row, col, SHAPE, (7.0, 2.3, 2.1), 5.5)
    return Volume(letter_volume(geometry, SHAPE), geometry, provenance)


def small(data: Any = None, known: bool = True, provenance: Provenance = MEASURED) -> Volume:
    """Return a little volume, by default of two slices of 3 × 4."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4) if data is None else np.asarray(data, np.float32)
    centres = np.array([[0.0, 0.0, 6.0 * k] for k in range(len(array))])
    geometry = Geometry.from_centres(centres, (1, 0, 0), (0, 1, 0), (3, 4), (6.0, 1.5, 1.0), 5.0, known)
    return Volume(array, geometry, provenance)


def need(program: str) -> str:
    """Return the path of a Debian program or skip."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def errors_of(path: Path) -> list[str]:
    """Return dciodvfy's error lines (its exit status means little) but for the one tag newer than it."""
    done = subprocess.run([need("dciodvfy"), str(path)], capture_output=True, text=True, check=False, timeout=60)
    lines = (done.stdout + done.stderr).splitlines()
    assert any("MRImage" in line for line in lines), "dciodvfy recognised no MR image"
    return [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line]


# --- what is in the files ---------------------------------------------------------------------------------------


def test_pixels_and_geometry_come_back(tmp_path: Path) -> None:
    volume = letter_at("double oblique")
    paths = write_series(volume, SCAN, EXAM, "network", tmp_path, series_number=5001, received_at=RECEIVED)
    assert [p.name for p in paths] == [f"{k:04}.dcm" for k in range(1, 24)]
    slices = [pydicom.dcmread(p) for p in paths]
    assert len({s.SOPInstanceUID for s in slices}) == 23
    assert len({(s.SeriesInstanceUID, s.StudyInstanceUID, s.RescaleSlope, s.WindowWidth) for s in slices}) == 1
    row, col = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    np.testing.assert_allclose(row, volume.geometry.row_dir, atol=1e-9)
    np.testing.assert_allclose(col, volume.geometry.col_dir, atol=1e-9)
    for index, one in enumerate(slices):
        native = one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept)
        np.testing.assert_allclose(native, volume.data[index], atol=0.51 * float(one.RescaleSlope))
        np.testing.assert_allclose(one.ImagePositionPatient, volume.geometry.origin_mm[index], atol=1e-9)
        assert one.InstanceNumber == index + 1
    assert [float(v) for v in slices[0].PixelSpacing] == [2.3, 2.1]
    assert (slices[0].SliceThickness, slices[0].SpacingBetweenSlices) == (5.5, 7.0)
    locations = np.diff([float(s.SliceLocation) for s in slices])
    np.testing.assert_allclose(locations, 7.0, atol=1e-9)


def test_header_says_what_was_scanned_and_how_it_was_made(tmp_path: Path) -> None:
    first = write_series(letter_at("axial", 1), SCAN, EXAM, "network", tmp_path, series_number=7, contrast=1)[0]
    read = pydicom.dcmread(first)
    assert (read.PatientID, read.PatientName, read.AccessionNumber) == ("PAT-7", "Doe^Jane", "ACC1234")
    assert (read.StudyInstanceUID, read.FrameOfReferenceUID) == ("1.2.840.99999.1.5", "1.2.840.99999.1.6")
    assert (read.MagneticFieldStrength, read.EchoTime, read.RepetitionTime, read.FlipAngle) == (2.89, 120, 4000, 150)
    assert (read.ScanningSequence, read.SequenceVariant, read.MRAcquisitionType) == ("SE", "SK", "2D")
    assert (read.Modality, read.BodyPartExamined, read.PatientPosition) == ("MR", "HEAD", "HFS")
    assert list(read.ImageType) == ["DERIVED", "PRIMARY", "OTHER", "NETWORK"]
    assert "neural network" in read.DerivationDescription
    assert "acceleration by the header 4 x 1" in read.DerivationDescription
    assert "5e5e" in read.DerivationDescription
    item = read.ContributingEquipmentSequence[0]
    assert item.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    assert (item.Manufacturer, item.SoftwareVersions) == ("Scanside", "scanside 0.1.0")
    assert "SyntheticData" not in read
    assert read.SeriesDescription == "Scanside network T2 tra"


@pytest.mark.parametrize(
    ("protocol", "sequence", "variant"),
    [
        ("ep2d_diff", "EP", "NONE"),
        ("epilepsy_t1_mprage", "GR", "MP"),
        ("T2 FSE ax", "SE", "SK"),
        ("t2_gre_hemo", "GR", "NONE"),
        ("t1_se_tra", "SE", "NONE"),
        ("90 degree survey", "RM", "NONE"),
    ],
)
def test_sequence_is_read_from_whole_words(tmp_path: Path, protocol: str, sequence: str, variant: str) -> None:
    scan = replace(SCAN, protocol=protocol)
    read = pydicom.dcmread(write_series(small(), scan, Exam(), "network", tmp_path, series_number=1)[0])
    assert (read.ScanningSequence, read.SequenceVariant) == (sequence, variant)


def test_super_resolved_is_marked_synthetic(tmp_path: Path) -> None:
    volume = small(provenance=replace(MEASURED, is_measured=False))
    read = pydicom.dcmread(write_series(volume, SCAN, EXAM, "super-resolved", tmp_path, series_number=3)[0])
    assert read.SyntheticData == "YES"
    assert read.SeriesDescription.startswith(SYNTHETIC_TITLE)
    assert [i.PurposeOfReferenceCodeSequence[0].CodeValue for i in read.ContributingEquipmentSequence] == [
        "109100",
        "109102",
    ]
    assert read.MagneticFieldStrength == 2.89


def test_unknown_orientation_is_said(tmp_path: Path) -> None:
    read = pydicom.dcmread(write_series(small(known=False), SCAN, EXAM, "network", tmp_path, series_number=1)[0])
    assert "no slice directions" in read.ImageComments
    assert "[no orientation]" in read.SeriesDescription


def test_missing_dates_come_from_the_reception(tmp_path: Path) -> None:
    path = write_series(small(), SCAN, Exam(), "network", tmp_path, series_number=1, received_at=RECEIVED)[0]
    read = pydicom.dcmread(path)
    assert (read.StudyDate, read.StudyTime, read.TimezoneOffsetFromUTC) == ("20261121", "143005.250000", "+0100")
    header = write_series(small(), SCAN, EXAM, "network", tmp_path, series_number=1, received_at=RECEIVED)[0]
    assert pydicom.dcmread(header).StudyTime == "141500"


def test_empty_exam_leaves_the_patient_empty(tmp_path: Path) -> None:
    read = pydicom.dcmread(write_series(small(), SCAN, Exam(), "network", tmp_path, series_number=1)[0])
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate"):
        assert keyword in read
        assert not read[keyword].value


# --- the same every time, whole or not at all -----------------------------------------------------------------------


def test_same_scan_gives_same_bytes(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"series_number": 5001, "received_at": RECEIVED}
    once = write_series(small(), SCAN, EXAM, "network", tmp_path / "a", **kwargs)
    again = write_series(small(), SCAN, EXAM, "network", tmp_path / "b", **kwargs)
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in again]


def test_series_and_images_of_a_scan_are_told_apart(tmp_path: Path) -> None:
    kinds = [("network", 0), ("network", 1), ("classical", 0), ("classical", 1)]
    reads = []
    for series, index in kinds:
        paths = write_series(small(), SCAN, EXAM, series, tmp_path / series, series_number=1, image_index=index)
        reads += [pydicom.dcmread(p) for p in paths]
    assert len(list(tmp_path.rglob("*.dcm"))) == 8
    assert len({r.SOPInstanceUID for r in reads}) == 8
    assert len({r.SeriesInstanceUID for r in reads}) == 4
    assert len({r.StudyInstanceUID for r in reads}) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_series(small(), SCAN, EXAM, "network", tmp_path, series_number=1)
    assert list(tmp_path.iterdir()) == []


# --- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    data = np.ones((2, 3, 4), np.float32)
    data[1, 2, 3] = bad
    with pytest.raises(ScanError, match="1 of 24 voxels are not finite"):
        write_series(small(data), SCAN, EXAM, "network", tmp_path / "x", series_number=1)
    assert not (tmp_path / "x").exists()


def test_no_pixels_are_refused() -> None:
    with pytest.raises(ShapeError):
        quantise(np.zeros((2, 0, 4), np.float32))


@given(st.integers(-30, 35), st.integers(0, 2**32 - 1), st.booleans())
def test_levels_give_the_values_back(exponent: int, seed: int, signed: bool) -> None:
    data = np.random.default_rng(seed).uniform(-1.0 if signed else 0.0, 1.0, (2, 3, 4)) * 10.0**exponent
    data = data.astype(np.float32)
    data[0, 0, 0] = 0
    levels, slope = quantise(data)
    assert levels[0, 0, 0] == 0
    assert abs(levels.astype(int)).max() <= TOP_LEVEL
    assert len(as_decimal(slope)) <= 16
    np.testing.assert_allclose(levels * slope, data, rtol=0, atol=0.5001 * slope)


def test_empty_image_is_written(tmp_path: Path) -> None:
    path = write_series(small(np.zeros((1, 3, 4))), SCAN, EXAM, "network", tmp_path, series_number=1)[0]
    read = pydicom.dcmread(path)
    assert read.pixel_array.max() == 0
    assert read.RescaleSlope == 1


# --- values that fit ------------------------------------------------------------------------------------------------


def test_values_fit_or_go() -> None:
    assert as_text("a\\b\x00c\nd", 64) == "a b c d"
    assert as_identifier("  1234567890123456 ", 16) == "1234567890123456"
    assert as_identifier("12345678901234567", 16) == ""  # a shortened number may be somebody else's
    assert as_identifier("12\\34", 16) == ""
    assert as_name("Müller^Jörg=\u5c71\u7530^\u592a\u90ce") == "Müller^Jörg=\u5c71\u7530^\u592a\u90ce"
    assert as_code("Head/neck") == "HEAD_NECK"
    assert [as_date(v) for v in ("20260229", "2026-02-28", "today", "20261301", "")] == ["", "20260228", "", "", ""]
    assert [as_time(v) for v in ("235960", "23:59:59.12", "1200", "")] == ["", "235959.12", "", ""]
    with pytest.raises(ValueError, match="finite"):
        as_decimal(float("nan"))


@given(st.floats(-1e300, 1e300))
def test_decimal_strings_are_short_and_close(value: float) -> None:
    text = as_decimal(value)
    assert len(text) <= 16
    assert float(text) == pytest.approx(value, rel=1e-8, abs=0)


def test_uids_are_legal_and_told_apart() -> None:
    assert is_uid(derive_uid("a", 1))
    assert derive_uid("a", "bc") != derive_uid("ab", "c")
    for wrong in ("", "1", "1.02.3", "1..2", "3.1", "1.2.", "1.2.a", "1." + "2" * 63, "1.2\n"):
        assert not is_uid(wrong)


def test_scans_of_one_exam_share_a_study_only_where_that_is_sure() -> None:
    exam = replace(EXAM, study=replace(EXAM.study, instance_uid="not.a.uid"), frame_of_reference_uid="1.2.03")
    assert study_uid(exam, "scan 1") == study_uid(exam, "scan 2")
    other = replace(exam, subject=replace(exam.subject, identifier="PAT-8"))
    assert study_uid(exam, "scan 1") != study_uid(other, "scan 1")
    undated = replace(exam, study=replace(exam.study, date=""))
    assert study_uid(undated, "scan 1") != study_uid(undated, "scan 2")
    renamed = replace(exam, subject=replace(exam.subject, name="Roe^Richard"))
    assert study_uid(exam, "scan 1") == study_uid(renamed, "scan 1")
    assert is_uid(frame_of_reference_uid(exam, "scan 1"))


# --- other people's readers -----------------------------------------------------------------------------------------

HOSTILE = Exam(
    Subject("Ã\\bad^" + "名" * 90 + "=x\x00\n", "P" * 80, "19991332", "female", -3.0, float("inf")),
    Study("1.2.03.bad", "S" * 17, "A" * 17, "tomorrow", "99:99", "d\\e" * 40, "^^^^^^^^", "left\\knee (distal part)"),
    Equipment("Ü" * 100, "m" * 100, "\x07", "s" * 40, "n\\m", -1),
    "x" * 100,
    "upside down",
    "line one\nline two " * 9,
    "urn:uuid:nonsense",
    "?",
)
PEER_CASES = {
    "complete": (SCAN, EXAM, MEASURED, True),
    "empty": (Scan("01JD", (ENCODING,)), Exam(), MEASURED, False),
    "hostile": (
        replace(SCAN, te_ms=(float("nan"),), ti_ms=(1e300,), flip_deg=(-1.0,), field_t=0.0, protocol="\\" * 99),
        HOSTILE,
        replace(MEASURED, software="v" * 99, steps=("step",) * 500),
        True,
    ),
    "inversion recovery": (replace(SCAN, ti_ms=(2500.0,)), EXAM, MEASURED, True),
    "synthetic": (SCAN, EXAM, replace(MEASURED, is_measured=False), True),
    "surrogates": (SCAN, replace(EXAM, subject=Subject("a\ud800b")), MEASURED, True),
}


@pytest.mark.peer
@pytest.mark.parametrize("case", PEER_CASES)
def test_dciodvfy_finds_no_error(tmp_path: Path, case: str) -> None:
    need("dciodvfy")
    scan, exam, provenance, known = PEER_CASES[case]
    volume = small(known=known, provenance=provenance)
    paths = write_series(volume, scan, exam, "network", tmp_path, series_number=5001, received_at=RECEIVED)
    for path in paths:
        assert errors_of(path) == []


@pytest.mark.peer
@pytest.mark.parametrize("case", PEER_CASES)
def test_dcmtk_reads_the_file(tmp_path: Path, case: str) -> None:
    scan, exam, provenance, known = PEER_CASES[case]
    volume = small(known=known, provenance=provenance)
    path = write_series(volume, scan, exam, "network", tmp_path, series_number=5001, received_at=RECEIVED)[0]
    for program, wanted in (("dcmftest", b"yes:"), ("dcmdump", b"PixelData")):
        done = subprocess.run([need(program), str(path)], capture_output=True, check=True, timeout=60)
        assert wanted in done.stdout
        assert b"W:" not in done.stderr
        assert b"E:" not in done.stderr


@pytest.mark.peer
@pytest.mark.parametrize("vendor", ["", "SIEMENS"])
@pytest.mark.parametrize("plane", PLANES)
def test_dcm2niix_puts_every_voxel_where_it_is(tmp_path: Path, plane: str, vendor: str) -> None:
    volume = letter_at(plane)
    exam = replace(EXAM, equipment=replace(EXAM.equipment, manufacturer=vendor))
    write_series(volume, SCAN, exam, "network", tmp_path / "dicom", series_number=5001, received_at=RECEIVED)
    image = to_nifti(tmp_path)

    n_slices, n_y, n_x = volume.data.shape
    z, y, x = np.indices(volume.data.shape)
    voxels = np.stack([x, y, z, np.ones_like(x)], -1) @ volume.geometry.affine().T
    ras = voxels * (-1, -1, 1, 1)
    inverse = np.linalg.inv(image.affine)
    found = (ras @ inverse.T)[..., :3]
    # 0.01 mm, in voxels of each axis
    tolerance = 0.01 / np.linalg.norm(image.affine[:3, :3], axis=0)
    assert (abs(found - np.rint(found)) <= tolerance).all()
    index = np.rint(found).astype(int)
    assert sorted(image.shape) == sorted((n_x, n_y, n_slices))
    np.testing.assert_allclose(image.get_fdata()[tuple(np.moveaxis(index, -1, 0))], volume.data, atol=1e-4)


@pytest.mark.peer
@pytest.mark.parametrize("plane", PLANES)
def test_left_is_left_in_other_programs(tmp_path: Path, plane: str) -> None:
    write_series(letter_at(plane), SCAN, EXAM, "network", tmp_path / "dicom", series_number=1)
    image = to_nifti(tmp_path)
    for name, (centre, intensity) in LANDMARKS.items():
        ras = np.array([-centre[0], -centre[1], centre[2], 1.0])
        nearest = np.rint(np.linalg.inv(image.affine) @ ras)[:3].astype(int)
        assert image.get_fdata()[tuple(nearest)] == pytest.approx(intensity, abs=1e-3), name


@pytest.mark.peer
def test_single_slice_keeps_its_place_and_thickness(tmp_path: Path) -> None:
    volume = letter_at("double oblique", 1)
    write_series(volume, SCAN, EXAM, "network", tmp_path / "dicom", series_number=1)
    image = to_nifti(tmp_path)
    centre = image.affine @ [0, SHAPE[0] - 1, 0, 1]  # dcm2niix turns the rows round
    np.testing.assert_allclose(centre[:3] * (-1, -1, 1), volume.geometry.origin_mm[0], atol=0.01)


def to_nifti(folder: Path) -> Any:
    """Return what dcm2niix makes of folder/dicom, loaded; it must be one volume."""
    program = need("dcm2niix")
    (folder / "nifti").mkdir()
    subprocess.run(
        [program, "-b", "n", "-z", "n", "-f", "out", "-o", str(folder / "nifti"), str(folder / "dicom")],
        capture_output=True,
        check=True,
        timeout=120,
    )
    (path,) = (folder / "nifti").glob("*.nii")
    return nibabel.load(path)


# --- the phantom itself ---------------------------------------------------------------------------------------------


def test_letter_has_no_symmetry() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(-90.0, 91.0, 5.0)] * 3, indexing="ij"), -1)
    seen = letter_intensity(grid)
    for axes in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        assert abs(np.flip(seen, axes) - seen).max() > 0.4
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)):
        assert abs(seen.transpose(order) - seen).max() > 0.4
    for centre, intensity in LANDMARKS.values():
        assert letter_intensity(centre) == intensity
        assert letter_intensity(np.add(centre, (0, 0, BALL_RADIUS_MM + 1.0))) != intensity


@settings(max_examples=30)
@given(st.text(max_size=200), st.text(max_size=40))
def test_any_text_is_made_to_fit(name: str, number: str) -> None:
    text = as_name(name)
    assert all(len(group) <= 64 for group in text.split("="))
    assert "\\" not in text
    assert as_identifier(number, 16) in {"", number.strip(" \0")}
    assert as_text(name, 64) == as_text(as_text(name, 64), 64)
    assert len(as_text(name, 64).encode()) <= 64
