"""What triage says of an exam: every finding in one of three states, never silence and never "normal"."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

LABELS = ("infarct", "haemorrhage", "mass")
PRESENT, ABSENT = "present", "absent"  # what a conformal set may hold

Box = tuple[tuple[float, float, float], tuple[float, float, float]]


class State(enum.Enum):
    """`NOT_ASSESSED` is not `NOT_FLAGGED`: nobody looked, and `reason` says why."""

    FLAGGED = "flagged"
    NOT_FLAGGED = "not flagged"
    NOT_ASSESSED = "not assessed"


@dataclass(frozen=True)
class Finding:
    """One finding: its state, why where nobody looked, and what the state rests on where somebody did.

    probability: calibrated, of the exam; None where no network looked. conformal: which of PRESENT and ABSENT the
    site's α leaves possible; () where no network looked, or where neither is like anything known.
    evidence: "real" or "simulated", what the network was evaluated on. contrast: of the series that decided.
    volume_ml, box_mm (least and greatest corner, LPS), key_slice (from 0) and the volume of the scan that it counts in:
    of what the network outlined, None where nothing was. model_sha256 and operating_point: whose answer this is, and
    by which threshold.
    """

    label: str
    state: State
    reason: str = ""
    probability: float | None = None
    conformal: tuple[str, ...] = ()
    alpha: float | None = None
    evidence: str = ""
    contrast: str = ""
    volume_ml: float | None = None
    box_mm: Box | None = None
    key_slice: int | None = None
    volume: int = 0
    model: str = ""
    model_sha256: str = ""
    operating_point: str = ""


@dataclass(frozen=True)
class Measurement:
    """One number and the interval that holds the truth in 95 of 100 cases; None, and `reason`, where it cannot be had.

    side: "left" or "right" of the patient where that means anything: of a lesion, or towards which the midline moved.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    reason: str = ""
    side: str = ""


@dataclass(frozen=True)
class Findings:
    """All findings that a site enabled, each exactly once, and what was measured, by name with its unit in it."""

    findings: tuple[Finding, ...]
    measurements: Mapping[str, Measurement] = field(default_factory=dict)


def not_assessed(reason: str, labels: tuple[str, ...] = LABELS) -> Findings:
    """Return every finding as not assessed, for `reason`."""
    return Findings(tuple(Finding(label, State.NOT_ASSESSED, reason) for label in labels))
