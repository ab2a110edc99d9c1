"""The ledger: numbers without gaps, images noted once, deaths counted."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from edge.ledger import Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_event_numbers_go_on_after_reopening_and_pruning(path: Path) -> None:
    ledger = Ledger(path)
    assert [ledger.add_event("heartbeat", "", "t", {"n": n}) for n in range(5)] == [1, 2, 3, 4, 5]
    ledger.prune_events(keep=2)
    assert [event[0] for event in ledger.events()] == [4, 5]
    ledger.close()
    again = Ledger(path)
    assert again.add_event("heartbeat", "", "t", {}) == 6
    assert [(seq, fields) for seq, _, _, _, fields in again.events(after=4)] == [(5, {"n": 4}), (6, {})]
    again.close()


def test_an_image_is_noted_once_unless_it_changed(path: Path) -> None:
    ledger = Ledger(path)
    ledger.open_scan("A", "t")
    assert ledger.note_image("A", "classical", "0-0", "one")
    assert not ledger.note_image("A", "classical", "0-0", "one")
    assert ledger.note_image("A", "classical", "0-0", "two")
    assert ledger.note_image("A", "network", "0-0", "two")
    ledger.close()


def test_an_image_is_set_aside_at_its_second_death_and_reading_never_is(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.note_death("A", "0-1") == 1
    assert ledger.set_aside("A") == []
    assert ledger.note_death("A", "0-1") == 2
    assert [ledger.note_death("A", "") for _ in range(3)] == [1, 2, 3]
    assert ledger.set_aside("A") == ["0-1"]
    assert ledger.set_aside("B") == []
    ledger.close()


def test_a_scan_is_followed_from_its_first_byte_to_its_end(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.scan("A") is None
    ledger.open_scan("A", "10:00")
    ledger.open_scan("A", "11:00")
    ledger.end_scan("A", "complete", "", 100, 7)
    ledger.finish_scan("A", "done", "", "10:05")
    row = ledger.scan("A")
    assert row is not None
    assert (row.state, row.ending, row.received_at, row.finished_at) == ("done", "complete", "10:00", "10:05")
    assert (row.n_bytes, row.n_readouts) == (100, 7)
    assert ledger.scans() == [row]
    ledger.close()


def test_what_is_no_ledger_is_refused(path: Path) -> None:
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Ledger(path)
