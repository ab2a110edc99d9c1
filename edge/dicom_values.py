"""Values that fit their DICOM value representation, from whatever a header says; what cannot fit becomes "".

Source: DICOM PS3.5 §6.2, with the character set ISO_IR 192 (UTF-8).
"""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import date, time

POSITIONS = frozenset({"HFS", "HFP", "HFDR", "HFDL", "FFS", "FFP", "FFDR", "FFDL"})


def as_text(value: str, limit: int) -> str:
    """Return `value` in one line without control characters or backslashes, in `limit` bytes of UTF-8 (LO, SH, ST).

    For words that a person reads; a number that is looked up goes through `as_identifier`. DICOM counts characters,
    but many programs, dciodvfy among them, count bytes: what fits in bytes fits in both.
    """
    return _one_line(value).encode()[:limit].decode(errors="ignore").rstrip()


def _one_line(value: str) -> str:
    plain = unicodedata.normalize("NFC", value).encode("utf-8", "replace").decode("utf-8")
    spaced = (" " if c == "\\" or unicodedata.category(c) in {"Cc", "Zl", "Zp"} else c for c in plain)
    return " ".join("".join(spaced).split())


def as_identifier(value: str, limit: int) -> str:
    """Return `value` if it fits as it is into `limit` characters, "" otherwise.

    A shortened patient or accession number could be that of somebody else; an empty one is asked about.
    """
    stripped = value.strip(" \0")
    return stripped if _one_line(stripped) == stripped and len(stripped) <= limit else ""


def as_name(value: str) -> str:
    """Return a person's name (PN): up to three groups (Latin, ideographic, phonetic), each of up to five components.

    The standard gives each group 64 characters; as in `as_text` all of it is held to 64 bytes, last groups first.
    """
    groups = [as_text("^".join(group.split("^")[:5]), 64) for group in value.split("=")[:3]]
    while len("=".join(groups).encode()) > 64:
        groups.pop()
    return "=".join(groups).rstrip("=")


def as_code(value: str) -> str:
    """Return a code string (CS): at most 16 of A–Z, 0–9, space and underscore; anything else becomes an underscore."""
    return re.sub(r"[^A-Z0-9 _]", "_", as_text(value.upper(), 16))


def as_sex(value: str) -> str:
    """Return M, F or O, "" for anything else."""
    sex = value.strip().upper()
    return sex if sex in {"M", "F", "O"} else ""


def as_position(value: str) -> str:
    """Return the patient position (HFS, FFP …), "" for what is none."""
    position = value.strip().upper()
    return position if position in POSITIONS else ""


def as_date(value: str) -> str:
    """Return YYYYMMDD from that or from YYYY-MM-DD, "" for what is no day of the calendar."""
    found = re.fullmatch(r"([0-9]{4})[-.]?([0-9]{2})[-.]?([0-9]{2})", value.strip(" \0"))
    if found is None:
        return ""
    year, month, day = (int(part) for part in found.groups())
    try:
        date(year, month, day)
    except ValueError:
        return ""
    return f"{year:04}{month:02}{day:02}"


def as_time(value: str) -> str:
    """Return HHMMSS, with any fraction, from that or from HH:MM:SS; "" for what is no time of day."""
    found = re.fullmatch(r"([0-9]{2}):?([0-9]{2}):?([0-9]{2})(\.[0-9]{1,6})?[0-9]*", value.strip(" \0"))
    if found is None:
        return ""
    hour, minute, second = (int(part) for part in found.groups()[:3])
    try:
        time(hour, minute, second)
    except ValueError:
        return ""
    return f"{hour:02}{minute:02}{second:02}{found.group(4) or ''}"


def as_decimal(value: float) -> str:
    """Return a decimal string (DS): as many digits as 16 characters hold. Raises ValueError if not finite."""
    if not math.isfinite(value):
        raise ValueError("a decimal string holds finite numbers only")
    for digits in range(16, 0, -1):
        text = f"{value + 0.0:.{digits}g}"  # + 0.0: no "-0"
        if len(text) <= 16:
            return text
    raise AssertionError("one digit and an exponent take at most 10 characters")
