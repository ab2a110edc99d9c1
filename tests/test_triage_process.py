"""Triage in a process of its own: nothing waits for it, and whatever becomes of it each scan's findings come once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_world import events, rows
from edge.child import DaemonProcess
from edge.crew import Report
from edge.ledger import Ledger
from edge.rawfile import open_raw
from edge.triage_crew import MOST_DEATHS, Task, TriageCrew
from tests.test_daemon import Listener, replay, wait_for_states
from tests.test_operation import wait_until

CONFIG = "[worker]\nmethod = 'sense'\ntimeout_s = %g\n[alerts]\ndeadline_s = 3600\n[disk]\nmin_free_mib = 0\n"


class Site:
    """A daemon that flags every scan, and whose triage can be held."""

    def __init__(self, folder: Path, timeout_s: float = 120.0) -> None:
        self.state, self.log = folder / "state", folder / "log"
        (folder / "scanside.toml").write_text(CONFIG % timeout_s)
        self._arguments = ["--config", str(folder / "scanside.toml")]
        self._held: list[int] = []
        self.start()

    def start(self) -> None:
        self.daemon = DaemonProcess(self.state, self.log, self._arguments, module="benchmarks.flagging")

    def close(self) -> None:
        self.daemon.stop()
        for pid in self._held:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def triage_pid(self) -> int:
        found: list[int] = []

        def is_there() -> bool:
            pid = self.daemon.child_pid("edge.triage_process")
            found.extend([] if pid is None else [pid])
            return bool(found)

        wait_until(is_there)
        return found[0]

    def hold(self) -> int:
        """Stop the triage process; return its id."""
        pid = self.triage_pid()
        self._held.append(pid)
        os.kill(pid, signal.SIGSTOP)
        return pid

    def said(self, words: str) -> int:
        return self.log.read_text().count(words)

    def kinds(self) -> dict[str, Counter[str]]:
        """How many events of each kind there are, by scan."""
        found: dict[str, Counter[str]] = {}
        for event in events(self.state):
            if "scan_id" in event and not event.get("early"):
                found.setdefault(event["scan_id"], Counter())[event["kind"]] += 1
        return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    opened = Site(tmp_path)
    yield opened
    opened.close()


class Stuck:
    """A scan whose triage does not get to the end of reading the volume, which is a pipe until `mend`."""

    def __init__(self, site: Site, small_scan: Path) -> None:
        pid = site.hold()
        assert replay(open_raw(small_scan), site.daemon).problem == ""  # the scanner waits for no triage
        (self.volume,) = site.state.glob("results/*/volume.npy")
        self.folder = self.volume.parent
        self._pixels = self.volume.read_bytes()
        self.volume.unlink()
        os.mkfifo(self.volume)
        os.kill(pid, signal.SIGCONT)
        self._ends: list[int] = []
        self.wait()

    def wait(self) -> None:
        """Return once a process has begun to read."""

        def is_open() -> bool:
            with suppress(OSError):  # nobody reads yet
                self._ends.append(os.open(self.volume, os.O_WRONLY | os.O_NONBLOCK))
                return True
            return False

        wait_until(is_open)

    def let_go(self) -> None:
        """Close our end, once who reads the other is dead."""
        while self._ends:
            os.close(self._ends.pop())

    def mend(self) -> None:
        """Put the volume back."""
        self.volume.unlink()
        self.volume.write_bytes(self._pixels)
        self.let_go()

    def findings(self) -> list[dict[str, Any]]:
        """What the report says."""
        found: list[dict[str, Any]] = json.loads((self.folder / "report.json").read_text())["findings"]
        return found


def is_told_once(site: Site) -> None:
    wait_for_states(site.state, {"done"})
    for kinds in site.kinds().values():
        assert [kinds[kind] for kind in ("quality", "findings", "alert", "scan.done")] == [1, 1, 1, 1]
    assert not rows(site.state, "SELECT * FROM triage")
    for path in site.state.glob("results/*/report.json"):
        report = json.loads(path.read_text())
        assert report["stage_ms"]["triage"] > 0
        assert report["triage"]


def test_killed_in_the_middle_the_finding_comes_once(site: Site, small_scan: Path) -> None:
    scan = Stuck(site, small_scan)
    assert {each["state"] for each in scan.findings()} == {"not assessed"}  # until triage has said otherwise
    assert [sum(kinds[k] for kinds in site.kinds().values()) for k in ("quality", "findings")] == [1, 0]
    os.kill(site.triage_pid(), signal.SIGKILL)
    scan.mend()
    is_told_once(site)
    assert site.said("triage process died") == 1
    assert site.said("scan reconstructed") == 1
    assert (scan.folder / "dicom" / "findings" / "findings.dcm").exists()


def test_a_scan_that_triage_always_dies_at_is_not_assessed(site: Site, small_scan: Path) -> None:
    heard = Listener(site.daemon.events)
    scan = Stuck(site, small_scan)
    for n in range(1, MOST_DEATHS + 1):
        os.kill(site.triage_pid(), signal.SIGKILL)
        wait_until(lambda n=n: site.said("triage process died") == n)
        scan.let_go()
        if n < MOST_DEATHS:
            scan.wait()
    (done,) = heard.wait("scan.done")
    heard.close()
    assert (done["ending"], done["images"]) == ("complete", 4)
    (findings,) = [event for event in events(site.state) if event["kind"] == "findings"]
    for each in (*findings["findings"], *scan.findings()):
        assert (each["state"], each["why"]) == ("not assessed", "the triage process died 3 times at this scan")
    assert [sum(kinds[k] for kinds in site.kinds().values()) for k in ("quality", "alert")] == [1, 0]
    assert not (scan.folder / "dicom" / "findings").exists()
    assert not rows(site.state, "SELECT * FROM triage")
    replay(open_raw(small_scan), site.daemon)  # the next one is read
    wait_until(lambda: sum(kinds["alert"] for kinds in site.kinds().values()) == 1)


def test_a_hang_is_ended_and_the_finding_comes_once(tmp_path: Path, small_scan: Path) -> None:
    site = Site(tmp_path, timeout_s=8.0)
    try:
        scan = Stuck(site, small_scan)
        wait_until(lambda: site.said("worker silent module=edge.triage_process"))
        scan.mend()
        is_told_once(site)
        assert site.said("triage process died") >= 1
    finally:
        site.close()


def test_what_waited_when_the_daemon_was_killed_is_read_and_nothing_is_made_again(site: Site, small_scan: Path) -> None:
    site.hold()
    for _ in range(2):
        assert len(replay(open_raw(small_scan), site.daemon).images) == 4
    wait_until(lambda: site.said("scan reconstructed") == 2)
    (n,) = rows(site.state, "SELECT count(*) FROM triage")[0]
    assert n == 2
    site.daemon.kill()
    site.start()
    wait_for_states(site.state, {"done"}, 2)
    is_told_once(site)
    assert len(site.kinds()) == 2
    assert site.said("for triage") == 2
    assert site.said("scan reconstructed") == 2  # by the daemon that was killed


class FakeCrew:
    """Takes orders, and gives no answer by itself."""

    def __init__(self) -> None:
        self.ordered: list[str] = []

    def order(self, do: str, scan_id: str, **fields: Any) -> None:
        self.ordered.append(scan_id)


class Bench:
    """A triage crew without a process."""

    def __init__(self, ledger: Ledger) -> None:
        self.triage = TriageCrew({}, 1.0, ledger)
        self.crew = self.triage.crew = FakeCrew()  # type: ignore[assignment]
        self.ends: list[tuple[str, ...]] = []

    def add(self, *names: str) -> None:
        for name in names:
            self.triage.add(
                Task(
                    name,
                    {"do": "scan"},
                    lambda report: self.ends.append((report["scan_id"], "triaged")),
                    lambda code, reason, name=name: self.ends.append((name, code, reason)),
                )
            )

    def answer(self, scan_id: str, report: str = "triaged", **fields: Any) -> None:
        said: Report = {"report": report, "scan_id": scan_id, **fields}
        self.triage.on_report(said)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        yield Bench(ledger)


def test_one_at_a_time_in_order_and_a_deadly_one_waits_behind_the_others(bench: Bench) -> None:
    bench.add("A", "B")
    assert (bench.crew.ordered, bench.triage.n_waiting) == (["A"], 2)
    bench.triage._on_start()  # a process that is ready asks for what was dropped before
    assert bench.crew.ordered == ["A", "A"]
    bench.triage._on_death()
    bench.triage._on_start()
    bench.answer("A")  # of a process that is gone
    assert (bench.crew.ordered[2:], bench.ends) == (["B"], [])
    bench.answer("B")
    for _ in range(MOST_DEATHS - 1):
        bench.triage._on_start()
        bench.triage._on_death()
    assert bench.ends == [("B", "triaged"), ("A", "triage", "the triage process died 3 times at this scan")]
    assert (bench.triage.n_waiting, bench.triage.oldest_s()) == (0, 0.0)
    bench.triage._on_death()  # at nothing
    assert len(bench.ends) == 2


def test_deaths_are_remembered_by_the_ledger(bench: Bench, tmp_path: Path) -> None:
    bench.add("A")
    bench.triage._on_death()
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        again = Bench(ledger)
        again.add("A")
        for _ in range(MOST_DEATHS - 1):
            again.triage._on_death()
            again.triage._on_start()
        assert [end[1] for end in again.ends] == ["triage"]


def test_what_finds_no_room_is_tried_again_and_what_cannot_be_is_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.triage_crew._LONGEST_RETRY_S", 0.01)
    monkeypatch.setattr("edge.triage_crew._MAX_RETRIES", 2)

    async def play() -> None:
        bench.add("A", "B", "C")
        bench.answer("A", "failed", code="delivery", reason="the disk is full")
        assert bench.crew.ordered == ["A", "B"]  # others do not wait for it
        bench.answer("B", "failed", code="acquisition", reason="no header")
        await asyncio.sleep(0.05)
        assert bench.crew.ordered == ["A", "B", "C"]
        bench.answer("C")
        for _ in range(2):
            await asyncio.sleep(0.05)
            assert bench.crew.ordered[-1] == "A"
            bench.answer("A", "failed", code="delivery", reason="the disk is full")

    asyncio.run(play())
    assert bench.ends == [("B", "acquisition", "no header"), ("C", "triaged"), ("A", "delivery", "the disk is full")]


def test_a_process_that_never_starts_leaves_nobody_waiting(bench: Bench) -> None:
    bench.add("A", "B")
    for n in range(1, 10):
        bench.triage._on_false_start(n)
    assert not bench.ends
    bench.triage._on_false_start(10)
    assert [(name, code) for name, code, _ in bench.ends] == [("A", "triage"), ("B", "triage")]
    assert bench.ends[0][2] == "the triage process does not start: it was tried 10 times"
