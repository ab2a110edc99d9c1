"""Makes room: the oldest scans that others have whole are deleted, raw data and results, and never any other.

A scan may go once every archive that the settings name has all of its objects, each of its alerts is acknowledged, and
no other system waits for one. What the ledger says of it stays. Without an archive nothing is ever deleted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from edge.atomic import sync_folder
from edge.audit import AuditTrail
from edge.incoming import FOLDER
from edge.ledger import Ledger
from edge.settings import Settings
from edge.spool import Spool
from edge.wire import utc_now
from recon.errors import ScanError

log = logging.getLogger(__name__)

_LOOK_S = 10.0
_CHECKED, _GONE = ".checked-", ".deleted-"  # before the names of folders that are out of the way
_OLDEST = """
SELECT scan_id FROM scans
WHERE state IN ('done', 'failed')
AND scan_id NOT IN (SELECT scan_id FROM deleted)
AND (SELECT count(*) FROM held WHERE held.scan_id = scans.scan_id AND sink IN ({sinks})) = ?
AND NOT EXISTS (
    SELECT 1 FROM deliveries WHERE state <> 'delivered' AND sink IN ({sinks})
    AND key >= scans.scan_id || '/' AND key < scans.scan_id || '0'
)
AND NOT EXISTS (SELECT 1 FROM alerts WHERE alerts.scan_id = scans.scan_id AND acknowledged_at = '')
AND NOT EXISTS (
    SELECT 1 FROM alerts JOIN deliveries ON key = alert_id WHERE alerts.scan_id = scans.scan_id AND state <> 'delivered'
)
ORDER BY received_at, scans.rowid LIMIT 1
"""


class Retention:
    """Looks at the disk every few seconds while `run` runs."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        ledger: Ledger,
        spool: Spool,
        audit: AuditTrail,
        archives: Sequence[str],
        is_open: Callable[[str], bool],
    ) -> None:
        """Tidy up after a crash.

        settings: asked at each look. archives: the queues that must have delivered. is_open: whether more comes.
        """
        self._settings, self._ledger, self._spool, self._audit = settings, ledger, spool, audit
        self._archives, self._is_open = tuple(archives), is_open
        self._is_short = False
        _tidy(settings().state)

    async def run(self) -> None:
        """Look for ever; deleting takes place beside the event loop."""
        state = self._settings().state
        while True:
            while (scan_id := self.next()) is not None:
                if not await asyncio.to_thread(self._delete, state, scan_id, self._ledger.n_triaged(scan_id)):
                    break
                self._ledger.delete_scan(scan_id, utc_now())
                self._audit.record("deleted", objects={"scan": scan_id}, reason="delivered, and the disk filled up")
                log.info("scan deleted id=%s", scan_id)
            await asyncio.sleep(_LOOK_S)

    def next(self) -> str | None:
        """Return the scan that is to go now; None where there is room, or nothing that may."""
        disk = self._settings().disk
        wanted = max(disk.keep_free_mib, disk.min_free_mib) if disk.keep_free_mib else 0
        if self._spool.free_bytes() >> 20 >= wanted or not self._archives:
            self._is_short = False
            return None
        sinks = ", ".join("?" for _ in self._archives)
        row = self._ledger.db.execute(
            _OLDEST.format(sinks=sinks), (*self._archives, len(self._archives), *self._archives)
        ).fetchone()
        if row is None or self._is_open(row[0]):
            if not self._is_short:
                log.warning("disk below keep_free_mib=%d and no delivered scan to delete", wanted)
            self._is_short = True
            return None
        return str(row[0])

    def _delete(self, state: Path, scan_id: str, n_triaged: int | None) -> bool:
        """Delete what the disk has of a scan; False where something came meanwhile, or the disk does not let us."""
        try:
            if n_triaged is not None and not _take_away(state / FOLDER, scan_id, n_triaged):
                return False
            if (self._spool.root / scan_id).exists():  # a series has none
                self._spool.delete(scan_id)
            _move(state / "results", scan_id, _GONE)
            _finish(state)
        except (OSError, ScanError) as error:
            log.warning("scan not deleted id=%s type=%s", scan_id, type(error).__name__)
            return False
        return True


def _take_away(folder: Path, scan_id: str, n: int) -> bool:
    """Move a series out of the way, unless it has other than `n` objects: one may have been answered for just now."""
    checked = _move(folder, scan_id, _CHECKED)
    if checked is not None and len(list(checked.glob("*.dcm"))) != n:
        _put_back(folder, scan_id)
        return False
    if checked is not None:
        checked.rename(folder / f"{_GONE}{scan_id}")
    return True


def _put_back(folder: Path, scan_id: str) -> None:
    """Undo a `_move`; what came meanwhile stays."""
    checked = folder / f"{_CHECKED}{scan_id}"
    (folder / scan_id).mkdir(mode=0o700, exist_ok=True)
    for path in checked.glob("*.dcm"):
        with suppress(FileExistsError):
            os.link(path, folder / scan_id / path.name)
    sync_folder(folder / scan_id)
    shutil.rmtree(checked)


def _move(folder: Path, scan_id: str, mark: str) -> Path | None:
    """Rename a scan's folder so that nobody takes it for one; None where there is none."""
    try:
        return (folder / scan_id).rename(folder / f"{mark}{scan_id}")
    except FileNotFoundError:
        return None


def _finish(state: Path) -> None:
    """Remove what was moved out of the way for good."""
    for folder in (state / "results", state / FOLDER):
        for gone in folder.glob(f"{_GONE}*"):
            shutil.rmtree(gone, ignore_errors=True)


def _tidy(state: Path) -> None:
    """Put back what a crash left unchecked, and remove what it left half deleted."""
    for checked in (state / FOLDER).glob(f"{_CHECKED}*"):
        _put_back(state / FOLDER, checked.name.removeprefix(_CHECKED))
    _finish(state)
