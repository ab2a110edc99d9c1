"""What triage says of an exam: every finding in one of three states, never silence and never "normal"."""

from __future__ import annotations

import enum
from dataclasses import dataclass

LABELS = ("infarct", "haemorrhage", "mass")


class State(enum.Enum):
    """`NOT_ASSESSED` is not `NOT_FLAGGED`: nobody looked, and `reason` says why."""

    FLAGGED = "flagged"
    NOT_FLAGGED = "not flagged"
    NOT_ASSESSED = "not assessed"


@dataclass(frozen=True)
class Finding:
    """One finding: its state, and why where nobody looked. `probability` is None where it was not assessed."""

    label: str
    state: State
    reason: str = ""
    probability: float | None = None


@dataclass(frozen=True)
class Findings:
    """All findings that a site enabled, each exactly once."""

    findings: tuple[Finding, ...]


def not_assessed(reason: str) -> Findings:
    """Return every finding as not assessed, for `reason`."""
    return Findings(tuple(Finding(label, State.NOT_ASSESSED, reason) for label in LABELS))
