"""Alerts that wait for a person, in the ledger's file: entered with the result they come from, gone only by an answer.

An alert has the number of the event that last concerned it: its raising, or an escalation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge.deadline import Deadline
from edge.ledger import Ledger

_SCHEMA = """
CREATE TABLE IF NOT EXISTS alerts (
    alert_id TEXT PRIMARY KEY,
    scan_id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    content TEXT NOT NULL,
    raised_at TEXT NOT NULL,
    level INTEGER NOT NULL DEFAULT 0,
    boot TEXT NOT NULL,
    due_since_boot_s REAL NOT NULL,
    due_wall_s REAL NOT NULL,
    wait_s REAL NOT NULL,
    acknowledged_by TEXT NOT NULL DEFAULT '',
    acknowledged_via TEXT NOT NULL DEFAULT '',
    acknowledged_at TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS alerts_open ON alerts (seq) WHERE acknowledged_at = '';
"""
_COLUMNS = (
    "alert_id, scan_id, seq, content, raised_at, level, boot, due_since_boot_s, due_wall_s, wait_s, "
    "acknowledged_by, acknowledged_via, acknowledged_at"
)


@dataclass(frozen=True)
class Pending:
    """An alert in the outbox. level: how often it was escalated. acknowledged_via: the client that brought the answer.

    acknowledged_at: "" while nobody has answered.
    """

    alert_id: str
    scan_id: str
    seq: int
    content: Mapping[str, Any]
    raised_at: str
    level: int
    deadline: Deadline
    acknowledged_by: str
    acknowledged_via: str
    acknowledged_at: str


class Outbox:
    """The table of alerts. Call it within a `Ledger.transaction` to change it with something else."""

    def __init__(self, ledger: Ledger) -> None:
        """Make the table where it is missing."""
        self._db = ledger.db
        self._db.executescript(_SCHEMA)

    def knows(self, alert_id: str) -> bool:
        """Whether this alert was ever entered."""
        return self._db.execute("SELECT 1 FROM alerts WHERE alert_id = ?", (alert_id,)).fetchone() is not None

    def enter(self, content: Mapping[str, Any], seq: int, at: str, deadline: Deadline) -> None:
        """Enter an alert that `knows` does not know."""
        self._db.execute(
            "INSERT INTO alerts (alert_id, scan_id, seq, content, raised_at, boot, due_since_boot_s, due_wall_s, "
            "wait_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                content["alert_id"], content["scan_id"], seq, json.dumps(content, allow_nan=False), at,
                deadline.boot, deadline.since_boot_s, deadline.wall_s, deadline.wait_s,
            ),
        )  # fmt: skip

    def get(self, alert_id: str) -> Pending | None:
        """Return one alert, or None."""
        found = self._select("alert_id = ?", (alert_id,), 1)
        return found[0] if found else None

    def unanswered(self) -> list[Pending]:
        """Return the alerts that nobody acknowledged, the oldest news first."""
        return self._select("acknowledged_at = ''", (), -1)

    def answered(self, after: int, most: int) -> list[Pending]:
        """Return acknowledged alerts whose number is after `after`: the newest `most`, the oldest of them first."""
        return self._select("acknowledged_at <> '' AND seq > ?", (after,), most, "DESC")[::-1]

    def escalate(self, alert_id: str, seq: int, deadline: Deadline) -> None:
        """Hand an alert to the next group, with the event that says so and its new deadline."""
        self._db.execute("UPDATE alerts SET level = level + 1, seq = ? WHERE alert_id = ?", (seq, alert_id))
        self.set_deadline(alert_id, deadline)

    def set_deadline(self, alert_id: str, deadline: Deadline) -> None:
        """Set until when an alert may wait."""
        self._db.execute(
            "UPDATE alerts SET boot = ?, due_since_boot_s = ?, due_wall_s = ?, wait_s = ? WHERE alert_id = ?",
            (deadline.boot, deadline.since_boot_s, deadline.wall_s, deadline.wait_s, alert_id),
        )

    def acknowledge(self, alert_id: str, by: str, via: str, at: str) -> bool:
        """Note who takes an alert; False where somebody had already, and nothing changes."""
        cursor = self._db.execute(
            "UPDATE alerts SET acknowledged_by = ?, acknowledged_via = ?, acknowledged_at = ? "
            "WHERE alert_id = ? AND acknowledged_at = ''",
            (by, via, at, alert_id),
        )
        return cursor.rowcount > 0

    def _select(self, where: str, values: tuple[Any, ...], most: int, order: str = "ASC") -> list[Pending]:
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM alerts WHERE {where} ORDER BY seq {order} LIMIT {most}", values
        )
        return [
            Pending(
                alert_id, scan_id, seq, json.loads(content), raised_at, level, Deadline(boot, boot_s, wall_s, wait_s),
                by, via, at,
            )
            for (
                alert_id, scan_id, seq, content, raised_at, level, boot, boot_s, wall_s, wait_s, by, via, at
            ) in rows.fetchall()
        ]  # fmt: skip
