"""Triage networks and what triage measures by, from their folders, each checked against its card."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edge.backends.ort import open_session
from edge.model import MODEL
from recon.errors import ModelError, ScanError
from triage.assess import Tools, TriageModel
from triage.card import CALIBRATION, read_calibration, read_triage_card
from triage.gate import Gate, read_gate
from triage.measure import Ruler, read_levels, read_spreads
from triage.ventricles import FluidAtlas

log = logging.getLogger(__name__)

TRIAGE = Path(__file__).parent / "assets" / "triage"  # comes with this version
SPREADS, FLUID, GATE = "measurement.json", "fluid.npz", "gate.json"


def open_tools(folder: Path = TRIAGE) -> tuple[Tools, tuple[str, ...]]:
    """Return all that is in `folder`, and in words what is missing or refused; each network has a folder of its own."""
    models: list[TriageModel] = []
    problems: list[str] = []
    for each in sorted(path.parent for path in folder.glob("*/card.json")):
        try:
            models.append(open_model(each))
        except ScanError as error:
            log.warning("triage network not available name=%s code=%s", each.name, error.code)
            problems.append(f"{each.name}: {error}")
    gate, ruler = Gate({}, 0.0, 0.0), None  # without its numbers the gate is shut
    try:
        gate = read_gate(_json(folder / GATE))
    except ModelError as error:
        problems.append(str(error))
    try:
        ruler = _ruler(folder)
    except ModelError as error:
        problems.append(str(error))
    return Tools(tuple(models), gate, ruler), tuple(problems)


def open_model(folder: Path) -> TriageModel:
    """Return the network in `folder`; raise ModelError or BackendError where it is not what its card says."""
    card = read_triage_card(_json(folder / "card.json"))
    _check(folder / MODEL, card.sha256)
    _check(folder / CALIBRATION, card.calibration_sha256)
    arrays = _arrays(folder / CALIBRATION)
    calibrations = {contrast: read_calibration(arrays, contrast) for contrast in card.contrasts}
    return TriageModel(card, open_session(folder / MODEL), calibrations)


def close(models: Iterable[TriageModel]) -> None:
    """Give back the networks' memory."""
    for model in models:
        getattr(model.network, "close", lambda: None)()


def _ruler(folder: Path) -> Ruler:
    content = _arrays(folder / FLUID)
    try:
        x, y, z = (float(v) for v in content["origin_mm"])
        atlas = FluidAtlas(
            content["fluid"], content["nearer"], content["away"], (x, y, z), float(content["spacing_mm"])
        )
    except (KeyError, ValueError) as error:
        raise ModelError(f"{FLUID} cannot be read: {type(error).__name__}") from error
    numbers = _json(folder / SPREADS)
    return Ruler(atlas, read_spreads(numbers), read_levels(numbers))


def _json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"the triage folder lacks {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return content


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except OSError as error:
        raise ModelError(f"the triage folder lacks {path.name}: {error.strerror}") from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path.name} is no NumPy archive") from error


def _check(path: Path, sha256: str) -> None:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"the model folder lacks {path.name}: {error.strerror}") from error
    if digest != sha256:
        raise ModelError(f"{path.name} has sha256 {digest[:12]}…, its card says {sha256[:12]}…: not the same weights")
