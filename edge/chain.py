"""One scan from its readouts to results on disk: assemble, reconstruct, volumes, DICOM, report.

The worker and `scanside recon` both run this, so that a file and a live scan give the same images. What comes out
depends on the order of the readouts alone, never on when they came: a scan replayed after a crash gives the same bits.

Lines are gathered and whitened on the host, as they come one at a time and are small: a copy of each to a device would
take longer than its work. A slice's calibration lines and its k-space go to the device that the chain was given, whole;
everything up to the image is made there, and images come back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from edge.backends.device import Device
from edge.clock import StageClock
from edge.intake import to_acquisition
from edge.mrd import Readout
from edge.results import Results
from recon.arrays import Array
from recon.assemble import Assembler
from recon.errors import AcquisitionError, BackendError, ShapeError
from recon.network import Network
from recon.placement import stack_geometry
from recon.reconstruct import (
    Classical,
    Image,
    Sensitivities,
    network_refusal,
    reconstruct_classical,
    reconstruct_network,
    sense_coils,
)
from recon.scan import Acquisition, Encoding, Geometry, ImageKey, KSpace, Provenance, Role, Volume
from triage.findings import Findings, not_assessed

CLASSICAL = "classical"
NETWORK = "network"
NO_TRIAGE = "no triage network is installed"


class VolumeKey(NamedTuple):
    """Slices that share these counters make one volume."""

    encoding: int
    contrast: int
    phase: int
    repetition: int
    set: int


def volume_key(key: ImageKey) -> VolumeKey:
    """Return the volume that an image belongs to."""
    return VolumeKey(key.encoding, key.contrast, key.phase, key.repetition, key.set)


@dataclass(frozen=True, eq=False)
class SliceImage:
    """One reconstructed image as it goes out: float32 (slice, y, x), one slice for 2-D scans, all of a 3-D one.

    `series`: "classical", sent first and always, or "network". `reason`: why no network's image follows this one.
    `volume_index`: which volume of the scan it belongs to, of `n_slices` slices as far as the header tells.
    `message_end`: offset in the stream behind the readout that completed it (0: none did), to tell when that came.
    `begun_s`, `made_s`: when, on the monotonic clock, that readout was taken up and the image was there; `stage_ms`:
    how the time between went by stage. A network's image counts the classical one, from which it starts.
    """

    key: ImageKey
    series: str
    data: Array
    geometry: Geometry
    n_slices: int
    volume_index: int
    message_end: int
    method: str
    reason: str = ""
    begun_s: float = 0.0
    made_s: float = 0.0
    stage_ms: Mapping[str, float] = field(default_factory=dict)


class _Begin(NamedTuple):
    """When work for an image began, monotonic, and what the clock's stages had by then."""

    at_s: float
    stage_ms: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Made:
    """A reconstructed image key that waits for the rest of its volume."""

    classical: Image
    network: Image | None
    reason: str  # why there is no network's image, where one was wanted
    first: Acquisition


class Chain:
    """Feeds on the readouts of one scan and leaves its results in a folder."""

    def __init__(
        self,
        results: Results,
        *,
        method: str = "auto",
        network: Network | None = None,
        no_network: str = "no trained network is installed",
        device: Device | None = None,
        max_scan_mib: int = 8192,
        on_image: Callable[[SliceImage], None] = lambda image: None,
        may_make: Callable[[ImageKey], bool] = lambda key: True,
    ) -> None:
        """Prepare for the scan that `results` names; raises AcquisitionError when nothing could be made of it.

        network: what "auto" and "network" use; without one, `no_network` says why not, and "network" fails.
        device: where slices are reconstructed; None for the host.
        on_image: called with each finished image. may_make: asked before each; False sets the image aside.
        """
        # One thread a matrix product: their number changes the last bits, and on a busy machine two wait for each other
        # far longer than they work (measured: 20 times longer for coil maps).
        threadpool_limits(limits=1, user_api="blas")
        self.clock = StageClock()
        self.left_out: Counter[str] = Counter()
        self.set_aside: list[ImageKey] = []
        self.n_readouts = 0
        self.n_images = 0
        self._results = results
        self._scan = results.scan
        self._method = method
        self._network = network if method in ("auto", "network") else None
        self._no_network = no_network
        self._device = device or Device()
        self._max_bytes = max_scan_mib << 20
        self._on_image = on_image
        self._may_make = may_make
        self._assembler = Assembler(self._scan, self._max_bytes)
        self._coils: dict[ImageKey, tuple[int, Sensitivities]] = {}
        self._volumes: dict[VolumeKey, dict[ImageKey, _Made]] = {}
        self._indices: dict[VolumeKey, int] = {}
        self._written: dict[int, dict[str, Any]] = {}

    def feed(self, readout: Readout, message_end: int = 0) -> None:
        """Take one readout; images that it completes are made now."""
        self.n_readouts += 1
        if readout.samples is None:
            self.left_out["compressed samples are not supported; plain complex64 is needed"] += 1
            return
        keys: list[ImageKey] = []
        begin = self._begin()
        with self.clock.stage("assemble"):
            try:
                keys = self._assembler.add(to_acquisition(readout.header, readout.samples))
            except (AcquisitionError, ShapeError) as error:
                self.left_out[str(error)] += 1
        for key in keys:
            self._make(self._assembler, key, message_end, begin)
            begin = self._begin()

    def work_ahead(self) -> bool:
        """Make the coil maps of one slice whose calibration lines have come; return False where none waits."""
        if self._method == "zero-filled":
            return False
        for key in self._assembler.open_keys():
            if not self._scan.encodings[key.encoding].is_3d and self._is_stale(self._assembler, key):
                self._sense(self._assembler, key)
                return True
        return False

    def finish(self, ending: str, reason: str, replay: Callable[[], Iterable[Readout]]) -> dict[str, Any]:
        """Make what can still be made, write volumes and report, and return the report.

        ending: "complete" makes every image that has lines; after any other only whole slices stand.
        replay: gives the scan's readouts again, for images whose lines went on after they seemed complete.
        Raises AcquisitionError when not one image came of a complete scan.
        """
        if ending == "complete":
            for key in self._assembler.open_keys():
                self._make(self._assembler, key, 0)
            self._make_late(replay)
        for volume in list(self._volumes):
            self._write_volume(volume)
        if ending == "complete" and not self.n_images:
            raise AcquisitionError(f"no image could be made of {self.n_readouts} readouts: {self._main_fault()}")
        report = {
            "v": 1,
            "scan_id": self._scan.scan_id,
            "ending": ending,
            "reason": reason,
            "method": self._written[0]["method"] if 0 in self._written else "",
            "software": software(),
            "n_readouts": self.n_readouts,
            "n_images": self.n_images,
            "volumes": [self._written[index] for index in sorted(self._written)],
            "quality": self.quality(ending),
            "findings": findings_json(self.findings()),
            "stage_ms": self.clock.rounded(),
        }
        self._results.write_report(report)
        return report

    def quality(self, ending: str) -> dict[str, Any]:
        """Return the faults that were counted; without any the verdict stays open: nothing here can call it trusted."""
        reasons = [f"{n} of {self.n_readouts} readouts were left out: {why}" for why, n in self.left_out.most_common()]
        reasons += [f"slice {key.slice} was set aside: its reconstruction failed twice" for key in self.set_aside]
        if ending != "complete":
            reasons.append("the scan was interrupted: only whole slices were reconstructed")
        return {"verdict": "degraded" if reasons else None, "reasons": reasons}

    def findings(self) -> Findings:
        """Return what triage says: in this version, that nobody looked."""
        return not_assessed(NO_TRIAGE)

    def _main_fault(self) -> str:
        return self.left_out.most_common(1)[0][0] if self.left_out else "none of them was imaging data"

    def _begin(self) -> _Begin:
        return _Begin(time.monotonic(), dict(self.clock.ms))

    def _is_stale(self, assembler: Assembler, key: ImageKey) -> bool:
        """Whether the calibration lines of `key` are others than those its maps were made of."""
        n = assembler.n_calibrating(key)
        return n > 0 and self._coils.get(key, (0, None))[0] != n

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Time a stage; the device's work counts where it was given, not where it is waited for."""
        with self.clock.stage(name):
            yield
            self._device.synchronise()

    def _uploaded(self, kspace: KSpace) -> KSpace:
        """Return `kspace` with its samples and calibration lines on the device."""
        upload = self._device.upload
        calibration = None if kspace.calibration is None else upload(kspace.calibration)
        return replace(kspace, samples=upload(kspace.samples), calibration=calibration)

    def _sense(self, assembler: Assembler, key: ImageKey) -> None:
        n_ky = self._scan.encodings[key.encoding].encoded_matrix.y
        calibration = assembler.calibration(key)
        if calibration is not None:
            calibration = self._device.upload(calibration)
        coils = sense_coils(calibration, n_ky, assembler.n_coils, assembler.has_noise, self._stage)
        self._coils[key] = (assembler.n_calibrating(key), coils)

    def _make(self, assembler: Assembler, key: ImageKey, message_end: int, begin: _Begin | None = None) -> None:
        """Reconstruct one image key and hand it on; `begin` where the work for it began before this call."""
        begin = begin or self._begin()
        if not self._may_make(key):
            self.set_aside.append(key)
            assembler.discard(key)
            return
        encoding = self._scan.encodings[key.encoding]
        if self._method != "zero-filled" and (key not in self._coils or self._is_stale(assembler, key)):
            self._sense(assembler, key)
        coils = self._coils.pop(key, (0, None))[1]
        with self._stage("assemble"):
            kspace = self._uploaded(assembler.kspace(key))
        classical = reconstruct_classical(kspace, encoding, self._method, coils, self._stage)
        first = assembler.first_readout(key)
        assembler.discard(key)
        volume = volume_key(key)
        index = self._indices.setdefault(volume, len(self._indices))
        images = self._volumes.setdefault(volume, {})
        images[key] = _Made(classical.image, None, "", first)
        n_slices = self._n_slices(volume)
        geometry = stack_geometry([first], encoding)

        def send(image: Image, series: str, reason: str) -> None:
            self.n_images += 1
            made = SliceImage(
                key, series, image.data, geometry, n_slices, index, message_end, image.method, reason,
                begin.at_s, time.monotonic(), self.clock.since(begin.stage_ms),
            )  # fmt: skip
            self._on_image(made)

        reason = self._refusal(classical)
        send(classical.image, CLASSICAL, reason)
        if not reason:
            network, reason = self._run_network(classical, encoding)
            if network is not None:
                send(network, NETWORK, "")
            images[key] = _Made(classical.image, network, reason, first)
        elif self._method in ("auto", "network"):
            images[key] = _Made(classical.image, None, reason, first)
        if encoding.is_3d or len(images) == n_slices:
            self._write_volume(volume)

    def _refusal(self, classical: Classical) -> str:
        """Why no network goes on from the classical image, as far as can be told before it runs; "" where one does.

        Raises AcquisitionError with the reason where the method insists on the network.
        """
        if self._method not in ("auto", "network"):
            return f"the method is {self._method}"
        if self._network is None:
            reason = self._no_network
        elif classical.start is None:
            reason = "there are no coil maps"
        else:
            reason = network_refusal(self._network, classical.start)
        if reason and self._method == "network":
            raise AcquisitionError(f"the network cannot serve this scan: {reason}")
        return reason

    def _run_network(self, classical: Classical, encoding: Encoding) -> tuple[Image | None, str]:
        """Return the network's image, or why its run failed: the classical one then leads, and says so."""
        assert self._network is not None
        assert classical.start is not None
        try:
            return reconstruct_network(self._network, classical.start, encoding, self._stage), ""
        except BackendError as error:
            if self._method == "network":
                raise
            return None, str(error)

    def _make_late(self, replay: Callable[[], Iterable[Readout]]) -> None:
        """Make again, from the scan's start, the volumes of images whose lines went on after they seemed complete."""
        volumes = {volume_key(key) for key in self._assembler.late}
        if not volumes:
            return
        again = Assembler(self._scan, self._max_bytes, early=False)
        for readout in replay():
            if readout.samples is None:
                continue
            with suppress(AcquisitionError, ShapeError):  # counted when it came first
                acquisition = to_acquisition(readout.header, readout.samples)
                if acquisition.role in (Role.NOISE, Role.CALIBRATION) or volume_key(acquisition.key) in volumes:
                    again.add(acquisition)
        for key in again.open_keys():
            self._make(again, key, 0)

    def _n_slices(self, volume: VolumeKey) -> int:
        """How many slices a volume has, as far as the header and the scan so far tell."""
        encoding = self._scan.encodings[volume.encoding]
        if encoding.is_3d:
            return encoding.recon_matrix.z
        limit = encoding.limits.get("slice")
        return max(1 if limit is None else limit.maximum - limit.minimum + 1, len(self._volumes[volume]))

    def _write_volume(self, volume: VolumeKey) -> None:
        """Put the slices of a volume together, in the order of their numbers, and write it; they are forgotten."""
        images = self._volumes.pop(volume)
        made = [images[key] for key in sorted(images)]
        index = self._indices[volume]
        geometry = stack_geometry([each.first for each in made], self._scan.encodings[volume.encoding])
        by_network = [each.network for each in made if each.network is not None]
        whole = {CLASSICAL: [each.classical for each in made]}
        if len(by_network) == len(made):
            whole[NETWORK] = by_network
        reasons = Counter(each.reason for each in made if each.reason)
        volumes = {
            series: Volume(np.concatenate([image.data for image in each]), geometry, _provenance(each, reasons))
            for series, each in whole.items()
        }
        with self.clock.stage("write"):
            self._written[index] = self._results.write_volumes(volumes, index, volume.contrast)


def software() -> str:
    """Return the name and version that provenance carries."""
    return f"scanside {version('scanside')}"


def _provenance(images: list[Image], reasons: Counter[str]) -> Provenance:
    """How most slices of a volume were made, and in its steps how the others were and why no network was used."""
    ways = Counter((image.method, image.steps, image.model_sha256, image.backend) for image in images)
    (method, steps, sha256, backend), _ = ways.most_common(1)[0]
    for (other, other_steps, _, _), n in ways.most_common()[1:]:
        steps = (*steps, f"{n} of {len(images)} slices otherwise: {other} ({'; '.join(other_steps)})")
    for reason, n in reasons.most_common():
        steps = (*steps, f"network not used for {n} of {len(images)}: {reason}")
    return Provenance(method, software(), steps, model_sha256=sha256, backend=backend)


def findings_json(findings: Findings) -> list[dict[str, Any]]:
    """Return findings as the JSON of reports and events."""
    return [{**asdict(each), "state": each.state.value} for each in findings.findings]
