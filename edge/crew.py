"""A process of the daemon's as it sees it: started, fed with orders, listened to, killed when it hangs, replaced."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

Report = dict[str, Any]
_LINE_LIMIT = 16 << 20
_RESTART_PAUSE_S = 0.2
_END_S = 3.0
_START_S = 120.0  # a worker that is still starting, on a busy machine, does not hang


class Crew:
    """Keeps one worker process alive, the one that reconstructs or another `module`.

    on_report: called with each report and its payload. on_start: called when a fresh worker waits to be told of every
    scan. on_death: called when one that had been told of them died or was killed, before the next starts: one that dies
    earlier died of no scan. on_false_start: called instead of it then, with how many in succession have.
    is_wanted: False has `run` wait for `want` before it starts the first.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        timeout_s: float,
        on_report: Callable[[Report, bytes], None],
        on_start: Callable[[], None],
        on_death: Callable[[], None],
        module: str = "edge.worker",
        on_false_start: Callable[[int], None] = lambda n: None,
        is_wanted: bool = True,
    ) -> None:
        self.pid: int | None = None
        self._settings = settings
        self._timeout_s = timeout_s
        self._on_report = on_report
        self._on_start = on_start
        self._on_death = on_death
        self._module = module
        self._on_false_start = on_false_start
        self._n_false_starts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._heard_at = time.monotonic()
        self._is_stopping = False
        self._is_ready = False
        self._wanted = asyncio.Event()
        if is_wanted:
            self._wanted.set()

    @property
    def is_wanted(self) -> bool:
        """Whether there should be a worker: False until `want` where none was wanted at once."""
        return self._wanted.is_set()

    def want(self) -> None:
        """Have `run` start the worker that it has been waiting with."""
        self._heard_at = time.monotonic()
        self._wanted.set()

    @property
    def silent_s(self) -> float:
        """For how many seconds nothing was heard of a worker."""
        return time.monotonic() - self._heard_at

    @property
    def is_alive(self) -> bool:
        """Whether a worker was heard as lately as it must be, one that is starting included."""
        return self.silent_s <= max(self._timeout_s, _START_S if not self._is_ready else 0.0) + _RESTART_PAUSE_S + 5.0

    def order(self, do: str, scan_id: str, **fields: Any) -> None:
        """Give an order; without a ready worker it is dropped, as the next one is told of everything at its start."""
        process = self._process
        if not self._is_ready or process is None or process.stdin is None or process.stdin.is_closing():
            return
        process.stdin.write(json.dumps({"do": do, "scan_id": scan_id, **fields}).encode() + b"\n")

    async def run(self) -> None:
        """Keep a worker running, once it is wanted, until `stop`."""
        await self._wanted.wait()
        while not self._is_stopping:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                json.dumps(self._settings),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_LIMIT,
            )
            self._process, self.pid = process, process.pid
            self._heard_at = time.monotonic()
            watch = asyncio.create_task(self._watch(process))
            try:
                await self._listen(process)
            finally:
                watch.cancel()
                if process.stdin is not None:
                    process.stdin.close()
                code, was_ready = await _end(process), self._is_ready
                self._process, self.pid, self._is_ready = None, None, False
            if not self._is_stopping:
                log.warning("worker ended module=%s code=%d; another is started", self._module, code)
                self._n_false_starts = 0 if was_ready else self._n_false_starts + 1
                if was_ready:
                    self._on_death()
                else:
                    self._on_false_start(self._n_false_starts)
                await asyncio.sleep(_RESTART_PAUSE_S)

    async def stop(self) -> None:
        """Let the worker end by itself for a moment, then kill it."""
        self._is_stopping = True
        self._wanted.set()
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()
            await _end(process)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        out = process.stdout
        assert out is not None
        while line := await out.readline():
            try:
                report = json.loads(line)
                payload = await out.readexactly(report["n_bytes"])
            except (ValueError, asyncio.IncompleteReadError):
                return  # it died in the middle of a report
            self._heard_at = time.monotonic()
            if report["report"] == "ready":
                self._is_ready = True
                self._on_start()
            else:
                self._on_report(report, payload)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill a worker that has been silent for too long."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            limit_s = self._timeout_s if self._is_ready else max(self._timeout_s, _START_S)
            if time.monotonic() - self._heard_at > limit_s:
                log.warning("worker silent module=%s for %.0f s; it is killed", self._module, limit_s)
                with suppress(ProcessLookupError):
                    process.kill()
                return


async def _end(process: asyncio.subprocess.Process) -> int:
    """Wait for a worker that is about to end; kill it where it does not. Returns its exit code."""
    try:
        return await asyncio.wait_for(process.wait(), _END_S)
    except asyncio.TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        return await process.wait()
