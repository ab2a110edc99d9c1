"""Objects to an archive by C-STORE, and its word that it keeps them where it gives that.

An object counts as delivered when the archive has taken it with success or a warning and, where storage commitment is
asked for and offered, has committed to it. An object that was sent before is first asked about, then sent again.
Sources: DICOM PS3.4 B (storage), J (storage commitment), PS3.7 C (statuses).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from edge.dicom_net import Peer, application, associate, server_tls
from recon.errors import DeliveryError

_COMMITMENT_INSTANCE = UID("1.2.840.10008.1.20.1.1")  # well known
_MOST_CONTEXTS = 120  # an association has 128


class Outcome(NamedTuple):
    """What became of one object: "delivered", "waiting" (to be tried again) or "dead", and why."""

    key: str
    state: str
    reason: str = ""


class Item(NamedTuple):
    """One object to send. attempts: how often it was tried before."""

    key: str
    path: Path
    attempts: int = 0


class _Head(NamedTuple):
    """What a file says of itself: SOP class, SOP instance and transfer syntax."""

    sop_class: UID
    instance: UID
    syntax: UID


@dataclass
class _Promise:
    """A request for commitment that the archive has yet to answer."""

    heard: threading.Event
    committed: frozenset[str] = frozenset()


class StoreSender:
    """Sends to one archive. Where `listen` names a place, commitment is asked for and reports are taken there too."""

    def __init__(self, peer: Peer, listen: tuple[str, int] | None = None, commitment_s: float = 60.0) -> None:
        """commitment_s: how long a report is waited for. Raises DeliveryError where the place cannot be had."""
        self._peer = peer
        self._commitment_s = commitment_s if listen else 0.0
        self._promises: dict[str, _Promise] = {}
        self._handlers = [(evt.EVT_N_EVENT_REPORT, self._on_report)]
        self._server: Any = None
        if listen:
            entity = application(peer.calling_ae, peer.timeout_s)
            entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
            tls = server_tls(peer.ca, peer.cert, peer.key)
            try:
                self._server = entity.start_server(
                    listen, block=False, evt_handlers=[*self._handlers], ssl_context=tls
                )  # fmt: skip
            except OSError as error:
                raise DeliveryError(f"the port for storage commitment cannot be had: {error.strerror}") from error

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()

    def send(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Yield what becomes of each item, in any order; raises UnreachableError where no association is to be had.

        Items without an outcome when it ends were not tried.
        """
        heads: dict[str, _Head] = {}
        for item in items:
            try:
                heads[item.key] = _read_head(item.path)
            except DeliveryError as error:
                yield Outcome(item.key, "dead", str(error))
        readable = [item for item in items if item.key in heads]
        if not readable:
            return
        contexts = _contexts(list(heads.values()))
        if self._commitment_s:
            contexts.append(build_context(StorageCommitmentPushModel))
        association = associate(self._peer, contexts, self._handlers)
        try:
            yield from self._send_over(association, readable, heads)
        finally:
            if association.is_established:
                association.release()

    def _send_over(self, association: Association, items: list[Item], heads: dict[str, _Head]) -> Iterator[Outcome]:
        accepted = {
            (c.abstract_syntax, c.transfer_syntax[0]) for c in association.accepted_contexts if c.transfer_syntax
        }
        commits = self._commitment_s > 0 and any(c == StorageCommitmentPushModel for c, _ in accepted)
        if commits and (known := [item for item in items if item.attempts]):
            kept = self._ask(association, [heads[item.key] for item in known])
            for item in known:
                if heads[item.key].instance in kept:
                    yield Outcome(item.key, "delivered")
            items = [item for item in items if heads[item.key].instance not in kept]
        stored: list[Item] = []
        for number, item in enumerate(items):
            head = heads[item.key]
            if (head.sop_class, head.syntax) not in accepted:
                yield Outcome(item.key, "dead", "the archive takes no objects of this SOP class and transfer syntax")
                continue
            if not association.is_established:
                break
            outcome = _store(association, item, number % 65535 + 1)
            if outcome.state == "delivered" and commits:
                stored.append(item)
            else:
                yield outcome
        if stored:
            kept = self._ask(association, [heads[item.key] for item in stored])
            for item in stored:
                is_kept = heads[item.key].instance in kept
                yield (
                    Outcome(item.key, "delivered")
                    if is_kept
                    else Outcome(item.key, "waiting", "the archive took it and has not committed to keep it")
                )

    def _ask(self, association: Association, heads: list[_Head]) -> frozenset[str]:
        """Ask for commitment and return the instances that the archive has committed to keep, as far as it says."""
        if not association.is_established:
            return frozenset()
        action = Dataset()
        action.TransactionUID = UID(f"2.25.{uuid4().int}")
        action.ReferencedSOPSequence = [_reference(head) for head in heads]
        promise = self._promises[action.TransactionUID] = _Promise(threading.Event())
        try:
            with suppress(RuntimeError, ValueError):
                status, _ = association.send_n_action(action, 1, StorageCommitmentPushModel, _COMMITMENT_INSTANCE)
                if status.get("Status") == 0:
                    promise.heard.wait(self._commitment_s)
        finally:
            del self._promises[action.TransactionUID]
        return promise.committed

    def _on_report(self, event: Any) -> tuple[int, Dataset | None]:
        """Take an N-EVENT-REPORT, over our association or one that the archive made."""
        try:
            said = event.event_information
            promise = self._promises.get(str(said.TransactionUID))
            if promise is not None:
                items = said.get("ReferencedSOPSequence") or []
                promise.committed = frozenset(str(item.ReferencedSOPInstanceUID) for item in items)
                promise.heard.set()
        except Exception:  # whatever a peer sends: the objects are then not committed
            return 0x0110, None  # processing failure
        return 0x0000, None


def _store(association: Association, item: Item, message_id: int) -> Outcome:
    try:
        status = association.send_c_store(item.path, message_id)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        return Outcome(item.key, "waiting", f"the object could not be sent ({type(error).__name__})")
    code = status.get("Status")
    if code is None:
        return Outcome(item.key, "waiting", "the archive ended the association, or did not answer, at this object")
    if code in (0x0000, 0xB000, 0xB006, 0xB007):  # success; stored, with elements coerced or discarded
        return Outcome(item.key, "delivered")
    is_passing = 0xA700 <= code <= 0xA7FF or code in (0x0110, 0x0124, 0x0213)  # out of resources, not now, not you
    return Outcome(item.key, "waiting" if is_passing else "dead", f"the archive refuses it with status {code:04X}")


def _read_head(path: Path) -> _Head:
    try:
        meta = read_file_meta_info(path)
        return _Head(meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID)
    except OSError as error:
        raise DeliveryError(f"the file cannot be read: {error.strerror or type(error).__name__}") from error
    except Exception as error:  # a damaged file fails in many ways
        raise DeliveryError("the file is not DICOM any more") from error


def _contexts(heads: list[_Head]) -> list[PresentationContext]:
    kinds = list(dict.fromkeys((head.sop_class, head.syntax) for head in heads))
    return [build_context(sop_class, syntax) for sop_class, syntax in kinds[:_MOST_CONTEXTS]]


def _reference(head: _Head) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = head.sop_class, head.instance
    return item
