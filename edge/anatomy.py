"""The anatomy that ships with the package: read once, unfolded from the stored half."""

from __future__ import annotations

import functools
from importlib import resources

import numpy as np

from recon.errors import ScanError
from recon.head import FULL, STORED_TISSUES, Anatomy

ASSET = "icbm152_tissue.npz"


@functools.cache
def load_anatomy() -> Anatomy:
    """Return the ICBM 152 head (1 mm; the licence lies beside the asset), made by `python -m export.anatomy`.

    Raises ScanError if the installed package lacks the asset or holds one of another layout.
    """
    file = resources.files("edge") / "assets" / ASSET
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as asset:
            tissues = tuple(str(name) for name in asset["tissues"])
            half, levels = asset["fractions"], int(asset["levels"])
            origin, spacing = [float(v) for v in asset["origin_mm"]], float(asset["spacing_mm"])
    except (OSError, KeyError, ValueError) as error:
        raise ScanError(f"the anatomy {ASSET} cannot be read; reinstall the package") from error
    if tissues != STORED_TISSUES:
        raise ScanError(f"the anatomy {ASSET} holds {', '.join(tissues)}; expected {', '.join(STORED_TISSUES)}")
    whole = np.concatenate([half[..., :0:-1], half], axis=-1)  # the first stored plane is the middle one
    whole *= FULL // levels
    return Anatomy(whole, (origin[0] - spacing * (half.shape[-1] - 1), origin[1], origin[2]), spacing)
