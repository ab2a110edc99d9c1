"""Trained networks from their folders: card, weights whose hash must be the card's, and a backend that runs them."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

from recon.errors import BackendError, ModelError
from recon.network import Card, Network, read_card
from recon.unrolled import run_on_nothing

MODEL = "model.onnx"
BACKENDS = ("auto", "cpu")
RECONSTRUCTION = Path(__file__).parent / "assets" / "reconstruction"  # comes with this version


def load_card(folder: Path) -> Card:
    """Return the card in `folder`; raise ModelError where there is none or the weights are not those it describes."""
    try:
        card = read_card(json.loads((folder / "card.json").read_bytes()))
        digest = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"the model folder lacks {Path(error.filename).name}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError("card.json is not JSON") from error
    if digest != card.sha256:
        raise ModelError(f"{MODEL} has sha256 {digest[:12]}…, its card says {card.sha256[:12]}…: not the same weights")
    return card


def open_network(folder: Path = RECONSTRUCTION, backend: str = "auto") -> Network:
    """Return the network in `folder`, run once and ready, on `backend`.

    Raises ModelError for a folder that cannot be used, BackendError where nothing here can run it.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is not built in; there are {', '.join(BACKENDS)}")
    card = load_card(folder)
    if find_spec("onnxruntime") is None:
        raise BackendError("onnxruntime is not installed; pip install onnxruntime")
    from edge.backends import ort

    network = ort.open_network(folder / MODEL, card)
    run_on_nothing(network)
    return network
