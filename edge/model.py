"""Trained networks from their folders: card, weights whose hash must be the card's, and a backend that runs them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from recon.errors import BackendError, ModelError
from recon.network import Card, Network, read_card
from recon.unrolled import run_on_nothing

MODEL = "model.onnx"
INT8_MODEL = "model.int8.onnx"
BACKENDS = ("auto", "cpu")
PRECISIONS = ("float32", "int8")
RECONSTRUCTION = Path(__file__).parent / "assets" / "reconstruction"  # comes with this version


def load_card(folder: Path) -> Card:
    """Return the card in `folder`; raise ModelError where there is none or the weights are not those it describes."""
    try:
        card = read_card(json.loads(_read(folder / "card.json")))
    except ValueError as error:
        raise ModelError("card.json is not JSON") from error
    _check(folder / MODEL, card.sha256)
    return card


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"the model folder lacks {path.name}: {error.strerror}") from error


def _check(path: Path, sha256: str) -> None:
    """Raise ModelError where the file is not the one that its card means."""
    digest = hashlib.sha256(_read(path)).hexdigest()
    if digest != sha256:
        raise ModelError(f"{path.name} has sha256 {digest[:12]}…, its card says {sha256[:12]}…: not the same weights")


def choose_file(folder: Path, precision: str) -> tuple[Path, Card]:
    """Return the model file of `precision` and its card, whose sha256 is that file's.

    Raises ModelError where the folder cannot be used or its card does not offer the precision.
    """
    card = load_card(folder)
    if precision not in PRECISIONS:
        raise ModelError(f"precision {precision!r} is not known; there are {', '.join(PRECISIONS)}")
    if precision == "float32":
        return folder / MODEL, card
    if card.int8 is None:
        raise ModelError("the card offers no int8: it was not measured (python -m export.quantise)")
    if card.int8.why_not:
        raise ModelError(f"the card does not offer int8: {card.int8.why_not}")
    _check(folder / INT8_MODEL, card.int8.sha256)
    return folder / INT8_MODEL, replace(card, sha256=card.int8.sha256)


def open_network(folder: Path = RECONSTRUCTION, backend: str = "auto", precision: str = "float32") -> Network:
    """Return the network in `folder`, run once and ready, on `backend` at `precision`.

    Raises ModelError for a folder that cannot be used or a precision that its card does not offer, BackendError where
    nothing here can run it.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is not built in; there are {', '.join(BACKENDS)}")
    model, card = choose_file(folder, precision)
    if find_spec("onnxruntime") is None:
        raise BackendError("onnxruntime is not installed; pip install onnxruntime")
    from edge.backends import ort

    network = ort.open_network(model, card)
    if precision != "float32":
        network.backend += f" {precision}"
    run_on_nothing(network)
    return network
