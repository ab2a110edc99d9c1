"""Keys that tell exams and patients apart without naming them: what goes over the wire instead of numbers and names.

A key is an HMAC-SHA256 under a secret of this site, `keys/pseudonym.key`: the same patient has the same key here and
another elsewhere, and nobody without the secret can find the number that belongs to a key by trying them all.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from edge.exam import Exam
from edge.uids import study_uid

IDENTIFIERS = ("pseudonymous", "study")


def exam_keys(exam: Exam, scan_id: str, secret: bytes, identifiers: str = "pseudonymous") -> dict[str, str]:
    """Return what an alert says of whose scan it is.

    identifiers: "study" adds Study Instance UID and accession number, for receivers that must open the study; never a
    name, patient number or date.
    """
    uid = study_uid(exam, scan_id)
    keys = {"exam_key": pseudonym(secret, "study", uid)}
    if exam.subject.identifier:
        keys["patient_key"] = pseudonym(secret, "patient", exam.subject.identifier)
    if identifiers == "study":
        keys |= {"study_uid": uid, "accession": exam.study.accession_number}
    return keys


def pseudonym(secret: bytes, kind: str, value: str) -> str:
    """Return the 24 letters and digits that stand for a value of one kind at this site."""
    digest = hmac.new(secret, f"{kind}\0{value}".encode("utf-8", "replace"), hashlib.sha256).digest()
    return base64.b32encode(digest[:15]).decode()
