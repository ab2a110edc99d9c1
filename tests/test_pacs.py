"""Objects to the archive: each there once with the bytes it was made of, or given up with a reason in bounded time."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge.audit import TRAIL, AuditTrail
from edge.child import DaemonProcess
from edge.command import main
from edge.deliveries import Deliveries
from edge.doctor import archive_findings
from edge.ledger import Ledger
from edge.pacs import Pacs
from edge.rawfile import open_raw
from edge.replay import stream_file
from edge.settings import PacsSettings, Settings
from tests.archive import (
    Orthanc,
    data_set,
    free_port,
    instance_of,
    make_objects,
    needs_dcmtk,
    needs_orthanc,
    needs_web,
    self_signed,
    wait_for_port,
)  # fmt: skip

pytestmark = pytest.mark.peer
WAIT_S = 120.0


class Site:
    """A state folder with a queue for the archive, without the rest of a daemon."""

    def __init__(self, state: Path, **pacs: Any) -> None:
        state.mkdir(exist_ok=True)
        self.state = state
        options = {"host": "127.0.0.1", "called_ae": "ORTHANC", "longest_pause_s": 0.5, "timeout_s": 10.0} | pacs
        self.settings = Settings(state=state, pacs=PacsSettings(**options))
        self.ledger = Ledger(state / "ledger.sqlite")
        self.deliveries = Deliveries(self.ledger)
        self.audit = AuditTrail(state / TRAIL)

    def scan(self, scan_id: str, n: int, pacs: Pacs, **fields: Any) -> None:
        files = make_objects(self.state / "results", scan_id, n, **fields)
        with self.ledger.transaction():
            pacs.enter(scan_id, files)
        pacs.wake()

    def n(self, state: str, sink: str = "pacs") -> int:
        return self.deliveries.count().get((sink, state), 0)

    def run(self, story: Callable[[Pacs], Any]) -> None:
        """Run the queue while `story`, a coroutine, goes on."""

        async def play() -> None:
            pacs = Pacs(self.settings, self.ledger, self.audit, self.deliveries)
            tasks = [asyncio.create_task(work) for work in pacs.tasks()]
            try:
                await story(pacs)
            finally:
                for task in tasks:
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task

        asyncio.run(play())

    def close(self) -> None:
        self.audit.close()
        self.ledger.close()

    def sent(self) -> dict[str, bytes]:
        """The data sets on disk, by SOP Instance UID."""
        files = [path.read_bytes() for path in (self.state / "results").rglob("*.dcm")]
        return {instance_of(file): data_set(file) for file in files}


def sending_process() -> int:
    """The child of this process that sends; earlier tests may have left helpers of `multiprocessing` beside it."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    (sending,) = [pid for pid in children if b"edge.pacs_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(sending)


async def until(done: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + WAIT_S
    while not done():
        assert loop.time() < end, "it did not come to an end"
        await asyncio.sleep(0.02)


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[Orthanc]:
    archive = Orthanc(tmp_path / "orthanc").start()
    yield archive
    archive.kill()


@needs_orthanc
def test_an_archive_that_is_killed_under_load_has_every_object_once(orthanc: Orthanc, tmp_path: Path) -> None:
    site = Site(tmp_path / "state", port=orthanc.dicom)

    async def story(pacs: Pacs) -> None:
        for number in range(3):
            site.scan(f"{number}" * 26, 30, pacs)
        await until(lambda: site.n("delivered") > 0)
        orthanc.kill()
        site.scan("3" * 26, 30, pacs)
        await asyncio.sleep(1.5)
        assert site.n("waiting") > 0
        os.kill(sending_process(), 9)
        orthanc.start()
        await until(lambda: site.n("delivered") == 120)
        # A second end of the same scan sends nothing again.
        with site.ledger.transaction():
            pacs.enter("0" * 26, [f"dicom/classical/{number:04d}.dcm" for number in range(30)])
        assert site.n("waiting") == 0

    site.run(story)
    kept = orthanc.files()
    assert len(kept) == 120
    assert {instance_of(file): data_set(file) for file in kept} == site.sent()
    trail = (site.state / TRAIL).read_text()
    assert sum(int(object_n(line)) for line in trail.splitlines()) == 120
    assert "2.25." not in trail
    site.close()


def object_n(line: str) -> str:
    record = json.loads(line)
    assert record["EventID"]["csd-code"] == "110104"
    return str(
        {each["ParticipantObjectTypeCode"]: each["ParticipantObjectID"] for each in record["ParticipantObjects"]}[
            "objects"
        ]
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pynetdicom leaves its socket to others
def test_an_archive_that_never_comes_is_given_up_on_in_bounded_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    site = Site(tmp_path / "state", port=port, attempts=4, longest_pause_s=0.2)

    async def story(pacs: Pacs) -> None:
        site.scan("A" * 26, 5, pacs)
        await until(lambda: site.n("dead") == 5)

    site.run(story)
    assert {each.attempts for each in site.deliveries.dead()} == {4}
    assert main(["pacs", "dead", "--state", str(site.state)]) == 0
    assert capsys.readouterr().out == f"pacs  {'A' * 26}  5 objects  given up: the archive cannot be reached\n"
    assert main(["pacs", "retry", "A" * 26, "--state", str(site.state)]) == 0
    assert main(["pacs", "list", "--state", str(site.state)]) == 0
    assert "5 objects are tried again\npacs  waiting=5 delivered=0 dead=0" in capsys.readouterr().out
    assert (site.n("waiting"), site.n("dead")) == (5, 0)
    records = [json.loads(line) for line in (site.state / TRAIL).read_text().splitlines()]
    assert [(r["what"], r["EventOutcomeIndicator"]) for r in records] == [("transfer", 8), ("restricted", 0)]
    (fault,) = archive_findings(site.settings.pacs)
    assert fault.level == "fault"
    site.close()


@needs_orthanc
@needs_web
def test_objects_reach_an_archive_over_dicomweb(orthanc: Orthanc, tmp_path: Path) -> None:
    site = Site(tmp_path / "state", host="", stow=f"http://127.0.0.1:{orthanc.http}/dicom-web")

    async def story(pacs: Pacs) -> None:
        site.scan("W" * 26, 6, pacs)
        (site.state / "results" / ("W" * 26) / "dicom/classical/0003.dcm").write_bytes(b"no DICOM at all")
        await until(lambda: site.n("waiting", "stow") == 0)

    site.run(story)
    assert (site.n("delivered", "stow"), site.n("dead", "stow")) == (5, 1)
    assert orthanc.count() == 5
    (site.state / "results" / ("W" * 26) / "dicom/classical/0003.dcm").unlink()
    assert {instance_of(file): data_set(file) for file in orthanc.files()} == site.sent()
    (well,) = archive_findings(site.settings.pacs)
    assert well.level == "ok"
    site.close()


@needs_orthanc
def test_an_object_counts_once_the_archive_has_committed_to_keep_it(tmp_path: Path) -> None:
    port = free_port()
    archive = Orthanc(tmp_path / "orthanc", reports_to=port).start()
    site = Site(tmp_path / "state", port=archive.dicom, commitment=f"127.0.0.1:{port}")

    async def story(pacs: Pacs) -> None:
        site.scan("C" * 26, 4, pacs)
        await until(lambda: site.n("delivered") == 4)
        assert archive.jobs() == ["StorageCommitmentScp"]
        # Stored by a process that was killed before it could say so: asked about first.
        site.ledger.db.execute("UPDATE deliveries SET state = 'waiting', attempts = 1")
        pacs.wake()
        await until(lambda: site.n("delivered") == 4)
        assert archive.jobs() == ["StorageCommitmentScp"] * 2

    try:
        site.run(story)
        assert archive.count() == 4
    finally:
        archive.kill()
        site.close()


@needs_dcmtk
def test_objects_go_over_tls_to_an_archive_whose_certificate_is_known(tmp_path: Path) -> None:
    key, cert = self_signed(tmp_path)
    port = free_port()
    kept = tmp_path / "kept"
    kept.mkdir()
    command = ["storescp", "+tls", str(key), str(cert), "+cf", str(cert), "-B", "-aet", "ORTHANC", "-od", str(kept)]
    archive = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_port(port, archive)
    stranger = Site(tmp_path / "stranger", port=port, attempts=1)
    site = Site(tmp_path / "state", port=port, ca=str(cert), cert=str(cert), key=str(key))

    async def no_tls(pacs: Pacs) -> None:
        stranger.scan("T" * 26, 1, pacs)
        await until(lambda: stranger.n("dead") == 1)

    async def story(pacs: Pacs) -> None:
        site.scan("T" * 26, 3, pacs)
        await until(lambda: site.n("delivered") == 3)

    try:
        stranger.run(no_tls)
        assert not list(kept.iterdir())
        site.run(story)
        (well,) = archive_findings(site.settings.pacs)
        assert well.level == "ok"
        assert {instance_of(path.read_bytes()): data_set(path.read_bytes()) for path in kept.iterdir()} == site.sent()
        key.chmod(0o644)
        (fault,) = archive_findings(site.settings.pacs)
        assert "chmod 600" in fault.words
    finally:
        archive.kill()
        archive.wait()
        site.close()
        stranger.close()


@needs_orthanc
def test_a_scan_s_objects_go_to_the_archive_as_it_ends(orthanc: Orthanc, tmp_path: Path, small_scan: Path) -> None:
    config = tmp_path / "scanside.toml"
    config.write_text(f'[pacs]\nhost = "127.0.0.1"\nport = {orthanc.dicom}\ncalled_ae = "ORTHANC"\n')
    state = tmp_path / "state"
    with DaemonProcess(state, tmp_path / "log", ["--config", str(config)]) as process:
        stream_file(open_raw(small_scan), "127.0.0.1", process.port, answer_s=WAIT_S)
        asyncio.run(until(lambda: "objects delivered" in (tmp_path / "log").read_text()))
    files = [path.read_bytes() for path in state.glob("results/*/dicom/**/*.dcm")]
    assert len(files) >= 4
    assert {instance_of(f): data_set(f) for f in orthanc.files()} == {instance_of(f): data_set(f) for f in files}
    log = (tmp_path / "log").read_text()
    assert not any(instance_of(file) in log for file in files)
