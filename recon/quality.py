"""Can this scan be believed, and must it be repeated? From measures of its own k-space to a verdict in words.

No reference image is needed. What is measured comes from `recon.line_checks` (each readout as it arrives) and
`recon.consistency` (each slice once it is reconstructed); here it meets thresholds, which a calibration run stored with
the network's card (`export.calibrate_quality`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Level(enum.Enum):
    """How far a scan can be believed; `UNTRUSTED` puts the classical image in front and keeps triage away."""

    TRUSTED = "trusted"
    DEGRADED = "degraded"
    UNTRUSTED = "untrusted"


@dataclass(frozen=True)
class Reason:
    """Why a scan is not trusted.

    code: short and stable, such as "motion". words: a sentence for people, with the number and the threshold in it.
    measure, value, threshold: what was measured, and what would have passed. slices: the numbers of those affected,
    () for all. lines: order numbers of the readouts affected, from 0, as far as they can be told.
    """

    code: str
    words: str
    measure: str
    value: float
    threshold: float
    level: Level
    slices: tuple[int, ...] = ()
    lines: tuple[int, ...] = ()


@dataclass(frozen=True)
class Advice:
    """Whether to scan again. what: which part ("the whole series", "slices 3 and 4"). cost_s: None where unknown."""

    repeat: bool
    what: str = ""
    why: str = ""
    cost_s: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one scan. measures: every number that was taken, by name, for the report; the worst slice's."""

    level: Level
    reasons: tuple[Reason, ...]
    advice: Advice
    measures: Mapping[str, float] = field(default_factory=dict)
