"""The super-resolution network from its folder: card, weights and known heads, each checked by its hash."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

from edge.backends.ort import open_session
from edge.model import MODEL
from recon.errors import ModelError
from recon.head_likeness import Likeness
from recon.superres_card import Refiner, read_super_card

SUPER_RESOLUTION = Path(__file__).parent / "assets" / "super_resolution"  # comes with this version
LIKENESS = "likeness.npz"


def open_refiner(folder: Path = SUPER_RESOLUTION) -> Refiner:
    """Return the network in `folder`, ready; raise ModelError or BackendError where it is not what its card says."""
    try:
        card = read_super_card(json.loads((folder / "card.json").read_bytes()))
    except OSError as error:
        raise ModelError(f"the super-resolution folder lacks card.json: {error.strerror}") from error
    except ValueError as error:
        raise ModelError("the super-resolution card.json is not JSON") from error
    _read(folder / MODEL, card.sha256)
    content = _read(folder / LIKENESS, card.likeness_sha256)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            likeness = Likeness(arrays["known"], arrays["spread"], float(arrays["limit"]))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"{LIKENESS} cannot be read: {type(error).__name__}") from error
    return Refiner(card, open_session(folder / MODEL), likeness)


def _read(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"the super-resolution folder lacks {path.name}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise ModelError(f"{path.name} has sha256 {digest[:12]}…, its card says {sha256[:12]}…: not the same file")
    return content
