"""One scanner's connection: its bytes reach the spool before anything is made of them, and images go back to it.

One task reads and one writes; the disk is written to by threads, and a session that waits for its disk reads no
further, so that TCP holds its client back. No message makes this program import, open or run anything: whatever
configuration a client names, there is one automatic reconstruction, and the client is told so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from edge.framer import Frame, Framer
from edge.mrd import DEFAULT_LIMITS, Limits, MessageId, read_bytes, read_query, read_text
from edge.mrd_write import encode_close, encode_response, encode_text
from edge.spool import Ending, Spool, SpoolWriter
from recon.errors import DeliveryError, ScanError, StreamError

log = logging.getLogger(__name__)

KNOWN_CONFIGS = frozenset({"scanside", "default", "default.xml", "simplefft", "invertcontrast"})

_CHUNK = 1 << 20
_PIECE = 256 << 10
_GREW_S, _GREW_BYTES = 0.05, 256 << 10
_ENDED_HERE = "the server ended the session before the stream ended"

T = TypeVar("T")


@dataclass(frozen=True)
class ServerLimits:
    """What one session, and all of them together, may cost.

    sessions: served at once; others are refused. first_s: until the first byte; idle_s: between later ones.
    answer_s: from the end of the stream until `Session.finish`. send_s: for a client to take 256 KiB.
    send_bytes: replies that wait for one client. config_bytes: held in memory before it is clear that a scan comes.
    scan_bytes: of one stream. linger_s: how long bytes are still thrown away after our CLOSE, so that it arrives.
    """

    wire: Limits = DEFAULT_LIMITS
    sessions: int = 16
    config_bytes: int = 8 << 20
    scan_bytes: int = 64 << 30
    send_bytes: int = 64 << 20
    first_s: float = 120.0
    idle_s: float = 600.0
    answer_s: float = 3600.0
    send_s: float = 30.0
    linger_s: float = 2.0


class Listener(Protocol):
    """What the daemon does with scans. Called in the server's event loop; all but `admit` must return at once.

    Each scan has one `scan_opened` first and one `scan_closed` last, whatever its client does.
    """

    async def admit(self) -> None:
        """Raise ScanError to refuse a scan that is about to start; the client is told its message."""

    def scan_opened(self, session: Session, scan_id: str, config: str, header: bytes) -> None:
        """A scan starts; `header` is its XML, b"" where data, or the end, came without one."""

    def scan_grew(self, scan_id: str, n_bytes: int, n_readouts: int) -> None:
        """So much of the stream is in the spool, with so many whole readouts."""

    def scan_text(self, scan_id: str, text: str) -> None:
        """The client sent a TEXT, as some do to pass parameters as JSON."""

    def scan_closed(self, scan_id: str, ending: Ending, reason: str) -> None:
        """The stream ended. The session takes replies until `Session.finish`, unless the ending is failed."""


@dataclass(frozen=True, eq=False)
class Service:
    """What all sessions of a server share."""

    spool: Spool
    listener: Listener
    limits: ServerLimits
    disk: Executor

    async def on_disk(self, write: Callable[..., T], *args: object) -> T:
        """Return `write(*args)`, run in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.disk, write, *args)


class _EndedError(Exception):
    """The stream was interrupted, and why."""


class Session:
    """One client. `send`, `text` and `finish` are for the listener, from tasks of the server's event loop."""

    def __init__(self, service: Service, connection: socket.socket) -> None:
        """Serve `connection`, a non-blocking socket, once `run` is awaited."""
        self._service = service
        self._limits = service.limits
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._framer = Framer(service.limits.wire)
        self._writer: SpoolWriter | None = None
        self._held = bytearray()  # what came before it was clear that this is a scan
        self._texts: list[str] = []
        self._config = ""
        self._is_opened = False
        self._receiving: asyncio.Task[int] | None = None
        self._told_bytes = self._told_lasts = 0  # what the listener knows
        self._told_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._outbox: deque[bytes] = deque()
        self._n_waiting = 0
        self._is_finishing = self._is_gone = False
        self._filled, self._emptied, self._finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def send(self, message: bytes) -> None:
        """Queue one MRD message; waits while `send_bytes` wait already.

        Raises DeliveryError where the session is finished, or the client has left or took nothing for `send_s`.
        """
        while self._n_waiting >= self._limits.send_bytes and not (self._is_gone or self._is_finishing):
            self._emptied.clear()
            await self._emptied.wait()
        if not self._post(message):
            raise DeliveryError("the client has left or its session is finished; nothing can be sent to it")

    async def text(self, level: str, message: str) -> None:
        """Queue a TEXT with `level` INFO, WARNING or ERROR; raises as `send`."""
        await self.send(encode_text(message, level))

    async def finish(self) -> None:
        """Send what waits, then CLOSE, and return when all is out or the client has left, which is no error.

        Ends the reading too: where the client is still sending, its scan is closed as interrupted.
        """
        self.close_soon()
        await self._finished.wait()

    def close_soon(self, reason: str = "") -> None:
        """Do as `finish`, after a TEXT with `reason`, without waiting. A second call does nothing."""
        if reason:
            self._post(encode_text(reason, "ERROR"))
        self._post(encode_close())
        self._is_finishing = True
        self._emptied.set()
        if self._receiving is not None:
            self._receiving.cancel()

    async def run(self) -> None:
        """Serve the client until both sides are done; closes the connection."""
        sending = asyncio.create_task(self._send_out())
        try:
            await self._end(await self._receive())
            done, _ = await asyncio.wait({sending}, timeout=self._limits.answer_s)
            if not done:
                self.close_soon(f"no answer was ready within {self._limits.answer_s:g} s")
            await sending
            await linger(self._connection, self._limits.linger_s)
        finally:
            tasks: set[asyncio.Task[Any]] = {sending} if self._receiving is None else {sending, self._receiving}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._connection.close()

    # What comes in

    async def _receive(self) -> tuple[Ending, str]:
        """Take the whole stream; return how it ended and why."""
        view = memoryview(bytearray(_CHUNK))
        limit_s = self._limits.first_s
        try:
            while not self._framer.is_closed:
                n = await self._read(view, limit_s)
                await self._take(view[:n])
                limit_s = self._limits.idle_s
        except _EndedError as end:
            return "interrupted", str(end)
        except ScanError as error:  # a broken stream, a refusal, a full disk
            return "failed", str(error)
        return "complete", ""

    async def _read(self, view: memoryview, limit_s: float) -> int:
        """Return how many bytes came into `view`; raises _EndedError where no more will come."""
        if self._is_finishing:
            raise _EndedError(_ENDED_HERE)
        self._receiving = asyncio.create_task(_read_into(self._connection, view))
        done, _ = await asyncio.wait({self._receiving}, timeout=limit_s)
        if not done:
            self._receiving.cancel()
            await asyncio.wait({self._receiving})
            raise _EndedError(f"nothing was received for {limit_s:g} s")
        if self._receiving.cancelled():
            raise _EndedError(_ENDED_HERE)
        try:
            n = self._receiving.result()
        except OSError:
            n = 0
        if not n:
            raise _EndedError("the connection ended before the stream's CLOSE")
        return n

    async def _take(self, chunk: memoryview) -> None:
        """Spool `chunk`, then read it; raises ScanError where the stream cannot go on."""
        if self._writer is None:
            self._held += chunk
        else:
            await self._append(self._writer, chunk)
        frames = self._framer.feed(chunk)
        if self._writer is None and self._framer.is_scan:
            await self._service.listener.admit()
            self._writer = await self._service.on_disk(self._service.spool.create)
            await self._append(self._writer, self._held)
            self._held = bytearray()
        for frame in frames:
            await self._handle(frame)
        if self._framer.has_data:
            self._open_scan(b"")
        self._grow(at_once=self._framer.n_lasts > self._told_lasts)
        if self._framer.error is not None:
            raise self._framer.error
        if len(self._held) > self._limits.config_bytes:
            raise StreamError(f"{len(self._held)} bytes came without header or data; a scan must start sooner")

    async def _append(self, writer: SpoolWriter, chunk: bytes | bytearray | memoryview) -> None:
        if writer.n_bytes + len(chunk) > self._limits.scan_bytes:
            raise StreamError(f"the stream exceeds {self._limits.scan_bytes} bytes, the most that is taken for a scan")
        await self._service.on_disk(writer.append, chunk)

    async def _handle(self, frame: Frame) -> None:
        kind = frame.message.id
        if kind is MessageId.CONFIG_FILE and not self._is_opened:
            name = read_text(frame.data, frame.message)
            self._config = "".join(c for c in name if c.isprintable())[:64]
        elif kind is MessageId.CONFIG_TEXT and not self._is_opened:
            self._config = "a configuration text"
        elif kind is MessageId.HEADER:
            self._open_scan(read_bytes(frame.data, frame.message))
        elif kind is MessageId.TEXT:
            self._texts.append(read_text(frame.data, frame.message))
            self._pass_texts()
        elif kind is MessageId.QUERY:
            await self._answer(*read_query(frame.data, frame.message))

    async def _answer(self, correlation: int, query: str) -> None:
        answer = {"server": "scanside", "status": "ready"}
        if query not in {"", "status"}:
            answer["error"] = "this query is not known; 'status' is"
        try:
            await self.send(encode_response(correlation, json.dumps(answer)))
        except DeliveryError as error:
            raise _EndedError(str(error)) from error

    def _open_scan(self, header: bytes) -> None:
        """Tell the client what it gets, and the listener that a scan starts, once."""
        if self._writer is None or self._is_opened:
            return
        self._is_opened = True
        taken = "" if self._config in KNOWN_CONFIGS else ", which is not known here"
        asked = f"configuration {self._config}{taken}" if self._config else "no configuration"
        self._post(encode_text(f"asked for {asked}: the automatic reconstruction is used", "INFO"))
        self._service.listener.scan_opened(self, self._writer.scan_id, self._config, header)
        self._pass_texts()

    def _pass_texts(self) -> None:
        if self._is_opened and self._writer is not None:
            texts, self._texts = self._texts, []
            for text in texts:
                self._service.listener.scan_text(self._writer.scan_id, text)

    def _grow(self, at_once: bool) -> None:
        """Tell the listener how far the stream is in the spool, or see to it that it will be told soon."""
        if self._writer is None or not self._is_opened or self._writer.n_bytes == self._told_bytes:
            return
        now = time.monotonic()
        n_new = self._writer.n_bytes - self._told_bytes
        if at_once or n_new >= _GREW_BYTES or now - self._told_at >= _GREW_S:
            self._forget_timer()
            self._told_at = now
            self._told_bytes, self._told_lasts = self._writer.n_bytes, self._framer.n_lasts
            self._service.listener.scan_grew(self._writer.scan_id, self._told_bytes, self._framer.n_readouts)
        elif self._timer is None:
            self._timer = self._loop.call_later(_GREW_S, self._grow, True)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _end(self, how: tuple[Ending, str]) -> None:
        """Tell client and listener how the stream ended, and write it into the spool."""
        ending, reason = how
        writer = self._writer
        self._forget_timer()
        if writer is None:
            self.close_soon(reason)
            return
        log.info(
            "stream ended id=%s how=%s bytes=%d readouts=%d",
            writer.scan_id, ending, writer.n_bytes, self._framer.n_readouts,
        )  # fmt: skip
        self._open_scan(b"")
        if reason:
            self._post(encode_text(reason, "ERROR"))
        self._grow(at_once=True)
        self._service.listener.scan_closed(writer.scan_id, ending, reason)
        if ending == "failed":
            self.close_soon()
        try:
            await self._service.on_disk(writer.finish, ending, reason)
        except DeliveryError as error:  # what came is kept, and the next start judges it again
            log.warning("end of stream not written id=%s code=%s", writer.scan_id, error.code)

    # What goes out

    def _post(self, message: bytes) -> bool:
        """Queue `message` whatever waits already; False where nothing can be sent any more."""
        if self._is_gone or self._is_finishing:
            return False
        self._outbox.append(message)
        self._n_waiting += len(message)
        self._filled.set()
        return True

    async def _send_out(self) -> None:
        """Write what is queued until CLOSE is out or the client is gone."""
        try:
            while not self._is_finishing or self._outbox:
                if not self._outbox:
                    self._filled.clear()
                    await self._filled.wait()
                    continue
                message = self._outbox.popleft()
                await _send_all(self._connection, message, self._limits.send_s)
                self._n_waiting -= len(message)
                self._emptied.set()
        except (OSError, asyncio.TimeoutError):
            log.info("client left or takes nothing, messages dropped=%d", len(self._outbox) + 1)
        finally:
            self._is_gone = True
            self._outbox.clear()
            self._emptied.set()
            self._finished.set()


async def _read_into(connection: socket.socket, view: memoryview) -> int:
    return await asyncio.get_running_loop().sock_recv_into(connection, view)


async def _send_all(connection: socket.socket, message: bytes, send_s: float) -> None:
    """Send `message`; raises asyncio.TimeoutError where a piece of it is not taken within `send_s`, or OSError."""
    loop = asyncio.get_running_loop()
    view = memoryview(message)
    for start in range(0, len(view), _PIECE):
        await asyncio.wait_for(loop.sock_sendall(connection, view[start : start + _PIECE]), send_s)


async def linger(connection: socket.socket, linger_s: float) -> None:
    """End our direction and throw away what still comes for at most `linger_s`.

    Closing at once with bytes unread would make TCP reset the connection, and the client might lose our last words.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + linger_s
    rest = bytearray(_PIECE)
    try:
        connection.shutdown(socket.SHUT_WR)
        while (left_s := end - loop.time()) > 0:
            if not await asyncio.wait_for(loop.sock_recv_into(connection, rest), left_s):
                return
    except (OSError, asyncio.TimeoutError):
        return


async def refuse(connection: socket.socket, reason: str, limits: ServerLimits) -> None:
    """Send TEXT with `reason` and CLOSE, and close the connection."""
    try:
        await _send_all(connection, encode_text(reason, "ERROR") + encode_close(), limits.linger_s)
        await linger(connection, limits.linger_s)
    except (OSError, asyncio.TimeoutError):
        log.info("a refused client left at once")
    finally:
        connection.close()
