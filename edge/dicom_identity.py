"""What a DICOM object that comes in says of itself: whose it is, and why it may not be taken.

Statuses: DICOM PS3.4 B.2.3 (storage) and PS3.7 C (general); those from C101 on are this project's own.
"""

from __future__ import annotations

import filecmp
import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset

from edge.dicom_read import MODALITY, is_synthetic
from edge.exam import Exam, Study, Subject
from edge.spool import scan_id_of
from edge.uids import is_uid

OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900  # the data set is not what the command says
NOT_UNDERSTOOD = 0xC000
SYNTHETIC = 0xC101
OURS = 0xC102
DUPLICATE = 0x0111
_OUR_NAME = "Scanside"  # of Manufacturer in the Contributing Equipment of all that is made here


class ObjectRefusedError(Exception):
    """An object is not taken: the status that the sender is told, and why in words that name nobody."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Place:
    """Where an object belongs: the scan that its series is here, and its file's name there."""

    scan_id: str
    name: str


def place_of(path: Path, secret: bytes, sop_class: str, instance: str) -> Place:
    """Return where the object in a file belongs; raises ObjectRefusedError where triage could never use it.

    secret: the site's, so that names on the disk say nothing of the identifiers that they come from. sop_class,
    instance: what the sender's command called it.
    """
    try:
        found = dcmread(path)
        uids = [str(found.get(name, "")) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
        n_missing = _n_missing(found)
    except Exception as error:  # whatever a peer sends: damaged data sets fail in many ways
        raise ObjectRefusedError(NOT_UNDERSTOOD, "the data set cannot be read") from error
    if not all(is_uid(uid) for uid in uids):
        raise ObjectRefusedError(NOT_UNDERSTOOD, "study, series or instance UID is missing or is none")
    if (str(found.get("SOPClassUID", "")), uids[2]) != (sop_class, instance):
        raise ObjectRefusedError(MISMATCH, "the data set is another object than the command names")
    if found.get("Modality") != MODALITY:
        raise ObjectRefusedError(NOT_UNDERSTOOD, "the object is no MR image")
    if n_missing:
        raise ObjectRefusedError(NOT_UNDERSTOOD, "pixels are missing")
    if is_synthetic(found):
        raise ObjectRefusedError(SYNTHETIC, "synthetic images are not taken")
    if any(item.get("Manufacturer") == _OUR_NAME for item in found.get("ContributingEquipmentSequence") or []):
        raise ObjectRefusedError(OURS, "images that were made here are not taken again")
    digest = hmac.new(secret, f"series\0{uids[0]}\0{uids[1]}".encode(), hashlib.sha256).digest()
    name = hmac.new(secret, f"instance\0{uids[2]}".encode(), hashlib.sha256).hexdigest()
    return Place(scan_id_of(int.from_bytes(digest[:16], "big")), f"{name[:32]}.dcm")


def is_same(one: Path, other: Path) -> bool:
    """Whether two files hold one data set, in whatever transfer syntax."""
    return filecmp.cmp(one, other, shallow=False) or bool(dcmread(one) == dcmread(other))


def exam_of(header: Dataset) -> Exam:
    """Return whose images these are, as far as exam and patient keys need it."""
    study = Study(str(header.get("StudyInstanceUID", "")), accession_number=str(header.get("AccessionNumber", "")))
    return Exam(Subject(identifier=str(header.get("PatientID", "") or "")), study)


def _n_missing(found: Dataset) -> int:
    """Return how many bytes of pixels an uncompressed object lacks."""
    n = found.Rows * found.Columns * found.get("SamplesPerPixel", 1) * int(found.get("NumberOfFrames", 1) or 1)
    return max(int(n * found.BitsAllocated // 8) - len(found.PixelData), 0) or int(n == 0)
