"""A daemon as a child process: what the demo, tests and benchmarks start and stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from recon.errors import DeliveryError

_START_S = 60.0


class DaemonProcess:
    """`scanside serve` on free ports of the loopback, its log in a file; a context manager that ends it."""

    def __init__(
        self,
        state: Path,
        log: Path,
        arguments: Sequence[str] = (),
        module: str = "edge.command",
        before: Sequence[str] = (),
    ) -> None:
        """Start it and wait until it serves; raises DeliveryError with its last words where it does not.

        module: what stands for the `scanside` command. before: a program that starts it, such as faketime.
        """
        self.state = state
        self._log_path = log
        command = [*before, sys.executable, "-m", module, "serve", "--state", str(state)]
        ports = ["--port", "0", "--events", "tcp://127.0.0.1:0", "--alerts", "tcp://127.0.0.1:0"]
        with log.open("ab") as out:
            begin = out.tell()
            self._process = subprocess.Popen([*command, *ports, *arguments], stdout=out, stderr=out)
        self.port, self.events, self.alerts = self._wait_for_ports(begin)

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def worker_pid(self) -> int | None:
        """The process that reconstructs, or None between two of them."""
        return self.child_pid("edge.worker")

    def child_pid(self, module: str) -> int | None:
        """The daemon's process that runs a module, the first of several, or None where there is none."""
        return next(iter(self.child_pids(module)), None)

    def child_pids(self, module: str) -> list[int]:
        """The daemon's processes that run a module."""
        found: list[int] = []
        with suppress(OSError, ValueError):
            for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                with suppress(OSError):  # it may be ending
                    if module.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(int(child))
        return found

    def kill(self) -> None:
        """End it as a power cut would: at once, whatever it is doing."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """Ask it to end and return its exit code; kills it after ten seconds."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self._process.wait())

    def _wait_for_ports(self, begin: int) -> tuple[int, str, str]:
        until = time.monotonic() + _START_S
        said = ""
        while time.monotonic() < until:
            is_alive = self._process.poll() is None
            said = self._log_path.read_bytes()[begin:].decode("utf-8", "replace")
            found = re.search(r"serving mrd=\S+:(\d+) events=(\S+) alerts=(\S+)\n", said)
            if found:
                return int(found[1]), found[2], found[3]
            if not is_alive:
                break
            time.sleep(0.05)
        self.kill()
        raise DeliveryError(f"the daemon did not start: {(said.strip().splitlines() or ['it said nothing'])[-1]}")
