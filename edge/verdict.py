"""From faults of single readouts to the verdict that a scan carries: events while it runs, reasons, advice, JSON."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recon.arrays import Array
from recon.coil_watch import CoilFault
from recon.consistency import SliceMeasures
from recon.judge import SAYINGS, slice_reasons, worst
from recon.limits import Limits
from recon.line_checks import LineChecks
from recon.line_faults import Kind, LineFault, LineReport
from recon.network import TrainedRange
from recon.quality import Advice, Level, Reason, Verdict
from recon.scan import Acquisition, ImageKey, Scan

_EVENT_S = 1.0  # between two early events of one kind: a broken scanner must not flood those who listen
_MANY = 0.05  # of the readouts: more that are lost or spoiled are a scan to repeat, not to mend
_MAX_LINES = 100  # order numbers that a reason lists


@dataclass(frozen=True)
class Handling:
    """What became of a scan's readouts and images, beside their own faults.

    left_out: why readouts were left out, and how many, where no fault explains it. set_aside: images not made.
    ending: how the stream ended, "complete" where nothing is missing.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    set_aside: Sequence[ImageKey] = ()
    ending: str = "complete"


@dataclass
class Slices:
    """What was measured of each image, and the numbers of the readouts that gave its lines, ascending."""

    measures: dict[ImageKey, SliceMeasures] = field(default_factory=dict)
    numbers: dict[ImageKey, Array] = field(default_factory=dict)


class Watch:
    """Follows the readouts of one scan and announces new faults, each kind at most once a second; all are counted."""

    def __init__(
        self,
        scan: Scan,
        trained: TrainedRange | None,
        on_fault: Callable[[dict[str, Any]], None] = lambda fault: None,
        limits: Limits | None = None,
    ) -> None:
        """on_fault: called with the fields of an early `quality` event. limits: of what is measured of slices."""
        self._scan = scan
        self._limits = limits
        self._slices = Slices()
        self._checks = LineChecks(scan, trained)
        self._on_fault = on_fault
        self._told_at: dict[str, float] = {}
        self._found: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def look(self, acquisition: Acquisition, order: int) -> bool:
        """Look at one readout, number `order`; return whether it is one that nothing can be made of."""
        found = self._checks.add(acquisition, order)
        self._tell(found)
        return any(fault.kind in (Kind.NOT_FINITE, Kind.SAMPLING) and fault.order == order for fault in found)

    def complete(self, key: ImageKey) -> None:
        """Note that an image has all of its lines."""
        self._tell(self._checks.complete(key))

    def judge(self, key: ImageKey, measures: SliceMeasures, numbers: Array, dead: Sequence[CoilFault] = ()) -> None:
        """Take the measures of an image, announce what is wrong. numbers: of its lines' readouts, ascending.

        dead: coils that the image showed to be dead.
        """
        self._tell(self._checks.note_dead(dead, key))
        self._slices.measures[key], self._slices.numbers[key] = measures, numbers
        if self._limits is None:
            return
        for reason in slice_reasons({key: measures}, self._limits, {key: numbers}):
            order = reason.lines[0] if reason.lines else int(numbers[-1]) if len(numbers) else 0
            self._announce(reason.code, reason.words, order)

    def verdict(self, set_aside: Sequence[ImageKey], ending: str) -> Verdict | None:
        """Return the verdict on the scan as far as it has come."""
        handling = Handling(self.left_out, set_aside, ending)
        return verdict_of(self._scan, self._checks.report(), handling, self._slices, self._limits)

    def finish(self) -> None:
        """Note that every image that is still open has all of its lines: the scan is complete."""
        for key in self._checks.open_keys:
            self.complete(key)

    def _tell(self, found: list[LineFault]) -> None:
        for fault in found:
            self._announce(fault.kind.value, fault.words, fault.order, fault.line, fault.coil)

    def _announce(self, what: str, words: str, order: int, line: int | None = None, coil: int | None = None) -> None:
        """Send an early event, unless one of its kind was sent within the last second."""
        self._found[what] += 1
        now = time.monotonic()
        if now - self._told_at.get(what, -math.inf) < _EVENT_S:
            return
        self._told_at[what] = now
        fault = {"early": True, "fault": what, "words": words, "order": order, "line": line, "coil": coil}
        self._on_fault({**fault, "count": self._found[what]})


def verdict_of(
    scan: Scan, lines: LineReport, handling: Handling, slices: Slices | None = None, limits: Limits | None = None
) -> Verdict | None:
    """Return the verdict on a scan; None where nothing is wrong that was looked at, and no slice was measured.

    A scan is trusted by its slices: its lines alone never make it so.
    """
    slices = slices or Slices()
    judged = slice_reasons(slices.measures, limits, slices.numbers) if limits is not None else []
    reasons = [*_of_lines(lines), *_of_handling(lines, handling), *judged]
    is_measured = limits is not None and bool(slices.measures)
    if not reasons and not is_measured:
        return None
    level = Level.TRUSTED
    if reasons:
        level = Level.UNTRUSTED if any(each.level is Level.UNTRUSTED for each in reasons) else Level.DEGRADED
    measures = {f"{kind.value} readouts or lines": float(n) for kind, n in sorted(lines.counts.items(), key=str)}
    if limits is not None:
        measures |= worst(slices.measures, limits)
    return Verdict(level, tuple(reasons), _advice(scan, lines, reasons), measures)


def quality_json(verdict: Verdict | None) -> dict[str, Any]:
    """Return the `quality` of reports and events."""
    if verdict is None:
        return {"verdict": None, "reasons": [], "advice": None, "measures": {}}
    advice = verdict.advice
    return {
        "verdict": verdict.level.value,
        "reasons": [
            {
                "code": each.code,
                "words": each.words,
                "measure": each.measure,
                "value": _number(each.value),
                "threshold": _number(each.threshold),
                "level": each.level.value,
                "slices": list(each.slices),
                "lines": list(each.lines),
            }
            for each in verdict.reasons
        ],
        "advice": {
            "repeat": advice.repeat,
            "what": advice.what,
            "why": advice.why,
            "cost_s": None if advice.cost_s is None else _number(advice.cost_s),
        },
        "measures": {name: _number(value) for name, value in verdict.measures.items()},
    }


def summary(quality: Mapping[str, Any]) -> str:
    """Return a verdict, as reports carry it, in one line: its level and its gravest reason; "" where there is none."""
    level = quality["verdict"]
    if level is None:
        return ""
    gravest = [each["words"] for each in quality["reasons"] if each["level"] == level][:1]
    return ": ".join([level, *gravest])


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _of_lines(lines: LineReport) -> list[Reason]:
    """One reason a kind of fault: the first in words, how many there are, which slices and readouts."""
    by_kind: dict[Kind, list[LineFault]] = {}
    for fault in lines.faults:
        by_kind.setdefault(fault.kind, []).append(fault)
    out = []
    for kind, faults in by_kind.items():
        n = lines.counts[kind]
        words = faults[0].words if n == 1 else f"{faults[0].words} (the first of {n})"
        if kind is Kind.NOT_FINITE:
            words = f"{n} of {lines.n_readouts} readouts were left out: they hold values that are not finite numbers"
            words += f"; none may, the first is readout {faults[0].order}"
        worst = max(faults, key=lambda fault: abs(fault.value - fault.threshold))
        slices = sorted({fault.key.slice for fault in faults if fault.key is not None})
        orders = sorted({fault.order for fault in faults})[:_MAX_LINES]
        level = _level(kind, faults, n, lines)
        reason = Reason(
            kind.value, words, kind.value, worst.value, worst.threshold, level, tuple(slices), tuple(orders)
        )
        out.append(reason)
    return out


def _level(kind: Kind, faults: list[LineFault], n: int, lines: LineReport) -> Level:
    """What a kind of fault makes of a scan. Without calibration nothing unfolds; a coil that dies belies its map."""
    n_lines = sum(int(each.sum()) for each in lines.measured.values()) or lines.n_readouts
    is_grave = {
        Kind.CALIBRATION: True,
        Kind.DEAD_COIL: not all(fault.from_start for fault in faults),
        Kind.NOT_FINITE: n > _MANY * lines.n_readouts,
        Kind.MISSING: n > _MANY * n_lines,
        Kind.SPIKE: n > _MANY * lines.n_readouts,
    }
    return Level.UNTRUSTED if is_grave.get(kind, False) else Level.DEGRADED


def _of_handling(lines: LineReport, handling: Handling) -> list[Reason]:
    total = max(lines.n_readouts, sum(handling.left_out.values()))
    out = []
    for why, n in handling.left_out.most_common():
        words = f"{n} of {total} readouts were left out: {why}"
        level = Level.UNTRUSTED if n > _MANY * total else Level.DEGRADED
        out.append(Reason("left-out", words, "readouts left out", n, 0, level))
    for key in handling.set_aside:
        words = f"slice {key.slice} was set aside: its reconstruction failed twice"
        out.append(Reason("set-aside", words, "failed reconstructions", 2, 1, Level.DEGRADED, (key.slice,)))
    if handling.ending != "complete":
        words = "the scan was interrupted: only whole slices were reconstructed"
        out.append(Reason("interrupted", words, "interruptions", 1, 0, Level.DEGRADED))
    return out


_NO_REPEAT = ("duplicate", "sampling", "set-aside")  # the same scan again would give the same
_OF_SLICES = {said.code for said in SAYINGS.values()}
_OF_THE_HEAD = ("motion",)  # seen in some slices, it moved all that were being read
_NEVER_REPEAT = ("unfamiliar", "disagreement")  # they speak of the head and the network, not of the measurement


def _advice(scan: Scan, lines: LineReport, reasons: Sequence[Reason]) -> Advice:
    """Repeat what a fault of the measurement spoiled; what it costs, by the time stamps or TR × lines.

    What was only measured of slices asks for another scan when it is grave: a slight excess is no spoiled scan.
    """
    spared = {*_NO_REPEAT, *_OF_SLICES}
    grave = [
        each
        for each in reasons
        if each.code not in _NEVER_REPEAT and (each.code not in spared or each.level is Level.UNTRUSTED)
    ]
    if not grave:
        return Advice(False)
    slices = sorted({number for each in grave for number in each.slices})
    is_all = (
        not slices
        or any(not each.slices or each.code in _OF_THE_HEAD for each in grave)
        or len(slices) == len({k.slice for k in lines.measured})
    )
    numbers = ", ".join(str(number) for number in slices)
    what = "the whole series" if is_all else f"slice{'s' if len(slices) > 1 else ''} {numbers}"
    first = next((each for each in grave if each.level is Level.UNTRUSTED), grave[0])
    return Advice(True, what, first.words, _cost_s(scan, lines))


def _cost_s(scan: Scan, lines: LineReport) -> float | None:
    """Seconds that the series took: repeating some of its interleaved slices takes as long as all of them."""
    if lines.duration_s:
        return lines.duration_s
    if not scan.tr_ms or not lines.measured:
        return None
    return scan.tr_ms[0] * 1e-3 * max(int(each.sum()) for each in lines.measured.values())
