"""What triage saw, on one sheet: a slice a series, or all of a single series, with outlines of what was flagged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.orientation import display_ops
from edge.preview import Panel, slice_panel, write_preview
from edge.window import display_window
from recon.arrays import Array
from recon.scan import Volume
from triage.assess import Assessed
from triage.measure import OUTLINE

MOST = 24  # series on a sheet
SLICES = 12  # of a single series
COLUMNS = 4


@dataclass(frozen=True, eq=False)
class Entry:
    """One series on the sheet, and in words what was found."""

    name: str
    contrast: str
    volume: Volume
    assessed: Assessed
    words: str


def write_sheets(folder: Path, entries: Sequence[Entry]) -> None:
    """Write contact_sheet.png, and contact_sheet_002.png … where there are more than fit one. Raises OSError."""
    for number, start in enumerate(range(0, len(entries), MOST)):
        some = entries[start : start + MOST]
        panels = _slices(some[0]) if len(entries) == 1 else [_panel(each) for each in some]
        rows = [panels[k : k + COLUMNS] for k in range(0, len(panels), COLUMNS)]
        name = "contact_sheet.png" if number == 0 else f"contact_sheet_{number + 1:03d}.png"
        title = "Triage" if len(entries) > 1 else f"Triage · {_short(entries[0].name)}"
        subtitle = some[0].words if len(entries) == 1 else "a slice a series; outlines where something was flagged"
        write_preview(folder / name, rows, title, "Not assessed is not nothing found", subtitle)


def _slices(entry: Entry) -> list[Panel]:
    n = entry.volume.geometry.n_slices
    shown = {int((k + 0.5) * n / min(n, SLICES)) for k in range(min(n, SLICES))}
    keys = [each.key_slice for each in entry.assessed.findings.findings if each.key_slice is not None]
    for key in keys:  # in place of its nearest neighbour
        shown = (shown - {min(shown, key=lambda k: abs(k - key))}) | {key}
    window = display_window(entry.volume.data)
    return [_slice(entry, k, f"{k + 1} / {n}", window, "key slice" if k in keys else "") for k in sorted(shown)]


def _panel(entry: Entry) -> Panel:
    keys = [each.key_slice for each in entry.assessed.findings.findings if each.key_slice is not None]
    key = keys[0] if keys else entry.volume.geometry.n_slices // 2
    flagged = ", ".join(entry.assessed.maps)
    return _slice(entry, key, _short(entry.name), None, flagged or entry.contrast)


def _slice(entry: Entry, index: int, label: str, window: tuple[float, float] | None, note: str) -> Panel:
    panel = slice_panel(entry.volume, index, label, window)
    outline: Array = np.zeros(entry.volume.data.shape[1:], bool)
    for each in entry.assessed.maps.values():
        outline = outline | (each[index] >= min(OUTLINE, float(each.max())))
    ops = display_ops(entry.volume.geometry)
    return Panel(
        panel.label,
        panel.image,
        panel.spacing_mm,
        panel.window,
        note=note,
        letters=panel.letters,
        outline=ops.apply(outline) if outline.any() else None,
    )


def _short(name: str, most: int = 26) -> str:
    last = Path(name).name
    return last if len(last) <= most else f"{last[: math.ceil(most / 2) - 1]}…{last[-(most // 2) :]}"
