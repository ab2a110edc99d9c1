"""One scan from its readouts to results on disk: assemble, reconstruct, volumes, DICOM, report; triage reads it later.

The worker and `scanside recon` both run this, so that a file and a live scan give the same images. What comes out
depends on the order of the readouts alone, never on when they came: a scan replayed after a crash gives the same bits.

Lines are gathered and whitened on the host, as they come one at a time and are small: a copy of each to a device would
take longer than its work. A slice's calibration lines and its k-space go to the device that the chain was given, whole;
everything up to the image is made there, and images come back.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from threadpoolctl import threadpool_limits

from edge.backends.device import Device
from edge.clock import StageClock
from edge.exam_triage import unread_report
from edge.intake import to_acquisition
from edge.mrd import Readout
from edge.results import Results
from edge.verdict import Watch, quality_json
from edge.volumes import CLASSICAL, NETWORK, Made, Volumes, software, volume_key
from recon.arrays import Array
from recon.assemble import Assembler
from recon.consistency import measure_slice, ranked
from recon.dead_coils import find_dead
from recon.errors import AcquisitionError, BackendError, ShapeError
from recon.network import Network
from recon.placement import stack_geometry
from recon.reconstruct import (
    Classical,
    Image,
    Learned,
    Sensitivities,
    Start,
    network_refusal,
    reconstruct_classical,
    reconstruct_network,
    sense_coils,
)
from recon.scan import Encoding, Geometry, ImageKey, KSpace, Role

_FEW_SLICES = 4  # are all measured thoroughly
_MAX_UNMEASURED = 256 << 20  # bytes of k-space of slices that wait to be judged: they wait for images, not for ever


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


class _Unmeasured(NamedTuple):
    """A slice whose images have gone out and whose measures have not been taken. numbers: int (ky), of its readouts."""

    key: ImageKey
    kspace: KSpace
    coils: Sensitivities
    start: Start
    learned: Learned | None
    numbers: Array
    n_slices: int


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
        on_fault: Callable[[dict[str, Any]], None] = lambda fault: None,
        may_make: Callable[[ImageKey], bool] = lambda key: True,
    ) -> None:
        """Prepare for the scan that `results` names; raises AcquisitionError when nothing could be made of it.

        network: what "auto" and "network" use; without one, `no_network` says why not, and "network" fails.
        device: where slices are reconstructed; None for the host.
        on_image: called with each finished image. on_fault: with the fields of each early `quality` event.
        may_make: asked before each; False sets the image aside.
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
        self._unmeasured: deque[_Unmeasured] = deque()
        self._volumes = Volumes(results, self._scan)
        card = self._network.card if self._network else None
        self._watch = Watch(self._scan, card.trained_range if card else None, on_fault, card.limits if card else None)

    @property
    def results(self) -> Results:
        """Where the scan's results are written."""
        return self._results

    def feed(self, readout: Readout, message_end: int = 0) -> None:
        """Take one readout; images that it completes are made now."""
        self.n_readouts += 1
        if readout.samples is None:
            self._leave_out("compressed samples are not supported; plain complex64 is needed")
            return
        keys: list[ImageKey] = []
        begin = self._begin()
        is_faulty = False
        try:
            acquisition = to_acquisition(readout.header, readout.samples)
            with self.clock.stage("check"):
                is_faulty = self._watch.look(acquisition, self.n_readouts - 1)
            with self.clock.stage("assemble"):
                keys = self._assembler.add(acquisition, self.n_readouts - 1)
        except (AcquisitionError, ShapeError) as error:
            self._leave_out(str(error), is_faulty)
        for key in keys:
            with self.clock.stage("check"):
                self._watch.complete(key)
            self._make(self._assembler, key, message_end, begin)
            begin = self._begin()

    def work_ahead(self) -> bool:
        """Make the maps of one slice whose calibration lines have come, else judge one; False where none waits."""
        if self._method == "zero-filled":
            return False
        for key in self._assembler.open_keys():
            if not self._scan.encodings[key.encoding].is_3d and self._is_stale(self._assembler, key):
                self._sense(self._assembler, key)
                return True
        if self._unmeasured:
            self._measure_next()
            return True
        return False

    def finish(self, ending: str, reason: str, replay: Callable[[], Iterable[Readout]]) -> dict[str, Any]:
        """Make what can still be made, write volumes and report, and return the report, which assesses nothing yet.

        ending: "complete" makes every image that has lines; after any other only whole slices stand.
        replay: gives the scan's readouts again, for images whose lines went on after they seemed complete.
        Raises AcquisitionError when not one image came of a complete scan.
        """
        if ending == "complete":
            for key in self._assembler.open_keys():
                self._make(self._assembler, key, 0)
            self._make_late(replay)
        if ending == "complete":
            with self.clock.stage("check"):
                self._watch.finish()
        while self._unmeasured:
            self._measure_next()
        verdict = self._watch.verdict(self.set_aside, ending)
        with self.clock.stage("write"):
            self._volumes.finish(lambda: verdict)
            self._results.write_quality_note(verdict)
        written = self._volumes.said
        if ending == "complete" and not self.n_images:
            raise AcquisitionError(f"no image could be made of {self.n_readouts} readouts: {self._main_fault()}")
        report = {
            "v": 1,
            "scan_id": self._scan.scan_id,
            "ending": ending,
            "reason": reason,
            "method": written[0]["method"] if 0 in written else "",
            "software": software(),
            "n_readouts": self.n_readouts,
            "n_images": self.n_images,
            "volumes": [written[index] for index in sorted(written)],
            "quality": quality_json(verdict),
            **unread_report(),
            "stage_ms": self.clock.rounded(),
        }
        self._results.write_report(report)
        return report

    def quality(self, ending: str) -> dict[str, Any]:
        """Return the verdict so far as reports carry it; null where no fault was found."""
        return quality_json(self._watch.verdict(self.set_aside, ending))

    def _leave_out(self, why: str, is_faulty: bool = False) -> None:
        """Count a readout that was left out; is_faulty: the checks have said what is wrong with it."""
        self.left_out[why] += 1
        if not is_faulty:
            self._watch.left_out[why] += 1

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
        first, numbers = assembler.first_readout(key), assembler.order(key)
        assembler.discard(key)
        volumes = self._volumes
        volumes.put(key, Made(classical.image, None, "", first))
        n_slices, index = volumes.n_slices(key), volumes.index(key)
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
        learned = None
        if not reason:
            learned, reason = self._run_network(classical, encoding)
            if learned is not None:
                send(learned.image, NETWORK, "")
            volumes.put(key, Made(classical.image, None if learned is None else learned.image, reason, first))
        elif self._method in ("auto", "network"):
            volumes.put(key, Made(classical.image, None, reason, first))
        is_judged = self._network is not None and self._network.card.limits is not None
        if is_judged and classical.start is not None and coils is not None and not encoding.is_3d:
            self._unmeasured.append(_Unmeasured(key, kspace, coils, classical.start, learned, numbers[0], n_slices))
            n_bytes = kspace.samples.nbytes + classical.start.kspace.samples.nbytes
            if len(self._unmeasured) * n_bytes > _MAX_UNMEASURED:
                self._measure_next()
        if volumes.is_whole(key):
            with self.clock.stage("write"):
                volumes.close(volume_key(key), lambda: self._watch.verdict(self.set_aside, "complete"))

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

    def _measure_next(self) -> None:
        """Take the measures of the slice that has waited longest; those that cost most of every second slice."""
        assert self._network is not None
        waiting = self._unmeasured.popleft()
        ranks, in_order = ranked(waiting.numbers)
        learned = waiting.learned
        thorough = waiting.n_slices < _FEW_SLICES or waiting.key.slice % 2 == 0
        with self._stage("judge"):
            try:
                network, solution = (None, None) if learned is None else (self._network, learned.solution)
                measures = measure_slice(waiting.start, ranks, network, solution, thorough=thorough)
            except BackendError:  # the network's image was made: what needs no further run is measured
                measures = measure_slice(waiting.start, ranks, None, None, thorough=False)
            dead = find_dead(waiting.kspace, waiting.coils, waiting.start.image, waiting.numbers)
        self._watch.judge(waiting.key, measures, in_order, dead)

    def _run_network(self, classical: Classical, encoding: Encoding) -> tuple[Learned | None, str]:
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
        for number, readout in enumerate(replay()):
            if readout.samples is None:
                continue
            with suppress(AcquisitionError, ShapeError):  # counted when it came first
                acquisition = to_acquisition(readout.header, readout.samples)
                if acquisition.role in (Role.NOISE, Role.CALIBRATION) or volume_key(acquisition.key) in volumes:
                    again.add(acquisition, number)
        for key in again.open_keys():
            self._make(again, key, 0)
