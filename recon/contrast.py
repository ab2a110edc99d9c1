"""Signal equations of the simulated scanner, and what tissues are made of at 3 T.

Healthy tissue: T1, T2 and T2* of grey and white matter from Wansapura et al., J Magn Reson Imaging 9:531 (1999);
cerebrospinal fluid from Lin et al., Proc ISMRM 9:1391 (2001, T1); fat, marrow and muscle from Gold et al., Am J
Roentgenol 183:343 (2004); water content (proton density, water = 1) from Tofts, Quantitative MRI of the Brain (2003);
diffusion from Helenius et al., Am J Neuroradiol 23:194 (2002). T2* of the scalp is a plain assumption.
Lesions: infarct after Warach et al., Ann Neurol 37:231 (1995); blood after Bradley, Radiology 189:15 (1993, stages)
and Atlas & Thulborn, Am J Neuroradiol 19:1471 (1998); tumour and oedema after Oh et al., J Magn Reson Imaging 21:701
(2005).
Lesion values are round numbers inside the published ranges; no single number is a measurement.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple


class Tissue(NamedTuple):
    """Proton density (water = 1), relaxation times in ms and the apparent diffusion coefficient in µm²/ms."""

    density: float
    t1_ms: float
    t2_ms: float
    t2star_ms: float
    adc: float
    is_fat: bool = False


TISSUES: dict[str, Tissue] = {
    "wm": Tissue(0.70, 832, 80, 47, 0.75),
    "gm": Tissue(0.82, 1331, 110, 48, 0.85),
    "fluid": Tissue(1.00, 4163, 1700, 300, 3.0),
    "marrow": Tissue(0.45, 365, 110, 12, 0.3, is_fat=True),
    "fat": Tissue(0.85, 371, 110, 25, 0.1, is_fat=True),
    "muscle": Tissue(0.75, 1420, 32, 22, 1.4),
    "bone": Tissue(0.15, 250, 0.4, 0.4, 0.0),
}

LESION_TISSUES: dict[str, Tissue] = {
    "acute infarct": Tissue(0.86, 1550, 155, 60, 0.42),
    "vasogenic oedema": Tissue(0.88, 1600, 170, 80, 1.45),
    "solid tumour": Tissue(0.86, 1600, 140, 60, 1.15),
    "necrosis": Tissue(0.96, 2800, 420, 150, 2.3),
    "hyperacute blood": Tissue(0.88, 1550, 130, 18, 0.55),
    "acute blood": Tissue(0.82, 1300, 42, 7, 0.6),
    "early subacute blood": Tissue(0.82, 480, 45, 8, 0.7),
    "late subacute blood": Tissue(0.90, 480, 160, 25, 1.0),
    "haemosiderin": Tissue(0.75, 1100, 30, 4, 0.7),
}


class Sequence(enum.Enum):
    """How the signal is made."""

    GRADIENT_ECHO = "spoiled gradient echo"
    SPIN_ECHO = "turbo spin echo"
    INVERSION_RECOVERY = "inversion recovery turbo spin echo"
    DIFFUSION = "diffusion-weighted spin echo"


@dataclass(frozen=True)
class Contrast:
    """A sequence and its timing: ms, degrees, b in s/mm² (trace-weighted)."""

    name: str
    sequence: Sequence
    tr_ms: float
    te_ms: float
    flip_deg: float = 90.0
    ti_ms: float = 0.0
    b_s_mm2: float = 0.0
    suppresses_fat: bool = False


CONTRASTS: dict[str, Contrast] = {
    "t1": Contrast("t1", Sequence.GRADIENT_ECHO, 250, 2.5, flip_deg=70),
    "t2": Contrast("t2", Sequence.SPIN_ECHO, 5000, 100),
    "flair": Contrast("flair", Sequence.INVERSION_RECOVERY, 9000, 95, ti_ms=2430, suppresses_fat=True),
    "dwi": Contrast("dwi", Sequence.DIFFUSION, 5000, 80, b_s_mm2=1000, suppresses_fat=True),
    "t2star": Contrast("t2star", Sequence.GRADIENT_ECHO, 700, 20, flip_deg=25),
}

SUPPRESSED_FAT = 0.06  # what a good spectral saturation leaves


def signal(tissue: Tissue, contrast: Contrast) -> float:
    """Return the steady-state signal of a pure tissue (magnitude; 1 = all of water's magnetisation).

    Spoiled gradient echo: Ernst's equation with T2* decay. Spin echo: saturation recovery with T2 decay. Inversion
    recovery: magnitude of 1 - 2 exp(-TI/T1) + exp(-TR/T1) with T2 decay. Diffusion: spin echo times exp(-b ADC).
    Source: Bernstein, King & Zhou, Handbook of MRI Pulse Sequences (2004), chapters 14 and 16; Stejskal & Tanner,
    J Chem Phys 42:288 (1965).
    """
    recovered = math.exp(-contrast.tr_ms / tissue.t1_ms)
    decayed = math.exp(-contrast.te_ms / tissue.t2_ms)
    if contrast.sequence is Sequence.GRADIENT_ECHO:
        flip = math.radians(contrast.flip_deg)
        steady = math.sin(flip) * (1 - recovered) / (1 - math.cos(flip) * recovered)
        value = steady * math.exp(-contrast.te_ms / tissue.t2star_ms)
    elif contrast.sequence is Sequence.SPIN_ECHO:
        value = (1 - recovered) * decayed
    elif contrast.sequence is Sequence.INVERSION_RECOVERY:
        value = abs(1 - 2 * math.exp(-contrast.ti_ms / tissue.t1_ms) + recovered) * decayed
    else:
        value = (1 - recovered) * decayed * math.exp(-contrast.b_s_mm2 * tissue.adc * 1e-3)
    if contrast.suppresses_fat and tissue.is_fat:
        value *= SUPPRESSED_FAT
    return tissue.density * value
