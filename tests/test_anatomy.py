"""The anatomy that ships: present, licensed, and a head."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from edge.anatomy import ASSET, load_anatomy
from recon.contrast import TISSUES
from recon.errors import ShapeError
from recon.head import BONE, FULL, STORED_TISSUES, Anatomy, make_head, tissue_fractions, to_atlas


def test_the_asset_is_small_and_its_notice_lies_beside_it() -> None:
    folder = resources.files("edge") / "assets"
    assert len((folder / ASSET).read_bytes()) < 1_500_000
    notice = (folder / "icbm152_LICENCE.txt").read_text(encoding="utf-8")
    assert "Louis Collins" in notice
    assert "Permission to use, copy, modify, and distribute" in notice


def test_fractions_never_exceed_a_voxel_and_the_head_is_symmetric() -> None:
    fractions = load_anatomy().fractions
    assert fractions.sum(axis=0, dtype=np.int32).max() <= FULL * 4 / 3  # the modelled tissues are stored in thirds
    assert np.array_equal(fractions, fractions[..., ::-1])


def test_brain_volume_is_an_adults() -> None:
    fractions = load_anatomy().fractions
    brain_ml = fractions[:2].sum(dtype=np.float64) / FULL / 1000
    assert 1300 < brain_ml < 1900  # the atlas is scaled up from an average of 1.4 l


@pytest.mark.parametrize(
    ("point", "tissue"),
    [
        ((24.0, 20.0, 30.0), "wm"),  # centrum semiovale
        ((7.0, -8.0, 15.0), "fluid"),  # lateral ventricle
        ((32.0, -67.0, -36.0), "fluid"),  # eye
        ((0.0, 120.0, 200.0), "none"),
    ],
)
def test_tissues_lie_where_anatomy_puts_them(point: tuple[float, float, float], tissue: str) -> None:
    head = make_head(load_anatomy(), 0)
    shares = tissue_fractions(head, np.array(point, np.float32)[:, None])[:, 0]
    found = STORED_TISSUES[int(shares.argmax())] if shares.any() else "none"
    assert found == tissue


def test_from_the_brain_outwards_come_skull_fat_and_skin() -> None:
    head = make_head(load_anatomy(), 0)
    ray = np.stack([np.zeros(120), np.zeros(120) + 20, np.linspace(60, 110, 120)]).astype(np.float32)
    shares = tissue_fractions(head, ray)
    names = [STORED_TISSUES[share.argmax()] if share.any() else "air" for share in shares.T]
    order = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
    # The second bone is the outer table, the last one the silent remainder that touches the skin.
    assert order[-8:] == ["bone", "marrow", "bone", "muscle", "fat", "muscle", "bone", "air"]


def test_two_people_differ_and_one_stays_the_same() -> None:
    points = np.random.default_rng(0).uniform(-60, 60, (3, 500)).astype(np.float32)
    one, again, other = (make_head(load_anatomy(), seed) for seed in (5, 5, 6))
    assert np.array_equal(to_atlas(one, points), to_atlas(again, points))
    assert np.array_equal(one.folds, again.folds)
    moved = np.linalg.norm(to_atlas(one, points) - to_atlas(other, points), axis=0)
    assert moved.max() > 0.5
    assert moved.max() < 30  # a head stays a head


def test_an_anatomy_of_another_layout_is_refused() -> None:
    with pytest.raises(ShapeError, match="anatomy"):
        Anatomy(np.zeros((3, 4, 4, 4), np.uint8), (0, 0, 0), 1.0)


def test_every_stored_tissue_has_parameters() -> None:
    assert set(STORED_TISSUES) == set(TISSUES)
    assert STORED_TISSUES[BONE] == "bone"
