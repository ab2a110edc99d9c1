"""Every object of a finished scan to the archive: entered with the scan's end, sent until it is there, or given up.

The queue is the ledger's. A process of its own sends (`edge.pacs_process`); this side hands it a batch at a time and
notes the outcomes at once, so that neither images nor alerts wait for an archive. What is noted as delivered is never
sent again; what was sent and not noted is sent again under the same UIDs, which an archive holds once.
An archive that takes nothing holds up its own queue, with growing pauses, and each pause counts for all that waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, NamedTuple

from edge.audit import AuditTrail
from edge.deliveries import Deliveries, Delivery
from edge.ledger import Ledger
from edge.settings import PacsSettings, Settings, host_and_port
from edge.wire import utc_now

log = logging.getLogger(__name__)

STORE, STOW = "pacs", "stow"  # what the ledger calls the two ways
_BATCH = 50
_IDLE_S = 5.0
_FIRST_PAUSE_S = 1.0
_KEPT = 10_000  # delivered objects that the ledger still lists
_LINE_LIMIT = 1 << 20
_START_S = 60.0


class Pacs:
    """What goes to archives: nothing unless the settings name one."""

    def __init__(self, settings: Settings, ledger: Ledger, audit: AuditTrail, deliveries: Deliveries) -> None:
        """Prepare; nothing is connected before `tasks` run."""
        self._deliveries = deliveries
        self._queues = [
            Queue(name, process, settings, ledger, audit, deliveries)
            for name, process in _processes(settings.pacs).items()
        ]

    def enter(self, scan_id: str, files: Iterable[str]) -> None:
        """Enter the objects of a scan, by their places in its results folder, within the caller's transaction."""
        now, objects = utc_now(), list(files)
        for queue in self._queues if objects else ():
            self._deliveries.let_go(queue.name, scan_id)
            for file in objects:
                self._deliveries.enter_again(queue.name, f"{scan_id}/{file}", {"entered_at": now}, now)
        if objects:
            self.hold(scan_id)  # where all of it was delivered before

    def hold(self, scan_id: str) -> None:
        """Note, within the caller's transaction, that nothing of a scan is to follow."""
        for queue in self._queues:
            self._deliveries.hold(queue.name, scan_id)

    @property
    def names(self) -> list[str]:
        """What the ledger calls the queues."""
        return [queue.name for queue in self._queues]

    def wake(self) -> None:
        """Look for what was entered."""
        for queue in self._queues:
            queue.wake()

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """Return what is to run while the daemon does."""
        return [queue.run() for queue in self._queues]

    def oldest_s(self) -> dict[str, float]:
        """Return for how long the oldest object has waited, by queue; 0 where none does."""
        return {queue.name: waited_s(self._deliveries.oldest(queue.name)) for queue in self._queues}


class _Reply(NamedTuple):
    """What the process said of a batch. is_whole: it lived to the end of it."""

    outcomes: dict[str, tuple[str, str]]
    unreachable: str
    is_whole: bool


class Queue:
    """Objects for one archive, and the process that sends them."""

    def __init__(
        self,
        name: str,
        process: Mapping[str, Any],
        settings: Settings,
        ledger: Ledger,
        audit: AuditTrail,
        deliveries: Deliveries,
    ) -> None:
        """process: the settings of the process that sends."""
        self.name = name
        self._results = settings.state / "results"
        self._pacs = settings.pacs
        self._ledger, self._audit, self._deliveries = ledger, audit, deliveries
        self._sender = _SenderProcess(process, settings.pacs)
        self._held_until_s = 0.0  # on the monotonic clock: the archive takes nothing before
        self._n_missed = 0  # in a row
        self._due_s: dict[str, float] = {}  # of objects that failed on their own
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look at once whether there is something new."""
        self._wake.set()

    async def run(self) -> None:
        """Send for ever; ends the process where it is cancelled."""
        try:
            while True:
                self._wake.clear()
                batch, pause_s = self._due()
                if batch:
                    self._note(batch, await self._sender.send(self._lines(batch)))
                    continue
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), pause_s)
        finally:
            await self._sender.stop()

    def _due(self) -> tuple[list[Delivery], float]:
        """Return what is to be sent now, or for how long there is nothing."""
        now = time.monotonic()
        if self._held_until_s > now:
            return [], min(self._held_until_s - now, _IDLE_S)
        waiting = self._deliveries.waiting(self.name, 10 * _BATCH)
        due = [each for each in waiting if self._due_s.get(each.key, now) <= now]
        next_s = min((self._due_s[each.key] - now for each in waiting if each.key in self._due_s), default=_IDLE_S)
        return due[:_BATCH], min(max(next_s, 0.01), _IDLE_S)

    def _lines(self, batch: Sequence[Delivery]) -> list[tuple[str, str, int]]:
        return [(each.key, str(self._results / each.key), each.attempts) for each in batch]

    def _note(self, batch: Sequence[Delivery], reply: _Reply) -> None:
        """Note the outcomes of a batch in one transaction; then say so."""
        outcomes = dict(reply.outcomes)
        if not reply.is_whole:  # the first one that it did not answer for may have killed it
            culprit = next((each.key for each in batch if each.key not in outcomes), None)
            if culprit is not None:
                outcomes[culprit] = ("waiting", "the sending process ended at this object")
        now = utc_now()
        noted: Counter[tuple[str, str, str]] = Counter()
        with self._ledger.transaction():
            for each in batch:
                if each.key not in outcomes:
                    continue
                state, reason = outcomes[each.key]
                if state == "waiting" and each.attempts + 1 >= self._pacs.attempts:
                    state, reason = "dead", f"given up: {reason}"
                self._deliveries.note(each, state, reason, now)
                if state == "waiting":
                    self._due_s[each.key] = time.monotonic() + self._pause_s(each.attempts)
                else:
                    self._due_s.pop(each.key, None)
                    self._deliveries.hold(self.name, each.key.partition("/")[0])
                    noted[each.key.partition("/")[0], state, reason] += 1
            if reply.unreachable:
                reason = f"given up: {reply.unreachable}"
                for key in self._deliveries.miss(self.name, self._pacs.attempts, reason, now):
                    self._due_s.pop(key, None)
                    noted[key.partition("/")[0], "dead", reason] += 1
            self._deliveries.forget(self.name, _KEPT)
        if reply.unreachable:
            pause_s = self._pause_s(self._n_missed)
            self._n_missed += 1
            self._held_until_s = time.monotonic() + pause_s
            log.warning("archive not reached sink=%s times=%d pause_s=%.1f", self.name, self._n_missed, pause_s)
        elif outcomes:
            self._n_missed = 0
        for (scan_id, state, reason), n in noted.items():
            self._tell(scan_id, state, reason, n)

    def _tell(self, scan_id: str, state: str, reason: str, n: int) -> None:
        is_delivered = state == "delivered"
        log.log(
            logging.INFO if is_delivered else logging.ERROR,
            "objects %s id=%s sink=%s objects=%d", state, scan_id, self.name, n,
        )  # fmt: skip
        objects = {"scan": scan_id, "sink": self.name, "objects": str(n)}
        self._audit.record("transfer", "success" if is_delivered else "serious", objects=objects, reason=reason)

    def _pause_s(self, n_before: int) -> float:
        """Twice as long each time up to the longest, and up to half of it less by chance, so that nobody keeps step."""
        whole = min(_FIRST_PAUSE_S * 2.0 ** min(n_before, 30), self._pacs.longest_pause_s)
        return whole * random.uniform(0.5, 1.0)


class _SenderProcess:
    """Keeps `edge.pacs_process` alive while there is something to send."""

    def __init__(self, process: Mapping[str, Any], pacs: PacsSettings) -> None:
        self._settings = process
        # between two lines: an association, an object, a report of commitment
        self._silence_s = 4 * pacs.timeout_s + pacs.commitment_s + _START_S
        self._process: asyncio.subprocess.Process | None = None

    async def send(self, lines: Sequence[tuple[str, str, int]]) -> _Reply:
        """Hand over a batch and return what became of it; a process that dies or hangs is replaced at the next one."""
        outcomes: dict[str, tuple[str, str]] = {}
        process = self._process = self._process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(lines).encode() + b"\n")
            await process.stdin.drain()
            while line := await asyncio.wait_for(process.stdout.readline(), self._silence_s):
                said = json.loads(line)
                if "end" in said:
                    return _Reply(outcomes, said["unreachable"], True)
                key, state, reason = said["outcome"]
                outcomes[key] = (state, reason)
        except (OSError, ValueError, asyncio.TimeoutError):
            pass
        log.warning("sending process ended or hung; another is started")
        await self.stop()
        return _Reply(outcomes, "", False)

    async def stop(self) -> None:
        """End the process; what it has in hand is sent again."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "edge.pacs_process",
            json.dumps(self._settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
        )


def waited_s(delivery: Delivery | None) -> float:
    """Return for how many seconds something has waited, by the wall clock; 0 where nothing does."""
    if delivery is None:
        return 0.0
    entered = datetime.fromisoformat(str(delivery.content.get("entered_at", delivery.at)).replace("Z", "+00:00"))
    return max((datetime.now(timezone.utc) - entered).total_seconds(), 0.0)


def store_peer(pacs: PacsSettings) -> dict[str, Any]:
    """Return the fields of the `edge.dicom_net.Peer` that the settings name."""
    return {
        "host": pacs.host, "port": pacs.port, "called_ae": pacs.called_ae, "calling_ae": pacs.calling_ae,
        "timeout_s": pacs.timeout_s, "ca": pacs.ca, "cert": pacs.cert, "key": pacs.key,
    }  # fmt: skip


def _processes(pacs: PacsSettings) -> dict[str, dict[str, Any]]:
    """Return the settings of each sending process, by the queue's name."""
    found: dict[str, dict[str, Any]] = {}
    if pacs.host:
        listen = host_and_port(pacs.commitment) if pacs.commitment else None
        found[STORE] = {
            "kind": "store",
            "peer": store_peer(pacs),
            "listen": listen,
            "commitment_s": pacs.commitment_s,
        }
    if pacs.stow:
        found[STOW] = {
            "kind": "stow", "url": pacs.stow, "ca": pacs.stow_ca, "token": pacs.stow_token, "timeout_s": pacs.timeout_s,
        }  # fmt: skip
    return found
