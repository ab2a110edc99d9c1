"""The engine of super-resolution on disk: what it is called, how it is built, and whether it may serve.

It lies among the reconstruction's engines and is kept and checked as they are; see `edge.engines`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edge.backends.trt import Device, TrtRefiner, find_device
from edge.engines import Build, Engine, EngineCache
from recon.engine import Identity
from recon.errors import BackendError
from recon.superres_card import Session, SuperCard
from recon.superres_engine import PROFILE, check_refiner


class RefinerEngine:
    """The engine of one model on this machine's device, built or not."""

    def __init__(self, model: Path, card: SuperCard, folder: Path) -> None:
        """model: the ONNX file of `card`. folder: where engines are kept. Raises BackendError without a device."""
        self._device: Device = find_device()
        self._model, self._cache = model, EngineCache(folder)
        self.identity = Identity(self._device.gpu, self._device.runtime, card.sha256, PROFILE, "float32")

    def find(self) -> Engine | None:
        """Return the engine if it was built."""
        return self._cache.find(self.identity)

    def start(self) -> Build:
        """Start building it; raises BackendError where it cannot be."""
        return self._cache.build(self.identity, self._model, self._device.library.__name__)

    def check(self, engine: Engine, reference: Session) -> Engine:
        """Return `engine` with the outcome of its check beside `reference`, which is run once and written down."""
        if engine.parity is None:
            network = self.load(engine)
            try:
                parity, refusal = check_refiner(network, reference)
            finally:
                network.close()
            engine = replace(engine, parity=(parity.ssim, parity.difference), refusal=refusal)
            engine.write()
        return engine

    def load(self, engine: Engine) -> TrtRefiner:
        """Return the engine, ready; raises BackendError where its plan is damaged or is not taken."""
        return TrtRefiner(engine.read_plan(), self._device)

    def open(self, reference: Session) -> TrtRefiner:
        """Return the engine that was built and may serve; raises BackendError with the reason where there is none."""
        engine = self.find()
        if engine is None:
            raise BackendError(f"there is no engine of {PROFILE}; scanside engines build --super-resolution makes one")
        engine = self.check(engine, reference)
        if engine.refusal:
            raise BackendError(f"the engine of {PROFILE} is refused: {engine.refusal}")
        return self.load(engine)
