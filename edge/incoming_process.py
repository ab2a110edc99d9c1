"""The process that takes DICOM objects: a C-STORE and C-ECHO SCP, each object on disk before it is answered for.

What it says goes out as JSON lines on standard output; it ends when standard input does. It remembers nothing: killed
at any moment, what it called a success lies under the state folder, and the daemon finds it there.
Sources: DICOM PS3.4 B (storage), PS3.7 (DIMSE), PS3.8 (associations).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import evt
from pynetdicom.sop_class import EnhancedMRImageStorage, MRImageStorage, Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from edge.atomic import sync_folder
from edge.crash import log_crashes
from edge.dicom_identity import DUPLICATE, OUT_OF_RESOURCES, ObjectRefusedError, is_same, place_of
from edge.dicom_net import application, server_tls, silence_libraries
from edge.secret import read_secret
from recon.errors import DeliveryError

PARTS = ".part"  # what is being received; nothing there was answered for
_HANDSHAKE_S = 10.0
_KEPT_FREE = 64 << 20  # the last of the disk is the ledger's
_LOOK_BYTES = 8 << 20  # between two looks at the disk within one object
_SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]  # what triage reads without a decoder


class Store:
    """Puts objects under `folder`, each once. Called by several threads."""

    def __init__(self, folder: Path, secret: bytes, min_free: int) -> None:
        """Make the folder; what an earlier process had half received is thrown away. min_free: in bytes."""
        self.folder, self.min_free = folder, min_free
        self._secret = secret
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        (folder / PARTS).mkdir(mode=0o700, parents=True)

    def free(self) -> int:
        """Return how many bytes the disk has left."""
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def take(self, part: Path, sop_class: str, instance: str) -> tuple[str, bool]:
        """Keep a received file for good; return its scan, and whether it is new. Raises ObjectRefusedError."""
        if self.free() < self.min_free:
            raise ObjectRefusedError(OUT_OF_RESOURCES, "the disk is full")
        place = place_of(part, self._secret, sop_class, instance)
        folder = self.folder / place.scan_id
        try:
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
                sync_folder(self.folder)
            _sync_file(part)
            os.link(part, folder / place.name)  # never over one that is there
            sync_folder(folder)
        except FileExistsError:
            if not is_same(part, folder / place.name):
                raise ObjectRefusedError(DUPLICATE, "another object is here under the same UID") from None
            return place.scan_id, False
        except OSError as error:
            raise ObjectRefusedError(OUT_OF_RESOURCES, "the disk does not take it") from error
        return place.scan_id, True


class _Server(ThreadedAssociationServer):
    """Looks at addresses first, and lets no TLS handshake hold up the others."""

    daemon_threads = True
    allow: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    tls: Any = None
    on_stranger: Any = None

    def verify_request(self, request: Any, client_address: Any) -> bool:
        address = ipaddress.ip_address(client_address[0].partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if self.allow and not any(address in network for network in self.allow):
            self.on_stranger(client_address[0], "not one of incoming.allow")
            return False
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        if self.tls is not None:
            try:
                request.settimeout(_HANDSHAKE_S)
                request = self.tls.wrap_socket(request, server_side=True)
                request.settimeout(None)
            except OSError:  # ssl.SSLError is one
                self.on_stranger(client_address[0], "no TLS, or no certificate that incoming.ca knows")
                request.close()
                return
        super().process_request_thread(request, client_address)


class Receiver:
    """The SCP."""

    def __init__(self, settings: Mapping[str, Any], store: Store) -> None:
        """settings: those of the section [incoming]."""
        self._settings, self._store = settings, store
        self._said = threading.Lock()
        self._series: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # that an association has brought
        self._n_bytes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # since its last object
        self._server: _Server | None = None

    def start(self) -> int:
        """Listen; return the port. Raises DeliveryError where it cannot be had."""
        entity = application(self._settings["ae_title"], self._settings["timeout_s"])
        entity.network_timeout = self._settings["idle_s"]
        entity.maximum_associations = self._settings["max_associations"]
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._settings["callers"])
        entity.add_supported_context(Verification)
        for sop_class in (MRImageStorage, EnhancedMRImageStorage):
            entity.add_supported_context(sop_class, _SYNTAXES)
        tls = server_tls(self._settings["ca"], self._settings["cert"], self._settings["key"])
        handlers: list[Any] = [
            (evt.EVT_REJECTED, self._on_rejected),
            (evt.EVT_ACCEPTED, self._on_accepted),
            (evt.EVT_DATA_RECV, self._on_data),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_CONN_CLOSE, self._on_closed),
        ]
        address = (self._settings["host"], self._settings["port"])
        try:
            server = entity.make_server(address, evt_handlers=handlers, server_class=_Server)
        except OSError as error:
            raise DeliveryError(f"the port for DICOM cannot be had: {error.strerror}") from error
        assert isinstance(server, _Server)
        server.allow = tuple(ipaddress.ip_network(each) for each in self._settings["allow"])
        server.tls = tls
        server.on_stranger = lambda source, why: self.say(refused=why, source=source)
        entity._servers.append(server)  # as `start_server` does; `shutdown` takes it out
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._server = server
        return int(server.server_address[1])

    def stop(self) -> None:
        """End all associations and stop listening."""
        if self._server is not None:
            self._server.ae.shutdown()

    def say(self, **fields: Any) -> None:
        """Tell the daemon."""
        with self._said:
            sys.stdout.write(json.dumps(fields) + "\n")
            sys.stdout.flush()

    def _on_rejected(self, event: Any) -> None:
        asked = event.assoc.requestor.primitive
        if asked.calling_ae_title not in self._settings["callers"]:
            why = "its AE title is not one of incoming.callers"
        elif asked.called_ae_title != self._settings["ae_title"]:
            why = "it calls another AE title than incoming.ae_title"
        else:
            why = "too many associations at once"
        self.say(refused=why, source=_source(event))

    def _on_accepted(self, event: Any) -> None:
        """Say so where nothing that was offered can be taken: other kinds of objects, other transfer syntaxes."""
        if event.assoc.rejected_contexts and not event.assoc.accepted_contexts:
            self.say(refused="no MR images in a transfer syntax that is taken", source=_source(event))

    def _on_data(self, event: Any) -> None:
        """Cut off who sends without end, and who would take the last of the disk."""
        n_before = self._n_bytes.get(event.assoc, 0)
        n = self._n_bytes[event.assoc] = n_before + len(event.data)
        is_full = n // _LOOK_BYTES > n_before // _LOOK_BYTES and self._store.free() < _KEPT_FREE
        if is_full or n > self._settings["max_object_mib"] << 20:
            why = "the disk is full" if is_full else "an object is larger than incoming.max_object_mib"
            self.say(refused=why, source=_source(event))
            event.assoc.dul.socket.close()

    def _on_store(self, event: Any) -> Dataset:
        self._n_bytes[event.assoc] = 0
        request = event.request
        answer = Dataset()
        try:
            scan_id, is_new = self._store.take(
                event.dataset_path, str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)
            )
        except ObjectRefusedError as error:
            answer.Status, answer.ErrorComment = error.status, str(error)
            self.say(refused=f"{error} ({error.status:04X})", source=_source(event))
            return answer
        self._series.setdefault(event.assoc, set()).add(scan_id)
        self.say(stored=scan_id, is_new=is_new)
        answer.Status = 0x0000
        return answer

    def _on_released(self, event: Any) -> None:
        self.say(ended=sorted(self._series.pop(event.assoc, ())))

    def _on_closed(self, event: Any) -> None:
        """Throw away what an association that broke has left half received."""
        message = event.assoc.dimse.message
        part = getattr(message, "_data_set_file", None)
        if part is not None:
            part.close()
            with suppress(OSError):
                os.unlink(part.name)


def _source(event: Any) -> str:
    return str(event.assoc.requestor.address_info.address)


def _sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def main() -> int:
    """Serve until standard input ends; the one argument is the settings as JSON. 1 where the port cannot be had."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    log_crashes()
    silence_libraries()
    settings = json.loads(sys.argv[1])
    try:
        store = Store(
            Path(settings["folder"]), read_secret(Path(settings["pseudonym_key"])), settings["min_free_mib"] << 20
        )
        tempfile.tempdir = str(store.folder / PARTS)  # where the library puts what it receives
        receiver = Receiver(settings, store)
        port = receiver.start()
    except (OSError, DeliveryError) as error:
        why = str(error) if isinstance(error, DeliveryError) else f"the folder cannot be used: {error.strerror}"
        sys.stdout.write(json.dumps({"fault": why}) + "\n")
        return 1
    receiver.say(port=port)
    for line in iter(sys.stdin.buffer.readline, b""):
        store.min_free = json.loads(line)["min_free_mib"] << 20
    receiver.stop()
    os._exit(0)  # whatever threads a peer holds up


if __name__ == "__main__":
    sys.exit(main())
