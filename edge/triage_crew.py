"""The triage process as the daemon sees it: what waits for it, in order, and what becomes of what it dies at.

One thing is ordered at a time, so that a death, a hang and a refusal each belong to one scan. Whatever happens, each
task ends once, with an answer or with why it has none: nothing waits for ever, and nothing is forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge.crew import Crew, Report
from edge.ledger import Ledger
from recon.errors import DeliveryError

log = logging.getLogger(__name__)

MOST_DEATHS = 3  # of processes at one scan
MAKING = "triage"  # what the ledger calls what they died at
_MOST_FALSE_STARTS = 10  # one after the other; then nothing is waited for
_MAX_RETRIES, _LONGEST_RETRY_S = 60, 60.0  # of what finds no room on the disk: about an hour


@dataclass
class Task:
    """A scan or series that is to be triaged.

    order: what the process is told. on_triaged: called with its answer. on_given_up: called with a code and the reason
    where there is none.
    """

    scan_id: str
    order: Mapping[str, Any]
    on_triaged: Callable[[Report], None]
    on_given_up: Callable[[str, str], None]
    added_s: float = 0.0
    due_s: float = 0.0
    n_retries: int = 0


class TriageCrew:
    """Has tasks done in the order in which they came. All within the daemon's event loop."""

    def __init__(self, settings: dict[str, Any], timeout_s: float, ledger: Ledger) -> None:
        """settings: of the process. timeout_s: a task that takes longer is a hang."""
        self._ledger = ledger
        self._tasks: dict[str, Task] = {}
        self._current = ""
        self.crew = Crew(
            settings,
            timeout_s,
            lambda report, payload: self.on_report(report),
            self._on_start,
            self._on_death,
            module="edge.triage_process",
            on_false_start=self._on_false_start,
        )

    @property
    def n_waiting(self) -> int:
        """How many tasks have no answer."""
        return len(self._tasks)

    def oldest_s(self) -> float:
        """Return for how long the oldest of them has waited, 0 without any."""
        return max((time.monotonic() - task.added_s for task in self._tasks.values()), default=0.0)

    def add(self, task: Task) -> None:
        """Have a scan triaged that does not wait for it already."""
        task.added_s = time.monotonic()
        self._tasks[task.scan_id] = task
        self._next()

    def on_report(self, report: Report) -> None:
        """Take an answer of the process."""
        if report.get("scan_id", "") != self._current or not self._current:
            return
        task, self._current = self._tasks[self._current], ""
        if report["report"] == "triaged":
            del self._tasks[task.scan_id]
            task.on_triaged(report)
        elif report["code"] == DeliveryError.code and task.n_retries < _MAX_RETRIES:
            task.n_retries += 1
            pause_s = min(2.0**task.n_retries, _LONGEST_RETRY_S)
            task.due_s = time.monotonic() + pause_s
            log.warning("findings not written id=%s times=%d; tried again", task.scan_id, task.n_retries)
            asyncio.get_running_loop().call_later(pause_s, self._next)
        else:
            self._give_up(task, report["code"], report["reason"])
        self._next()

    def _next(self) -> None:
        """Order what has waited longest, unless something is being done."""
        now = time.monotonic()
        for task in self._tasks.values() if not self._current else ():
            if task.due_s <= now:
                self._current = task.scan_id
                self.crew.order(scan_id=task.scan_id, **task.order)  # dropped where none is ready: it asks as it starts
                return

    def _on_start(self) -> None:
        self._current = ""
        self._next()

    def _on_death(self) -> None:
        """Count it against what was being done, and let that wait behind all others, or end it."""
        if not self._current:
            return
        task, self._current = self._tasks.pop(self._current), ""
        n = self._ledger.note_death(task.scan_id, MAKING)
        log.warning("triage process died at id=%s times=%d", task.scan_id, n)
        self._tasks[task.scan_id] = task
        if n >= MOST_DEATHS:
            self._give_up(task, "triage", f"the triage process died {n} times at this scan")

    def _on_false_start(self, n: int) -> None:
        """End all that waits for a process that never gets ready: not assessed, rather than silence."""
        self._current = ""
        if n >= _MOST_FALSE_STARTS:
            for task in list(self._tasks.values()):
                self._give_up(task, "triage", f"the triage process does not start: it was tried {n} times")

    def _give_up(self, task: Task, code: str, reason: str) -> None:
        log.warning("triage given up id=%s code=%s", task.scan_id, code)
        del self._tasks[task.scan_id]
        task.on_given_up(code, reason)
