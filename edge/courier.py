"""Carries deliveries to one receiver: one at a time, again with growing pauses, and not for ever."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from edge.deliveries import Deliveries, Delivery
from edge.wire import utc_now
from recon.errors import DeliveryError

log = logging.getLogger(__name__)

_IDLE_S = 5.0


class RejectedError(DeliveryError):
    """The receiver will never take this: trying again is of no use."""

    code = "rejected"


class UnreachableError(DeliveryError):
    """The receiver takes nothing at present: what else waits for it need not be tried now."""

    code = "unreachable"


class Sink(Protocol):
    """A receiver. name: short and stable, as the ledger calls it."""

    name: str

    def send(self, key: str, content: Mapping[str, Any]) -> None:
        """Return once the receiver has it for certain; called in a thread.

        Raises RejectedError where it never will, DeliveryError where it may be tried again.
        """


class Courier:
    """Delivers to one sink while `run` runs."""

    def __init__(
        self,
        sink: Sink,
        deliveries: Deliveries,
        *,
        attempts: int = 20,
        first_pause_s: float = 1.0,
        longest_pause_s: float = 300.0,
        on_outcome: Callable[[Delivery, str, str], None] = lambda delivery, state, reason: None,
    ) -> None:
        """on_outcome: called with each delivery that is delivered or dead, its state and why."""
        self.sink = sink
        self._deliveries = deliveries
        self._attempts = attempts
        self._first_pause_s, self._longest_pause_s = first_pause_s, longest_pause_s
        self._on_outcome = on_outcome
        self._due_s: dict[str, float] = {}  # by key, on the monotonic clock
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look at once whether there is something new."""
        self._wake.set()

    async def run(self) -> None:
        """Deliver for ever."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = time.monotonic()
            waiting = self._deliveries.waiting(self.sink.name)
            due = [each for each in waiting if self._due_s.get(each.key, now) <= now]
            if due:
                await self._attempt(due[0])
                continue
            next_s = min((self._due_s[each.key] - now for each in waiting), default=_IDLE_S)
            timer = loop.call_later(min(next_s, _IDLE_S), self._wake.set)
            await self._wake.wait()
            timer.cancel()

    async def _attempt(self, delivery: Delivery) -> None:
        loop = asyncio.get_running_loop()
        state, reason = "delivered", ""
        try:
            await loop.run_in_executor(None, self.sink.send, delivery.key, delivery.content)
        except RejectedError as error:
            state, reason = "dead", str(error)
        except DeliveryError as error:
            is_last = delivery.attempts + 1 >= self._attempts
            state, reason = ("dead", f"given up: {error}") if is_last else ("waiting", str(error))
        self._deliveries.note(delivery, state, reason, utc_now())
        if state == "waiting":
            pause_s = min(self._first_pause_s * 2.0**delivery.attempts, self._longest_pause_s)
            self._due_s[delivery.key] = time.monotonic() + pause_s
            return
        self._due_s.pop(delivery.key, None)
        log.log(
            logging.INFO if state == "delivered" else logging.ERROR,
            "delivery %s sink=%s attempts=%d", state, self.sink.name, delivery.attempts + 1,
        )  # fmt: skip
        self._on_outcome(delivery, state, reason)
