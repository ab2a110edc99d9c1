"""Triage networks without weights, which outline what is brighter than a test chooses; and heads to show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage

from recon.errors import BackendError
from recon.scan import Geometry, Provenance, Volume
from triage.assess import TriageModel
from triage.card import Calibration, ContrastCard, Decision, TriageCard
from triage.likeness import LEVELS

N_FEATURES = 3
N_NUMBERS = N_FEATURES + len(LEVELS) + 7


class Brightness:
    """Logits that grow with brightness over `level` (the brain's median is 1)."""

    backend = "fake"

    def __init__(self, level: float = 1.8, feature: float = 0.0, fails: bool = False) -> None:
        self._level, self._feature, self._fails = level, feature, fails
        self.n_runs = 0

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Answer in the shapes of a triage network."""
        self.n_runs += 1
        if self._fails:
            raise BackendError("the network failed")
        planes = inputs["planes"]
        smooth = ndimage.gaussian_filter(planes[:, 0], (0, 1.5, 1.5))
        logits = np.clip(20 * (smooth - self._level), -12, 12).astype(np.float32)
        return {"lesion": logits[:, None], "features": np.full((len(planes), N_FEATURES), self._feature, np.float32)}

    def close(self) -> None:
        """Nothing is held."""


def fake_model(
    finding: str = "infarct",
    contrasts: tuple[str, ...] = ("flair",),
    network: Any = None,
    present: tuple[float, float] = (0.0, 6.0),
    absent: tuple[float, float] = (-9.0, -1.0),
) -> TriageModel:
    """Return a model whose held-out cases have scores spread evenly between the given ends."""
    score = np.concatenate([np.linspace(*present, 50), np.linspace(*absent, 50)] * 2)
    positive = np.tile(np.repeat([True, False], 50), 2)
    calibration = Calibration(
        score, positive, np.repeat([True, False], 100), np.ones(200, bool), 100.0 * positive, np.arange(200),
        np.zeros(N_NUMBERS), np.diag([1.0] * N_FEATURES + [0.0] * (N_NUMBERS - N_FEATURES)),
    )  # fmt: skip
    decision = Decision(1.0, 0.0, 0.5)
    card = ContrastCard("simulated", decision, decision, 5.0)
    return TriageModel(
        TriageCard(
            f"fake-{finding}", "1", "ab" * 32, finding, "axial", 1.0, (224, 192), dict.fromkeys(contrasts, card), ""
        ),
        network or Brightness(),
        dict.fromkeys(contrasts, calibration),
    )


def head(
    n_slices: int = 14, lesion: float = 0.0, distance_mm: float = 6.0, is_measured: bool = True, seed: int = 0
) -> Volume:
    """Return an axial head of ellipses: scalp, skull, brain, ventricles; `lesion`: brightness of a spot on the left."""
    n_y, n_x, step = 150, 124, 1.6
    y = ((np.arange(n_y) - n_y // 2) * step)[:, None]
    x = ((np.arange(n_x) - n_x // 2) * step)[None]
    rng = np.random.default_rng(seed)
    planes = []
    for k in range(n_slices):
        along = (k - (n_slices - 1) / 2) * distance_mm
        scale = np.sqrt(max(1 - (along / 85) ** 2, 0.05))
        inside = lambda a, b, y0=0.0, x0=0.0: ((y - y0) / a) ** 2 + ((x - x0) / b) ** 2 <= scale**2  # noqa: B023, E731
        image = np.where(inside(104, 84), 0.5, 0.0)
        image = np.where(inside(96, 76), 0.02, image)
        image = np.where(inside(88, 68), 1.0, image)
        for side in (-1, 1):
            image = np.where(((y + 4) / 26) ** 2 + ((x - 9 * side) / 6) ** 2 <= scale**2, 0.15, image)
        if lesion and abs(along) < 15:
            image = np.where((y - 18) ** 2 + (x - 42) ** 2 <= (14**2 - along**2 * 0.6), lesion, image)
        planes.append(image)
    data = ndimage.gaussian_filter(np.array(planes), (0, 0.8, 0.8))
    data = np.abs(data + 0.02 * (rng.standard_normal(data.shape) + 1j * rng.standard_normal(data.shape)))
    centres = np.array([0.0, 0.0, 0.0]) + ((np.arange(n_slices) - (n_slices - 1) / 2) * distance_mm)[:, None] * [
        0,
        0,
        1,
    ]
    geometry = Geometry.from_centres(centres, (1, 0, 0), (0, 1, 0), (n_y, n_x), (distance_mm, step, step), 5.0)
    made = Provenance("network", "scanside 0.1.0", (), is_measured)
    return Volume((500 * data).astype(np.float32), geometry, made)
