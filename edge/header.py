"""The ISMRMRD XML header of a scan: bytes from the wire in, checked values out.

What decides the images (matrices, fields of view, limits, acceleration, times) is refused when it is impossible; what
only describes the patient is left out. Namespaces are ignored and every optional block may be missing.
Source: ismrmrd.xsd of ISMRMRD 1.8 to 1.14.
"""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from edge.exam import Equipment, Exam, Study, Subject
from recon.errors import AcquisitionError
from recon.scan import Encoding, Limit, Matrix, Scan, Size

_MAX_BYTES = 4 << 20
_MAX_MATRIX = 16384
_MAX_SAMPLES = 1 << 30  # of one encoded matrix: 1024³
_MAX_COUNTER = 65535  # the readouts' counters are uint16
_MAX_TEXT = 256
_TRAJECTORIES = ("cartesian", "epi", "radial", "goldenangle", "spiral", "other")
_CALIBRATIONS = ("", "embedded", "interleaved", "separate", "external", "other")
_HZ_PER_T = 42.577478518e6  # proton, CODATA 2018
_COUNTERS = (
    "kspace_encoding_step_0", "kspace_encoding_step_1", "kspace_encoding_step_2", "average", "slice", "contrast",
    "phase", "repetition", "set", "segment",
)  # fmt: skip

Element = Any  # defusedxml's elements are those of the standard library, but it has no types


def read_header(xml: bytes, scan_id: str) -> tuple[Scan, Exam]:
    """Return what `xml` says of the scan, and of patient, study and scanner.

    xml: at most 4 MiB; NULs at its end are ignored.
    Raises AcquisitionError, naming field and value but never text of the header, where it is not an ISMRMRD header or
    holds an impossible number.
    """
    root = parse_header(xml)
    system = root.find("acquisitionSystemInformation")
    times = root.find("sequenceParameters")
    encodings = tuple(_encoding(e, n) for n, e in enumerate(root.findall("encoding")))
    if not encodings:
        raise AcquisitionError("the header holds no encoding; at least one is needed")
    scan = Scan(
        scan_id=scan_id,
        encodings=encodings,
        field_t=_field_t(root, system),
        te_ms=_numbers(times, "TE"),
        tr_ms=_numbers(times, "TR"),
        ti_ms=_numbers(times, "TI"),
        flip_deg=_numbers(times, "flipAngle_deg"),
        protocol=_text(root, "measurementInformation/protocolName"),
        n_coils=_count(system, "receiverChannels", 1, 1024),
        noise_bandwidth_ratio=_ratio(system),
    )
    return scan, _exam(root)


def parse_header(xml: bytes) -> Element:
    """Return the root element of a header, its tags without namespaces; raises AcquisitionError as `read_header`."""
    if len(xml) > _MAX_BYTES:
        raise AcquisitionError(f"the header has {len(xml)} bytes; at most {_MAX_BYTES} are read")
    try:
        root = fromstring(xml.rstrip(b"\0"), forbid_dtd=True)
    except DefusedXmlException as error:
        raise AcquisitionError("the header holds a DOCTYPE or entities; plain XML is needed") from error
    except (ParseError, ValueError, LookupError) as error:  # the latter two for encodings that Expat lacks
        raise AcquisitionError("the header is not well-formed XML; an ismrmrdHeader document is needed") from error
    for element in root.iter():
        if isinstance(element.tag, str):
            element.tag = element.tag.rsplit("}", 1)[-1]
    if root.tag != "ismrmrdHeader":
        raise AcquisitionError("the header's root is not ismrmrdHeader")
    return root


def _encoding(element: Element, number: int) -> Encoding:
    where = f"encoding {number}"
    spaces = {}
    for name in ("encodedSpace", "reconSpace"):
        space = element.find(name)
        if space is None:
            raise AcquisitionError(f"{where} has no {name}; both encodedSpace and reconSpace are needed")
        spaces[name] = _space(space, f"{where} {name}")
    limits = {}
    for name in _COUNTERS:
        found = element.find(f"encodingLimits/{name}")
        if found is not None:
            limits[name] = _limit(found, f"{where} {name}")
    parallel = element.find("parallelImaging")
    steps = ("kspace_encoding_step_1", "kspace_encoding_step_2")
    acceleration = [_count(parallel, f"accelerationFactor/{s}", 1, _MAX_MATRIX) or 1 for s in steps]
    return Encoding(
        *spaces["encodedSpace"],
        *spaces["reconSpace"],
        limits=limits,
        trajectory=_one_of(_TRAJECTORIES, _text(element, "trajectory") or "cartesian"),
        acceleration=(acceleration[0], acceleration[1]),
        calibration=_one_of(_CALIBRATIONS, _text(parallel, "calibrationMode")),
    )


def _space(element: Element, where: str) -> tuple[Matrix, Size]:
    counts, sizes = [], []
    for axis in "xyz":
        n = _count(element, f"matrixSize/{axis}", 1, _MAX_MATRIX, where)
        mm = _number(element, f"fieldOfView_mm/{axis}", where)
        if n is None or mm is None:
            raise AcquisitionError(f"{where} lacks {axis} of its matrixSize or fieldOfView_mm")
        if not 0 < mm <= 10_000:
            raise AcquisitionError(f"{where} has fieldOfView_mm/{axis} {mm:g}; it must lie above 0 and up to 10000")
        counts.append(n)
        sizes.append(mm)
    if math.prod(counts) > _MAX_SAMPLES:
        raise AcquisitionError(f"{where} has a matrix of {counts}; at most {_MAX_SAMPLES} points are possible")
    return Matrix(*counts), Size(*sizes)


def _limit(element: Element, where: str) -> Limit:
    found = [_count(element, name, 0, _MAX_COUNTER, where) for name in ("minimum", "maximum", "center")]
    minimum = found[0] or 0
    maximum = minimum if found[1] is None else found[1]
    center = (minimum + maximum + 1) // 2 if found[2] is None else found[2]
    if maximum < minimum:
        raise AcquisitionError(f"{where} is limited to {minimum}..{maximum}; the maximum must not be below the minimum")
    return Limit(minimum, maximum, center)


def _field_t(root: Element, system: Element | None) -> float | None:
    """The field strength, from the resonance frequency where the scanner does not say it itself."""
    field = _number(system, "systemFieldStrength_T")
    if not field:
        hz = _number(root, "experimentalConditions/H1resonanceFrequency_Hz")
        field = hz / _HZ_PER_T if hz else None
    if field is not None and not 0 < field <= 30:
        raise AcquisitionError(f"the field strength is {field:g} T; it must lie above 0 and up to 30")
    return field


def _ratio(system: Element | None) -> float | None:
    ratio = _number(system, "relativeReceiverNoiseBandwidth")
    if ratio is not None and not 0 < ratio <= 10:
        raise AcquisitionError(f"relativeReceiverNoiseBandwidth is {ratio:g}; it must lie above 0 and up to 10")
    return ratio


def _numbers(element: Element | None, name: str) -> tuple[float, ...]:
    """All numbers called `name`: times in ms and angles in degrees, none of them negative."""
    found = [] if element is None else [_parse(e.text, name) for e in element.findall(name)]
    for value in found:
        if not 0 <= value <= 1e6:
            raise AcquisitionError(f"{name} is {value:g}; it must lie in 0..1000000")
    return tuple(found)


def _count(element: Element | None, path: str, low: int, high: int, where: str = "the header") -> int | None:
    value = _number(element, path, where)
    if value is None:
        return None
    if value != int(value) or not low <= value <= high:
        raise AcquisitionError(f"{where} has {path} {value:g}; a whole number in {low}..{high} is needed")
    return int(value)


def _number(element: Element | None, path: str, where: str = "the header") -> float | None:
    found = None if element is None else element.find(path)
    return None if found is None else _parse(found.text, path, where)


def _parse(text: str | None, name: str, where: str = "the header") -> float:
    try:
        value = float(text or "")
    except ValueError:  # its text may be anything, so it is not repeated
        raise AcquisitionError(f"{where} has a {name} that is not a number") from None
    if not math.isfinite(value):
        raise AcquisitionError(f"{where} has {name} {value}; a finite number is needed")
    return value


def _one_of(words: tuple[str, ...], found: str) -> str:
    """Return `found` where the schema knows it, else "other": what is named in errors must not be free text."""
    return found.lower() if found.lower() in words else "other"


def _text(element: Element | None, path: str) -> str:
    found = None if element is None else element.find(path)
    text = "" if found is None else found.text or ""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:_MAX_TEXT]


def _exam(root: Element) -> Exam:
    subject, study, measurement, system = (
        root.find(name)
        for name in ("subjectInformation", "studyInformation", "measurementInformation", "acquisitionSystemInformation")
    )
    sex = _text(subject, "patientGender")[:1].upper()
    return Exam(
        Subject(
            name=_text(subject, "patientName"),
            identifier=_text(subject, "patientID"),
            birth_date=_digits(subject, "patientBirthdate", 8),
            sex=sex if sex in {"M", "F", "O"} else "",
            weight_kg=_plausible(subject, "patientWeight_kg", 700),
            height_m=_plausible(subject, "patientHeight_m", 3),
        ),
        Study(
            instance_uid=_text(study, "studyInstanceUID"),
            identifier=_text(study, "studyID"),
            accession_number=_text(study, "accessionNumber"),
            date=_digits(study, "studyDate", 8),
            time=_digits(study, "studyTime", 6),
            description=_text(study, "studyDescription"),
            referring_physician=_text(study, "referringPhysicianName"),
            body_part=_text(study, "bodyPartExamined"),
        ),
        Equipment(
            manufacturer=_text(system, "systemVendor"),
            model=_text(system, "systemModel"),
            institution=_text(system, "institutionName"),
            station=_text(system, "stationName"),
            serial_number=_text(system, "deviceSerialNumber") or _text(system, "deviceID"),
            resonance_hz=_count(root, "experimentalConditions/H1resonanceFrequency_Hz", 0, 10**10) or None,
        ),
        measurement_id=_text(measurement, "measurementID"),
        patient_position=_text(measurement, "patientPosition").upper(),
        series_description=_text(measurement, "seriesDescription"),
        frame_of_reference_uid=_text(measurement, "frameOfReferenceUID"),
        sequence_type=_text(root, "sequenceParameters/sequence_type"),
    )


def _digits(element: Element | None, path: str, n: int) -> str:
    """A date or time as DICOM writes it, "" where the text is not one; offsets and fractions of seconds are dropped."""
    digits = re.sub(r"[-:]", "", _text(element, path))[:n]
    return digits if re.fullmatch(rf"[0-9]{{{n}}}", digits) else ""


def _plausible(element: Element | None, path: str, high: float) -> float | None:
    """A measure of the patient, None where it is not a number in (0, high]: it decides no image."""
    found = _text(element, path)
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,12})?", found):
        return None
    return float(found) if 0 < float(found) <= high else None
