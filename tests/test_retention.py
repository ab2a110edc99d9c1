"""Room is made of what others have whole, the oldest first, and of nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_world import rows
from edge.audit import TRAIL, AuditTrail
from edge.child import DaemonProcess
from edge.deadline import Deadline
from edge.deliveries import Deliveries
from edge.ledger import Ledger
from edge.mrd_write import encode_close, encode_config_file, encode_header
from edge.outbox import Outbox
from edge.pacs import Pacs
from edge.rawfile import open_raw
from edge.retention import Retention
from edge.settings import DiskSettings, PacsSettings, Settings
from edge.spool import Spool
from tests.test_daemon import talk

WAIT_S = 60.0
AT = "2026-11-26T10:00:0{}.000Z"


class Site:
    """A state folder with scans in every state of delivery."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pacs = PacsSettings(host="127.0.0.1", stow="http://127.0.0.1:1/")
        self.settings = Settings(state=state, pacs=pacs, disk=DiskSettings(min_free_mib=10, keep_free_mib=50))
        self.ledger, self.audit = Ledger(state / "ledger.sqlite"), AuditTrail(state / TRAIL)
        self.deliveries, self.outbox, self.spool = Deliveries(self.ledger), Outbox(self.ledger), Spool(state / "spool")
        self.pacs = Pacs(self.settings, self.ledger, self.audit, self.deliveries)
        self.state, self.open = state, set[str]()
        self.n = 0
        self.free_mib = 0
        monkeypatch.setattr(self.spool, "free_bytes", lambda: self.free_mib << 20)
        self.retention = self.make(self.pacs.names)

    def make(self, archives: list[str]) -> Retention:
        return Retention(
            lambda: self.settings, self.ledger, self.spool, self.audit, archives, lambda scan_id: scan_id in self.open
        )

    def scan(self, outcome: str = "done") -> str:
        self.n += 1
        writer = self.spool.create()
        writer.append(b"raw")
        writer.finish("complete", "")
        self.ledger.open_scan(writer.scan_id, AT.format(self.n))
        if outcome != "receiving":
            self.ledger.finish_scan(writer.scan_id, outcome, "", AT.format(self.n))
        folder = self.state / "results" / writer.scan_id
        folder.mkdir(parents=True)
        (folder / "report.json").write_text("{}")
        with self.ledger.transaction():
            self.pacs.enter(writer.scan_id, ["dicom/a.dcm", "dicom/b.dcm"])
        return writer.scan_id

    def deliver(self, scan_id: str, *states: str) -> None:
        """Note what became of its two objects at both archives."""
        for sink in self.pacs.names:
            for file, state in zip("ab", states or ("delivered", "delivered"), strict=True):
                (each,) = [d for d in self.deliveries.waiting(sink) if d.key == f"{scan_id}/dicom/{file}.dcm"]
                self.deliveries.note(each, state, "", AT.format(9))
                self.deliveries.hold(sink, scan_id)

    def alert(self, scan_id: str, is_answered: bool, sink: str = "") -> None:
        content: Any = {"alert_id": f"alert of {scan_id}", "scan_id": scan_id}
        self.outbox.enter(content, 1, AT.format(1), Deadline("boot", 0.0, 0.0, 0.0))
        if is_answered:
            self.outbox.acknowledge(content["alert_id"], "a person", "desk", AT.format(2))
        if sink:
            self.deliveries.enter(sink, content["alert_id"], content, AT.format(1))

    def run(self, seconds: float = 0.3) -> None:
        async def play() -> None:
            task = asyncio.create_task(self.retention.run())
            await asyncio.sleep(seconds)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(play())

    def kept(self) -> set[str]:
        raw = {path.name for path in (self.state / "spool").iterdir()}
        assert raw == {path.name for path in (self.state / "results").iterdir()}
        return raw


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    opened = Site(tmp_path, monkeypatch)
    yield opened
    opened.audit.close()
    opened.ledger.close()


def test_only_what_was_delivered_and_answered_goes(site: Site) -> None:
    held = [site.scan() for _ in range(3)]
    for scan_id in held[:2]:
        site.deliver(scan_id)
    site.deliver(held[2], "delivered", "dead")
    site.alert(held[0], is_answered=False)
    site.alert(held[1], is_answered=True, sink="hl7")
    held.append(site.scan())  # waits at both archives
    held.append(site.scan("receiving"))
    gone = [site.scan(), site.scan("failed")]
    for scan_id in (held[4], *gone):
        site.deliver(scan_id)
    site.alert(gone[0], is_answered=True)
    site.run()
    assert site.kept() == set(held)
    assert [row.scan_id for row in site.ledger.scans()] == [*held, *gone]  # what is known of them stays
    trail = (site.state / TRAIL).read_text()
    assert trail.count('"110105"') == 2
    assert trail.index(gone[0]) < trail.index(gone[1])  # the oldest first
    (waiting,) = site.deliveries.waiting("hl7")
    site.deliveries.note(waiting, "delivered", "", AT.format(3))
    site.run()
    assert site.kept() == set(held) - {held[1]}


def test_nothing_goes_while_there_is_room_or_no_archive_or_nobody_asked(site: Site) -> None:
    scan_id = site.scan()
    site.deliver(scan_id)
    assert site.retention.next() == scan_id
    site.free_mib = 50
    assert site.retention.next() is None
    site.free_mib = 0
    assert site.make([]).next() is None
    site.settings = replace(site.settings, disk=DiskSettings(min_free_mib=10, keep_free_mib=0))
    assert site.retention.next() is None


def test_what_was_delivered_is_remembered_longer_than_its_objects(site: Site) -> None:
    scan_id = site.scan()
    site.deliver(scan_id)
    for sink in site.pacs.names:
        site.deliveries.forget(sink, -1)
    assert site.deliveries.count() == {}
    assert site.retention.next() == scan_id
    with site.ledger.transaction():
        site.pacs.enter(scan_id, ["dicom/c.dcm"])
    assert site.retention.next() is None


def test_a_series_goes_unless_an_object_has_just_come(site: Site) -> None:
    names = ["0" * 26, "1" * 26, "2" * 26]
    for n, scan_id in enumerate(names):
        folder = site.state / "incoming" / scan_id
        folder.mkdir(parents=True)
        (folder / "a.dcm").write_text("x")
        site.ledger.open_scan(scan_id, AT.format(n))
        site.ledger.finish_scan(scan_id, "done", "", AT.format(n))
        site.ledger.note_triaged(scan_id, 1)
        site.pacs.hold(scan_id)
    (site.state / "incoming" / names[1] / "b.dcm").write_text("just answered for")
    (site.state / "incoming" / names[1]).rename(site.state / "incoming" / f".checked-{names[1]}")  # and then a crash
    site.retention = site.make(site.pacs.names)
    site.open = {names[2]}
    site.run()
    left = {path.name: sorted(p.name for p in path.iterdir()) for path in (site.state / "incoming").iterdir()}
    assert left == {names[1]: ["a.dcm", "b.dcm"], names[2]: ["a.dcm"]}
    assert site.ledger.n_triaged(names[0]) is None
    site.run()
    assert len(list((site.state / "incoming" / names[1]).iterdir())) == 2
    site.ledger.open_scan(names[0], AT.format(5))  # it comes again
    assert rows(site.state, "SELECT count(*) FROM deleted") == [(0,)]


def test_a_full_disk_refuses_the_new_scan_and_finishes_the_old(tmp_path: Path, small_scan: Path) -> None:
    config = tmp_path / "scanside.toml"
    config.write_text('[worker]\nmethod = "sense"\n[triage]\nmodels = "/nowhere"\n[disk]\nmin_free_mib = 0\n')
    raw = open_raw(small_scan)
    content = encode_config_file("scanside") + encode_header(raw.header) + b"".join(raw.acquisitions())
    with DaemonProcess(tmp_path / "state", tmp_path / "log", ["--config", str(config)]) as process:

        def refused() -> str:
            said, _ = talk(process, encode_config_file("scanside") + encode_header(raw.header))
            return next((text for text in said if "no new scan is taken" in text), "")

        with socket.create_connection(("127.0.0.1", process.port)) as old:
            old.sendall(content[: len(content) // 2])
            until(lambda: rows(tmp_path / "state", "SELECT count(*) FROM scans") == [(1,)])
            config.write_text(config.read_text().replace("= 0", "= 1000000000"))
            os.kill(process.pid, signal.SIGHUP)
            until(lambda: "taken=disk.min_free_mib" in (tmp_path / "log").read_text())
            assert "MiB left" in refused()
            old.sendall(content[len(content) // 2 :] + encode_close())
            until(lambda: "scan done" in (tmp_path / "log").read_text())
    assert rows(tmp_path / "state", "SELECT state, ending FROM scans") == [("done", "complete")]


def until(done: Any) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)
