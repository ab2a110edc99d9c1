"""What can be wrong with single readouts: the values that `recon.line_checks` finds and reports."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from recon.arrays import Array
from recon.scan import ImageKey

MAX_KEPT = 200  # faults of one kind; a broken scanner finds no end, the others are counted


class Kind(enum.Enum):
    """What is wrong with a readout, or with the lines of an image; the values are short, stable codes."""

    NOT_FINITE = "not-finite"
    CLIPPED = "clipped"
    SPIKE = "spike"
    DUPLICATE = "duplicate"
    MISSING = "missing"
    SAMPLING = "sampling"
    CALIBRATION = "calibration"
    DEAD_COIL = "dead-coil"
    GAIN_JUMP = "gain-jump"
    INTERFERENCE = "interference"


@dataclass(frozen=True)
class LineFault:
    """One fault of one readout or image.

    key, line: which image, and which row ky of its encoded grid; None where it belongs to none. order: number of the
    readout in the scan, from 0; that of the image's last one for faults that show when it is complete. coil: None where
    all are meant. value, threshold: what was measured, and what would have passed. words: a sentence with both.
    from_start: for a coil, whether it never worked in this scan.
    """

    kind: Kind
    key: ImageKey | None
    line: int | None
    order: int
    coil: int | None
    value: float
    threshold: float
    words: str
    from_start: bool = False


@dataclass(frozen=True, eq=False)
class LineReport:
    """What was seen of all readouts so far.

    faults: in the order in which they were found, at most `MAX_KEPT` of a kind. counts: of all,
    by kind. n_readouts: that were looked at, whatever they are for. measured: bool (kz, ky) on the host, which places
    of each image have an imaging line. duration_s: from the first to the last readout by their time stamps; None where
    they carry none.
    """

    faults: tuple[LineFault, ...]
    counts: Mapping[Kind, int]
    n_readouts: int
    measured: Mapping[ImageKey, Array]
    duration_s: float | None


class FaultLog:
    """Faults as they are found. faults: the first `MAX_KEPT` of each kind, in order. counts: of all, by kind."""

    def __init__(self) -> None:
        self.faults: list[LineFault] = []
        self.counts: Counter[Kind] = Counter()
        self._said: set[tuple[Hashable, ...]] = set()

    def keep(
        self,
        kind: Kind,
        key: ImageKey | None,
        line: int | None,
        order: int,
        value: float,
        threshold: float,
        words: str,
        coil: int | None = None,
        from_start: bool = False,
    ) -> list[LineFault]:
        """Note one fault; return it, in a list, for the caller to add to what it found."""
        fault = LineFault(kind, key, line, order, coil, float(value), float(threshold), words, from_start)
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_KEPT:
            self.faults.append(fault)
        return [fault]

    def is_new(self, *what: Hashable) -> bool:
        """Whether `what`, a kind before all else, was not asked before."""
        is_new = what not in self._said
        self._said.add(what)
        return is_new

    def take_back(self, faults: Iterable[LineFault]) -> None:
        """Forget `faults`, and that anything of their kinds was said."""
        gone = list(faults)
        self.faults = [fault for fault in self.faults if fault not in gone]
        self.counts.subtract(fault.kind for fault in gone)
        kinds = {fault.kind for fault in gone}
        self._said = {what for what in self._said if what[0] not in kinds}
