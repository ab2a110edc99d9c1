"""Alerts as HL7 v2.5.1 ORU^R01 over MLLP, for systems that speak that.

Preliminary results (OBR-25, OBX-11 P) with the alert's pseudonyms. The control id (MSH-10) is made of the alert's, so
that a receiver knows one that came twice. Delivered is what an acknowledgement that names it has accepted (AA).
Sources: HL7 v2.5.1 chapters 2 (MSH, MSA), 7 (ORU^R01, tables 0078 and 0085); MLLP release 1.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hl7

from edge.courier import RejectedError
from recon.errors import DeliveryError

_BEGIN, _END = b"\x0b", b"\x1c\r"
_LONGEST = 1 << 20  # of an acknowledgement
_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\", "\r": " ", "\n": " "})


class Hl7Sink:
    """An MLLP listener."""

    name = "hl7"

    def __init__(self, host: str, port: int, *, ca: Path | None = None, timeout_s: float = 10.0) -> None:
        """ca: certificates that the receiver's TLS certificate is checked against; None speaks without TLS.

        Raises DeliveryError where the certificates cannot be read.
        """
        self._place = (host, port)
        self._timeout_s = timeout_s
        try:
            self._tls = ssl.create_default_context(cafile=str(ca)) if ca else None
        except (OSError, ssl.SSLError) as error:
            raise DeliveryError(f"the certificates in {ca} cannot be used") from error

    def send(self, key: str, content: Mapping[str, Any]) -> None:
        """Send one alert; see `edge.courier.Sink`."""
        message = encode_oru(key, content)
        try:
            with socket.create_connection(self._place, self._timeout_s) as plain:
                connection = self._tls.wrap_socket(plain, server_hostname=self._place[0]) if self._tls else plain
                connection.settimeout(self._timeout_s)
                connection.sendall(_BEGIN + message.encode("utf-8") + _END)
                answer = _receive(connection)
        except OSError as error:
            raise DeliveryError(f"the HL7 receiver cannot be reached: {type(error).__name__}") from error
        check_ack(answer, control_id(key))


def control_id(key: str) -> str:
    """Return MSH-10 of the message for an alert: 20 characters, the most that version 2.5.1 takes."""
    return key[:20]


def encode_oru(key: str, alert: Mapping[str, Any]) -> str:
    """Return the message for an alert, its segments ended by carriage returns."""
    raised = _moment(alert["times"]["raised"])
    exam = alert["exam"]
    finding = f"{_text(alert['finding'])}^{_text(alert['finding'])}^L"
    also = [each["finding"] for each in alert.get("also", ())]
    interpretation = "AA" if alert["acr_category"] == 1 else "A"
    results = [
        ("CWE", f"{finding}", finding, "", interpretation),
        ("CWE", "ACR^ACR actionable finding category^L", f"{_text(alert['acr_code'])}^^RADLEX", "", interpretation),
        ("NM", "PROBABILITY^Probability^L", _text(alert["probability"]), "1", ""),
        ("ST", "EVIDENCE^Evidence grade^L", _text(alert["evidence"]), "", ""),
        ("ST", "QUALITY^Scan quality verdict^L", _text(alert["quality"]["verdict"] or "no verdict"), "", ""),
        ("ST", "MODEL^Model^L", _text(alert["model"]), "", ""),
        ("ST", "WEIGHTS^SHA-256 of the weights^L", _text(alert["model_sha256"]), "", ""),
        ("ST", "ALSO^Also flagged at the same place^L", _text(" ".join(also)), "", ""),
        ("ST", "ALERT^Alert^L", _text(alert["alert_id"]), "", ""),
    ]
    whose = f"{_text(exam.get('patient_key') or exam.get('exam_key', ''))}^^^SCANSIDE^PI"
    request = {
        1: "1", 3: f"{_text(alert['scan_id'])}^SCANSIDE", 4: "TRIAGE^Triage of an MR scan^L", 7: raised,
        18: _text(exam.get("accession", "")), 20: _text(exam.get("exam_key", "")), 22: raised, 24: "RAD", 25: "P",
    }  # fmt: skip
    segments = [
        f"MSH|^~\\&|SCANSIDE||||{raised}||ORU^R01^ORU_R01|{control_id(key)}|P|2.5.1|||AL|NE||UNICODE UTF-8",
        _segment("PID", {1: "1", 3: whose, 5: "^"}),
        _segment("OBR", request),
        *(
            _segment("OBX", {1: str(n), 2: kind, 3: name, 5: value, 6: unit, 8: flag, 11: "P", 14: raised})
            for n, (kind, name, value, unit, flag) in enumerate(results, 1)
            if value
        ),
        _segment("NTE", {1: "1", 3: _text(alert["notice"])}),
    ]
    return "\r".join(segments) + "\r"


def check_ack(answer: str, expected: str) -> None:
    """Return where `answer` accepts the message with control id `expected`.

    Raises RejectedError where it refuses it for ever (AR, CR), DeliveryError for all else.
    """
    try:
        message = hl7.parse(answer)
        code, named = str(message["MSA"][0][1]), str(message["MSA"][0][2])
    except (hl7.HL7Exception, KeyError, IndexError, ValueError) as error:
        raise DeliveryError("the HL7 receiver's answer is no acknowledgement") from error
    if named != expected:
        raise DeliveryError("the HL7 receiver acknowledged another message")
    if code in ("AR", "CR"):
        raise RejectedError(f"the HL7 receiver rejects the message ({code})")
    if code not in ("AA", "CA"):
        raise DeliveryError(f"the HL7 receiver could not take the message ({code[:2]})")


def _receive(connection: socket.socket) -> str:
    buffer = b""
    while _END not in buffer:
        chunk = connection.recv(1 << 16)
        if not chunk or len(buffer) > _LONGEST:
            raise DeliveryError("the HL7 receiver ended without an acknowledgement")
        buffer += chunk
    return buffer[: buffer.index(_END)].lstrip(_BEGIN).decode("utf-8", "replace")


def _segment(name: str, fields: Mapping[int, str]) -> str:
    """Return a segment with these fields, by their numbers in the standard."""
    return "|".join([name, *(fields.get(n, "") for n in range(1, max(fields) + 1))])


def _text(value: Any) -> str:
    return "" if value is None else str(value).translate(_ESCAPES)


def _moment(rfc3339: str) -> str:
    """Return an RFC 3339 UTC time as HL7 writes it."""
    return rfc3339.replace("-", "").replace("T", "").replace(":", "").replace("Z", "+0000")
