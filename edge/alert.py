"""The alert: what is sent when triage flags a finding. It starts the clock for a person to read the study, no more.

Built from what the reconstruction process reports of a scan, and never from its header: the keys that name exam and
patient are pseudonyms (`edge.pseudonym`) unless the settings ask for more.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from recon.errors import DeliveryError
from triage.findings import State

NOTICE = "For notification only. Not for diagnostic use. Read the full study."

# DICOM CID 7035, Actionable Finding Classification: RADLEX codes of the ACR's categories (minutes, hours, days).
ACR_CODES = {1: "RID49480", 2: "RID49481", 3: "RID49482"}
_ACR_BY_FINDING = {"infarct": 1, "haemorrhage": 1, "mass": 2}  # where the finding does not carry its category
_SAME_PLACE = 0.25  # of the smaller box lies in the other
_NEAR_MM = 5.0  # boxes nearer than a slice are at one place


@dataclass(frozen=True)
class Times:
    """When the scan reached each step, RFC 3339 in UTC; "" where nobody knows, as after a restart."""

    acquisition_end: str = ""
    reconstruction_end: str = ""
    triage_end: str = ""
    raised: str = ""


@dataclass(frozen=True)
class Alert:
    """One flagged place of one scan, as it is published, under the name of the likeliest finding there.

    also: what else is flagged at the same place: `finding`, `probability`, `evidence`. acr_category: the most urgent.
    exam: keys of exam and patient. quality: verdict and reason codes. conformal: "present", "absent", both or none.
    box_mm: lower and upper corner, patient LPS. key_image: which slice of which volume shows it, and where its preview
    lies under the state folder. None: triage did not say.
    """

    alert_id: str
    scan_id: str
    finding: str
    acr_category: int
    exam: Mapping[str, str]
    probability: float | None
    conformal: Sequence[str]
    alpha: float | None
    evidence: str | None
    contrast: str | None
    operating_point: str | None
    volume_ml: float | None
    box_mm: Sequence[Sequence[float]] | None
    model: str | None
    model_sha256: str | None
    quality: Mapping[str, Any]
    key_image: Mapping[str, Any]
    also: Sequence[Mapping[str, Any]] = ()
    times: Times = field(default_factory=Times)
    notice: str = NOTICE

    def __post_init__(self) -> None:
        """Refuse what must never reach a desk: no finding, a probability or category that is none."""
        if not self.alert_id or not self.scan_id or not self.finding:
            raise DeliveryError("an alert without id, scan or finding cannot be sent")
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise DeliveryError(f"an alert's probability is {self.probability!r}; it must lie in 0..1")
        if self.acr_category not in ACR_CODES:
            raise DeliveryError(f"an alert's ACR category is {self.acr_category!r}; 1, 2 and 3 are known")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "acr_code": ACR_CODES[self.acr_category]}


def alert_id(scan_id: str, finding: str, model_sha256: str | None) -> str:
    """Return 26 letters and digits that always belong to a finding of a scan by a model: a rerun alerts once."""
    digest = hashlib.sha256("\0".join((scan_id, finding, model_sha256 or "")).encode()).digest()
    return base64.b32encode(digest[:16]).decode().rstrip("=")


def alerts_of(scan_id: str, report: Mapping[str, Any], exam: Mapping[str, str], times: Times) -> list[Alert]:
    """Return an alert for each place of a scan at which something is flagged.

    To a network for masses a bleed looks like one: a place is told once, under the likeliest name, with the others.

    report: its `quality` and `findings` as in report.json. Raises DeliveryError where a finding cannot be one.
    """
    quality = report.get("quality") or {}
    codes = [reason["code"] for reason in quality.get("reasons", ()) if "code" in reason]
    verdict = {"verdict": quality.get("verdict"), "reasons": codes}
    flagged = [finding for finding in report.get("findings", ()) if finding.get("state") == State.FLAGGED.value]
    return [_alert(scan_id, place, verdict, exam, times) for place in _places(flagged)]


def _places(flagged: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return findings that lie at one place together, the likeliest of each first."""
    places: list[list[Mapping[str, Any]]] = []
    for finding in sorted(flagged, key=lambda each: -(_number(each.get("probability")) or 0.0)):
        there = next((place for place in places if _overlap(place[0].get("box_mm"), finding.get("box_mm"))), None)
        if there is None:
            places.append([finding])
        else:
            there.append(finding)
    return places


def _overlap(one: Any, other: Any) -> bool:
    """Whether two boxes, lower and upper corner each, share `_SAME_PLACE` of the smaller; False where one is None.

    The first is taken `_NEAR_MM` larger all round: what one network outlines in a slice, another may in the next one.
    """
    if one is None or other is None:
        return False
    grown = ((a - _NEAR_MM, b + _NEAR_MM, c, d) for a, b, c, d in zip(*one, *other, strict=True))
    shared = [min(b, d) - max(a, c) for a, b, c, d in grown]
    least = min(math.prod(b - a for a, b in zip(*box, strict=True)) for box in (one, other))
    return bool(min(shared) > 0 and math.prod(shared) >= _SAME_PLACE * least)


def _alert(
    scan_id: str, place: Sequence[Mapping[str, Any]], quality: Mapping[str, Any], exam: Mapping[str, str], times: Times
) -> Alert:
    finding, *others = place
    label, sha256 = str(finding["finding"]), finding.get("model_sha256")
    return Alert(
        alert_id=alert_id(scan_id, label, sha256),
        scan_id=scan_id,
        finding=label,
        acr_category=min(_category(each) for each in place),
        exam=dict(exam),
        probability=_number(finding.get("probability")),
        conformal=tuple(finding.get("conformal") or ()),
        alpha=_number(finding.get("alpha")),
        evidence=finding.get("evidence"),
        contrast=finding.get("contrast"),
        operating_point=finding.get("operating_point"),
        volume_ml=_number(finding.get("volume_ml")),
        box_mm=finding.get("box_mm"),
        model=finding.get("model"),
        model_sha256=sha256,
        quality=quality,
        key_image={
            "volume": finding.get("volume"),
            "slice": finding.get("key_slice"),
            "preview": f"results/{scan_id}/preview.png",
        },
        also=tuple(
            {
                "finding": str(each["finding"]),
                "probability": _number(each.get("probability")),
                "evidence": each.get("evidence"),
            }
            for each in others
        ),
        times=times,
    )


def _category(finding: Mapping[str, Any]) -> int:
    return finding.get("acr_category") or _ACR_BY_FINDING.get(str(finding["finding"]), 2)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
