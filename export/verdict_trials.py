"""Clean scans and the same scans with faults, assessed: the table that thresholds are set and tried on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.assess import Assessed, assess, error_in_head
from export.faults import INJECTED, inject
from export.slices import Slice
from export.trials import KEY, Setting, Stream, Subject, draw_move, draw_setting, draw_subject, pattern, read
from recon.arrays import Array
from recon.errors import AcquisitionError
from recon.network import Network
from recon.scan import Role

CLEAN = "clean"
MOTION_MM = (1.0, 3.0, 6.0)
AWAY_MM = (5.0, 12.0, 25.0)  # between calibration lines and image
FAULTS = (*INJECTED, "motion", "calibration from another pose", "sampling out of range", "weak signal")
WEAKER = (5.0, 20.0, 100.0)  # times, the noise beside the signal
MOTION_SHARE = 0.3  # of the faults that are drawn
WORSE = 1.2  # a fault that raises the true error by more is to be found


@dataclass(frozen=True)
class Row:
    """One assessed scan. error: of its leading image, inside the head; clean_error: of the scan without the fault.

    values: its measures. kinds: what the checks of its readouts found, with counts. onset: the rank of the line with
    which a motion began, and found: where the measures put it, of n_lines. has_image: False where the scan gave none.
    level, repeat: of the verdict, where one was asked for.
    """

    scan: int
    subject: str
    contrast: str
    setting: dict[str, Any]
    fault: str
    severity: int
    error: float
    clean_error: float
    method: str
    values: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    onset: int | None = None
    found: int | None = None
    n_lines: int = 0
    has_image: bool = True
    level: str = ""
    repeat: bool = False

    @property
    def is_worse(self) -> bool:
        """Whether the fault raised the true error by more than `WORSE`."""
        return not self.has_image or self.error > WORSE * self.clean_error


Judge = Callable[[Stream, Assessed], tuple[str, bool]]


def no_verdict(stream: Stream, assessed: Assessed) -> tuple[str, bool]:
    """Return no level and no advice."""
    return "", False


def make_rows(
    slices: list[Slice],
    network: Network,
    n_scans: int,
    n_faults: int,
    seed: int,
    judge: Judge = no_verdict,
    motion_share: float = MOTION_SHARE,
) -> Iterator[Row]:
    """Yield the rows of `n_scans` scans, each clean first and then with `n_faults` faults; a seed gives the same ones.

    judge: returns the verdict's level and whether it advises to scan again. motion_share: of the faults, are motion.
    """
    weight = np.array([each.weight for each in slices])
    for number in range(n_scans):
        rng = np.random.default_rng([seed, number])
        source = slices[rng.choice(len(slices), p=weight / weight.sum())]
        setting = draw_setting(rng)
        subject = draw_subject(rng, source, setting)
        noise = int(rng.integers(1 << 31))
        clean = _row(number, source, setting, CLEAN, 0, read(subject, setting, noise), network, judge)
        yield clean
        for fault, severity in _drawn(rng, setting, n_faults, motion_share):
            stream = _spoiled(rng, subject, setting, noise, fault, severity)
            yield _row(number, source, setting, fault, severity, stream, network, judge, clean.error)


def _drawn(rng: np.random.Generator, setting: Setting, n: int, motion_share: float) -> list[tuple[str, int]]:
    """Faults that such a scan can have, a share of them motion."""
    impossible = set()
    if setting.acceleration == 1:
        impossible |= {"no calibration"}
    if not setting.separate:
        impossible |= {"calibration from another pose", "swapped coils"}
    if setting.n_coils == 1:
        impossible |= {"swapped coils", "dead coil"}
    others = [each for each in FAULTS if each not in impossible and each != "motion"]
    n_motions = int((rng.random(n) < motion_share).sum())
    names = [*["motion"] * n_motions, *rng.choice(others, n - n_motions, replace=n > len(others)).tolist()]
    return [(name, int(rng.integers(3))) for name in names]


def _spoiled(
    rng: np.random.Generator, subject: Subject, setting: Setting, noise: int, fault: str, severity: int
) -> Stream:
    lattice, central = pattern(setting)
    if fault == "motion":
        n_lines = int((lattice if setting.separate else lattice | central).sum())
        stream = read(subject, setting, noise, draw_move(rng, MOTION_MM[severity], n_lines))
    elif fault == "calibration from another pose":
        stream = read(subject, setting, noise, calibration_mm=AWAY_MM[severity])
    elif fault == "sampling out of range":
        n = len(lattice)
        rows = np.arange(n)
        lattice = (rows % 10 == 0, rows % 12 == 0, (rows % setting.acceleration == 0) & (rows > 0.46 * n))[severity]
        stream = read(subject, setting, noise, lattice=lattice)
    elif fault == "weak signal":
        stream = read(subject, setting._replace(sigma=WEAKER[severity] * setting.sigma), noise)
    else:
        whole = read(subject, setting, noise)
        stream = whole.changed(inject(fault, severity, list(whole.acquisitions), rng))
    return stream


def _row(
    number: int,
    source: Slice,
    setting: Setting,
    fault: str,
    severity: int,
    stream: Stream,
    network: Network,
    judge: Judge,
    clean_error: float | None = None,
) -> Row:
    try:
        found: Assessed | None = assess(stream.scan, stream.acquisitions, network)
    except AcquisitionError:
        found = None
    about = (number, source.subject, source.contrast, setting._asdict(), fault, severity)
    if found is None or KEY not in found.images:
        return Row(*about, 1.0, clean_error or 1.0, "", has_image=False)
    error = error_in_head(found.images[KEY][0], stream.truths)
    measures = found.measures.get(KEY)
    return Row(
        *about,
        error,
        error if clean_error is None else clean_error,
        found.methods[KEY],
        {} if measures is None else dict(measures.values),
        {kind.value: n for kind, n in found.lines.counts.items()},
        sum(found.left_out.values()),
        stream.onset,
        None if measures is None else measures.onset,
        sum(each.role in (Role.IMAGING, Role.CALIBRATION_AND_IMAGING) for each in stream.acquisitions),
        True,
        *judge(stream, found),
    )


def save_rows(rows: list[Row], path: Path) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def load_rows(path: Path) -> list[Row]:
    """Return the rows that `save_rows` wrote."""
    return [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def onset_errors(rows: list[Row]) -> Array:
    """Return by how many of its lines the onset of each found motion was missed, as a share; float (row)."""
    return np.array(
        [abs(row.found - row.onset) / row.n_lines for row in rows if row.onset is not None and row.found is not None]
    )
