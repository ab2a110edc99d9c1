"""The super-resolution network from its folder: card, weights and known heads, each checked by its hash.

It runs in ONNX Runtime on the CPU, or on what else the settings name, if that gives the CPU's images.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge.backends.ort import open_session
from edge.model import MODEL
from recon.arrays import Array
from recon.errors import BackendError, ModelError
from recon.head_likeness import Likeness
from recon.superres_card import Refiner, Session, SuperCard, read_super_card
from recon.superres_engine import check_refiner, fits

SUPER_RESOLUTION = Path(__file__).parent / "assets" / "super_resolution"  # comes with this version
LIKENESS = "likeness.npz"


class EngineAndBase:
    """An engine where a plane fits it, `base` where not; see `recon.superres_card.Session`."""

    def __init__(self, engine: Session, base: Session) -> None:
        self._engine, self._base = engine, base
        self.backend = f"{engine.backend}; {base.backend} for what does not fit it"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run on the engine or on the base; raises BackendError."""
        return (self._engine if fits(inputs) else self._base).run(inputs)

    def close(self) -> None:
        """Close both."""
        self._engine.close()
        self._base.close()


def open_refiner(folder: Path = SUPER_RESOLUTION, backend: str = "cpu", engines: Path | None = None) -> Refiner:
    """Return the network in `folder`, ready; raise ModelError or BackendError where it is not what its card says.

    backend: "cpu"; "cuda", ONNX Runtime's provider; "tensorrt", the engine that lies in `engines`; "auto", the best of
    them that is there. A backend that is named is the only one, but for planes that the engine is not for.
    """
    card = load_super_card(folder)
    content = _read(folder / LIKENESS, card.likeness_sha256)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            likeness = Likeness(arrays["known"], arrays["spread"], float(arrays["limit"]))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"{LIKENESS} cannot be read: {type(error).__name__}") from error
    return Refiner(card, _session(folder / MODEL, card, backend, engines), likeness)


def load_super_card(folder: Path) -> SuperCard:
    """Return the card in `folder`; raise ModelError where there is none or the weights are not those it describes."""
    try:
        card = read_super_card(json.loads((folder / "card.json").read_bytes()))
    except OSError as error:
        raise ModelError(f"the super-resolution folder lacks card.json: {error.strerror}") from error
    except ValueError as error:
        raise ModelError("the super-resolution card.json is not JSON") from error
    _read(folder / MODEL, card.sha256)
    return card


def _session(model: Path, card: SuperCard, backend: str, engines: Path | None) -> Session:
    """Return what runs the network; raises BackendError with every reason where nothing that is named does."""
    cpu = open_session(model)
    reasons = []
    for kind in ("tensorrt", "cuda", "cpu") if backend == "auto" else (backend,):
        try:
            if kind == "cpu":
                return cpu
            if kind == "cuda":
                return _checked(open_session(model, "cuda"), cpu)
            if kind != "tensorrt":
                raise BackendError(f"backend {kind!r} is not built in")
            if engines is None:
                raise BackendError("no folder for engines was named")
            from edge.superres_engines import RefinerEngine

            return EngineAndBase(RefinerEngine(model, card, engines).open(cpu), cpu)
        except BackendError as error:
            reasons.append(str(error))
    cpu.close()
    raise BackendError("; ".join(reasons))


def _checked(session: Session, reference: Session) -> Session:
    """Return `session` if it may stand in for `reference`, which is closed; raises BackendError with the reason."""
    _, refusal = check_refiner(session, reference)
    if refusal:
        session.close()
        raise BackendError(f"{session.backend} is refused: {refusal}")
    reference.close()
    return session


def _read(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"the super-resolution folder lacks {path.name}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise ModelError(f"{path.name} has sha256 {digest[:12]}…, its card says {sha256[:12]}…: not the same file")
    return content
