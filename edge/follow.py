"""The event stream without gaps: what was lost on the wire is asked for and put in its place."""

from __future__ import annotations

from collections import deque
from typing import Any

from edge.client import AlertClient, ClientKey
from edge.wire import Subscriber


class Follower:
    """Events in the order of their numbers, each once. An event that had to be asked for comes without its payload."""

    def __init__(
        self, events: str, alerts: str, name: str, *, after: int | None = None, key: ClientKey | None = None
    ) -> None:
        """Follow the event socket and ask the alert socket; both of one daemon.

        after: the last event that is known; None begins with the next one.
        """
        self.last = after
        self.n_healed = 0
        self._held: deque[tuple[dict[str, Any], bytes | None]] = deque()
        self._subscriber = Subscriber(events, (key.public, key.secret, key.server) if key else None)
        self._client = AlertClient(alerts, name, key=key)

    def receive(self, timeout_s: float) -> tuple[dict[str, Any], bytes | None] | None:
        """Return the next event, or None when none came in time; raises DeliveryError where a gap cannot be filled."""
        if not self._held:
            event = self._subscriber.receive(timeout_s)
            if event is None:
                return None
            self._fill(event)
            if not self._held:
                return None
        header, payload = self._held.popleft()
        self.last = header["seq"]
        return header, payload

    def close(self) -> None:
        """Stop following."""
        self._subscriber.close()
        self._client.close()

    def _fill(self, event: tuple[dict[str, Any], bytes | None]) -> None:
        seq = event[0]["seq"]
        if self.last is not None and seq <= self.last:
            return  # it had been asked for, and came all the same
        if self.last is not None and seq > self.last + 1:
            missed = [each for each in self._client.snapshot(self.last) if each["seq"] < seq]
            self.n_healed += len(missed)
            self._held += [(each, None) for each in missed]
        self._held.append(event)
