"""The ledger: which scans came, what became of them, what was sent; SQLite in WAL mode, one writer (the daemon).

A scan's state goes receiving → received → done | failed. The spool holds the truth; the ledger says what was
done with it, and an entry is committed before anything that depends on it is shown to the world.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scans (
    scan_id TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('receiving', 'received', 'done', 'failed')),
    ending TEXT NOT NULL DEFAULT '' CHECK (ending IN ('', 'complete', 'interrupted', 'failed')),
    reason TEXT NOT NULL DEFAULT '',
    received_at TEXT NOT NULL,
    finished_at TEXT NOT NULL DEFAULT '',
    n_bytes INTEGER NOT NULL DEFAULT 0,
    n_readouts INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS images (
    scan_id TEXT NOT NULL REFERENCES scans (scan_id),
    series TEXT NOT NULL,
    image_key TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (scan_id, series, image_key)
);
CREATE TABLE IF NOT EXISTS deaths (
    scan_id TEXT NOT NULL,
    image_key TEXT NOT NULL,
    n INTEGER NOT NULL,
    PRIMARY KEY (scan_id, image_key)
);
CREATE TABLE IF NOT EXISTS incoming (
    scan_id TEXT PRIMARY KEY,
    n_triaged INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS deleted (
    scan_id TEXT PRIMARY KEY,
    at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS notes (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    scan_id TEXT NOT NULL,
    at TEXT NOT NULL,
    fields TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class ScanRow:
    """One scan as the ledger knows it."""

    scan_id: str
    state: str
    ending: str
    reason: str
    received_at: str
    finished_at: str
    n_bytes: int
    n_readouts: int


class Ledger:
    """The state folder's `ledger.sqlite`. Every method commits before it returns, unless a `transaction` is open."""

    def __init__(self, path: Path) -> None:
        """Open or create the ledger at `path`; raise sqlite3.Error when the file is not one."""
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
            row = self._db.execute("SELECT max(seq) FROM events").fetchone()
        except sqlite3.Error:
            self._db.close()
            raise
        self._seq: int = row[0] or 0

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, for tables that are kept in the same file and change in the same transactions."""
        return self._db

    @property
    def last_seq(self) -> int:
        """The number of the last event."""
        return self._seq

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all that is entered inside at its end, or nothing of it where it raises. Not nested."""
        seq = self._seq
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._seq = seq
            with suppress(sqlite3.Error):  # a full disk has ended the transaction already
                self._db.execute("ROLLBACK")
            raise

    def open_scan(self, scan_id: str, at: str) -> None:
        """Enter a scan that begins to arrive."""
        self._db.execute(
            "INSERT OR IGNORE INTO scans (scan_id, state, received_at) VALUES (?, 'receiving', ?)", (scan_id, at)
        )
        self._db.execute("DELETE FROM deleted WHERE scan_id = ?", (scan_id,))

    def end_scan(self, scan_id: str, ending: str, reason: str, n_bytes: int, n_readouts: int) -> None:
        """Note that a scan's stream has ended, and how: complete, interrupted or failed."""
        self._db.execute(
            "UPDATE scans SET state = 'received', ending = ?, reason = ?, n_bytes = ?, n_readouts = ? "
            "WHERE scan_id = ?",
            (ending, reason, n_bytes, n_readouts, scan_id),
        )

    def finish_scan(self, scan_id: str, state: str, reason: str, at: str) -> None:
        """Note that a scan was served (`done`) or cannot be (`failed`)."""
        self._db.execute(
            "UPDATE scans SET state = ?, reason = ?, finished_at = ? WHERE scan_id = ?", (state, reason, at, scan_id)
        )

    def note_triaged(self, scan_id: str, n: int) -> None:
        """Note how many objects of a series that came in were triaged."""
        self._db.execute("INSERT OR REPLACE INTO incoming (scan_id, n_triaged) VALUES (?, ?)", (scan_id, n))

    def n_triaged(self, scan_id: str) -> int | None:
        """Return how many objects of a series were triaged; None for what is no series, or was deleted."""
        row = self._db.execute("SELECT n_triaged FROM incoming WHERE scan_id = ?", (scan_id,)).fetchone()
        return int(row[0]) if row else None

    def delete_scan(self, scan_id: str, at: str) -> None:
        """Note that the files of a scan or series were deleted; what is known of it stays."""
        self._db.execute("INSERT OR REPLACE INTO deleted (scan_id, at) VALUES (?, ?)", (scan_id, at))
        self._db.execute("DELETE FROM incoming WHERE scan_id = ?", (scan_id,))  # should it come again, it is new

    def scan(self, scan_id: str) -> ScanRow | None:
        """Return one scan, or None."""
        row = self._db.execute("SELECT * FROM scans WHERE scan_id = ?", (scan_id,)).fetchone()
        return ScanRow(*row) if row else None

    def scans(self) -> list[ScanRow]:
        """Return every scan, oldest first."""
        return [ScanRow(*row) for row in self._db.execute("SELECT * FROM scans ORDER BY received_at, rowid")]

    def note_image(self, scan_id: str, series: str, image_key: str, sha256: str) -> bool:
        """Note an image about to be sent; return False when this very image was noted before."""
        cursor = self._db.execute(
            "INSERT INTO images (scan_id, series, image_key, sha256) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (scan_id, series, image_key) DO UPDATE SET sha256 = excluded.sha256 "
            "WHERE images.sha256 <> excluded.sha256",
            (scan_id, series, image_key, sha256),
        )
        return cursor.rowcount > 0

    def note_death(self, scan_id: str, image_key: str) -> int:
        """Count a worker that died at an image (at '' between images); return how many died there so far."""
        row = self._db.execute(
            "INSERT INTO deaths (scan_id, image_key, n) VALUES (?, ?, 1) "
            "ON CONFLICT (scan_id, image_key) DO UPDATE SET n = n + 1 RETURNING n",
            (scan_id, image_key),
        ).fetchone()
        return int(row[0])

    def set_aside(self, scan_id: str) -> list[str]:
        """Return the images of a scan that killed a worker twice."""
        rows = self._db.execute(
            "SELECT image_key FROM deaths WHERE scan_id = ? AND n >= 2 AND image_key <> ''", (scan_id,)
        )
        return [row[0] for row in rows]

    def add_event(self, kind: str, scan_id: str, at: str, fields: Mapping[str, Any]) -> int:
        """Enter an event and return its number: one more than the last, across restarts too."""
        self._db.execute(
            "INSERT INTO events (seq, kind, scan_id, at, fields) VALUES (?, ?, ?, ?, ?)",
            (self._seq + 1, kind, scan_id, at, json.dumps(fields, allow_nan=False)),
        )
        self._seq += 1
        return self._seq

    def events(self, after: int = 0, most: int = -1) -> list[tuple[int, str, str, str, dict[str, Any]]]:
        """Return (seq, kind, scan_id, at, fields) of the events after number `after`, the first `most` of them."""
        rows = self._db.execute(
            "SELECT seq, kind, scan_id, at, fields FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, most)
        )
        return [(seq, kind, scan_id, at, json.loads(fields)) for seq, kind, scan_id, at, fields in rows]

    def write_note(self, name: str, value: str) -> None:
        """Keep a text under a name, instead of the one that was there."""
        self._db.execute("INSERT OR REPLACE INTO notes (name, value) VALUES (?, ?)", (name, value))

    def prune_events(self, keep: int) -> None:
        """Forget all but the last `keep` events."""
        self._db.execute("DELETE FROM events WHERE seq <= ?", (self._seq - keep,))


def read_note(path: Path, name: str) -> str | None:
    """Return a note of the ledger at `path`, which a daemon may have open; None where there is none or no ledger."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            row = db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
    except sqlite3.Error:
        return None
    return str(row[0]) if row else None


def n_unread(path: Path) -> int:
    """Return how many scans wait for triage in the ledger at `path`, which a daemon may have open; 0 without one."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT count(*) FROM triage").fetchone()[0])
    except sqlite3.Error:
        return 0


class LedgerError(Exception):
    """A ledger cannot be copied or put back; the message says why."""


def back_up(ledger: Path, copy: Path) -> int:
    """Copy a ledger that a daemon may be writing to as it is at one moment; return how many scans the copy has.

    The copy has mode 0600 and is complete when it has its name. Raises LedgerError or OSError.
    """
    if not ledger.exists():
        raise LedgerError(f"there is no ledger {ledger}")
    part = copy.with_name(f".{copy.name}.part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:
        with (
            closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(part)) as to,
        ):
            source.backup(to)
            n = _n_scans(to)
    except sqlite3.Error as error:
        part.unlink(missing_ok=True)
        raise LedgerError(f"{ledger} cannot be copied: {type(error).__name__}") from error
    part.replace(copy)
    return n


def restore(copy: Path, ledger: Path) -> int:
    """Put a copy in the place of a ledger that nobody has open; return how many scans it has.

    The former ledger is kept beside it as `.before`. Scans of the spool that the copy does not know are taken up as the
    daemon starts. Raises LedgerError or OSError.
    """
    try:
        with closing(sqlite3.connect(f"file:{copy}?mode=ro", uri=True)) as db:
            n = _n_scans(db)
            if db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise LedgerError(f"{copy} is damaged")
    except sqlite3.Error as error:
        raise LedgerError(f"{copy} is no ledger that can be read") from error
    part = ledger.with_name(".ledger.part")
    back_up(copy, part)
    for ending in ("-wal", "-shm"):
        found = ledger.with_name(ledger.name + ending)
        if found.exists():
            found.replace(ledger.with_name(f"{ledger.name}.before{ending}"))
    if ledger.exists():
        ledger.replace(ledger.with_name(f"{ledger.name}.before"))
    part.replace(ledger)
    return n


def _n_scans(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM scans").fetchone()[0])
