"""Findings as a DICOM structured report: Comprehensive 3D SR, TID 1500, unverified and preliminary.

Each finding and each measurement of the brain is a measurement group (TID 1501) with the state, the probability, what
the algorithm was, and the images it rests on. States that DICOM has no code for carry the scheme 99SCANSIDE.
Sources: DICOM PS3.3 A.35.13, PS3.16 TID 1500, 1501, 310 (measurement properties), 1600 (images), 4019 (algorithm).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage

from edge.dicom import encode
from edge.dicom_reference import Reference
from edge.dicom_values import as_decimal, as_text
from edge.uids import derive_uid
from triage.findings import Finding, Findings, Measurement, State

SERIES_NUMBER = 9001  # beyond those of the images, ten for each volume
NOTICE = "For notification only. Not for diagnostic use. Read the full study. Not assessed is not nothing found."
SCHEME = "99SCANSIDE"


class Code(NamedTuple):
    """A coded concept."""

    value: str
    scheme: str
    meaning: str


FINDINGS = {
    "infarct": Code("432504007", "SCT", "Cerebral infarction"),
    "haemorrhage": Code("1386000", "SCT", "Intracranial hemorrhage"),
    "mass": Code("4147007", "SCT", "Mass"),
}
STATES = {
    State.FLAGGED: Code("flagged", SCHEME, "Flagged for priority review"),
    State.NOT_FLAGGED: Code("not-flagged", SCHEME, "Not flagged"),
    State.NOT_ASSESSED: Code("not-assessed", SCHEME, "Not assessed"),
}
SIDES = {
    "left": Code("7771000", "SCT", "Left"),
    "right": Code("24028007", "SCT", "Right"),
    "middle": Code("260528009", "SCT", "Median"),
}
_UNITS = {
    "ml": Code("ml", "UCUM", "milliliter"),
    "mm": Code("mm", "UCUM", "millimeter"),
    "": Code("1", "UCUM", "no units"),
}
_BRAIN = Code("12738006", "SCT", "Brain structure")
_FINDING = Code("121071", "DCM", "Finding")
_PROBABILITY = Code("probability", SCHEME, "Probability of the finding")
_STATE = Code("state", SCHEME, "Triage state")
_CONFORMAL = Code("conformal", SCHEME, "Conformal set")
_EVIDENCE = Code("evidence", SCHEME, "Evidence grade of the algorithm")
_NAMES = {  # of a measurement without its finding and unit
    "volume": Code("118565006", "SCT", "Volume"),
    "diameter": Code("81827009", "SCT", "Diameter"),
    "midline_shift": Code("midline-shift", SCHEME, "Midline shift"),
    "ventricle_volume": Code("ventricle-volume", SCHEME, "Volume of the lateral ventricles"),
    "evans_index": Code("evans-index", SCHEME, "Evans-like index"),
}


def structured_report(findings: Findings, reference: Reference, software: str, notes: Iterable[str] = ()) -> bytes:
    """Return the file that says what was found in the images of `reference`; the same arguments give the same bytes.

    software: its name and version. notes: sentences for the reader, such as the verdict on the scan.
    """
    out = Dataset()
    out.update(reference.common)
    out.SpecificCharacterSet = "ISO_IR 192"
    out.SOPClassUID = Comprehensive3DSRStorage
    out.SOPInstanceUID = reference.derived_uid("instance", "report")
    out.StudyInstanceUID = reference.study_uid
    out.Modality = "SR"
    out.SeriesInstanceUID = reference.derived_uid("series", "report")
    out.SeriesNumber = SERIES_NUMBER
    out.SeriesDescription = "Scanside triage - not for diagnostic use"
    out.InstanceNumber = 1
    out.ReferencedPerformedProcedureStepSequence = []
    out.PerformedProcedureCodeSequence = []
    out.CompletionFlag, out.VerificationFlag, out.PreliminaryFlag = "PARTIAL", "UNVERIFIED", "PRELIMINARY"
    study = Dataset()
    study.StudyInstanceUID, study.ReferencedSeriesSequence = reference.study_uid, [reference.series_item()]
    out.CurrentRequestedProcedureEvidenceSequence = [study]
    out.ValueType, out.ContinuityOfContent = "CONTAINER", "SEPARATE"
    out.ConceptNameCodeSequence = [_coded(Code("126000", "DCM", "Imaging Measurement Report"))]
    out.ContentTemplateSequence = [_template("1500")]
    out.ContentSequence = [
        *_context(software),
        _code("HAS CONCEPT MOD", Code("121058", "DCM", "Procedure reported"), Code("24590-2", "LN", "MR Brain")),
        _library(reference),
        _container(
            Code("126010", "DCM", "Imaging Measurements"),
            [
                *(_finding_group(each, findings.measurements, reference, software) for each in findings.findings),
                *_brain_group(findings, reference, software),
            ],
        ),
        _container(
            Code("C0034375", "UMLS", "Qualitative Evaluations"),
            [_text("CONTAINS", Code("121106", "DCM", "Comment"), " ".join([NOTICE, *notes]))],
        ),
    ]
    return encode(out)


def _context(software: str) -> list[Dataset]:
    name, _, version = software.partition(" ")
    language = _code(
        "HAS CONCEPT MOD",
        Code("121049", "DCM", "Language of Content Item and Descendants"),
        Code("en", "RFC5646", "English"),
    )
    device = _item("HAS OBS CONTEXT", "UIDREF", Code("121012", "DCM", "Device Observer UID"))
    device.UID = derive_uid("observer")
    return [
        language,
        _code("HAS OBS CONTEXT", Code("121005", "DCM", "Observer Type"), Code("121007", "DCM", "Device")),
        device,
        _text("HAS OBS CONTEXT", Code("121013", "DCM", "Device Observer Name"), name),
        _text("HAS OBS CONTEXT", Code("121015", "DCM", "Device Observer Model Name"), f"{name} {version}"),
    ]


def _library(reference: Reference) -> Dataset:
    images = [_image("CONTAINS", reference, number) for number in range(len(reference.instances))]
    group = _container(Code("126200", "DCM", "Image Library Group"), images)
    return _container(Code("111028", "DCM", "Image Library"), [group])


def _finding_group(
    finding: Finding, measurements: Mapping[str, Measurement], reference: Reference, software: str
) -> Dataset:
    items = [
        *_tracking(finding.label, reference),
        _code("CONTAINS", _FINDING, FINDINGS[finding.label]),
        _code("HAS CONCEPT MOD", Code("363698007", "SCT", "Finding Site"), _BRAIN),
        *_algorithm(finding, software),
        _code("CONTAINS", _STATE, STATES[finding.state]),
    ]
    source = [] if finding.key_slice is None else [_image("INFERRED FROM", reference, finding.key_slice)]
    if finding.probability is not None:
        items.append(_number(_PROBABILITY, finding.probability, "", source))
    if finding.conformal:
        items.append(_text("CONTAINS", _CONFORMAL, f"{', '.join(finding.conformal)} at alpha {finding.alpha:g}"))
    if finding.evidence:
        items.append(_text("CONTAINS", _EVIDENCE, finding.evidence))
    if finding.reason:
        items.append(_text("CONTAINS", Code("121106", "DCM", "Comment"), finding.reason))
    for name, each in measurements.items():
        if name.startswith(f"{finding.label}_"):
            items += _measured(name.removeprefix(f"{finding.label}_"), each, source)
    return _group(items)


def _brain_group(findings: Findings, reference: Reference, software: str) -> list[Dataset]:
    labels = tuple(f"{each.label}_" for each in findings.findings)
    brain = {name: each for name, each in findings.measurements.items() if not name.startswith(labels)}
    if not brain:
        return []
    items = [
        *_tracking("brain", reference),
        _code("HAS CONCEPT MOD", Code("363698007", "SCT", "Finding Site"), _BRAIN),
        *_algorithm(None, software),
    ]
    for name, each in brain.items():
        items += _measured(name, each, [])
    return [_group(items)]


def _measured(name: str, measurement: Measurement, source: list[Dataset]) -> list[Dataset]:
    """Return a measurement with its interval as upper and lower uncertainty, or in words why there is none."""
    stem, _, unit = name.rpartition("_")
    concept = _NAMES.get(stem if unit in ("mm", "ml") else name, Code(name.replace("_", "-"), SCHEME, name))
    if measurement.value is None:
        return [_text("CONTAINS", Code("121106", "DCM", "Comment"), f"{concept.meaning}: {measurement.reason}")]
    properties = list(source)
    if measurement.interval is not None:
        low, high = measurement.interval
        upper = Code("371886008", "SCT", "+, range of upper measurement uncertainty")
        lower = Code("371885007", "SCT", "-, range of lower measurement uncertainty")
        properties += [
            _number(upper, high - measurement.value, unit, relation="HAS PROPERTIES"),
            _number(lower, measurement.value - low, unit, relation="HAS PROPERTIES"),
        ]
    if measurement.side in SIDES:
        properties.append(_code("HAS CONCEPT MOD", Code("272741003", "SCT", "Laterality"), SIDES[measurement.side]))
    return [_number(concept, measurement.value, unit, properties)]


def _tracking(label: str, reference: Reference) -> list[Dataset]:
    uid = _item("HAS OBS CONTEXT", "UIDREF", Code("112040", "DCM", "Tracking Unique Identifier"))
    uid.UID = reference.derived_uid("tracking", label)
    return [_text("HAS OBS CONTEXT", Code("112039", "DCM", "Tracking Identifier"), label), uid]


def _algorithm(finding: Finding | None, software: str) -> list[Dataset]:
    name, _, version = software.partition(" ")
    parameters = ""
    if finding is not None and finding.model:
        name, _, version = finding.model.rpartition(" ")
        parameters = f"weights sha256 {finding.model_sha256}; operating point {finding.operating_point}"
    out = [
        _text("HAS CONCEPT MOD", Code("111001", "DCM", "Algorithm Name"), name),
        _text("HAS CONCEPT MOD", Code("111003", "DCM", "Algorithm Version"), version),
    ]
    if parameters:
        out.append(_text("HAS CONCEPT MOD", Code("111002", "DCM", "Algorithm Parameters"), parameters))
    return out


def _group(items: list[Dataset]) -> Dataset:
    out = _container(Code("125007", "DCM", "Measurement Group"), items)
    out.ContentTemplateSequence = [_template("1501")]
    return out


def _template(number: str) -> Dataset:
    out = Dataset()
    out.MappingResource, out.TemplateIdentifier = "DCMR", number
    return out


def _coded(code: Code) -> Dataset:
    out = Dataset()
    out.CodeValue, out.CodingSchemeDesignator, out.CodeMeaning = code
    return out


def _item(relation: str, kind: str, name: Code | None) -> Dataset:
    out = Dataset()
    out.RelationshipType, out.ValueType = relation, kind
    if name is not None:
        out.ConceptNameCodeSequence = [_coded(name)]
    return out


def _container(name: Code, items: list[Dataset]) -> Dataset:
    out = _item("CONTAINS", "CONTAINER", name)
    out.ContinuityOfContent = "SEPARATE"
    out.ContentSequence = items
    return out


def _code(relation: str, name: Code, value: Code) -> Dataset:
    out = _item(relation, "CODE", name)
    out.ConceptCodeSequence = [_coded(value)]
    return out


def _text(relation: str, name: Code, value: str) -> Dataset:
    out = _item(relation, "TEXT", name)
    out.TextValue = as_text(value, 1024) or "not known"
    return out


def _number(
    name: Code, value: float, unit: str, below: list[Dataset] | None = None, relation: str = "CONTAINS"
) -> Dataset:
    out = _item(relation, "NUM", name)
    measured = Dataset()
    measured.NumericValue = as_decimal(float(f"{value:.4g}"))
    measured.MeasurementUnitsCodeSequence = [_coded(_UNITS.get(unit, _UNITS[""]))]
    out.MeasuredValueSequence = [measured]
    if below:
        out.ContentSequence = below
    return out


def _image(relation: str, reference: Reference, number: int) -> Dataset:
    out = _item(relation, "IMAGE", None if relation == "CONTAINS" else Code("121112", "DCM", "Source of Measurement"))
    out.ReferencedSOPSequence = [reference.image_item(number)]
    return out
