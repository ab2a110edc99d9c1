"""The MRD server: accepts scanners' connections and gives each a session of its own."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor

from edge.session import Listener, ServerLimits, Service, Session, refuse
from edge.spool import Spool
from recon.errors import DeliveryError

log = logging.getLogger(__name__)

_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))  # a dead peer is known after a minute


class MrdServer:
    """Listens for MRD v1 streams. MRD has no authentication: bind it to loopback or a scanner's own network.

    `broken` gets the exception of a session that hit a bug; await it beside whatever keeps the daemon running.
    """

    def __init__(
        self,
        host: str,
        port: int,
        spool: Spool,
        listener: Listener,
        limits: ServerLimits | None = None,
        allow: Sequence[str] = (),
        on_stranger: Callable[[str], None] = lambda address: None,
    ) -> None:
        """Prepare to listen on `host`; port 0 takes a free one, which `port` tells after `start`.

        allow: addresses and networks whose clients are served, everybody's where empty. on_stranger: called with the
        address of one who is not.
        """
        self.host = host
        self.port = port
        self.limits = limits or ServerLimits()
        self.broken: asyncio.Future[None] | None = None
        self._disk = ThreadPoolExecutor(self.limits.sessions, thread_name_prefix="spool")
        self._service = Service(spool, listener, self.limits, self._disk)
        self._allow = [ipaddress.ip_network(each) for each in allow]
        self._on_stranger = on_stranger
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._sessions: dict[asyncio.Task[None], Session] = {}
        self._refusals: set[asyncio.Task[None]] = set()

    def allow(self, addresses: Sequence[str]) -> None:
        """Serve clients at these addresses and networks from now on, everybody where empty."""
        self._allow = [ipaddress.ip_network(each) for each in addresses]

    @property
    def n_sessions(self) -> int:
        """How many sessions are being served."""
        return len(self._sessions)

    async def start(self) -> None:
        """Listen; raises DeliveryError where the address cannot be had."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            self._socket = socket.create_server((self.host, self.port), family=family, backlog=128)
        except OSError as error:
            raise DeliveryError(f"port {self.port} cannot be listened on: {error.strerror}") from error
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        self.broken = asyncio.get_running_loop().create_future()
        self._accepting = self._start(self._accept(self._socket))

    async def stop(self, grace_s: float = 5.0) -> None:
        """Accept no more, end all sessions with a reason, and return; scans still being sent are marked interrupted."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
        if self._socket is not None:
            self._socket.close()
        for session in self._sessions.values():
            session.close_soon("the server is stopping")
        tasks = {*self._sessions, *self._refusals}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._disk.shutdown()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:  # out of file descriptors, or a client that left already
                log.warning("a connection was not accepted errno=%s", error.errno)
                await asyncio.sleep(0.1)
                continue
            if not self._is_allowed(peer[0]):
                connection.close()
                self._on_stranger(peer[0])
                continue
            connection.setblocking(False)
            _tune(connection)
            if self.n_sessions < self.limits.sessions:
                session = Session(self._service, connection)
                self._sessions[self._start(session.run())] = session
            elif len(self._refusals) < 4 * self.limits.sessions:
                reason = f"all {self.limits.sessions} sessions are in use; try again later"
                self._refusals.add(self._start(refuse(connection, reason, self.limits)))
            else:
                connection.close()

    def _is_allowed(self, address: str) -> bool:
        if not self._allow:
            return True
        found = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(found, "ipv4_mapped", None) or found
        return any(found in network for network in self._allow)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._sessions.pop(task, None)
        self._refusals.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a session hit a bug type=%s", type(error).__name__)
            if self.broken is not None and not self.broken.done():
                self.broken.set_exception(error)


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
