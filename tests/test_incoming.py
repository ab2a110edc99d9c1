"""Series of the scanner's own: taken from dcmtk, on disk before they are answered for, triaged, and told of once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import CTImageStorage, MRImageStorage
from pynetdicom import AE

from benchmarks.chaos_world import rows
from edge.audit import TRAIL, verify
from edge.child import DaemonProcess
from edge.client import AlertClient
from edge.dicom import encode
from edge.dicom_identity import ObjectRefusedError, place_of
from edge.dicom_read import DicomSeries, read_series
from edge.doctor import incoming_findings
from edge.exams import Exams
from edge.ledger import Ledger
from edge.rawfile import open_raw
from edge.replay import stream_file
from edge.secret import random_secret
from edge.settings import IncomingSettings, Settings, SettingsError, check
from edge.uids import derive_uid
from tests.archive import image, needs_dcmtk, self_signed
from tests.fake_triage import head

pytestmark = [pytest.mark.peer, needs_dcmtk]
WAIT_S = 60.0
STORED = ": 0x0000: success"
CONFIG = """
[mrd]
port = 0
[incoming]
host = "127.0.0.1"
port = 0
callers = ["MR1", "MR2"]
quiet_s = 0.3
max_object_mib = 1
[alerts]
deadline_s = 3600.0
[disk]
min_free_mib = 0
"""
QUICK = """[worker]
method = "sense"
[triage]
models = "/nowhere"
"""  # no networks
NAMES = ("Zebrowski", "PID778899", "2.25.")
HEAD = head(10)


def write_series(folder: Path, series: str, numbers: range = range(10), **fields: Any) -> list[Path]:
    """Write slices of a head as a scanner's diffusion series; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in numbers:
        pixels = np.clip(HEAD.data[number], 0, 4095).astype("<u2")
        said = {
            "SeriesDescription": "ep2d_diff_b1000", "StudyInstanceUID": derive_uid("study", "exam"),
            "Rows": pixels.shape[0], "Columns": pixels.shape[1], "PixelData": pixels.tobytes(),
            "PixelSpacing": [1.6, 1.6], "SliceThickness": 5.0, "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [float(v) for v in HEAD.geometry.origin_mm[number]], "DiffusionBValue": 1000.0,
        } | fields  # fmt: skip
        path = folder / f"{number:04d}.dcm"
        path.write_bytes(encode(image(series, number, **said)))
        files.append(path)
    return files


def storescu(port: int, files: list[Path], *more: str, caller: str = "MR1", called: str = "SCANSIDE") -> str:
    """Send with dcmtk, whatever becomes of each; return what it says."""
    command = ["storescu", "-d", "-nh", "-aet", caller, "-aec", called, *more, "127.0.0.1", str(port), *map(str, files)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    return (said.stdout + said.stderr).lower()


def until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end, f"{what} was awaited"
        time.sleep(0.02)


class Site:
    """A daemon that flags everything and takes series."""

    def __init__(self, folder: Path, config: str = CONFIG) -> None:
        self.folder, self.state = folder, folder / "state"
        (folder / "scanside.toml").write_text(config)
        self.start()

    def start(self) -> None:
        arguments = ["--config", str(self.folder / "scanside.toml")]
        begun = len(self.log())
        self.daemon = DaemonProcess(self.state, self.folder / "log", arguments, module="benchmarks.flagging")
        until(lambda: "incoming port=" in self.log()[begun:], "the port")
        self.port = int(re.findall(r"incoming port=(\d+)", self.log())[-1])

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def done(self) -> dict[str, int]:
        """The series that were triaged, and how often."""
        ids = re.findall(r"series done id=(\S+)", self.log())
        return {scan_id: ids.count(scan_id) for scan_id in ids}

    def receiver_pid(self) -> int:
        children = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children").read_text().split()
        (pid,) = [c for c in children if b"edge.incoming_process" in Path(f"/proc/{c}/cmdline").read_bytes()]
        return int(pid)

    def audit(self, what: str) -> list[str]:
        records = [json.loads(line) for line in (self.state / TRAIL).read_text().splitlines()]
        return [record["EventOutcomeDescription"] for record in records if record["what"] == what]

    def events(self, scan_id: str, kind: str) -> list[dict[str, Any]]:
        sql = f"SELECT fields FROM events WHERE scan_id = '{scan_id}' AND kind = '{kind}' ORDER BY seq"
        return [json.loads(fields) for (fields,) in rows(self.state, sql)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    opened = Site(tmp_path_factory.mktemp("site"))
    yield opened
    opened.daemon.stop()


def test_a_series_is_triaged_alerts_once_and_grows(site: Site, tmp_path: Path) -> None:
    subprocess.run(["echoscu", "-aet", "MR1", "-aec", "SCANSIDE", "127.0.0.1", str(site.port)], check=True)
    files = write_series(tmp_path / "dwi", "grows")
    assert storescu(site.port, files[:8]).count(STORED) == 8
    until(lambda: len(site.done()) == 1, "the series")
    (scan_id,) = site.done()
    (findings,) = site.events(scan_id, "findings")
    assert [each["finding"] for each in findings["findings"]] == ["infarct", "haemorrhage", "mass"]
    assert findings["findings"][0]["state"] == "flagged"
    report = json.loads((site.state / "results" / scan_id / "report.json").read_text())
    assert (report["contrast"], report["n_objects"], report["source"]) == ("dwi", 8, "dicom")
    assert report["findings"][1]["why"].startswith("unlike dwi images of heads")  # by the real gate
    (before,) = (site.state / "results" / scan_id / "dicom").glob("*/findings.dcm")

    # Sent again: nothing new. Two more slices: triaged again, under another report, and nobody is told twice.
    assert storescu(site.port, files[:8]).count(STORED) == 8
    assert storescu(site.port, files[8:], "-xi", caller="MR2").count(STORED) == 2
    until(lambda: site.done()[scan_id] == 2, "the series again")
    after = set((site.state / "results" / scan_id / "dicom").glob("*/findings.dcm")) - {before}
    assert len(after) == 1
    assert len(list((site.state / "incoming" / scan_id).iterdir())) == 10
    with AlertClient(site.daemon.alerts, "desk") as client:
        raised = [event for event in client.snapshot(0) if event["kind"] == "alert" and event["scan_id"] == scan_id]
        client.ack(raised[0]["alert_id"], "a person")
    assert len(raised) == 1
    until(lambda: len(site.audit("import")) == 2, "the records")
    assert list((site.state / "incoming" / ".part").iterdir()) == []


def test_a_raw_scan_and_a_series_of_one_study_are_one_exam(site: Site, tmp_path: Path, small_scan: Path) -> None:
    before = set(site.done())
    stream_file(open_raw(small_scan), "127.0.0.1", site.daemon.port, answer_s=WAIT_S)
    until(lambda: "scan done" in site.log(), "the scan")
    (raw_id,) = re.findall(r"scan done id=(\S+)", site.log())
    study = re.search(rb"<studyInstanceUID>(.*?)</studyInstanceUID>", open_raw(small_scan).header)
    assert study is not None
    storescu(site.port, write_series(tmp_path / "own", "joins", StudyInstanceUID=study[1].decode()))
    until(lambda: len(site.done()) > len(before), "the series")
    (scan_id,) = set(site.done()) - before
    exam = site.events(scan_id, "findings")[0]["exam"]
    assert exam["scans"] == [raw_id, scan_id]
    assert [each["state"] for each in exam["findings"]] == ["flagged", "not assessed", "not assessed"]


def test_what_may_not_come_in_is_refused_with_its_reason_and_audited(site: Site, tmp_path: Path) -> None:
    def sent(what: str, **fields: Any) -> str:
        return storescu(site.port, write_series(tmp_path / what, what, range(1), **fields))

    n_before = len(list((site.state / "incoming").iterdir()))
    ours = image("ours", 0)
    ours.Manufacturer = "Scanside"
    assert "0xc101" in sent("synthetic", SyntheticData="YES")
    assert "0xc102" in sent("ours", ContributingEquipmentSequence=[ours])
    assert "0xc000" in sent("short", PixelData=b"\0" * 100)
    assert "0xc000" in sent("study", StudyInstanceUID="")
    assert "0xc000" in sent("modality", Modality="CT")
    assert "no acceptable presentation contexts" in storescu(
        site.port, write_series(tmp_path / "foreign", "foreign", range(1), SOPClassUID=CTImageStorage), "-R"
    )
    assert "rejected" in storescu(site.port, [tmp_path / "short" / "0000.dcm"], caller="EVE")
    assert "rejected" in storescu(site.port, [tmp_path / "short" / "0000.dcm"], called="OTHER")
    sent("large", Rows=1024, Columns=1024, PixelData=bytes(2 << 20))
    assert len(list((site.state / "incoming").iterdir())) == n_before
    until(lambda: len(site.audit("refused")) == 9, "the last record")
    assert site.audit("refused") == [
        "DICOM: synthetic images are not taken (C101)",
        "DICOM: images that were made here are not taken again (C102)",
        "DICOM: pixels are missing (C000)",
        "DICOM: study, series or instance UID is missing or is none (C000)",
        "DICOM: the object is no MR image (C000)",
        "DICOM: no MR images in a transfer syntax that is taken",
        "DICOM: its AE title is not one of incoming.callers",
        "DICOM: it calls another AE title than incoming.ae_title",
        "DICOM: an object is larger than incoming.max_object_mib",
    ]
    # Another object under a UID that is here, and one that is not what the command says.
    (one,) = write_series(tmp_path / "one", "one", range(1))
    assert STORED in storescu(site.port, [one])
    assert "0x0111" in sent("one", PixelSpacing=[2.0, 2.0])
    until(lambda: list((site.state / "incoming" / ".part").iterdir()) == [], "tidiness")
    assert verify(site.state / TRAIL)[1] == ""
    kept = site.log() + (site.state / TRAIL).read_text() + str(rows(site.state, "SELECT fields FROM events"))
    kept += str(list(site.state.rglob("*")))
    assert not [name for name in NAMES if name in kept]


def test_a_full_disk_is_told_and_ends(site: Site, tmp_path: Path) -> None:
    files = write_series(tmp_path / "full", "full", range(2))
    config = site.folder / "scanside.toml"
    config.write_text(CONFIG.replace("min_free_mib = 0", "min_free_mib = 1000000000"))
    os.kill(site.daemon.pid, signal.SIGHUP)
    until(lambda: "taken=disk.min_free_mib" in site.log(), "the settings")
    until(lambda: "0xa700" in storescu(site.port, files), "a refusal")
    until(lambda: "DICOM: the disk is full (A700)" in site.audit("refused"), "the record")
    config.write_text(CONFIG)
    os.kill(site.daemon.pid, signal.SIGHUP)
    until(lambda: storescu(site.port, files).count(STORED) == 2, "room")


def test_associations_beyond_the_cap_are_refused_and_the_others_go_on(tmp_path: Path) -> None:
    site = Site(tmp_path, CONFIG.replace("quiet_s", "max_associations = 2\nquiet_s") + QUICK)
    files = write_series(tmp_path / "capped", "capped")
    entity = AE("MR1")
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = WAIT_S
    entity.add_requested_context(MRImageStorage)

    def associate() -> Any:
        return entity.associate("127.0.0.1", site.port, ae_title="SCANSIDE")

    try:
        held = [associate() for _ in range(2)]
        assert [each.is_established for each in held] == [True, True]
        assert held[0].send_c_store(str(files[0])).Status == 0
        for _ in range(3):
            refused = associate()
            assert refused.is_rejected
            primitive = refused.acceptor.primitive
            assert (primitive.result, primitive.result_source, primitive.diagnostic) == (
                2,
                3,
                2,
            )  # for now: local limit
            assert "rejected" in storescu(site.port, files[:1])
        # Those that are there go on, on both associations, and what they bring is triaged.
        assert {each.send_c_store(str(path)).Status for each in held for path in files[1:5]} == {0}
        held[0].release()
        until(lambda: storescu(site.port, files[5:]).count(STORED) == 5, "a place")
        held[1].release()
        until(lambda: len(site.done()) == 1 and set(site.done().values()) >= {1}, "the series")
        until(lambda: len(site.audit("refused")) >= 6, "the records")
        assert set(site.audit("refused")) == {"DICOM: too many associations at once"}
        (scan_id,) = site.done()
        assert len(list((site.state / "incoming" / scan_id).glob("*.dcm"))) == 10
        with ThreadPoolExecutor(8) as pool:  # all at once: never more than may
            burst = list(pool.map(lambda _: associate(), range(8)))
        assert sum(each.is_established for each in burst) <= 2
        assert all(each.is_established or each.is_rejected for each in burst)
        for each in burst:
            each.abort()
    finally:
        site.daemon.stop()


def test_killed_at_any_moment_nothing_is_lost_that_was_a_success(tmp_path: Path) -> None:
    site = Site(tmp_path, CONFIG + QUICK)
    try:
        answered = 0
        for round_ in range(2):
            files = write_series(tmp_path / f"{round_}", f"killed {round_}")
            command = ["storescu", "-v", "-aet", "MR1", "-aec", "SCANSIDE", "127.0.0.1", str(site.port)]
            with subprocess.Popen([*command, *map(str, files)], stderr=subprocess.PIPE, text=True) as sender:
                assert sender.stderr is not None
                n = 0
                for line in sender.stderr:
                    n += "(Success)" in line
                    if n == 3 + round_ and "(Success)" in line:
                        os.kill(site.receiver_pid() if round_ % 2 else site.daemon.pid, signal.SIGKILL)
            answered += n
            assert n < 10
            if round_ % 2:
                n_ports = site.log().count("incoming port=")
                until(lambda n=n_ports: site.log().count("incoming port=") > n, "another process")
                site.port = int(re.findall(r"incoming port=(\d+)", site.log())[-1])
            else:
                site.daemon.kill()
                site.start()
        until(lambda: len(site.done()) == 2, "all series")
        kept = list((site.state / "incoming").glob("*/*.dcm"))
        assert answered <= len(kept) <= answered + 2  # one on the way each time
        assert {kept_of(path) for path in kept} == set(site.done())
        (n_alerts,) = rows(site.state, "SELECT count(*) FROM alerts")[0]
        assert n_alerts == 2
    finally:
        site.daemon.stop()


def kept_of(path: Path) -> str:
    return path.parent.name


def test_tls_asks_for_a_certificate(tmp_path: Path) -> None:
    key, cert = self_signed(tmp_path)
    secret = tmp_path / "secret"
    random_secret(secret)
    incoming = asdict(IncomingSettings("127.0.0.1", 0, callers=("MR1",), ca=str(cert), cert=str(cert), key=str(key)))
    more = {"folder": str(tmp_path / "in"), "pseudonym_key": str(secret), "min_free_mib": 0}
    command = [sys.executable, "-m", "edge.incoming_process", json.dumps({**incoming, **more})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        sent = write_series(tmp_path / "tls", "tls", range(2))
        assert STORED not in storescu(port, sent)
        assert STORED not in storescu(port, sent, "+tla", "-ic")
        assert storescu(port, sent, "+tls", str(key), str(cert), "+cf", str(cert)).count(STORED) == 2
        process.stdin.close()
        said = [json.loads(line) for line in process.stdout]
    assert [next(iter(line)) for line in said] == ["refused", "refused", "stored", "stored", "ended"]
    assert {line.get("refused") for line in said} == {None, "no TLS, or no certificate that incoming.ca knows"}


def test_what_a_data_set_says_must_be_what_the_command_said(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, "said", range(1))
    instance = derive_uid("test", "said", 0)
    assert place_of(path, b"secret", MRImageStorage, instance) == place_of(path, b"secret", MRImageStorage, instance)
    assert place_of(path, b"other", MRImageStorage, instance) != place_of(path, b"secret", MRImageStorage, instance)
    for sop_class, uid in ((MRImageStorage, "1.2.3"), (CTImageStorage, instance)):
        with pytest.raises(ObjectRefusedError) as refused:
            place_of(path, b"secret", sop_class, uid)
        assert refused.value.status == 0xA900
    whole = path.read_bytes()
    for junk in (b"", whole[:200], whole[:900], b"\0" * 128 + b"DICM" + b"\xff" * 500, whole[:-5000]):
        path.write_bytes(junk)
        with pytest.raises(ObjectRefusedError) as refused:
            place_of(path, b"secret", MRImageStorage, instance)
        assert refused.value.status == 0xC000


def test_of_a_diffusion_series_the_strongest_weighting_is_read(tmp_path: Path) -> None:
    write_series(tmp_path / "b0", "b", DiffusionBValue=0.0, SeriesDescription="x", PixelData=bytes(2 * 150 * 124))
    files = write_series(tmp_path / "b1000", "b", SeriesDescription="x")
    for path in files:
        path.rename(tmp_path / "b0" / f"b1000_{path.name}")
    (found,) = read_series(tmp_path / "b0")
    assert isinstance(found, DicomSeries)
    assert found.contrast == "dwi"
    assert found.volume.data.shape[0] == 10
    assert found.volume.data.max() > 100


def test_one_exam_by_study_or_by_patient_on_the_same_day(tmp_path: Path) -> None:
    found = {"finding": "mass", "state": "not assessed", "why": "no", "probability": None, "conformal": [],
             "contrast": "t1"}  # fmt: skip
    flag = found | {"state": "flagged", "why": "", "probability": 0.9, "conformal": ["present"], "contrast": "flair"}
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        exams = Exams(ledger)

        def join(scan_id: str, key: str, finding: Any, known: bool = True, at: str = "2026-11-26T12:00:00.000Z") -> Any:
            keys = {"exam_key": key, "patient_key": "P"}
            report = {"exam": keys, "is_study_known": known, "findings": [finding]}
            return exams.join(scan_id, report, at).get("exam")

        assert join("A", "one", found) is None
        assert join("B", "two", found) is None  # another study of the same patient
        both = join("C", "one", flag)
        assert both["scans"] == ["A", "C"]
        assert (both["findings"][0]["state"], both["findings"][0]["scan_id"]) == ("flagged", "C")
        assert join("D", "derived", found, known=False)["scans"] == ["A", "B", "C", "D"]
        assert join("E", "later", found, known=False, at="2026-11-28T12:00:00.000Z") is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"host": "127.0.0.1"}, "callers must name"),
        ({"host": "0.0.0.0", "callers": ("MR1",)}, "allow or incoming.ca"),
        ({"allow": ("here",)}, "incoming.allow names"),
        ({"callers": ("x" * 17,)}, "AE title"),
        ({"key": "x"}, "incoming.cert"),
    ],
)
def test_settings_that_would_let_anybody_in_stop_the_start(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        check(Settings(incoming=IncomingSettings(**fields)))


def test_the_doctor_looks_at_port_and_certificates(tmp_path: Path) -> None:
    (off,) = incoming_findings(IncomingSettings())
    assert off.level == "ok"
    ready = incoming_findings(IncomingSettings(host="127.0.0.1", port=0, callers=("MR1",)))
    assert [each.level for each in ready] == ["ok", "ok"]
    missing = incoming_findings(IncomingSettings(host="127.0.0.1", port=0, callers=("MR1",), cert=str(tmp_path / "no")))
    assert missing[-1].level == "fault"
