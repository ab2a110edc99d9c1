"""Charts of benchmarks as PNG, drawn with Pillow: bars and stacked bars, time lines, and curves on log axes.

A chart is a sheet with a title and panels below each other. It is drawn at twice its size and made smaller, so that
lines are smooth; text is never smaller than 15 pixels.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image, ImageDraw, ImageFont

from edge.atomic import write_atomically
from edge.preview import BACKGROUND, BRIGHT, DIM

Colour = tuple[int, int, int]
PALETTE: tuple[Colour, ...] = (
    (86, 156, 235), (245, 178, 66), (94, 196, 136), (226, 104, 92), (170, 130, 226),
    (82, 200, 205), (233, 140, 190), (178, 186, 92), (150, 160, 178), (205, 150, 110),
    (120, 120, 235), (240, 220, 130), (60, 140, 110), (170, 70, 110),
)  # fmt: skip
GRID: Colour = (46, 51, 62)
WIDTH, MARGIN = 1240, 28
_SCALE = 2
_TEXT, _HEADING, _TITLE = 16, 18, 25
_PLAIN = str.maketrans({"×": "x", "–": "-", "—": "-", "−": "-", "→": "->", "≤": "<=", "≥": ">=", "µ": "u", "²": "2"})


class Pen:
    """Draws in pixels of the finished chart on the larger sheet."""

    def __init__(self, sheet: Image.Image) -> None:
        self._draw = ImageDraw.Draw(sheet)

    def text(self, x: float, y: float, words: str, colour: Colour = BRIGHT, size: int = _TEXT, at: str = "ls") -> None:
        """Write `words`; `at` is Pillow's anchor."""
        self._draw.text((x * _SCALE, y * _SCALE), plain(words), colour, _font(size * _SCALE), anchor=at)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """Fill a rectangle, at least a hair wide."""
        self._draw.rectangle((x0 * _SCALE, y0 * _SCALE, max(x1, x0 + 0.5) * _SCALE - 1, y1 * _SCALE - 1), fill=colour)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 1) -> None:
        """Draw a line through `points`."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=max(1, round(width * _SCALE)), joint="curve")

    def dot(self, x: float, y: float, colour: Colour, radius: float = 4.5) -> None:
        """Draw a filled circle."""
        r = radius * _SCALE
        self._draw.ellipse((x * _SCALE - r, y * _SCALE - r, x * _SCALE + r, y * _SCALE + r), fill=colour)


class ChartPanel(Protocol):
    """One part of a chart."""

    @property
    def title(self) -> str:
        """What is above it."""

    def height(self) -> int:
        """Return how many pixels it needs below its title."""

    def draw(self, pen: Pen, left: float, top: float, right: float) -> None:
        """Draw it from `top` on, between `left` and `right`."""


class Segment(NamedTuple):
    """A piece of a bar: its name gives its colour."""

    name: str
    start: float
    length: float


@dataclass(frozen=True)
class Bars:
    """Horizontal bars of coloured pieces that share one axis from 0: stacked bars, or a time line of each row.

    rows: label and pieces. unit: of the axis. notes: a word behind each bar. legend: whether the pieces' names are
    told. names: the order of their colours, so that panels agree; () takes them as they come.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[Segment]]]
    unit: str
    notes: Sequence[str] = ()
    legend: bool = True
    names: Sequence[str] = ()
    bar: int = 24

    def height(self) -> int:
        """Return how many pixels it needs below its title."""
        return len(self.rows) * (self.bar + 10) + 44 + len(self._legend_rows(WIDTH - 2 * MARGIN)) * 26

    def _names(self) -> list[str]:
        return list(dict.fromkeys((*self.names, *(piece.name for _, pieces in self.rows for piece in pieces))))

    def _legend_rows(self, width: float) -> list[list[str]]:
        if not self.legend:
            return []
        rows: list[list[str]] = [[]]
        used = 0.0
        for name in self._names():
            needed = text_width(name) + 46
            if used + needed > width and rows[-1]:
                rows.append([])
                used = 0.0
            rows[-1].append(name)
            used += needed
        return rows

    def draw(self, pen: Pen, left: float, top: float, right: float) -> None:
        """Draw it from `top` on, between `left` and `right`."""
        colours = {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(self._names())}
        y = top
        for names in self._legend_rows(right - left):
            x = left
            for name in names:
                pen.box(x, y + 3, x + 15, y + 18, colours[name])
                pen.text(x + 22, y + 16, name, DIM)
                x += text_width(name) + 46
            y += 26
        begin = left + max((text_width(label) for label, _ in self.rows), default=0) + 12
        end = right - max((text_width(note) for note in self.notes), default=0) - 12
        most = max((piece.start + piece.length for _, pieces in self.rows for piece in pieces), default=1.0) or 1.0
        bottom = y + len(self.rows) * (self.bar + 10)
        for tick in linear_ticks(most):
            x = begin + (end - begin) * tick / most
            pen.line([(x, y), (x, bottom)], GRID)
            is_last = tick == linear_ticks(most)[-1]
            pen.text(x, bottom + 20, f"{tick:g}{' ' + self.unit if is_last else ''}", DIM, at="ms")
        for number, (label, pieces) in enumerate(self.rows):
            middle = y + number * (self.bar + 10) + 5 + self.bar / 2
            pen.text(begin - 12, middle, label, at="rm")
            for piece in pieces:
                at = begin + (end - begin) * piece.start / most
                width = (end - begin) * piece.length / most
                pen.box(at, middle - self.bar / 2, at + width, middle + self.bar / 2, colours[piece.name])
            if number < len(self.notes):
                reach = max((piece.start + piece.length for piece in pieces), default=0.0)
                at = begin + (end - begin) * reach / most + 10
                pen.box(at - 4, middle - 11, at + text_width(self.notes[number]) + 4, middle + 11, BACKGROUND)
                pen.text(at, middle, self.notes[number], DIM, at="lm")


@dataclass(frozen=True)
class Curves:
    """Points of one or more series, joined by lines or not, on linear or log axes; their names stand on the right."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    x_name: str
    y_name: str
    log_x: bool = True
    log_y: bool = True
    joined: bool = True

    def height(self) -> int:
        """Return how many pixels it needs below its title."""
        return 400

    def draw(self, pen: Pen, left: float, top: float, right: float) -> None:
        """Draw it from `top` on, between `left` and `right`."""
        points = [point for each in self.series.values() for point in each]
        if not points:
            pen.text(left, top + 30, "nothing was measured", DIM)
            return
        names_width = max(text_width(name) for name in self.series) + 40
        x0, x1, y0, y1 = left + 78, right - names_width - 16, top + 34, top + 400 - 58
        along, x_ticks = _axis([x for x, _ in points], self.log_x, x0, x1)
        up, y_ticks = _axis([y for _, y in points], self.log_y, y1, y0)
        for tick in x_ticks:
            pen.line([(along(tick), y0), (along(tick), y1)], GRID)
            pen.text(along(tick), y1 + 20, f"{tick:g}", DIM, at="ms")
        for tick in y_ticks:
            pen.line([(x0, up(tick)), (x1, up(tick))], GRID)
            pen.text(x0 - 8, up(tick), f"{tick:g}", DIM, at="rm")
        pen.text(x0, y0 - 14, self.y_name, DIM)
        pen.text((x0 + x1) / 2, y1 + 46, self.x_name, DIM, at="ms")
        for number, (name, each) in enumerate(self.series.items()):
            colour = PALETTE[number % len(PALETTE)]
            placed = [(along(x), up(y)) for x, y in each]
            if self.joined and len(placed) > 1:
                pen.line(placed, colour, 2)
            for x, y in placed:
                pen.dot(x, y, colour, 4.5 if self.joined else 6.5)
            pen.dot(x1 + 24, y0 + 10 + 26 * number, colour, 6)
            pen.text(x1 + 38, y0 + 10 + 26 * number, name, at="lm")


def write_chart(path: Path, title: str, panels: Sequence[ChartPanel], subtitle: str = "", footer: str = "") -> None:
    """Write a chart as one PNG (8-bit RGB), whole or not at all; raises OSError as the file system does."""
    top = MARGIN + 30 + (26 if subtitle else 0)
    heights = [panel.height() + 44 for panel in panels]
    height = top + sum(heights) + (34 if footer else 8)
    sheet = Image.new("RGB", (WIDTH * _SCALE, height * _SCALE), BACKGROUND)
    pen = Pen(sheet)
    pen.text(MARGIN, MARGIN + 18, title, size=_TITLE)
    pen.text(MARGIN, MARGIN + 44, subtitle, DIM)
    y = top
    for panel, each in zip(panels, heights, strict=True):
        pen.text(MARGIN, y + 26, panel.title, size=_HEADING)
        panel.draw(pen, MARGIN, y + 40, WIDTH - MARGIN)
        y += each
    pen.text(MARGIN, height - 16, footer, DIM, 15)
    small = sheet.resize((WIDTH, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def stacked(parts: Mapping[str, float]) -> list[Segment]:
    """Return pieces one behind the other; those of no length are left out."""
    pieces: list[Segment] = []
    at = 0.0
    for name, length in parts.items():
        if length > 0:
            pieces.append(Segment(name, at, length))
            at += length
    return pieces


def linear_ticks(most: float) -> list[float]:
    """Return round numbers from 0 to `most`, four to nine of them."""
    rough = most / 6
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [round(step * k, 12) for k in range(int(most / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a number with three digits or more, never in powers of ten."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def counted(n: int, what: str) -> str:
    """Return "1 scanner", "2 scanners"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def plain(words: str) -> str:
    """Return `words` in characters that Pillow's own font has; "?" for the rest."""
    decomposed = unicodedata.normalize("NFKD", words.translate(_PLAIN))
    kept = (c for c in decomposed if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c in "·±°…" else "?" for c in kept)


def text_width(words: str, size: int = _TEXT) -> float:
    """Return how many pixels `words` take."""
    return float(_font(size).getlength(plain(words)))


def _axis(
    values: Sequence[float], is_log: bool, begin: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """Return what places a value between `begin` and `end`, and the ticks."""
    if not is_log:
        low, high = 0.0, max(values) * 1.06 or 1.0
        return (lambda v: begin + (end - begin) * (v - low) / (high - low)), linear_ticks(high)
    least, most = min(v for v in values if v > 0), max(values)
    low, high = math.log10(least / 1.15), math.log10(most * 1.15)
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors: tuple[float, ...] = (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [f * 10.0**d for d in decades for f in factors if low <= math.log10(f * 10.0**d) <= high]
    if len(ticks) < 3:  # within less than a factor of five or so
        ticks = [t for t in linear_ticks(most) if t >= 10**low]
    return (lambda v: begin + (end - begin) * (math.log10(max(v, least)) - low) / (high - low)), ticks


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType; its wheels have it")
    return font
