"""The header of an MR series: patient, study, sequence, scanner, and the marks of how the image came to be.

Sources: DICOM PS3.3 A.4 (MR Image IOD), C.8.3.1 (MR image), C.12.1 (Synthetic Data), PS3.16 CID 7005 (contributing
equipment).
"""

from __future__ import annotations

import re
from datetime import datetime

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import MRImageStorage

from edge.dicom_values import (
    as_code,
    as_date,
    as_decimal,
    as_identifier,
    as_name,
    as_position,
    as_sex,
    as_text,
    as_time,
)
from edge.exam import Exam
from edge.uids import frame_of_reference_uid, series_uid, study_uid
from recon.quality import Level, Verdict
from recon.scan import Provenance, Scan, Volume

SYNTHETIC_TITLE = "AI-SR – not for diagnostic use"
SYNTHETIC_WORDS = "Detail beyond the measured resolution was added by a learned prior. Not for diagnostic use."
PROCESSING = ("109102", "Processing Equipment")
SYNTHESIZING = ("109100", "Synthesizing Equipment")

METHODS = {
    "network": "unrolled neural network with data consistency",
    "sense": "regularised CG-SENSE, no neural network",
    "root-sum-of-squares": "Fourier transform and root sum of squares over coils, no neural network",
    "zero-filled": "zero-filled Fourier transform, no neural network",
    "super-resolution": "super-resolution by a neural network, measured k-space put back",
}

# Words in the header's sequence type, the Scanning Sequence and the Sequence Variant that they stand for.
SEQUENCES = (
    (r"\b(epi\b|ep2d|ep3d)", "EP", "NONE"),
    (r"\b(tse|fse|rare\b|space\b|haste|turbo ?spin|fast ?spin)", "SE", "SK"),
    (r"\b(mprage|mp2rage|tfl|bravo)", "GR", "MP"),
    (r"\b(flash|gre\b|gradient|ffe|fisp|true ?fisp|spgr|vibe)", "GR", "NONE"),
    (r"\b(se\b|spin)", "SE", "NONE"),
)


def mr_header(
    volume: Volume,
    scan: Scan,
    exam: Exam,
    series: str,
    series_number: int,
    received_at: datetime | None,
    image_index: int,
    contrast: int,
    verdict: Verdict | None = None,
) -> Dataset:
    """Return what all slices of a series have in common but for their pixels; the arguments are `write_series`'s."""
    out = Dataset()
    out.SpecificCharacterSet = "ISO_IR 192"
    out.SOPClassUID = MRImageStorage
    describe_patient(out, exam)
    describe_study(out, exam, scan.scan_id, received_at)
    out.Modality = "MR"
    out.SeriesInstanceUID = series_uid(scan.scan_id, series, image_index)
    out.SeriesNumber = series_number
    out.SeriesDescription = _series_description(volume, scan, exam, series, image_index, verdict)
    out.ProtocolName = as_text(scan.protocol, 64)
    out.BodyPartExamined = as_code(exam.study.body_part) or "BRAIN"
    if out.BodyPartExamined not in {"BRAIN", "HEAD"}:
        out.Laterality = ""  # asked for where a body part may be paired; the raw header does not say
    out.PatientPosition = as_position(exam.patient_position)
    out.FrameOfReferenceUID = frame_of_reference_uid(exam, scan.scan_id)
    out.PositionReferenceIndicator = ""
    _describe_sequence(out, scan, exam, contrast)
    describe_equipment(out, exam)
    _describe_origin(out, volume.provenance, scan, series, verdict)
    if not volume.geometry.is_known:
        out.ImageComments = "The scanner sent no slice directions: an axial plane was assumed; left and right unproven"
    row_mm, column_mm = volume.geometry.spacing_mm[1:]
    out.PixelSpacing = [as_decimal(row_mm), as_decimal(column_mm)]
    out.SliceThickness = as_decimal(volume.geometry.thickness_mm)
    out.SpacingBetweenSlices = as_decimal(volume.geometry.spacing_mm[0])
    return out


def describe_patient(out: Dataset, exam: Exam) -> None:
    """Enter the patient, as far as the raw header names one."""
    subject = exam.subject
    out.PatientName = as_name(subject.name)
    out.PatientID = as_identifier(subject.identifier, 64)
    out.PatientBirthDate = as_date(subject.birth_date)
    out.PatientSex = as_sex(subject.sex)
    for keyword, value, most in (("PatientWeight", subject.weight_kg, 700), ("PatientSize", subject.height_m, 3)):
        if value is not None and 0 < value < most:
            setattr(out, keyword, as_decimal(value))


def describe_study(out: Dataset, exam: Exam, scan_id: str, received_at: datetime | None) -> None:
    """Enter the study; dates that the header lacks, and those of series and content, come from `received_at`."""
    study = exam.study
    out.StudyInstanceUID = study_uid(exam, scan_id)
    out.StudyID = as_identifier(study.identifier, 16)
    out.AccessionNumber = as_identifier(study.accession_number, 16)
    out.ReferringPhysicianName = as_name(study.referring_physician)
    if study.description:
        out.StudyDescription = as_text(study.description, 64)
    out.StudyDate, out.StudyTime = as_date(study.date), as_time(study.time)
    if received_at is None:
        return
    day, moment = f"{received_at:%Y%m%d}", f"{received_at:%H%M%S.%f}"
    if not out.StudyDate:
        out.StudyDate, out.StudyTime = day, moment
        offset = f"{received_at:%z}"[:5]
        if offset:  # holds for every time in the file, so only where none came from the header
            out.TimezoneOffsetFromUTC = offset
    out.SeriesDate, out.SeriesTime = day, moment
    out.ContentDate, out.ContentTime = day, moment


def _series_description(
    volume: Volume, scan: Scan, exam: Exam, series: str, image_index: int, verdict: Verdict | None
) -> str:
    protocol = as_text(exam.series_description or scan.protocol, 64)
    title = f"Scanside {as_text(series, 24)}" if volume.provenance.is_measured else SYNTHETIC_TITLE
    if series == "network" and verdict is not None and verdict.level is Level.UNTRUSTED:
        title += " [untrusted]"
    if image_index:
        title += f" #{image_index + 1}"
    if not volume.geometry.is_known:
        title += " [no orientation]"
    return f"{title} {protocol}".strip()[:64].strip()  # what it is first: lists show the beginning


def _describe_sequence(out: Dataset, scan: Scan, exam: Exam, contrast: int) -> None:
    words = f"{exam.sequence_type} {scan.protocol}".lower().replace("_", " ")
    # RM, research mode, is the one defined term that claims nothing of a sequence that the header does not name
    sequence, variant = next((found[1:] for found in SEQUENCES if re.search(found[0], words)), ("RM", "NONE"))
    inversion = _chosen(scan.ti_ms, contrast)
    if inversion:
        sequence = "IR" if sequence == "RM" else f"{sequence}\\IR"
    out.ScanningSequence = sequence
    out.SequenceVariant = variant
    out.ScanOptions = ""
    out.MRAcquisitionType = "3D" if scan.encodings[0].is_3d else "2D"
    out.EchoNumbers = contrast + 1
    out.EchoTrainLength = ""
    out.EchoTime = _chosen(scan.te_ms, contrast)
    out.RepetitionTime = _chosen(scan.tr_ms, contrast)
    if inversion:
        out.InversionTime = inversion
    if flip := _chosen(scan.flip_deg, contrast):
        out.FlipAngle = flip
    if scan.field_t is not None and scan.field_t > 0:
        out.MagneticFieldStrength = as_decimal(scan.field_t)
    if exam.equipment.resonance_hz is not None and exam.equipment.resonance_hz > 0:
        out.ImagingFrequency = as_decimal(exam.equipment.resonance_hz / 1e6)
        out.ImagedNucleus = "1H"
    out.InPlanePhaseEncodingDirection = "COL"  # the y axis of every volume is the phase-encoding one


def _chosen(values: tuple[float, ...], index: int) -> str:
    """Return the value at `index`, or the last one, as DS; "" where the header holds none that is one."""
    value = values[min(index, len(values) - 1)] if values else float("nan")
    return as_decimal(value) if np.isfinite(value) and value >= 0 else ""


def describe_equipment(out: Dataset, exam: Exam) -> None:
    """Enter the scanner."""
    equipment = exam.equipment
    out.Manufacturer = as_text(equipment.manufacturer, 64)
    for keyword, value, limit in (
        ("ManufacturerModelName", equipment.model, 64),
        ("InstitutionName", equipment.institution, 64),
        ("StationName", equipment.station, 16),
        ("DeviceSerialNumber", equipment.serial_number, 64),
    ):
        if text := as_text(value, limit):
            setattr(out, keyword, text)


def _describe_origin(out: Dataset, provenance: Provenance, scan: Scan, series: str, verdict: Verdict | None) -> None:
    """Say how the image came to be and that it is not for diagnosis; mark what was made rather than measured."""
    out.ImageType = ["DERIVED", "PRIMARY", "OTHER", as_code(series.replace("-", "_"))]
    along_y, along_z = scan.encodings[0].acceleration
    sentences = [
        f"Reconstructed from measured k-space by {provenance.software}: "
        f"{METHODS.get(provenance.method, provenance.method)}; acceleration by the header {along_y} x {along_z}.",
        verdict_words(verdict),
        f"Steps: {', '.join(provenance.steps)}." if provenance.steps else "",
        f"Model SHA-256 {provenance.model_sha256}, run by {provenance.backend}." if provenance.model_sha256 else "",
        "Not for diagnostic use.",
    ]
    if not provenance.is_measured:  # first: what comes last is cut where the steps are many
        sentences.insert(0, SYNTHETIC_WORDS)
    description = as_text(" ".join(filter(None, sentences)), 1024)
    out.DerivationDescription = description
    purposes = [PROCESSING]
    if not provenance.is_measured:
        out.SyntheticData = "YES"
        purposes = [SYNTHESIZING, PROCESSING]
    out.ContributingEquipmentSequence = Sequence(_equipment_item(p, provenance, description) for p in purposes)
    out.ContentQualification = "RESEARCH"
    out.BurnedInAnnotation = "NO"
    out.RecognizableVisualFeatures = "YES"  # a head with its face; nothing here removes it
    out.LossyImageCompression = "00"


def verdict_words(verdict: Verdict | None) -> str:
    """Return the verdict as a sentence, its gravest reason with it; "" where there is none."""
    if verdict is None:
        return ""
    gravest = next((each.words for each in verdict.reasons if each.level is verdict.level), "")
    return f"Verdict on the scan: {verdict.level.value}{': ' if gravest else ''}{as_text(gravest, 240)}."


def _equipment_item(purpose: tuple[str, str], provenance: Provenance, description: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodeMeaning = purpose
    code.CodingSchemeDesignator = "DCM"
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = Sequence([code])
    item.Manufacturer = "Scanside"
    item.ManufacturerModelName = "Scanside"
    item.SoftwareVersions = as_text(provenance.software, 64)
    item.ContributionDescription = description
    return item
