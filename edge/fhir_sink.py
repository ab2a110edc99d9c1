"""Alerts as FHIR R4B: a preliminary DiagnosticReport and an urgent Communication about it, in one transaction.

Both are created conditionally (`ifNoneExist` on the alert's identifier): a server that gets them twice has them once.
Patient and exam are named by the alert's pseudonyms.
Sources: HL7 FHIR R4B, Bundle (transaction, conditional create), Communication, DiagnosticReport.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.communication import Communication
from fhir.resources.R4B.diagnosticreport import DiagnosticReport

from edge.courier import RejectedError
from edge.secret import read_secret
from recon.errors import DeliveryError

_SYSTEM = "urn:scanside"
_TRY_AGAIN = frozenset({408, 425, 429})
_AI = {
    "system": "http://terminology.hl7.org/CodeSystem/v3-ObservationValue",
    "code": "AIAST",
    "display": "Artificial Intelligence asserted",
}


class FhirSink:
    """A FHIR server's base address."""

    name = "fhir"

    def __init__(self, url: str, *, token: Path | None = None, ca: Path | None = None, timeout_s: float = 10.0) -> None:
        """token: a file with a bearer token, read at each sending. ca: certificates instead of the system's."""
        self._url, self._token, self._timeout_s = url, token, timeout_s
        try:
            self._tls = ssl.create_default_context(cafile=str(ca) if ca else None)
        except (OSError, ssl.SSLError) as error:
            raise DeliveryError(f"the certificates in {ca} cannot be used") from error

    def send(self, key: str, content: Mapping[str, Any]) -> None:
        """Send one alert; see `edge.courier.Sink`."""
        headers = {"Content-Type": "application/fhir+json", "Accept": "application/fhir+json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {read_secret(self._token).decode('ascii').strip()}"
        body = encode_bundle(key, content).encode()
        request = urllib.request.Request(self._url, body, headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=self._tls))
        try:
            with opener.open(request, timeout=self._timeout_s) as answer:
                found = json.loads(answer.read(1 << 20))
        except urllib.error.HTTPError as error:
            error.close()
            if 400 <= error.code < 500 and error.code not in _TRY_AGAIN:
                raise RejectedError(f"the FHIR server refuses the alert (HTTP {error.code})") from error
            raise DeliveryError(f"the FHIR server could not take the alert (HTTP {error.code})") from error
        except (OSError, ValueError) as error:
            raise DeliveryError(f"the FHIR server cannot be reached: {type(error).__name__}") from error
        entries = found.get("entry", []) if isinstance(found, dict) else []
        statuses = [str(each.get("response", {}).get("status", ""))[:3] for each in entries if isinstance(each, dict)]
        if len(statuses) != 2 or not set(statuses) <= {"200", "201"}:
            raise DeliveryError("the FHIR server's answer does not say that both resources are there")


def encode_bundle(key: str, alert: Mapping[str, Any]) -> str:
    """Return the transaction for an alert as JSON; what FHIR does not allow raises pydantic's ValueError."""
    exam = alert["exam"]
    subject = {"identifier": {"system": f"{_SYSTEM}:patient", "value": exam.get("patient_key") or exam["exam_key"]}}
    finding = {"coding": [{"system": f"{_SYSTEM}:finding", "code": alert["finding"]}], "text": alert["finding"]}
    raised = alert["times"]["raised"]
    meta = {"security": [_AI]}
    words = _words(alert)
    report = DiagnosticReport.model_validate(
        {
            "meta": meta,
            "identifier": [{"system": f"{_SYSTEM}:alert", "value": key}],
            "status": "preliminary",
            "code": {"text": "Triage of an MR scan"},
            "subject": subject,
            "effectiveDateTime": raised,
            "issued": raised,
            "conclusion": words,
            "conclusionCode": [
                finding,
                {"coding": [{"system": "http://radlex.org", "code": alert["acr_code"]}]},
            ],
        }
    )
    place = f"urn:uuid:{_uuid(key)}"
    communication = Communication.model_validate(
        {
            "meta": meta,
            "identifier": [{"system": f"{_SYSTEM}:alert", "value": key}],
            "status": "in-progress",
            "category": [
                {
                    "coding": [
                        {"system": "http://terminology.hl7.org/CodeSystem/communication-category", "code": "alert"}
                    ]
                }
            ],
            "priority": "stat" if alert["acr_category"] == 1 else "urgent",
            "subject": subject,
            "about": [{"reference": place}],
            "sent": raised,
            "payload": [{"contentString": words}],
        }
    )
    bundle = Bundle.model_validate(
        {
            "type": "transaction",
            "entry": [
                {
                    **({"fullUrl": place} if kind == "DiagnosticReport" else {}),
                    "resource": resource,
                    "request": {"method": "POST", "url": kind, "ifNoneExist": f"identifier={_SYSTEM}:alert|{key}"},
                }
                for kind, resource in (("DiagnosticReport", report), ("Communication", communication))
            ],
        }
    )
    return str(bundle.model_dump_json())


def _words(alert: Mapping[str, Any]) -> str:
    probability = alert["probability"]
    said = [
        f"Flagged for review: {alert['finding']}",
        f"probability {probability:.2f}" if probability is not None else "",
        f"scan quality {alert['quality']['verdict'] or 'without a verdict'}",
        f"evidence grade {alert['evidence']}" if alert["evidence"] else "",
        *(f"also flagged at the same place: {each['finding']}" for each in alert.get("also", ())),
    ]
    return f"{', '.join(each for each in said if each)}. {alert['notice']}"


def _uuid(key: str) -> str:
    """Return a UUID in form that always belongs to an alert."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{_SYSTEM}:alert:{key}"))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing: a token goes to the server that the settings name, and to no other."""
        return None
