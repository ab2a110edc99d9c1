"""The daemon as a benchmark sees it: a real `scanside serve` on loopback, its events with their times, its memory."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from edge.child import DaemonProcess
from edge.wire import Subscriber
from recon.errors import DeliveryError

HOST = "127.0.0.1"
_SETTINGS = "[events]\nheartbeat_s = 0.2\n[disk]\nmin_free_mib = 64\n[mrd]\nmax_sessions = 64\n"
_SAMPLE_S = 0.05


class Event(NamedTuple):
    """An event's header, and when it came: seconds on the monotonic clock."""

    at_s: float
    header: dict[str, Any]


class EventLog:
    """Keeps every event of a daemon, without pixels, in the order in which they came."""

    def __init__(self, address: str) -> None:
        """Listen at `address` until `close`."""
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._listen, args=(Subscriber(address),), daemon=True)
        self._thread.start()

    def position(self) -> int:
        """Return how many events have come."""
        with self._changed:
            return len(self._events)

    def since(self, position: int, kind: str = "") -> list[Event]:
        """Return the events after `position`, of one kind where it is given."""
        with self._changed:
            return [event for event in self._events[position:] if not kind or event.header["kind"] == kind]

    def wait(self, position: int, is_it: Callable[[dict[str, Any]], bool], timeout_s: float = 300.0) -> Event:
        """Return the first event after `position` whose header `is_it` takes; raises DeliveryError where none comes."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for event in self._events[position:]:
                    if is_it(event.header):
                        return event
                position = len(self._events)
                if not self._changed.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                    raise DeliveryError(f"the awaited event did not come within {timeout_s:g} s")

    def wait_for(self, position: int, n: int, *kinds: str, timeout_s: float = 300.0) -> None:
        """Return once `n` events of `kinds` came after `position`; raises DeliveryError where they do not come."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while sum(event.header["kind"] in kinds for event in self._events[position:]) < n:
                if not self._changed.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                    raise DeliveryError(f"{n} awaited events did not come within {timeout_s:g} s")

    def close(self) -> None:
        """Stop listening."""
        self._is_closed = True
        self._thread.join()

    def _listen(self, subscriber: Subscriber) -> None:
        try:
            while not self._is_closed:
                received = subscriber.receive(0.1)
                if received is not None:
                    event = Event(time.monotonic(), received[0])
                    with self._changed:
                        self._events.append(event)
                        self._changed.notify_all()
        finally:
            subscriber.close()


class MeasuredDaemon:
    """`scanside serve` with a state folder of its own, which goes with it; a context manager."""

    def __init__(self, settings: str = "") -> None:
        """Start it; `start_s` is how long it took until it served. Raises DeliveryError where it does not start.

        settings: further sections, as TOML.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="scanside-benchmark-")
        root = Path(self._folder.name)
        (root / "settings.toml").write_text(_SETTINGS + settings)
        begun = time.monotonic()
        arguments = ("--config", str(root / "settings.toml"))
        self.state = root / "state"
        self._process = DaemonProcess(self.state, root / "log", arguments)
        self.start_s = time.monotonic() - begun
        self.port = self._process.port
        self.events = EventLog(self._process.events)

    def __enter__(self) -> MeasuredDaemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.events.close()
        self._process.stop()
        self._folder.cleanup()

    def pids(self) -> dict[str, int]:
        """Return the processes by name: "daemon", "worker" ("worker 2" …) and "triage", where they run."""
        found = {"daemon": self._process.pid}
        for name, module in (("worker", "edge.worker"), ("triage", "edge.triage_process")):
            for n, pid in enumerate(self._process.child_pids(module)):
                found[f"{name} {n + 1}" if n else name] = pid
        return found


class MemoryWatch:
    """Samples the resident memory of processes while a `with` block runs; `peak_mib` holds the largest of each.

    Only memory of their own counts: pages of mapped files belong to the file cache.
    """

    def __init__(self, pids: Callable[[], dict[str, int]]) -> None:
        self.peak_mib: dict[str, float] = {}
        self._pids = pids
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for name, pid in self._pids().items():
                with suppress(OSError, StopIteration, ValueError):  # it may be ending
                    self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), own_mib(pid))
            if self._done.wait(_SAMPLE_S):
                return


def own_mib(pid: int) -> float:
    """Return the anonymous resident memory of a process, MiB; raises OSError where it is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024, 1)
