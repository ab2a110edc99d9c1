"""Which network serves the next scan: the best backend that is ready, and engines as they get ready.

A scan keeps what it began with: engines that are finished meanwhile serve the next one. Nothing but the CPU in float32
serves before its images of a fixed scan were found to be the CPU's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from edge.backends.device import Device, open_device
from edge.engines import Build, Engine, EngineCache
from edge.model import RECONSTRUCTION, load_card, model_file
from recon.arrays import Array
from recon.engine import Identity, Profile, profile_for, profile_of, read_profile
from recon.errors import BackendError, ModelError
from recon.network import Card, Network
from recon.parity import check_parity
from recon.unrolled import run_on_nothing

log = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "cuda", "tensorrt")
_ORDER = ("tensorrt", "cuda", "cpu")  # what "auto" tries
_CHECKED = profile_for((256, 256), 4, 24, 8)  # the scan on which a runtime's CUDA provider is compared
_MAX_WANTED = 16


class Tried(NamedTuple):
    """A backend that was thought of, and why it is not the one; "" for one that is used."""

    backend: str
    why_not: str


class ScanNetwork:
    """The network of one scan: an engine where its profile has one, `base` where not; see `recon.network.Network`.

    thread: runs it, while the caller waits; None for the caller's own.
    """

    def __init__(
        self, card: Card, engines: Mapping[Profile, Network], base: Network | None, thread: Executor | None = None
    ) -> None:
        self.card = card if base is None else base.card
        self._thread = thread
        self.missing: set[Profile] = set()
        self._engines, self._base = dict(engines), base
        self.backend = base.backend if base is not None else next((e.backend for e in engines.values()), "tensorrt")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run on the engine of these sizes or on the base, as `backend` and `card` then say; raises BackendError."""
        try:
            profile = profile_of(inputs)
        except (KeyError, ValueError) as error:
            raise BackendError("failed to run the network: its inputs are not a reconstruction network's") from error
        network = self._engines.get(profile, self._base)
        if profile not in self._engines:
            self.missing.add(profile)
        if network is None:
            raise BackendError(f"there is no engine for {profile.name} yet; scanside engines build makes one")
        self.backend, self.card = network.backend, network.card
        return network.run(inputs) if self._thread is None else self._thread.submit(network.run, inputs).result()

    def close(self) -> None:
        """The networks are the supply's, which closes them."""


class Supply:
    """Hands out networks, builds engines that scans were missing, and admits those that pass their parity check."""

    def __init__(
        self,
        folder: Path = RECONSTRUCTION,
        backend: str = "auto",
        engines: Path | None = None,
        precision: str = "auto",
        thread: Executor | None = None,
    ) -> None:
        """Open what `backend` names, "auto" the best that works; `engines` is where engines are kept (None: none).

        precision: of the convolutions; "auto" takes float16 in engines and float32 everywhere else.
        thread: runs the networks of scans on the host; None for the thread that asks for their answer.
        Raises ModelError for a folder that cannot be used, BackendError where nothing here can run it.
        """
        if backend not in BACKENDS:
            raise BackendError(f"backend {backend!r} is not built in; there are {', '.join(BACKENDS)}")
        self.card = load_card(folder)
        self._of_engines = "float16" if precision == "auto" else precision
        self._of_runtime = "float32" if precision == "auto" else precision
        model_file(folder, self.card, self._of_runtime)
        self.tried: list[Tried] = []
        self._folder = folder
        self._thread = thread
        self._cache = None if engines is None else EngineCache(engines)
        self._device: Any = None
        self._base: Network | None = None
        self._reference: Network | None = None
        self._ready: dict[Profile, Network] = {}
        self._refused: set[Profile] = set()
        self._wanted: list[Profile] = []
        self._given: list[ScanNetwork] = []
        self._build: Build | None = None
        for kind in _ORDER if backend == "auto" else (backend,):
            if self._base is None:
                self._try(kind, insists=backend != "auto")
        if self._base is None and self._device is None:
            raise BackendError("; ".join(each.why_not for each in self.tried))
        self.arrays: Device | None = None  # where slices are made ready for it; None: on the host
        if self._device is not None:
            with suppress(BackendError):
                self.arrays = open_device("cuda")
            self._open_engines()

    @property
    def words(self) -> str:
        """What runs the network, for people."""
        base = "" if self._base is None else self._base.backend
        if self._device is None:
            return base
        n = len(self._ready)
        engines = f"{self._device.runtime} on {self._device.gpu}, {n} engine{'s' if n != 1 else ''} ready"
        return f"{engines}; {base} where there is none" if base else engines

    @property
    def has_no_device(self) -> bool:
        """Whether engines can neither be built nor run here."""
        return self._device is None

    def network(self) -> ScanNetwork:
        """Return the network for one scan: it stays the same while the scan lasts."""
        thread = self._thread if self.arrays is None else None  # a device's arrays stay with the caller's
        network = ScanNetwork(self.card, self._ready, self._base, thread)
        self._given.append(network)
        return network

    def tend(self) -> None:
        """Between scans: go on with building engines that scans were missing, and admit what was finished."""
        for network in self._given:
            for profile in network.missing:
                self.want(profile)
        self._given.clear()
        if self._cache is None or self._device is None:
            return
        if self._build is not None and self._build.poll():
            build, self._build = self._build, None
            try:
                self._admit(build.finish())
            except (BackendError, ModelError) as error:
                self._refused.add(read_profile(build.identity.profile))
                log.warning("engine not available profile=%s code=%s", build.identity.profile, error.code)
        if self._build is None and self._wanted:
            profile = self._wanted.pop(0)
            try:
                self._build = self.start(profile)
            except (BackendError, ModelError) as error:
                self._refused.add(profile)
                log.warning("engine cannot be built profile=%s code=%s", profile.name, error.code)
            else:
                log.info("engine being built profile=%s", profile.name)

    def want(self, profile: Profile) -> None:
        """Have an engine built for `profile`, when there is time."""
        known = profile in self._ready or profile in self._refused or profile in self._wanted
        is_built = self._build is not None and self._build.identity.profile == profile.name
        if not known and not is_built and len(self._wanted) < _MAX_WANTED:
            self._wanted.append(profile)

    def start(self, profile: Profile) -> Build:
        """Start building the engine of `profile`; raises BackendError where it cannot be."""
        identity = self.identity(profile)
        assert self._cache is not None
        model, _ = model_file(self._folder, self.card, self._of_engines)
        return self._cache.build(identity, model, self._device.library.__name__)

    def check(self, engine: Engine) -> Engine:
        """Return `engine` with the outcome of its parity check; it is run once for each engine, and written down."""
        if engine.parity is None:
            profile = read_profile(engine.identity.profile)
            network = self._load(engine, profile)
            try:
                engine = engine.judge(check_parity(network, self._cpu(), profile))
            finally:
                network.close()
        return engine

    def close(self) -> None:
        """Give back all memory, and stop what is being built."""
        if self._build is not None:
            self._build.stop()
            self._build = None
        for network in (*self._ready.values(), self._base, self._reference):
            if network is not None:
                network.close()
        self._ready.clear()

    def _try(self, kind: str, insists: bool) -> None:
        """Open one backend, or note why it cannot be; as `insists`, TensorRT may also be ONNX Runtime's provider."""
        try:
            if kind == "tensorrt":
                self._open_tensorrt(insists)
            else:
                self._base = self._open_runtime(kind, self._of_runtime)
            self.tried.append(Tried(kind, ""))
        except BackendError as error:
            self.tried.append(Tried(kind, str(error)))

    def _open_tensorrt(self, insists: bool) -> None:
        from edge.backends import trt

        try:
            if self._cache is None:
                raise BackendError("no folder for engines was named")
            self._device = trt.find_device()
            model_file(self._folder, self.card, self._of_engines)
        except BackendError:
            if not insists:
                raise
            with suppress(BackendError):
                self._base = self._open_runtime("tensorrt", self._of_runtime)
                return
            raise

    def _open_runtime(self, kind: str, precision: str) -> Network:
        """Return the network in ONNX Runtime, run once; another provider must give the CPU's images."""
        if find_spec("onnxruntime") is None:
            raise BackendError("onnxruntime is not installed; pip install onnxruntime")
        from edge.backends import ort

        model, sha256 = model_file(self._folder, self.card, precision)
        folder = None if self._cache is None else self._cache.folder / "onnxruntime"
        network = ort.open_network(model, replace(self.card, sha256=sha256), kind, folder, precision)
        run_on_nothing(network)
        if kind != "cpu":
            parity = check_parity(network, self._cpu(), _CHECKED)
            if not parity.is_passed:
                network.close()
                raise BackendError(f"{network.backend} is refused: its images differ from the reference: {parity}")
        return network

    def _cpu(self) -> Network:
        """Return the reference: ONNX Runtime on the CPU in float32."""
        if self._reference is None:
            self._reference = self._open_runtime("cpu", "float32")
        return self._reference

    def _open_engines(self) -> None:
        """Admit the engines that were built for this device and this model."""
        assert self._cache is not None
        _, own = model_file(self._folder, self.card, self._of_engines)
        for _, found in self._cache:
            if not isinstance(found, Engine) or found.identity.model_sha256 != own:
                continue  # another network's
            if found.identity == self.identity(read_profile(found.identity.profile)):
                with suppress(BackendError):
                    self._admit(found)

    def _admit(self, engine: Engine) -> None:
        """Let an engine serve from the next scan on; raises BackendError with the figure if it does not pass."""
        profile = read_profile(engine.identity.profile)
        engine = self.check(engine)
        if engine.refusal:
            self._refused.add(profile)
            log.warning("engine refused profile=%s %s", profile.name, engine.refusal)
            raise BackendError(f"the engine of {profile.name} is refused: {engine.refusal}")
        self._ready[profile] = self._load(engine, profile)
        log.info("engine ready profile=%s", profile.name)

    def _load(self, engine: Engine, profile: Profile) -> Network:
        from edge.backends.trt import TrtNetwork

        identity = engine.identity
        card = replace(self.card, sha256=identity.model_sha256)
        return TrtNetwork(engine.read_plan(), profile, card, identity.precision, self._device)

    def identity(self, profile: Profile) -> Identity:
        """Return the identity of the engine of `profile` on this device; raises BackendError without one."""
        if self._device is None:
            raise BackendError(f"no engine can be built here: {self._why_no_engines()}")
        _, sha256 = model_file(self._folder, self.card, self._of_engines)
        return Identity(self._device.gpu, self._device.runtime, sha256, profile.name, self._of_engines)

    def _why_no_engines(self) -> str:
        return next((each.why_not for each in self.tried if each.backend == "tensorrt"), "the backend is not tensorrt")
