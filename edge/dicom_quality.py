"""The advice to scan again as a DICOM Key Object Selection: a note at the images that it is about.

Sources: DICOM PS3.3 A.35.4 (Key Object Selection Document IOD), PS3.16 TID 2010, CID 7010 (titles), CID 7011 (why).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydicom.dataset import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage, MRImageStorage

from edge.dicom import encode
from edge.dicom_mr import describe_equipment, describe_patient, describe_study, verdict_words
from edge.dicom_values import as_text
from edge.exam import Exam
from edge.uids import derive_uid, instance_uid, series_uid, study_uid
from recon.quality import Verdict
from recon.scan import Scan

SERIES_NUMBER = 9000  # beyond those of the images, ten for each volume
TITLE = ("113010", "Quality Issue")
ARTIFACT = ("111207", "Image artifact(s)")
OTHER = ("111220", "Other failure")
CAUSES = {  # of a reason's code, within CID 7011
    "motion": ("111210", "Motion blur"),
    "dead-coil": ("111217", "Electrical failure"),
    "missing": OTHER,
    "calibration": OTHER,
    "sampling": OTHER,
    "not-finite": OTHER,
    "left-out": OTHER,
    "interrupted": OTHER,
}


def quality_note(
    verdict: Verdict, images: Sequence[tuple[str, int, int]], scan: Scan, exam: Exam, received_at: datetime | None
) -> bytes:
    """Return the file of a note that says why to scan again, what, and what it costs, at the images concerned.

    images: for each series its name, the number of its volume and how many slices it has; those that the reasons name
    are referenced, or all where one of them means all. received_at: as for `edge.dicom.write_series`; without it and
    without a date in the header, the note is dated now, as DICOM wants a date in it. Raises ValueError without images.
    """
    if not images:
        raise ValueError("a note on no image cannot be written")
    dated = received_at or (None if exam.study.date and exam.study.time else datetime.now().astimezone())
    out = Dataset()
    out.SpecificCharacterSet = "ISO_IR 192"
    out.SOPClassUID = KeyObjectSelectionDocumentStorage
    out.SOPInstanceUID = derive_uid("instance", scan.scan_id, "quality note")
    describe_patient(out, exam)
    describe_study(out, exam, scan.scan_id, dated)
    if dated is None:
        out.ContentDate, out.ContentTime = out.StudyDate, out.StudyTime
    describe_equipment(out, exam)
    out.Modality = "KO"
    out.SeriesInstanceUID = derive_uid("series", scan.scan_id, "quality note")
    out.SeriesNumber = SERIES_NUMBER
    out.InstanceNumber = 1
    out.SeriesDescription = "Scanside quality note"
    out.ReferencedPerformedProcedureStepSequence = []
    chosen = _chosen(verdict, images)
    out.CurrentRequestedProcedureEvidenceSequence = [_evidence(chosen, scan, exam)]
    out.ValueType = "CONTAINER"
    out.ConceptNameCodeSequence = [_code(*TITLE)]
    out.ContinuityOfContent = "SEPARATE"
    template = Dataset()
    template.MappingResource, template.TemplateIdentifier = "DCMR", "2010"
    out.ContentTemplateSequence = [template]
    out.ContentSequence = [
        *(_coded("HAS CONCEPT MOD", ("113011", "Document Title Modifier"), cause) for cause in _causes(verdict)),
        _coded("HAS OBS CONTEXT", ("121005", "Observer Type"), ("121007", "Device")),
        _observer(),
        _text(verdict),
        *(_reference(uid) for _, _, uids in _instances(chosen, scan) for uid in uids),
    ]
    return encode(out)


def _chosen(verdict: Verdict, images: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, list[int]]]:
    """Series, volume and slice numbers of the images that the reasons name."""
    is_all = any(not reason.slices for reason in verdict.reasons)
    named = {number for reason in verdict.reasons for number in reason.slices}
    out = []
    for series, index, n_slices in images:
        slices = [number for number in range(n_slices) if number in named]
        out.append((series, index, list(range(n_slices)) if is_all or not slices else slices))
    return out


def _instances(chosen: list[tuple[str, int, list[int]]], scan: Scan) -> list[tuple[str, int, list[str]]]:
    return [
        (series, index, [instance_uid(scan.scan_id, series, index, number) for number in slices])
        for series, index, slices in chosen
    ]


def _evidence(chosen: list[tuple[str, int, list[int]]], scan: Scan, exam: Exam) -> Dataset:
    out = Dataset()
    out.StudyInstanceUID = study_uid(exam, scan.scan_id)
    out.ReferencedSeriesSequence = []
    for series, index, uids in _instances(chosen, scan):
        item = Dataset()
        item.SeriesInstanceUID = series_uid(scan.scan_id, series, index)
        item.ReferencedSOPSequence = [_referenced(uid) for uid in uids]
        out.ReferencedSeriesSequence.append(item)
    return out


def _causes(verdict: Verdict) -> list[tuple[str, str]]:
    return sorted({CAUSES.get(reason.code, ARTIFACT) for reason in verdict.reasons})


def _code(value: str, meaning: str) -> Dataset:
    out = Dataset()
    out.CodeValue, out.CodingSchemeDesignator, out.CodeMeaning = value, "DCM", meaning
    return out


def _item(relation: str, kind: str, name: tuple[str, str] | None) -> Dataset:
    out = Dataset()
    out.RelationshipType, out.ValueType = relation, kind
    if name is not None:
        out.ConceptNameCodeSequence = [_code(*name)]
    return out


def _coded(relation: str, name: tuple[str, str], value: tuple[str, str]) -> Dataset:
    out = _item(relation, "CODE", name)
    out.ConceptCodeSequence = [_code(*value)]
    return out


def _observer() -> Dataset:
    out = _item("HAS OBS CONTEXT", "UIDREF", ("121012", "Device Observer UID"))
    out.UID = derive_uid("observer")
    return out


def _text(verdict: Verdict) -> Dataset:
    out = _item("CONTAINS", "TEXT", ("113012", "Key Object Description"))
    advice = verdict.advice
    cost = "" if advice.cost_s is None else f" It takes about {advice.cost_s:.0f} s."
    reasons = " ".join(f"{reason.words}." for reason in verdict.reasons)
    out.TextValue = as_text(
        f"Scan again: {advice.what}, because {advice.why}.{cost} {verdict_words(verdict)} {reasons} "
        "Made by software; not for diagnostic use.",
        4000,
    )
    return out


def _referenced(uid: str) -> Dataset:
    out = Dataset()
    out.ReferencedSOPClassUID, out.ReferencedSOPInstanceUID = MRImageStorage, uid
    return out


def _reference(uid: str) -> Dataset:
    out = _item("CONTAINS", "IMAGE", None)
    out.ReferencedSOPSequence = [_referenced(uid)]
    return out
