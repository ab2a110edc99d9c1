"""Pictures: right shape, right side, right colours, the warning on each, and whole files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from edge.comparison import busiest_box, write_comparison
from edge.preview import AMBER, WARNING, Panel, scan_preview, slice_panel, write_preview
from edge.window import display_window
from recon.errors import ShapeError
from recon.scan import Geometry, Provenance, Volume
from tests.letter import LANDMARKS, letter_volume

MEASURED = Provenance("sense", "scanside 0.1.0")


def letter(n_slices: int = 3, known: bool = True, row: Any = (1, 0, 0), col: Any = (0, 1, 0)) -> Volume:
    """Return the phantom in pixels of 3 × 1.5 mm."""
    centres = np.array([[0.0, 0.0, 6.0 * k] for k in range(n_slices)])
    geometry = Geometry.from_centres(centres, row, col, (70, 130), (6.0, 3.0, 1.5), 5.0, known)
    return Volume(letter_volume(geometry, (70, 130)), geometry, MEASURED)


def read(path: Path) -> Any:
    """Return the picture as int (y, x, colour)."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture).astype(int)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect every word that is drawn."""
    drawn: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def listen(self: Any, xy: Any, text: str, *args: Any, **kwargs: Any) -> None:
        drawn.append(text)
        draw(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", listen)
    return drawn


def test_pixels_keep_their_physical_shape(tmp_path: Path) -> None:
    image = np.ones((20, 40), np.float32)  # 60 mm high, 40 mm wide
    write_preview(tmp_path / "p.png", [[Panel("", image, (3.0, 1.0), (0.0, 1.0))]], "", "", panel_px=240)
    white = (read(tmp_path / "p.png") == 255).all(-1)
    assert white.any(0).sum() == 160
    assert white.any(1).sum() == 240


def test_panels_of_a_row_share_one_scale(tmp_path: Path) -> None:
    big, little = np.ones((40, 40), np.float32), np.ones((10, 20), np.float32)
    write_preview(tmp_path / "p.png", [[Panel("", big, window=(0, 1)), Panel("", little, window=(0, 1))]], "", "")
    white = (read(tmp_path / "p.png") == 255).all(-1)
    assert white.sum() == 300 * 300 + 75 * 150


def test_window_sets_black_and_white(tmp_path: Path) -> None:
    image = np.repeat(np.array([[-5.0, 2.0, 6.0, 99.0]], np.float32), 4, axis=0)
    write_preview(tmp_path / "p.png", [[Panel("", image, window=(2.0, 10.0))]], "", "", panel_px=400)
    sheet = read(tmp_path / "p.png")
    line = sheet[sheet.shape[0] // 2]
    left = (line.shape[0] - 400) // 2
    assert [int(line[left + x, 0]) for x in (20, 380)] == [0, 255]
    assert abs(line[left + 250, 0] - 127) < 25  # 6 is half way


@pytest.mark.parametrize("stored", [((1, 0, 0), (0, 1, 0)), ((-1, 0, 0), (0, -1, 0)), ((0, -1, 0), (1, 0, 0))])
def test_left_ball_is_drawn_on_the_right(tmp_path: Path, stored: Any, words: list[str]) -> None:
    volume = letter(1, row=stored[0], col=stored[1])
    panel = slice_panel(volume, 0, "x", (0.95, 1.0))  # only the left ball is that bright
    bright = np.argwhere(panel.image > 0.95).mean(0) * panel.spacing_mm
    middle = np.array(panel.size_mm) / 2
    (x_mm, y_mm, _), _ = LANDMARKS["left"]
    np.testing.assert_allclose(bright - middle, (y_mm, x_mm), atol=5)
    scan_preview(tmp_path / "p.png", volume)
    assert words.index("R") < words.index("L") < words.index("A") < words.index("P")  # left, right, top, bottom edge


def test_unknown_orientation_gets_no_letters(tmp_path: Path, words: list[str]) -> None:
    scan_preview(tmp_path / "p.png", letter(known=False))
    assert not {"L", "R", "A", "P"} & set(words)
    assert any("orientation unknown" in word for word in words)


@pytest.mark.parametrize("n_slices", [1, 2, 3, 4, 7, 12, 40])
def test_contact_sheet_holds_up_to_twelve(tmp_path: Path, words: list[str], n_slices: int) -> None:
    volume = letter(n_slices)
    scan_preview(tmp_path / "p.png", volume)
    labels = [word for word in words if word.endswith(f" / {n_slices}")]
    assert len(labels) == len(set(labels)) == min(n_slices, 12)
    assert WARNING in words
    assert "CG-SENSE reconstruction" in words
    sheet = read(tmp_path / "p.png")
    assert (sheet == AMBER).all(-1).any()
    assert max(sheet.shape) < 1500


def test_super_resolved_is_named_so(tmp_path: Path, words: list[str]) -> None:
    volume = letter(1)
    made = Volume(volume.data, volume.geometry, Provenance("network", "s", is_measured=False))
    scan_preview(tmp_path / "p.png", made)
    assert any("AI-SR" in word for word in words)


def test_comparison_says_the_error(tmp_path: Path, words: list[str]) -> None:
    volume = letter(2)
    worse = volume.data * np.float32(0.9)
    write_comparison(
        tmp_path / "c.png", {"Worse": worse, "Same": volume.data}, volume.data, volume.geometry, [1], "t", "f"
    )
    assert {"Worse", "Same", "Fully sampled", "NRMSE 10.0 %", "NRMSE 0.0 %", "10 %", WARNING} <= set(words)
    assert words.count("Error x 10") == 2
    coloured = np.ptp(read(tmp_path / "c.png"), axis=-1) > 60
    third = coloured.shape[1] // 3
    lower = coloured[2 * coloured.shape[0] // 3 :]
    assert lower[:, :third].sum() > 2 * lower[:, third : 2 * third].sum()  # no error: black but for its bar


def test_comparison_refuses_other_grids(tmp_path: Path) -> None:
    volume = letter(1)
    with pytest.raises(ShapeError, match="image of Less"):
        write_comparison(tmp_path / "c.png", {"Less": volume.data[:, 1:]}, volume.data, volume.geometry, [0], "", "")
    assert list(tmp_path.iterdir()) == []


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=30), elements=st.floats(0, 1, width=32))
)
def test_detail_lies_within_the_image(image: Any) -> None:
    y0, y1, x0, x1 = busiest_box(image)
    assert 0 <= y0 < y1 <= image.shape[0]
    assert 0 <= x0 < x1 <= image.shape[1]


def test_detail_is_where_the_edges_are() -> None:
    image = np.zeros((60, 60), np.float32)
    image[35:45:2, 18:28] = 1
    y0, y1, x0, x1 = busiest_box(image)
    assert (y0 <= 35, y1 >= 45) == (True, True)
    assert (x0 <= 18, x1 >= 28) == (True, True)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3), elements=st.floats(-1e6, 1e6, width=32)))
def test_window_is_never_empty(image: Any) -> None:
    low, high = display_window(image)
    assert low <= 0 or low <= image.min()
    assert high > low


def test_hot_voxels_do_not_set_the_window() -> None:
    image = np.zeros((64, 64), np.float32)
    image[16:48, 16:48] = 1.0
    image[20, 20] = 1e4
    assert display_window(image) == (0.0, 1.0)


def test_bad_pixels_are_black_and_harmless(tmp_path: Path) -> None:
    image = np.full((8, 8), np.nan, np.float32)
    image[0, 0], image[0, 1] = np.inf, 1.0
    write_preview(tmp_path / "p.png", [[Panel("Müller × 3 – 名", image)]], "title", "footer")
    assert read(tmp_path / "p.png").ndim == 3


def test_pictures_are_whole_and_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan_preview(tmp_path / "a.png", letter())
    scan_preview(tmp_path / "b.png", letter())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    before = (tmp_path / "a.png").read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        scan_preview(tmp_path / "a.png", letter(1))
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_empty_picture_is_refused() -> None:
    with pytest.raises(ShapeError, match="picture"):
        Panel("", np.zeros((0, 4)))
