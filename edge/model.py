"""Trained networks from their folders: card, and weights whose hash must be the card's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from recon.errors import ModelError
from recon.network import Card, read_card

MODEL = "model.onnx"
PRECISIONS = ("auto", "float32", "float16", "int8")  # of the convolutions
RECONSTRUCTION = Path(__file__).parent / "assets" / "reconstruction"  # comes with this version


def load_card(folder: Path) -> Card:
    """Return the card in `folder`; raise ModelError where there is none or the weights are not those it describes."""
    try:
        card = read_card(json.loads((folder / "card.json").read_bytes()))
    except OSError as error:
        raise ModelError(f"the model folder lacks card.json: {error.strerror}") from error
    except ValueError as error:
        raise ModelError("card.json is not JSON") from error
    _check(folder / MODEL, card.sha256)
    return card


def model_file(folder: Path, card: Card, precision: str) -> tuple[Path, str]:
    """Return the ONNX file of `precision` and its sha256; raise ModelError where the card or the folder has none."""
    if precision == "float32":
        return folder / MODEL, card.sha256
    variant = card.precisions.get(precision)
    if variant is None:
        there = ", ".join(("float32", *card.precisions))
        raise ModelError(f"the network comes in {there}; there is no {precision}")
    if variant.why_not:
        raise ModelError(f"the network does not offer {precision}: {variant.why_not}")
    _check(folder / variant.file, variant.sha256)
    return folder / variant.file, variant.sha256


def _check(path: Path, sha256: str) -> None:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"the model folder lacks {path.name}: {error.strerror}") from error
    if digest != sha256:
        raise ModelError(f"{path.name} has sha256 {digest[:12]}…, its card says {sha256[:12]}…: not the same weights")
