"""Events on their way out: in the ledger first, under a number without gaps, then to whoever listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edge.ledger import Ledger
from edge.wire import Publisher, encode_event, utc_now


class EventLog:
    """Numbers, keeps and publishes events."""

    def __init__(self, ledger: Ledger, publisher: Publisher) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._held: list[list[bytes | memoryview]] | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Commit the events published inside, and what else the ledger is told, at once, and send them then.

        Where it raises, none of it was and nobody hears of it.
        """
        self._held = []
        try:
            with self._ledger.transaction():
                yield
            held = self._held
        finally:
            self._held = None
        for frames in held:
            self._publisher.send(frames)

    def publish(self, kind: str, scan_id: str, fields: dict[str, Any], payload: bytes | None = None) -> int:
        """Enter an event in the ledger, send it, and return its number."""
        at = utc_now()
        fields = {"scan_id": scan_id, **fields} if scan_id else fields
        seq = self._ledger.add_event(kind, scan_id, at, fields)
        frames = encode_event(kind, seq, at, fields, payload)
        if self._held is None:
            self._publisher.send(frames)
        else:
            self._held.append(frames)
        return seq
