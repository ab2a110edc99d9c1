"""DICOM objects without what names the patient: the basic profile of PS3.15, with codes that say so.

The profile lists what to remove; here it is listed what may stay, by value representation: numbers, codes and pixels.
Names, dates, times, addresses, private elements and free text go, except words that this software writes itself. UIDs
are replaced under the site's secret: the same one always by the same, and nobody else can tell which.
Sources: DICOM PS3.15 E.1 to E.3 (profile and options), PS3.16 CID 7050 (codes), PS3.3 C.12.1.1.1 (Patient Identity).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import UID

from edge.dicom import encode
from edge.pseudonym import pseudonym
from recon.errors import DeliveryError

_GONE = frozenset({"PN", "DA", "TM", "DT", "AS", "AE", "UN"})
_TEXTS = frozenset({"LO", "SH", "ST", "LT", "UT", "UC", "UR"})
_WORDS = frozenset(  # texts of codes and equipment, and those that this software writes
    {
        "CodeValue", "LongCodeValue", "CodingSchemeDesignator", "CodingSchemeVersion", "CodeMeaning", "TextValue",
        "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "RescaleType", "SegmentLabel",
        "SegmentDescription", "SegmentAlgorithmName", "AlgorithmName", "AlgorithmVersion", "LUTExplanation",
    }
)  # fmt: skip
_NUMBERS_THAT_TELL = frozenset(
    {
        "PatientSex", "PatientWeight", "PatientSize", "PregnancyStatus", "SmokingStatus", "EthnicGroup",
        "PatientSexNeutered", "PatientState", "MedicalAlerts", "Allergies",
    }
)  # fmt: skip
_EMPTY = (  # type 2: there, and empty
    "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_NEEDS_CONTENT_DATE = frozenset({"SR", "KO", "SEG", "OT"})
_STANDARD = "1.2.840.10008."
_CODES = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113105", "Clean Descriptors Option"),
)
_UNTRUSTED = "Verdict on the scan: untrusted"
_SYNTHETIC = "added by a learned prior"


def deidentify(file: Dataset, secret: bytes) -> Dataset:
    """Return a new data set of what may leave the site, to be written by `edge.dicom.encode`.

    Faces are not removed from images: whoever has the whole head can draw one (Recognizable Visual Features says so).
    """
    out = _cleaned(file, secret)
    who = pseudonym(secret, "patient", str(file.get("PatientID", "") or file.get("StudyInstanceUID", "")))
    out.PatientName = out.PatientID = who
    for name in _EMPTY:
        setattr(out, name, "")
    if "Manufacturer" not in out:
        out.Manufacturer = ""
    if file.get("Modality") in _NEEDS_CONTENT_DATE or "ContentDate" in file:
        out.ContentDate, out.ContentTime = "19000101", "000000"  # type 1, so a date that is nobody's
    if "TimezoneOffsetFromUTC" in out:
        del out.TimezoneOffsetFromUTC
    for name, value in _descriptors(file).items():
        setattr(out, name, value)
    out.SpecificCharacterSet = "ISO_IR 192"
    out.PatientIdentityRemoved = "YES"
    out.DeidentificationMethod = "Scanside: numbers, codes and pixels kept"
    out.DeidentificationMethodCodeSequence = [_code(*each) for each in _CODES]
    out.LongitudinalTemporalInformationModified = "REMOVED"
    if "PixelData" in file:
        out.BurnedInAnnotation = "NO"
        out.RecognizableVisualFeatures = "YES"
    return out


def deidentified_file(path: Path, secret: bytes) -> bytes:
    """Return the file that may leave the site; raises DeliveryError where the one at `path` cannot be read."""
    try:
        return encode(deidentify(dcmread(path), secret))
    except OSError as error:
        raise DeliveryError(f"an object cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged file fails in many ways
        raise DeliveryError(f"an object cannot be de-identified ({type(error).__name__})") from error


def _cleaned(file: Dataset, secret: bytes) -> Dataset:
    out = Dataset()
    for element in file:
        if element.tag.is_private or element.keyword in _NUMBERS_THAT_TELL or element.VR in _GONE:
            continue
        if element.VR == "SQ":
            out.add(DataElement(element.tag, "SQ", [_cleaned(item, secret) for item in element.value]))
        elif element.VR == "UI":
            out.add(DataElement(element.tag, "UI", _new_uids(element.value, secret)))
        elif element.VR in _TEXTS and element.keyword not in _WORDS:
            out.add(DataElement(element.tag, element.VR, ""))  # empty rather than gone: it may be type 2
        else:
            out.add(element)
    return out


def _new_uids(value: str | Iterable[str] | None, secret: bytes) -> UID | list[UID]:
    if value is None or isinstance(value, str):
        return new_uid(value or "", secret)
    return [new_uid(each, secret) for each in value]


def new_uid(uid: str, secret: bytes) -> UID:
    """Return the UID that stands for `uid` outside; those of the standard itself stay."""
    if not uid or uid.startswith(_STANDARD):
        return UID(uid)
    digest = hmac.new(secret, b"uid\0" + uid.encode(), hashlib.sha256).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")


def _descriptors(file: Dataset) -> dict[str, str]:
    """Return in fixed words what a reader must still be told of the images: what they are not to be used for."""
    said = str(file.get("DerivationDescription", ""))
    series = str(file.get("SeriesDescription", ""))
    words = [part for part in (_UNTRUSTED, _SYNTHETIC) if part in said]
    if "[untrusted]" in series and _UNTRUSTED not in words:
        words.append(_UNTRUSTED)
    out = {"SeriesDescription": "AI-SR - not for diagnostic use" if series.startswith("AI-SR") else
           "Scanside - not for diagnostic use"}  # fmt: skip
    if words:
        out["DerivationDescription"] = "; ".join(words)
    return out


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item
