"""DICOM peers: how associations are made and secured, and whether a peer answers.

Sources: DICOM PS3.7 (DIMSE), PS3.8 (associations), PS3.15 B (TLS profiles, as BCP 195 has them).
"""

from __future__ import annotations

import logging
import socket
import ssl
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from edge.courier import UnreachableError
from edge.secret import check_secret
from recon.errors import DeliveryError

# Data sets go out and come in as they are, in pieces: nothing is decoded, and no object is held in memory.
_config.STORE_SEND_CHUNKED_DATASET = True
_config.STORE_RECV_CHUNKED_DATASET = True


@dataclass(frozen=True)
class Peer:
    """One DICOM node, and who we are to it. Files of certificates: "" where none are used; TLS is spoken where any is.

    ca: what its certificate is checked against. cert, key: ours, for nodes that ask for one.
    """

    host: str
    port: int
    called_ae: str
    calling_ae: str
    timeout_s: float = 30.0
    ca: str = ""
    cert: str = ""
    key: str = ""


def silence_libraries() -> None:
    """Keep the libraries' own messages, which name identifiers, out of the log."""
    warnings.simplefilter("ignore")
    for name in ("pynetdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def client_tls(ca: str, cert: str, key: str) -> ssl.SSLContext | None:
    """Return TLS for connections that we make, None where nothing asks for it; raises DeliveryError."""
    if not (ca or cert):
        return None
    try:
        context = ssl.create_default_context(cafile=ca or None)
        _load_own(context, cert, key)
    except (OSError, ssl.SSLError) as error:
        raise DeliveryError("the certificates for DICOM TLS cannot be used") from error
    return context


def server_tls(ca: str, cert: str, key: str) -> ssl.SSLContext | None:
    """Return TLS for connections that come in, each with a certificate that `ca` knows; None where nothing asks."""
    if not (ca or cert):
        return None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca or None)
        if ca:
            context.verify_mode = ssl.CERT_REQUIRED
        _load_own(context, cert, key)
    except (OSError, ssl.SSLError) as error:
        raise DeliveryError("the certificates for DICOM TLS cannot be used") from error
    return context


def _load_own(context: ssl.SSLContext, cert: str, key: str) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert:
        check_secret(Path(key or cert))
        context.load_cert_chain(cert, key or None)


def application(calling_ae: str, timeout_s: float) -> AE:
    """Return an application entity whose every wait is bounded."""
    entity = AE(calling_ae)
    entity.connection_timeout = timeout_s
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = timeout_s
    return entity


def associate(
    peer: Peer, contexts: Sequence[PresentationContext], handlers: Sequence[tuple[Any, ...]] = ()
) -> Association:
    """Return an association that stands; raises UnreachableError where there is none to be had."""
    entity = application(peer.calling_ae, peer.timeout_s)
    tls = client_tls(peer.ca, peer.cert, peer.key)
    association = entity.associate(
        peer.host,
        peer.port,
        list(contexts),
        ae_title=peer.called_ae,
        tls_args=(tls, peer.host) if tls else None,
        evt_handlers=[(evt.EVT_CONN_OPEN, _hurry), (evt.EVT_DATA_SENT, _hurry), *handlers],
    )
    if association.is_established:
        return association
    if association.is_rejected:
        raise UnreachableError("the archive rejects the association: do both sides know each other's AE title?")
    raise UnreachableError("the archive cannot be reached")


def _hurry(event: Any) -> None:
    """Have TCP send and acknowledge at once: otherwise each object waits twice for a delayed acknowledgement, 90 ms."""
    connection = event.assoc.dul.socket.socket
    if connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # Linux turns this off again by itself


def echo(peer: Peer) -> None:
    """Return where the peer answers a C-ECHO; raises DeliveryError where it does not."""
    association = associate(peer, [build_context(Verification)])
    try:
        status = association.send_c_echo()
    finally:
        association.release()
    if status.get("Status") != 0:
        raise DeliveryError("the archive accepts the association and does not answer a C-ECHO")
