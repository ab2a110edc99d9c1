"""What must reach other systems, in the ledger's file: entered with what it comes from, tried until it is there.

A delivery is waiting, delivered, or dead: given up with its reason, until somebody has it tried again. Each has an id
of its own which the receiver is told, so that one that is sent twice, around a crash, is there once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge.ledger import Ledger

_SCHEMA = """
CREATE TABLE IF NOT EXISTS deliveries (
    sink TEXT NOT NULL,
    key TEXT NOT NULL,
    content TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'delivered', 'dead')),
    attempts INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    at TEXT NOT NULL,
    PRIMARY KEY (sink, key)
);
CREATE INDEX IF NOT EXISTS deliveries_waiting ON deliveries (sink) WHERE state = 'waiting';
CREATE INDEX IF NOT EXISTS deliveries_undone ON deliveries (key) WHERE state <> 'delivered';
CREATE TABLE IF NOT EXISTS held (
    scan_id TEXT NOT NULL,
    sink TEXT NOT NULL,
    PRIMARY KEY (scan_id, sink)
);
CREATE INDEX IF NOT EXISTS deliveries_next ON deliveries (sink, attempts) WHERE state = 'waiting';
"""


@dataclass(frozen=True)
class Delivery:
    """One thing for one receiver."""

    sink: str
    key: str
    content: Mapping[str, Any]
    state: str
    attempts: int
    reason: str
    at: str


class Deliveries:
    """The table. Call `enter` within a `Ledger.transaction` to enter something with its cause."""

    def __init__(self, ledger: Ledger) -> None:
        """Make the table where it is missing."""
        self._db = ledger.db
        self._db.executescript(_SCHEMA)

    def enter(self, sink: str, key: str, content: Mapping[str, Any], at: str) -> None:
        """Enter what is to be delivered to `sink`; the same key a second time changes nothing."""
        self._db.execute(
            "INSERT OR IGNORE INTO deliveries (sink, key, content, at) VALUES (?, ?, ?, ?)",
            (sink, key, json.dumps(content, allow_nan=False), at),
        )

    def enter_again(self, sink: str, key: str, content: Mapping[str, Any], at: str) -> None:
        """Enter what is to be delivered as it is now: what waits under this key, or was given up, is replaced."""
        self._db.execute(
            "INSERT INTO deliveries (sink, key, content, at) VALUES (?, ?, ?, ?) ON CONFLICT (sink, key) DO UPDATE "
            "SET content = excluded.content, state = 'waiting', attempts = 0, reason = '', at = excluded.at "
            "WHERE state <> 'delivered'",
            (sink, key, json.dumps(content, allow_nan=False), at),
        )

    def waiting(self, sink: str, most: int = 100) -> list[Delivery]:
        """Return what waits for one receiver, the least often tried first."""
        return self._select("sink = ? AND state = 'waiting' ORDER BY attempts, rowid LIMIT ?", (sink, most))

    def oldest(self, sink: str) -> Delivery | None:
        """Return what has waited longest for one receiver, None where nothing waits."""
        return next(iter(self._select("sink = ? AND state = 'waiting' ORDER BY rowid LIMIT 1", (sink,))), None)

    def dead(self, most: int = 1000) -> list[Delivery]:
        """Return what was given up, the newest first."""
        return self._select("state = 'dead' ORDER BY rowid DESC LIMIT ?", (most,))

    def count(self) -> dict[tuple[str, str], int]:
        """Return how many there are by sink and state."""
        rows = self._db.execute("SELECT sink, state, count(*) FROM deliveries GROUP BY sink, state")
        return {(sink, state): n for sink, state, n in rows}

    def note(self, delivery: Delivery, state: str, reason: str, at: str) -> None:
        """Note the outcome of an attempt."""
        self._db.execute(
            "UPDATE deliveries SET state = ?, reason = ?, attempts = attempts + 1, at = ? WHERE sink = ? AND key = ?",
            (state, reason, at, delivery.sink, delivery.key),
        )

    def miss(self, sink: str, most_attempts: int, reason: str, at: str) -> list[str]:
        """Count an attempt against all that waits for a receiver that takes nothing; return the keys given up by it."""
        self._db.execute(
            "UPDATE deliveries SET attempts = attempts + 1, reason = ?, at = ?, state = CASE WHEN attempts + 1 >= ? "
            "THEN 'dead' ELSE 'waiting' END WHERE sink = ? AND state = 'waiting'",
            (reason, at, most_attempts, sink),
        )
        rows = self._db.execute(
            "SELECT key FROM deliveries WHERE sink = ? AND state = 'dead' AND at = ? AND reason = ?", (sink, at, reason)
        )
        return [row[0] for row in rows]

    def hold(self, sink: str, scan_id: str) -> None:
        """Remember that a receiver has all of a scan, where nothing of it waits or was given up.

        `forget` leaves that alone. The keys of a scan's objects begin with its id and a slash.
        """
        self._db.execute(
            "INSERT OR IGNORE INTO held (scan_id, sink) SELECT ?, ? WHERE NOT EXISTS (SELECT 1 FROM deliveries "
            "WHERE sink = ? AND state <> 'delivered' AND key >= ? || '/' AND key < ? || '0')",
            (scan_id, sink, sink, scan_id, scan_id),
        )

    def let_go(self, sink: str, scan_id: str) -> None:
        """Forget that a receiver has all of a scan: there is more."""
        self._db.execute("DELETE FROM held WHERE scan_id = ? AND sink = ?", (scan_id, sink))

    def forget(self, sink: str, keep: int) -> None:
        """Forget what was delivered, all but the last `keep`."""
        self._db.execute(
            "DELETE FROM deliveries WHERE sink = ? AND state = 'delivered' AND rowid <= "
            "(SELECT max(rowid) FROM deliveries) - ?",
            (sink, keep),
        )

    def revive(self, sink: str, key: str = "") -> int:
        """Have what was given up tried again, one thing or all for a receiver; return how many."""
        which = "sink = ? AND state = 'dead'" + (" AND key = ?" if key else "")
        values = (sink, key) if key else (sink,)
        cursor = self._db.execute(f"UPDATE deliveries SET state = 'waiting', attempts = 0 WHERE {which}", values)
        return cursor.rowcount

    def _select(self, where: str, values: tuple[Any, ...]) -> list[Delivery]:
        rows = self._db.execute(
            f"SELECT sink, key, content, state, attempts, reason, at FROM deliveries WHERE {where}", values
        )
        return [Delivery(sink, key, json.loads(content), *rest) for sink, key, content, *rest in rows.fetchall()]
