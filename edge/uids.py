"""DICOM unique identifiers: the scanner's own where they are valid, otherwise derived, so that a rerun gives the same.

Source: DICOM PS3.5 §9.1 (form), B.2 (UUID-derived root 2.25).
"""

from __future__ import annotations

import hashlib
import re

from edge.exam import Exam

_FORM = re.compile(r"[012](\.(0|[1-9][0-9]*))+")


def is_uid(value: str) -> bool:
    """True where `value` is a legal UID: at most 64 characters, numbers joined by points, no leading zeros."""
    return len(value) <= 64 and _FORM.fullmatch(value) is not None


def derive_uid(*parts: str | int) -> str:
    """Return the UID 2.25.N that always belongs to `parts`: N is the first 128 bits of their SHA-256."""
    text = "\0".join(("scanside", *map(str, parts)))
    return f"2.25.{int.from_bytes(hashlib.sha256(text.encode('utf-8', 'replace')).digest()[:16], 'big')}"


def has_study_uid(exam: Exam) -> bool:
    """Whether the header names the study."""
    return is_uid(exam.study.instance_uid.strip(" \0"))


def study_uid(exam: Exam, scan_id: str) -> str:
    """Return the Study Instance UID: the header's, else one that scans of the same dated exam share, else the scan's.

    A study number alone does not name an exam (many scanners count 1, 2, 3 each day), so scans are joined only where
    patient number, date and a study or accession number are all there. Nothing can be read back from the hash, and
    no name enters it.
    """
    study = exam.study
    if has_study_uid(exam):
        return study.instance_uid.strip(" \0")
    if exam.subject.identifier and study.date and (study.accession_number or study.identifier):
        return derive_uid(
            "study", exam.subject.identifier, study.date, study.accession_number, study.identifier,
            exam.equipment.serial_number or exam.equipment.station,
        )  # fmt: skip
    return derive_uid("study", scan_id)


def frame_of_reference_uid(exam: Exam, scan_id: str) -> str:
    """Return the Frame of Reference UID: the header's, else the scan's own (others may have moved since)."""
    found = exam.frame_of_reference_uid.strip(" \0")
    return found if is_uid(found) else derive_uid("frame", scan_id)


def series_uid(scan_id: str, series: str, image_index: int = 0) -> str:
    """Return the Series Instance UID of one volume of a scan."""
    return derive_uid("series", scan_id, series, image_index)


def instance_uid(scan_id: str, series: str, image_index: int, slice_index: int) -> str:
    """Return the SOP Instance UID of one slice of one volume of a scan."""
    return derive_uid("instance", scan_id, series, image_index, slice_index)
