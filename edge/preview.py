"""Pictures that a person looks at first: panels of slices on a dark sheet, each the right way round and labelled."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edge.atomic import write_atomically
from edge.orientation import display_ops
from edge.window import display_window
from recon.arrays import Array
from recon.errors import ShapeError
from recon.scan import Volume

WARNING = "Not for diagnostic use"

BACKGROUND = (13, 15, 19)
BRIGHT, DIM, AMBER = (236, 239, 244), (146, 154, 168), (245, 178, 66)
MARGIN, GAP, LABEL_HEIGHT = 26, 12, 26

# Black through violet and orange to pale yellow, each step brighter than the last, so that it also reads in grey.
_ERROR_STOPS = (
    (0, 0, 0), (38, 12, 81), (98, 21, 110), (156, 41, 99),
    (209, 70, 68), (242, 120, 25), (250, 190, 40), (252, 255, 164),
)  # fmt: skip

# What Pillow's own font cannot draw, in letters that it can.
_PLAIN = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "−": "-", "→": "->", "≤": "<=", "≥": ">=", "µ": "u", "σ": "sigma"}
)


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a sheet.

    image: real (y, x), any size; as it is to be seen, first row on top.
    spacing_mm: (y, x), for the right shape of the picture.
    window: (black, white) in the units of `image`; None: found from the image.
    colours: "grey", or "error" for a difference, drawn with a bar that states its range (`unit` behind the numbers).
    note: a short word to the right of the label. letters: patient directions at the left, right, top, bottom edge.
    box: (y0, y1, x0, x1) in pixels of `image`, outlined. outline: bool (y, x), whose border is drawn.
    """

    label: str
    image: Array
    spacing_mm: tuple[float, float] = (1.0, 1.0)
    window: tuple[float, float] | None = None
    colours: Literal["grey", "error"] = "grey"
    note: str = ""
    unit: str = ""
    letters: tuple[str, str, str, str] = ("", "", "", "")
    box: tuple[int, int, int, int] | None = None
    outline: Array | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 2 or 0 in self.image.shape:
            raise ShapeError("picture", self.image.shape, ("y", "x"))
        if self.outline is not None and self.outline.shape != self.image.shape:
            raise ShapeError("outline", self.outline.shape, self.image.shape)

    @property
    def size_mm(self) -> tuple[float, float]:
        """Height and width of the picture."""
        return self.image.shape[0] * self.spacing_mm[0], self.image.shape[1] * self.spacing_mm[1]


def write_preview(
    path: Path, rows: Sequence[Sequence[Panel]], title: str, footer: str, subtitle: str = "", panel_px: int = 300
) -> None:
    """Write `rows` of panels to `path` as one PNG (8-bit RGB), whole or not at all.

    Panels of a row share one scale, so that millimetres compare; the longest side in a row is `panel_px` pixels.
    Every sheet carries the words "Not for diagnostic use". Raises OSError as the file system does.
    """
    sizes = [[_pixels(panel, row, panel_px) for panel in row] for row in rows]
    n_columns = max(len(row) for row in rows)
    widths = [max(row[c][0] for row in sizes if c < len(row)) for c in range(n_columns)]
    heights = [max(height for _, height in row) for row in sizes]
    strips = [LABEL_HEIGHT if any(panel.label or panel.note for panel in row) else 0 for row in rows]
    top = MARGIN + (36 if title else 0) + (26 if subtitle else 0) + (8 if title or subtitle else 0)
    caption, warning = _font(15), _font(17)
    footer_width = math.ceil(caption.getlength(_drawable(footer)) + warning.getlength(WARNING)) + 60
    title_width = math.ceil(max(_font(26).getlength(_drawable(title)), _font(16).getlength(_drawable(subtitle))))
    body_width = sum(widths) + GAP * (n_columns - 1)
    width = max(body_width, footer_width, title_width) + 2 * MARGIN
    height = top + sum(heights) + sum(strips) + GAP * len(rows) + 30 + MARGIN
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), _drawable(title), BRIGHT, _font(26))
    draw.text((MARGIN, MARGIN - 6 + (36 if title else 0)), _drawable(subtitle), DIM, _font(16))

    y = top
    for row, row_sizes, row_height, strip in zip(rows, sizes, heights, strips, strict=True):
        x = (width - body_width) // 2
        for panel, size, column_width in zip(row, row_sizes, widths, strict=False):
            left = x + (column_width - size[0]) // 2
            _draw_label(draw, panel, left, y, size[0])
            above = y + strip + (row_height - size[1]) // 2
            sheet.paste(_picture(panel, size), (left, above))
            x += column_width + GAP
        y += row_height + strip + GAP
    draw.text((MARGIN, height - MARGIN), _drawable(footer), DIM, caption, anchor="ls")
    draw.text((width - MARGIN, height - MARGIN), WARNING, AMBER, warning, anchor="rs")
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_atomically(path, file.getvalue())


def scan_preview(path: Path, volume: Volume, title: str = "", footer: str = "", most: int = 12) -> None:
    """Write a contact sheet of `volume` to `path`: up to `most` slices spread evenly, one window for all.

    Without a title it is named after how it was made; without a footer, after the software.
    """
    n_slices = volume.geometry.n_slices
    shown = [int((k + 0.5) * n_slices / min(n_slices, most)) for k in range(min(n_slices, most))]
    window = display_window(volume.data)
    panels = [slice_panel(volume, index, f"{index + 1} / {n_slices}", window) for index in shown]
    n_columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / math.ceil(len(panels) / 4))
    rows = [panels[start : start + n_columns] for start in range(0, len(panels), n_columns)]
    n_y, n_x = panels[0].image.shape
    y_mm, x_mm = panels[0].spacing_mm
    facts = f"{display_ops(volume.geometry).plane} · {n_slices} slice{'s' * (n_slices > 1)} · {n_x} × {n_y}"
    facts += f" · {x_mm:.2f} × {y_mm:.2f} mm, {volume.geometry.thickness_mm:.1f} mm thick"
    write_preview(
        path,
        rows,
        title or _made_by(volume),
        footer or volume.provenance.software,
        facts,
        panel_px={1: 640, 2: 520, 3: 400}.get(n_columns, 300),
    )


def slice_panel(volume: Volume, index: int, label: str, window: tuple[float, float] | None = None) -> Panel:
    """Return one slice of `volume` turned for display, with the patient's directions at its edges."""
    ops = display_ops(volume.geometry)
    spacing = ops.spacing(volume.geometry.spacing_mm[1:])
    letters = (ops.left, ops.right, ops.top, ops.bottom)
    return Panel(label, ops.apply(volume.data[index]), spacing, window, letters=letters)


def _made_by(volume: Volume) -> str:
    method = {"network": "Network", "sense": "CG-SENSE", "zero-filled": "Zero-filled"}
    name = method.get(volume.provenance.method, volume.provenance.method.capitalize())
    if not volume.provenance.is_measured:
        return "Super-resolved (AI-SR): detail added by a learned prior"
    return f"{name} reconstruction"


def _pixels(panel: Panel, row: Sequence[Panel], panel_px: int) -> tuple[int, int]:
    """Return width and height of `panel` in the sheet's pixels, at the scale of its row."""
    scale = panel_px / max(max(other.size_mm) for other in row)
    return max(round(panel.size_mm[1] * scale), 1), max(round(panel.size_mm[0] * scale), 1)


def _picture(panel: Panel, size: tuple[int, int]) -> Image.Image:
    """Return the panel's image in RGB at `size` (width, height), with letters, box and bar drawn on it."""
    values = np.nan_to_num(np.asarray(panel.image, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = panel.window or display_window(values)
    span = max(high - low, float(np.finfo(np.float32).tiny))
    shade = np.clip((values.astype(np.float64) - low) / span, -0.5, 1.5).astype(np.float32)
    grown = np.asarray(Image.fromarray(shade).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    if panel.colours == "error":
        rgb = _error_colours(grown)
    else:
        rgb = np.repeat(np.rint(grown * 255).astype(np.uint8)[..., None], 3, axis=-1)
    if panel.outline is not None:
        rgb[_border(panel.outline, size)] = AMBER
    picture = Image.fromarray(rgb)
    draw = ImageDraw.Draw(picture)
    if panel.box is not None:
        y0, y1, x0, x1 = panel.box
        x_scale, y_scale = size[0] / values.shape[1], size[1] / values.shape[0]
        draw.rectangle((x0 * x_scale, y0 * y_scale, x1 * x_scale - 1, y1 * y_scale - 1), outline=AMBER, width=2)
    _draw_letters(draw, panel.letters, size)
    if panel.colours == "error":
        _draw_bar(picture, low, high, panel.unit)
    return picture


def _border(inside: Array, size: tuple[int, int]) -> Array:
    """Return bool (height, width): the border, one pixel wide, of what is True in `inside` once grown to `size`."""
    grown = np.asarray(Image.fromarray(inside.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)) >= 0.5
    padded = np.pad(grown, 1)
    kept = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return grown & ~kept


def _error_colours(shade: Array) -> Array:
    """Return uint8 (…, 3) for `shade` (…) from 0 to 1."""
    stops = np.asarray(_ERROR_STOPS, np.float64)
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(shade, at, stops[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)


def _draw_label(draw: ImageDraw.ImageDraw, panel: Panel, left: int, y: int, width: int) -> None:
    baseline = y + LABEL_HEIGHT - 8
    draw.text((left, baseline), _drawable(panel.label), BRIGHT, _font(16), anchor="ls")
    draw.text((left + width, baseline), _drawable(panel.note), DIM, _font(15), anchor="rs")


def _draw_letters(draw: ImageDraw.ImageDraw, letters: tuple[str, str, str, str], size: tuple[int, int]) -> None:
    width, height = size
    places = ((5, height / 2, "lm"), (width - 5, height / 2, "rm"), (width / 2, 4, "mt"), (width / 2, height - 5, "mb"))
    for letter, (x, y, anchor) in zip(letters, places, strict=True):
        draw.text((x, y), letter, AMBER, _font(14), anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))


def _draw_bar(picture: Image.Image, low: float, high: float, unit: str) -> None:
    """Draw the colour bar and its range into the lower right corner."""
    width, height = picture.size
    length = max(height // 3, 24)
    shade = np.repeat(np.linspace(1, 0, length)[:, None], 9, axis=1)
    left, top = width - 16, height - length - 14
    picture.paste(Image.fromarray(_error_colours(shade)), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left - 1, top - 1, left + 9, top + length), outline=DIM)
    for value, y, anchor in ((high, top, "rt"), (low, top + length, "rb")):
        draw.text(
            (left - 6, y),
            f"{value:.3g}{_drawable(unit)}",
            BRIGHT,
            _font(13),
            anchor,
            stroke_width=2,
            stroke_fill=(0, 0, 0),
        )


def _drawable(text: str) -> str:
    """Return `text` in characters that Pillow's own font has; "?" for the rest."""
    plain = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    kept = (c for c in plain if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c in "·±°…" else "?" for c in kept)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType; its wheels have it")
    return font
