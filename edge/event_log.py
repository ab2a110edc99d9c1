"""Events on their way out: in the ledger first, under a number without gaps, then to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from edge.ledger import Ledger
from edge.wire import Publisher, encode_event, utc_now


class _Outgoing(NamedTuple):
    kind: str
    fields: Mapping[str, Any]
    frames: list[bytes | memoryview]


class EventLog:
    """Numbers, keeps and publishes events."""

    def __init__(
        self,
        ledger: Ledger,
        publisher: Publisher,
        on_event: Callable[[str, Mapping[str, Any]], None] = lambda kind, fields: None,
    ) -> None:
        """on_event: called with kind and fields of each event that went out."""
        self._on_event = on_event
        self._ledger = ledger
        self._publisher = publisher
        self._held: list[_Outgoing] | None = None

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
        for each in held:
            self._send(each)

    def publish(self, kind: str, scan_id: str, fields: dict[str, Any], payload: bytes | None = None) -> int:
        """Enter an event in the ledger, send it, and return its number."""
        at = utc_now()
        fields = {"scan_id": scan_id, **fields} if scan_id else fields
        seq = self._ledger.add_event(kind, scan_id, at, fields)
        outgoing = _Outgoing(kind, fields, encode_event(kind, seq, at, fields, payload))
        if self._held is None:
            self._send(outgoing)
        else:
            self._held.append(outgoing)
        return seq

    def _send(self, event: _Outgoing) -> None:
        self._publisher.send(event.frames)
        self._on_event(event.kind, event.fields)
