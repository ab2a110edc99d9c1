"""Signal equations against closed forms, and the contrasts a radiographer expects."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from recon.contrast import CONTRASTS, LESION_TISSUES, TISSUES, Contrast, Sequence, Tissue, signal

WATER = Tissue(1.0, 1000.0, 100.0, 50.0, 2.0)


def test_gradient_echo_is_largest_at_the_ernst_angle() -> None:
    contrast = Contrast("x", Sequence.GRADIENT_ECHO, 100, 0)
    ernst = math.degrees(math.acos(math.exp(-0.1)))
    at = [signal(WATER, replace(contrast, flip_deg=angle)) for angle in (ernst - 2, ernst, ernst + 2)]
    assert at[1] > max(at[0], at[2])
    e1 = math.exp(-0.1)
    assert at[1] == pytest.approx(math.sqrt((1 - e1) / (1 + e1)))  # the closed form at that angle


def test_ninety_degrees_is_saturation_recovery() -> None:
    gradient = signal(WATER, Contrast("x", Sequence.GRADIENT_ECHO, 700, 20, flip_deg=90))
    assert gradient == pytest.approx((1 - math.exp(-0.7)) * math.exp(-20 / 50))
    assert signal(WATER, Contrast("x", Sequence.SPIN_ECHO, 700, 20)) == pytest.approx(
        (1 - math.exp(-0.7)) * math.exp(-20 / 100)
    )


def test_inversion_recovery_is_null_where_the_formula_says() -> None:
    null = 1000 * math.log(2 / (1 + math.exp(-3)))
    contrast = Contrast("x", Sequence.INVERSION_RECOVERY, 3000, 0, ti_ms=null)
    assert signal(WATER, contrast) == pytest.approx(0, abs=1e-12)


def test_diffusion_falls_with_b() -> None:
    contrast = CONTRASTS["dwi"]
    ratio = signal(WATER, contrast) / signal(WATER, replace(contrast, b_s_mm2=0))
    assert ratio == pytest.approx(math.exp(-1000 * 2.0e-3))


def test_only_fat_is_suppressed() -> None:
    with_fat = replace(CONTRASTS["dwi"], suppresses_fat=False)
    assert signal(TISSUES["fat"], CONTRASTS["dwi"]) < 0.1 * signal(TISSUES["fat"], with_fat)
    assert signal(TISSUES["gm"], CONTRASTS["dwi"]) == signal(TISSUES["gm"], with_fat)


@pytest.mark.parametrize(
    ("contrast", "brighter", "darker"),
    [
        ("t1", "fat", "wm"), ("t1", "wm", "gm"), ("t1", "gm", "fluid"),
        ("t2", "fluid", "gm"), ("t2", "gm", "wm"),
        ("flair", "gm", "wm"), ("flair", "wm", "fluid"),
        ("dwi", "gm", "wm"), ("dwi", "wm", "fluid"),
        ("t2star", "wm", "bone"),
    ],
)  # fmt: skip
def test_healthy_contrasts(contrast: str, brighter: str, darker: str) -> None:
    chosen = CONTRASTS[contrast]
    assert signal(TISSUES[brighter], chosen) > 1.1 * signal(TISSUES[darker], chosen)


@pytest.mark.parametrize(
    ("contrast", "lesion", "is_brighter"),
    [
        ("dwi", "acute infarct", True), ("flair", "acute infarct", True), ("t2", "acute infarct", True),
        ("t1", "acute infarct", False), ("t2star", "acute blood", False), ("t2", "acute blood", False),
        ("t1", "late subacute blood", True), ("flair", "vasogenic oedema", True), ("dwi", "vasogenic oedema", False),
    ],
)  # fmt: skip
def test_lesions_against_white_matter(contrast: str, lesion: str, is_brighter: bool) -> None:
    chosen = CONTRASTS[contrast]
    found, healthy = signal(LESION_TISSUES[lesion], chosen), signal(TISSUES["wm"], chosen)
    assert found > 1.15 * healthy if is_brighter else found < 1.02 * healthy


def test_every_signal_is_a_share_of_waters() -> None:
    values = [signal(t, c) for t in (*TISSUES.values(), *LESION_TISSUES.values()) for c in CONTRASTS.values()]
    assert min(values) >= 0
    assert max(values) <= 1
    assert np.isfinite(values).all()
