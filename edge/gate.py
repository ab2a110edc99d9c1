"""Who may connect: CURVE on a socket, keys asked for through ZAP, and everybody who is refused written down."""

from __future__ import annotations

import logging
import threading

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from edge.audit import AuditTrail
from edge.keyring import Keyring

log = logging.getLogger(__name__)

_DOMAIN = "scanside"
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_POLL_MS = 200


class Gate:
    """A context whose sockets take only clients with a known key.

    A client's identity on a message (`User-Id`) is the name of its key.
    """

    def __init__(self, keyring: Keyring, audit: AuditTrail) -> None:
        """Start to answer; raises SecretError where the daemon has no key."""
        self._public, self._secret = keyring.server()
        self._audit = audit
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = _Authenticator(self.context, keyring, audit)
        self._authenticator.configure_curve_callback(_DOMAIN, self._authenticator)
        self._authenticator.start()
        self._monitors: list[zmq.Socket[bytes]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Ask everybody who connects to `socket` for a key; call it before the socket is bound and before `watch`."""
        socket.curve_server = True
        socket.curve_secretkey = self._secret
        socket.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
        self._monitors.append(socket.get_monitor_socket(_FAILED))

    def watch(self) -> None:
        """Begin to write down connections that fail before they show a key."""
        self._thread = threading.Thread(target=self._watch, name="gate")
        self._thread.start()

    def close(self) -> None:
        """End; the sockets must be closed."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for monitor in self._monitors:
            monitor.close(0)
        self._authenticator.stop()
        self.context.term()

    def _watch(self) -> None:
        poller = zmq.Poller()
        for monitor in self._monitors:
            poller.register(monitor, zmq.POLLIN)
        while not self._stop.is_set():
            for monitor, _ in poller.poll(_POLL_MS):
                parse_monitor_message(monitor.recv_multipart())
                log.warning("connection refused code=handshake")
                self._audit.record(
                    "refused", "serious", reason="a connection without a key, or with the wrong server's"
                )


class _Authenticator(ThreadAuthenticator):
    """Asks the keyring, and says who was refused from where."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keyring: Keyring, audit: AuditTrail) -> None:
        super().__init__(context, log=logging.getLogger("edge.gate.zap"))
        self._keyring = keyring
        self._trail = audit
        self._address = ""

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        """Note where a request comes from, then answer it."""
        self._address = msg[3].decode("ascii", "replace") if len(msg) > 3 else ""
        await super().handle_zap_message(msg)

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a public key (Z85) is a known client's."""
        client = self._keyring.by_public(key.decode("ascii", "replace"))
        if client is None:
            log.warning("connection refused code=key")
            self._trail.record("refused", "serious", source=self._address, reason="a key that is not known here")
        return client is not None

    def curve_user_id(self, client_public_key: bytes) -> str:
        """Return the name of the client whose key this is."""
        client = self._keyring.by_public(z85.encode(client_public_key).decode("ascii"))
        return client.name if client is not None else "?"
