"""The reconstruction process: reads spools, makes images, and tells the daemon over a pipe.

Orders come as JSON lines on standard input; reports go out as JSON lines, an image's pixels behind its line. The
process holds nothing that the spool does not: it may die at any moment and another takes its place.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO

from edge.backends.device import Device
from edge.chain import Chain, SliceImage
from edge.crash import log_crashes
from edge.header import read_header
from edge.model import RECONSTRUCTION
from edge.mrd import Limits, Message, MessageId, Readout, read_acquisition, read_bytes
from edge.priority import lowered
from edge.pseudonym import exam_keys
from edge.recall import describe
from edge.reports import Reports
from edge.results import Results
from edge.secret import read_secret
from edge.spool import SpoolReader
from edge.supply import Supply
from edge.uids import has_study_uid
from recon.errors import AcquisitionError, ScanError, StreamError
from recon.network import Network
from recon.scan import ImageKey

log = logging.getLogger(__name__)

_TURN = 64  # messages that one scan may take before the others have theirs
_BEAT_S = 1.0
# Where several processes want few cores: classical images first, then the network's, maps and verdicts after them.
_NETWORK_NICE, _AHEAD_NICE = 5, 10


class OpenScan:
    """One scan that the worker follows through its spool."""

    def __init__(
        self,
        order: dict[str, Any],
        reports: Reports,
        settings: dict[str, Any],
        network: Network | None,
        no_network: str,
        device: Device | None,
    ) -> None:
        self.scan_id: str = order["scan_id"]
        self.ending: str | None = None
        self.reason = ""
        self._order = order
        self._reports = reports
        self._settings = settings
        self._network, self._no_network, self._device = network, no_network, device
        self._limits = Limits(**settings["limits"])
        self._reader = SpoolReader(Path(order["spool"]), self._limits)
        self._set_aside = frozenset(order["set_aside"])
        self._chain: Chain | None = None
        self._exam_keys: dict[str, str] = {}
        self._is_study_known = False
        self._is_done = False

    def turn(self) -> bool:
        """Take the next messages that have come; False when there were none."""
        taken = False
        try:
            for message in islice(self._reader.messages(), _TURN):
                if message.id is MessageId.CLOSE:
                    break
                taken = True
                self._take(message)
        except StreamError:
            taken = False  # the server says so too, as the scan's ending; what came before it stands
        if not taken and self.ending is not None:
            self._finish()
        return taken

    def work_ahead(self) -> bool:
        """Do a piece of work that no message waits for."""
        return self._chain is not None and self._chain.work_ahead()

    def close(self) -> None:
        """Let go of the spool."""
        self._reader.close()

    @property
    def is_done(self) -> bool:
        """Whether the results are written."""
        return self._is_done

    def _take(self, message: Message) -> None:
        if message.id is MessageId.HEADER:
            self._open(read_bytes(self._reader.buffer, message))
        elif message.id is MessageId.ACQUISITION:
            if self._chain is None:
                raise AcquisitionError("readouts came without a header before them; an ISMRMRD XML header is needed")
            self._chain.feed(read_acquisition(self._reader.buffer, message), self._reader.base + message.end)

    def _open(self, xml: bytes) -> None:
        scan, exam = read_header(xml, self.scan_id)
        secret = read_secret(Path(self._settings["pseudonym_key"]))
        self._exam_keys = exam_keys(exam, self.scan_id, secret, self._settings["identifiers"])
        self._is_study_known = has_study_uid(exam)
        received_at = datetime.fromisoformat(self._order["received_at"])
        self._chain = Chain(
            Results(Path(self._order["results"]), scan, exam, received_at),
            method=self._settings["method"],
            network=self._network,
            no_network=self._no_network,
            device=self._device,
            max_scan_mib=self._settings["max_scan_mib"],
            on_image=self._send_image,
            on_fault=lambda fault: self._reports.send("fault", scan_id=self.scan_id, fields=fault),
            may_make=self._may_make,
        )
        encoding = scan.encodings[0]
        limit = encoding.limits.get("slice")
        self._reports.send(
            "started",
            scan_id=self.scan_id,
            matrix=list(encoding.recon_matrix),
            slices=encoding.recon_matrix.z if encoding.is_3d else (limit.maximum + 1 if limit else 1),
            coils=scan.n_coils,
            acceleration=list(encoding.acceleration),
            field_t=scan.field_t,
        )

    def _may_make(self, key: ImageKey) -> bool:
        name = image_name(key)
        if name in self._set_aside:
            return False
        self._reports.send("making", scan_id=self.scan_id, image_key=name)
        return True

    def _send_image(self, image: SliceImage) -> None:
        geometry = image.geometry
        self._reports.send(
            "image",
            image.data,
            scan_id=self.scan_id,
            image_key=image_name(image.key),
            key=image.key._asdict(),
            series=image.series,
            n_slices=image.n_slices,
            volume_index=image.volume_index,
            shape=list(image.data.shape),
            message_end=image.message_end,
            method=image.method,
            reason=image.reason,
            begun_s=image.begun_s,
            made_s=image.made_s,
            stage_ms=dict(image.stage_ms),
            origin_mm=geometry.origin_mm.tolist(),
            row_dir=geometry.row_dir,
            col_dir=geometry.col_dir,
            spacing_mm=geometry.spacing_mm,
            thickness_mm=geometry.thickness_mm,
            is_known=geometry.is_known,
        )

    def _finish(self) -> None:
        if self._chain is None:
            raise AcquisitionError("the stream ended without a header; an ISMRMRD XML header is needed before readouts")
        assert self.ending is not None
        report = self._chain.finish(self.ending, self.reason, self._replay)
        self._is_done = True
        self._reports.send(
            "reconstructed",
            scan_id=self.scan_id,
            **{name: report[name] for name in ("quality", "method", "n_images", "n_readouts", "stage_ms")},
            exam=self._exam_keys,
            is_study_known=self._is_study_known,
            volumes=describe(self._chain.results),
        )

    def _replay(self) -> Iterator[Readout]:
        again = SpoolReader(Path(self._order["spool"]), self._limits)
        try:
            for message in again.messages():
                if message.id is MessageId.ACQUISITION:
                    yield read_acquisition(again.buffer, message)
        finally:
            again.close()


def _open_supply(settings: dict[str, Any], thread: Executor) -> tuple[Supply | None, str]:
    """Return what hands out reconstruction networks that `thread` runs, or None and why there is none."""
    if settings["method"] not in ("auto", "network"):
        return None, ""
    try:
        folder = Path(settings["model"] or RECONSTRUCTION)
        supply = Supply(folder, settings["backend"], Path(settings["engines"]), settings["precision"], thread)
    except ScanError as error:
        log.warning("network not available code=%s", error.code)
        return None, str(error)
    card = supply.card
    log.info("network ready name=%s version=%s backend=%s", card.name, card.version, supply.words)
    return supply, ""


def image_name(key: ImageKey) -> str:
    """Return an image key as a short text: what the ledger and events call it."""
    return "-".join(str(number) for number in key)


class Worker:
    """Serves scans in turns until standard input ends."""

    def __init__(self, orders: int, out: BinaryIO, settings: dict[str, Any]) -> None:
        self._orders: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._reports = Reports(out)
        self._settings = settings
        network = lowered("network", _NETWORK_NICE)  # opened there, too: the runtime's threads inherit its niceness
        self._supply, self._no_network = network.submit(_open_supply, settings, network).result()
        on_host = self._supply is None or self._supply.arrays is None  # a device's arrays stay with one thread
        self._ahead = lowered("ahead", _AHEAD_NICE) if on_host else None
        self._scans: dict[str, OpenScan] = {}
        self._ring: deque[str] = deque()
        threading.Thread(target=self._listen, args=(orders,), daemon=True).start()

    def run(self) -> None:
        """Work until the daemon closes the pipe; reports at least each second, except while one image is being made."""
        self._reports.send("ready")
        is_busy = False
        beat_at = time.monotonic()
        while True:
            if time.monotonic() - beat_at >= _BEAT_S:
                beat_at = time.monotonic()
                self._reports.send("beat")
            try:
                order = self._orders.get(block=not is_busy, timeout=None if is_busy else _BEAT_S)
            except Empty:
                is_busy = self._turn_all() or self._work_ahead()
                if self._supply is not None and not self._scans:
                    self._supply.tend()
                continue
            if order is None:
                if self._supply is not None:
                    self._supply.close()
                return
            self._obey(order)
            is_busy = True

    def _listen(self, orders: int) -> None:
        """Queue the orders that come on a file descriptor; a plain one, as a buffer's lock would outlive the thread."""
        rest = b""
        while chunk := os.read(orders, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._orders.put(json.loads(line))
        self._orders.put(None)

    def _obey(self, order: dict[str, Any]) -> None:
        scan_id = order["scan_id"]
        if order["do"] == "open" and scan_id not in self._scans:
            network = None if self._supply is None else self._supply.network()
            device = None if self._supply is None else self._supply.arrays
            self._scans[scan_id] = OpenScan(order, self._reports, self._settings, network, self._no_network, device)
            self._ring.append(scan_id)
        elif order["do"] == "close" and (scan := self._scans.get(scan_id)) is not None:
            scan.ending, scan.reason = order["ending"], order["reason"]

    def _turn_all(self) -> bool:
        """Give every scan its turn; False when none had anything to do."""
        was_busy = False
        for scan_id in list(self._ring):
            scan = self._scans[scan_id]
            try:
                was_busy |= scan.turn()
            except ScanError as error:
                log.info("scan failed id=%s code=%s", scan_id, error.code)
                self._reports.send("failed", scan_id=scan_id, code=error.code, reason=str(error))
                self._forget(scan_id)
                continue
            if scan.is_done:
                self._forget(scan_id)
        return was_busy

    def _work_ahead(self) -> bool:
        for scan_id in self._ring:
            work = self._scans[scan_id].work_ahead
            if work() if self._ahead is None else self._ahead.submit(work).result():
                return True
        return False

    def _forget(self, scan_id: str) -> None:
        self._ring.remove(scan_id)
        self._scans.pop(scan_id).close()


def main() -> int:
    """Run a worker on standard input and output; the one argument is its settings as JSON."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    log_crashes()
    # A pipe that breaks says that the daemon has died: the next one has the spool read again.
    with suppress(BrokenPipeError):
        Worker(sys.stdin.fileno(), sys.stdout.buffer, json.loads(sys.argv[1])).run()
    sys.stdout = None  # nothing is left to flush into a broken pipe
    return 0


if __name__ == "__main__":
    sys.exit(main())
