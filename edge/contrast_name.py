"""Which contrast a series has: by the words of those who named it, then by its timing; "" where neither tells."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words of protocol and series names, the more telling first. Underscores, dots and hyphens part words.
_WORDS = (
    ("adc", r"\badc\b|apparent diffusion"),
    ("dwi", r"\bdwi|\bdiff|\bep2d diff|\btrace\w*|\bb ?1000"),
    ("flair", r"flair|tirm|dark ?fluid|\bfl ?air"),
    ("swi", r"\bswi|\bswan|venobold|\bt2 ?star|\bt2 ?\*|\bhemo|\bhaemo|\bt2 ?fl2d|\bmerge\b"),
    ("t1ce", r"\bt1c\b|\bt1 ?w? ?ce|\bt1w?\b.*\b(ce|gd|km|post|gad\w*|contrast|\+ ?c)\b"),
    ("t1ce", r"\b(post|gd|gad\w*|ce|km)\b.*\bt1"),
    ("t1", r"\bt1|mprage|bravo|\bspgr|\bmp2rage"),
    ("t2", r"\bt2"),
    ("pd", r"\bpd(w|\b)|proton ?dens"),
)  # fmt: skip


def contrast_of_words(*texts: str) -> str:
    """Return the contrast that names say, the first text that says one; "" where none does."""
    for text in texts:
        plain = re.sub(r"[_\-./\\]+", " ", text.lower())
        for contrast, pattern in _WORDS:
            if re.search(pattern, plain):
                return contrast
    return ""


def contrast_of_timing(
    te_ms: Sequence[float], tr_ms: Sequence[float], ti_ms: Sequence[float], is_gradient_echo: bool = False, at: int = 0
) -> str:
    """Return the contrast of a sequence's times at 1.5 to 3 T, "" where they do not tell.

    Source: usual clinical ranges (Bernstein, King & Zhou, Handbook of MRI Pulse Sequences, 2004, chapter 14).
    """
    te, tr, ti = (float(v[min(at, len(v) - 1)]) if len(v) else 0.0 for v in (te_ms, tr_ms, ti_ms))
    if ti >= 1500 and te >= 60:
        return "flair"
    if not te or not tr or ti:
        return ""
    if is_gradient_echo:
        return "swi" if te >= 12 else "t1" if te <= 8 and tr <= 500 else ""
    if tr >= 2000 and te >= 70:
        return "t2"
    return "t1" if tr <= 900 and te <= 25 else ""
