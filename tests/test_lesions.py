"""Findings: their truth against an independent count, and the push of a mass."""

from __future__ import annotations

import numpy as np
import pytest

from edge.anatomy import load_anatomy
from recon.contrast import LESION_TISSUES
from recon.errors import ScanError
from recon.head import STORED_TISSUES, make_head
from recon.lesions import FINDINGS, Ellipsoid, Lesion, Part, Ripple, healthy_fractions, measure, place_lesion

SMOOTH = Ripple(np.zeros((1, 3), np.float32), np.full(1, np.pi / 2, np.float32), 0.0)


def ball(radius_mm: float, centre_mm: tuple[float, float, float]) -> Ellipsoid:
    return Ellipsoid(centre_mm, radius_mm, (np.eye(3) / radius_mm).astype(np.float32), radius_mm, SMOOTH)


def test_volume_of_a_ball_is_its_formula() -> None:
    head = make_head(load_anatomy(), 1)
    everywhere = dict.fromkeys(STORED_TISSUES, 1.0)
    part = Part(LESION_TISSUES["acute blood"], ball(12, (25, 10, 20)), 1.0, everywhere)
    truth = measure(head, Lesion("bleed", "ball", (part,)))
    assert truth.volume_ml == pytest.approx(4 / 3 * np.pi * 12**3 / 1000, rel=0.02)
    assert truth.centre_mm == pytest.approx((25, 10, 20), abs=0.05)
    assert truth.midline_shift_mm == 0


@pytest.mark.parametrize("finding", FINDINGS[1:])
@pytest.mark.parametrize("seed", range(4))
def test_findings_are_of_a_size_that_is_seen_and_survived(finding: str, seed: int) -> None:
    head = make_head(load_anatomy(), seed)
    lesion = place_lesion(head, finding, seed)
    assert lesion is not None
    truth = measure(head, lesion)
    assert 0.2 < truth.volume_ml < 120
    assert max(np.abs(truth.centre_mm)) < 80
    assert (truth.oedema_ml > 0) == (finding != "infarct")
    assert truth.midline_shift_mm > 2 if finding == "mass" else truth.midline_shift_mm < 6


def test_an_infarct_replaces_tissue_only() -> None:
    head = make_head(load_anatomy(), 1)
    lesion = place_lesion(head, "infarct", 1)
    assert lesion is not None
    points = np.random.default_rng(0).uniform(-90, 90, (3, 20000)).astype(np.float32)
    fractions, _ = healthy_fractions(head, lesion, points)
    cover = lesion.core().coverage(points, fractions)
    assert (cover <= fractions[:2].sum(axis=0) + 1e-5).all()
    assert cover.max() > 0.5


def test_a_mass_pushes_the_midline_by_what_it_says() -> None:
    seed = 4
    head = make_head(load_anatomy(), seed)
    lesion = place_lesion(head, "mass", seed)
    assert lesion is not None
    assert lesion.displacement is not None
    stated = measure(head, lesion).midline_shift_mm
    x = np.arange(-30, 30.1, 0.1, dtype=np.float32)
    best = 0.0
    for y in range(-60, 61, 6):
        for z in range(0, 51, 6):
            points = np.stack([x, np.full_like(x, y), np.full_like(x, z)])
            came_from = x - lesion.displacement.at(points)
            assert (np.diff(came_from) > 0).all()  # the tissue is never folded over itself
            best = max(best, abs(float(np.interp(0, came_from, x))))
    assert stated == pytest.approx(best, rel=0.05)
    assert stated > 3
    away = -np.sign(measure(head, lesion).centre_mm[0])
    assert lesion.displacement.shift_mm * away > 0


def test_the_skull_stays_where_it_is() -> None:
    head = make_head(load_anatomy(), 4)
    lesion = place_lesion(head, "mass", 4)
    assert lesion is not None
    assert lesion.displacement is not None
    points = np.random.default_rng(1).uniform((-95, -110, -90), (95, 125, 95), (3000, 3)).T.astype(np.float32)
    fractions, _ = healthy_fractions(head, None, points)
    outside = fractions[STORED_TISSUES.index("fat")] > 0.5
    assert outside.sum() > 20
    assert np.abs(lesion.displacement.at(points[:, outside])).max() < 1.0


def test_the_seed_decides_and_none_is_none() -> None:
    head = make_head(load_anatomy(), 2)
    one, again, other = (place_lesion(head, "bleed", seed) for seed in (3, 3, 4))
    assert one is not None
    assert again is not None
    assert other is not None
    assert measure(head, one) == measure(head, again)
    assert measure(head, one) != measure(head, other)
    assert place_lesion(head, "none", 3) is None
    with pytest.raises(ScanError, match="infarct"):
        place_lesion(head, "aneurysm", 1)


def test_a_lesion_outside_the_brain_is_refused() -> None:
    head = make_head(load_anatomy(), 2)
    part = Part(LESION_TISSUES["acute infarct"], ball(5, (0, 0, 300)), 1.0, {"wm": 1.0})
    with pytest.raises(ScanError, match="0 ml"):
        measure(head, Lesion("infarct", "nowhere", (part,)))
