"""The daemon as a stranger meets it: streams in, images, files and events out, and nothing lost when it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from edge.child import DaemonProcess
from edge.command import main
from edge.mrd import MessageId, next_message, read_image, read_text
from edge.mrd_write import encode_close, encode_config_file, encode_header
from edge.rawfile import RawFile, open_raw
from edge.replay import Replayed, series, stream_file
from edge.simulate import simulate_file
from edge.wire import KINDS, Subscriber
from recon.errors import DeliveryError
from recon.protocol import Protocol

WAIT_S = 60.0


class Listener:
    """Collects events in the background."""

    def __init__(self, address: str) -> None:
        self.events: list[tuple[dict[str, Any], bytes | None]] = []
        self._subscriber = Subscriber(address)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        time.sleep(0.3)  # a subscription takes a moment to reach the publisher

    def wait(self, *kinds: str, n: int = 1) -> list[dict[str, Any]]:
        """Return the headers of the first `n` events of `kinds`; fails when they do not come."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            found = [header for header, _ in list(self.events) if header["kind"] in kinds]
            if len(found) >= n:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{n} of {kinds} were awaited; heard {[header['kind'] for header, _ in self.events]}")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._subscriber.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            event = self._subscriber.receive(0.1)
            if event is not None:
                self.events.append(event)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "state", tmp_path / "log") as process:
        yield process


@pytest.fixture
def listener(daemon: DaemonProcess) -> Iterator[Listener]:
    heard = Listener(daemon.events)
    yield heard
    heard.close()


@pytest.fixture(scope="module")
def undisturbed(small_scan: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The small scan's volume from a daemon that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with DaemonProcess(folder / "state", folder / "log") as process:
        replay(open_raw(small_scan), process)
    return volume_of(folder / "state")


def replay(raw: RawFile, process: DaemonProcess, **options: Any) -> Replayed:
    return stream_file(raw, "127.0.0.1", process.port, answer_s=WAIT_S, **options)


def volume_of(state: Path) -> np.ndarray:
    (path,) = state.glob("results/*/volume.npy")
    return np.load(path)


def rows_of(state: Path) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(state / "ledger.sqlite")) as db:
        return db.execute("SELECT state, ending, reason FROM scans ORDER BY rowid").fetchall()


def wait_for_states(state: Path, wanted: set[str], n: int = 1) -> list[tuple[str, str, str]]:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        rows = rows_of(state)
        if len(rows) >= n and {row[0] for row in rows} <= wanted:
            return rows
        time.sleep(0.05)
    raise AssertionError(f"scans are {rows_of(state)}; {wanted} was awaited")


def test_a_fault_is_announced_while_the_scan_runs(daemon: DaemonProcess, listener: Listener, small_scan: Path) -> None:
    raw = open_raw(small_scan)
    heads = raw.heads.copy()
    heads["idx"]["kspace_encode_step_1"][40] = 999  # a place that no header allows
    replay(replace(raw, heads=heads), daemon)
    listener.wait("scan.done")
    events = [header for header, _ in listener.events if header["kind"] in ("quality", "image")]
    early = [header for header in events if header["kind"] == "quality" and header.get("early")]
    assert (early[0]["fault"], early[0]["order"]) == ("sampling", 40)
    assert "999" in early[0]["words"]
    assert events.index(early[0]) < len(events) - 2  # before the last images, and the verdict
    assert events[-1]["verdict"] == "degraded"
    assert events[-1]["reasons"][0]["code"] == "sampling"


def test_a_scan_gives_images_events_dicom_and_a_report(
    daemon: DaemonProcess, listener: Listener, small_scan: Path, tmp_path: Path
) -> None:
    replayed = replay(open_raw(small_scan), daemon)
    assert replayed.problem == ""
    (done,) = listener.wait("scan.done")
    folder = tmp_path / "state" / done["results"]
    volume = np.load(folder / "volume.npy")
    assert volume.shape == (4, 64, 64)
    assert volume.dtype == np.float32
    # What the scanner got, what subscribers got and what lies on disk are the same pixels, without any scaling.
    (stack,) = series(replayed.images).values()
    np.testing.assert_array_equal(stack, volume)
    images = [event for event in listener.events if event[0]["kind"] == "image"]
    for header, payload in images:
        assert payload is not None
        assert (header["dtype"], header["slices"], header["series"]) == ("<f4", 4, "classical")
        np.testing.assert_array_equal(np.frombuffer(payload, "<f4").reshape(header["shape"]), volume[header["slice"]])
    assert sorted(header["slice"] for header, _ in images) == [0, 1, 2, 3]
    datasets = [pydicom.dcmread(path) for path in sorted((folder / "dicom" / "classical").glob("*.dcm"))]
    assert len({d.SeriesInstanceUID for d in datasets}) == 1
    assert len({d.RescaleSlope for d in datasets}) == 1
    for plane, dataset in zip(volume, datasets, strict=True):
        np.testing.assert_allclose(dataset.pixel_array * float(dataset.RescaleSlope), plane, atol=dataset.RescaleSlope)
    report = json.loads((folder / "report.json").read_text())
    assert report["method"] == "sense"
    quality = report["quality"]
    assert (quality["verdict"], quality["reasons"], quality["advice"]["repeat"]) == ("trusted", [], False)
    assert (folder / "preview.png").read_bytes().startswith(b"\x89PNG")


def test_the_network_s_images_follow_the_classical_ones_everywhere(
    daemon: DaemonProcess, listener: Listener, tmp_path: Path
) -> None:
    protocol = Protocol(matrix=(96, 112), n_slices=2, n_coils=4, acceleration=3, n_calibration=16)
    simulate_file(tmp_path / "scan.h5", protocol, "none", 2)
    raw = open_raw(tmp_path / "scan.h5")
    replayed = replay(raw, daemon)
    assert not replayed.problem
    by_number = series(replayed.images)
    assert sorted(by_number) == [1, 2]
    (done,) = listener.wait("scan.done")
    assert (done["method"], done["images"]) == ("network", 4)
    images = listener.wait("image", n=4)
    assert [header["series"] for header in images] == ["classical", "network"] * 2
    assert [header["method"] for header in images] == ["sense", "network"] * 2
    assert not any("no_network" in header for header in images)
    (folder,) = (tmp_path / "state" / "results").iterdir()
    assert {path.name for path in (folder / "dicom").iterdir()} - {"findings"} == {"classical", "network"}
    np.testing.assert_array_equal(np.load(folder / "volume.npy"), by_number[2])
    np.testing.assert_array_equal(np.load(folder / "classical.npy"), by_number[1])
    truth = np.load(tmp_path / "scan.truth.npz")["image"]
    errors = [np.linalg.norm(by_number[n] - truth) / np.linalg.norm(truth) for n in (1, 2)]
    assert errors[1] < errors[0] < 0.25
    # and a file gives the same bits as a scanner
    assert main(["recon", str(tmp_path / "scan.h5"), "--out", str(tmp_path / "out"), "--method", "network"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "volume.npy"), by_number[2])


def test_a_scan_the_network_was_not_trained_for_says_so_in_its_events(
    daemon: DaemonProcess, listener: Listener, small_scan: Path
) -> None:
    replay(open_raw(small_scan), daemon)
    for header in listener.wait("image", n=4):
        assert header["series"] == "classical"
        assert "trained for 96 to 512" in header["no_network"]


def test_events_are_numbered_without_gaps_and_findings_are_never_silent(
    daemon: DaemonProcess, listener: Listener, small_scan: Path
) -> None:
    replay(open_raw(small_scan), daemon)
    listener.wait("scan.done")
    headers = [header for header, _ in listener.events]
    numbers = [header["seq"] for header in headers]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert {header["kind"] for header in headers} <= set(KINDS)
    kinds = [header["kind"] for header in headers if header["kind"] not in ("heartbeat", "scan.progress")]
    assert kinds[0] == "scan.started"
    assert kinds[-3:] == ["quality", "findings", "scan.done"]
    (findings,) = listener.wait("findings")
    assert {each["state"] for each in findings["findings"]} == {"not assessed"}
    assert all(each["why"] for each in findings["findings"])


def test_numbers_go_on_after_a_restart(tmp_path: Path, small_scan: Path) -> None:
    last = 0
    for _ in range(2):
        with DaemonProcess(tmp_path / "state", tmp_path / "log") as process:
            heard = Listener(process.events)
            replay(open_raw(small_scan), process)
            heard.wait("scan.done")
            first = heard.events[0][0]["seq"]
            assert first > last
            process.kill()
            heard.close()
        with closing(sqlite3.connect(tmp_path / "state" / "ledger.sqlite")) as db:
            numbers = [row[0] for row in db.execute("SELECT seq FROM events ORDER BY seq")]
        assert numbers == list(range(1, len(numbers) + 1))
        last = numbers[-1]


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_a_killed_worker_changes_no_bit(
    share: float, tmp_path: Path, small_scan: Path, undisturbed: np.ndarray
) -> None:
    raw = open_raw(small_scan)
    deadly = int(share * len(raw.heads))
    count = iter(range(len(raw.heads)))
    with DaemonProcess(tmp_path / "state", tmp_path / "log") as process:
        heard = Listener(process.events)

        def on_readout() -> None:
            if next(count) == deadly:
                heard.wait("image" if share > 0.5 else "scan.started")  # later on, some images have been sent already
                pid = process.worker_pid()
                assert pid is not None
                os.kill(pid, signal.SIGKILL)

        replayed = replay(raw, process, on_readout=on_readout)
        heard.wait("scan.done")
        heard.close()
        assert replayed.problem == ""
        assert len(replayed.images) == 4  # none twice
        np.testing.assert_array_equal(volume_of(tmp_path / "state"), undisturbed)
        assert "worker ended" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_daemon_keeps_what_came_and_marks_it(
    seed: int, tmp_path: Path, small_scan: Path, undisturbed: np.ndarray
) -> None:
    raw = open_raw(small_scan)
    deadly = random.Random(seed).randrange(len(raw.heads) // 2, len(raw.heads) - 1)
    count = iter(range(len(raw.heads)))
    with DaemonProcess(tmp_path / "state", tmp_path / "log") as process:

        def on_readout() -> None:
            if next(count) == deadly:
                time.sleep(0.1)
                process.kill()

        replayed = replay(raw, process, on_readout=on_readout)
        assert replayed.problem  # the scanner saw that nobody answered
    (spooled,) = (tmp_path / "state").glob("spool/*/raw.mrd")
    n_bytes = spooled.stat().st_size
    with DaemonProcess(tmp_path / "state", tmp_path / "log"):
        ((state, ending, _),) = wait_for_states(tmp_path / "state", {"done"})
        assert (state, ending) == ("done", "interrupted")
        assert spooled.stat().st_size == n_bytes
        report = json.loads(next((tmp_path / "state").glob("results/*/report.json")).read_text())
        assert report["ending"] == "interrupted"
        assert report["quality"]["verdict"] == "degraded"
        for path in (tmp_path / "state").glob("results/*/volume.npy"):
            for plane in np.load(path):
                assert any((plane == whole).all() for whole in undisturbed)


def test_a_scan_that_was_whole_when_the_daemon_died_is_finished(
    tmp_path: Path, small_scan: Path, undisturbed: np.ndarray
) -> None:
    raw = open_raw(small_scan)
    with DaemonProcess(tmp_path / "state", tmp_path / "log") as process:
        connection = socket.create_connection(("127.0.0.1", process.port))
        connection.sendall(encode_config_file("scanside") + encode_header(raw.header))
        connection.sendall(b"".join(raw.acquisitions()) + encode_close())
        (spooled,) = _until(lambda: list((tmp_path / "state").glob("spool/*/raw.mrd")))
        sent = 2 + 1024 + sum(len(m) for m in raw.acquisitions())
        _until(lambda: spooled.stat().st_size > sent)
        process.kill()
        connection.close()
    with DaemonProcess(tmp_path / "state", tmp_path / "log"):
        assert wait_for_states(tmp_path / "state", {"done"}) == [("done", "complete", "")]
        np.testing.assert_array_equal(volume_of(tmp_path / "state"), undisturbed)


def test_an_image_that_kills_the_worker_twice_is_set_aside(tmp_path: Path, small_scan: Path) -> None:
    raw = open_raw(small_scan)
    state = tmp_path / "state"
    with DaemonProcess(state, tmp_path / "log") as process:
        scan_id = ""
        with closing(sqlite3.connect(state / "ledger.sqlite")) as db:
            replay(raw, process)
            wait_for_states(state, {"done"})
            (scan_id,) = db.execute("SELECT scan_id FROM scans").fetchone()
        process.kill()
    with closing(
        sqlite3.connect(state / "ledger.sqlite")
    ) as db:  # as if it had died at slice 2 twice, and the daemon then too
        db.execute("UPDATE scans SET state = 'received'")
        db.execute("INSERT INTO deaths VALUES (?, '0-2-0-0-0-0', 2)", (scan_id,))
        db.commit()
    with DaemonProcess(state, tmp_path / "log"):
        wait_for_states(state, {"done"})
        report = json.loads((state / "results" / scan_id / "report.json").read_text())
    assert report["n_images"] == 3
    (reason,) = report["quality"]["reasons"]
    assert reason["words"] == "slice 2 was set aside: its reconstruction failed twice"


def test_a_broken_scan_says_why_and_others_do_not_notice(
    daemon: DaemonProcess, listener: Listener, small_scan: Path, tmp_path: Path
) -> None:
    raw = open_raw(small_scan)
    idle = socket.create_connection(("127.0.0.1", daemon.port))
    said, _ = talk(daemon, encode_config_file("scanside") + encode_header(raw.header.replace(b"cartesian", b"radial")))
    assert any("'radial'" in text and "cartesian" in text for text in said)
    (failed,) = listener.wait("scan.failed")
    assert failed["code"] == "acquisition"
    assert "'radial'" in failed["reason"]
    assert listener.wait("findings")[0]["findings"][0]["state"] == "not assessed"
    assert len(list((tmp_path / "state").glob("spool/*/raw.mrd"))) == 1  # what came is kept
    assert len(replay(raw, daemon).images) == 4
    idle.close()


def test_several_scanners_at_once_each_get_their_own_images(
    daemon: DaemonProcess, small_scan: Path, undisturbed: np.ndarray, tmp_path: Path
) -> None:
    raw = open_raw(small_scan)
    idle = socket.create_connection(("127.0.0.1", daemon.port))
    stalled = socket.create_connection(("127.0.0.1", daemon.port))
    stalled.sendall(encode_config_file("scanside") + encode_header(raw.header) + next(raw.acquisitions())[:200])
    replayed: list[Replayed] = []
    threads = [threading.Thread(target=lambda: replayed.append(replay(raw, daemon))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replayed) == 4
    for each in replayed:
        assert each.problem == ""
        (stack,) = series(each.images).values()
        np.testing.assert_array_equal(stack, undisturbed)
    idle.close()
    stalled.close()


def test_scans_one_after_the_other_need_one_worker(tmp_path: Path, small_scan: Path) -> None:
    raw = open_raw(small_scan)
    with DaemonProcess(tmp_path / "state", tmp_path / "log") as process:
        heard = Listener(process.events)
        for n in (1, 2):
            assert replay(raw, process).problem == ""
            heard.wait("scan.done", n=n)
            assert len(process.child_pids("edge.worker")) == 1
        heard.close()


def test_no_more_workers_than_allowed_whatever_overlaps(tmp_path: Path, small_scan: Path) -> None:
    raw = open_raw(small_scan)
    (tmp_path / "scanside.toml").write_text("[worker]\nprocesses = 2\n")
    replayed: list[Replayed] = []
    with DaemonProcess(tmp_path / "state", tmp_path / "log", ["--config", str(tmp_path / "scanside.toml")]) as process:
        heard = Listener(process.events)
        due_s = [0.02 * n for n in range(len(raw.heads))]
        threads = [
            threading.Thread(target=lambda: replayed.append(replay(raw, process, due_s=due_s))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        heard.wait("scan.started", n=4)
        assert len(process.child_pids("edge.worker")) == 2
        for thread in threads:
            thread.join()
        heard.wait("scan.done", n=4)
        assert len(process.child_pids("edge.worker")) == 2
        heard.close()
    assert [(each.problem, len(each.images)) for each in replayed] == [("", 4)] * 4


def test_two_workers_share_the_scans_and_one_dies_for_its_own(
    tmp_path: Path, small_scan: Path, undisturbed: np.ndarray
) -> None:
    raw, state = open_raw(small_scan), tmp_path / "state"
    (tmp_path / "scanside.toml").write_text("[worker]\nprocesses = 2\n")
    replayed: list[Replayed] = []
    with DaemonProcess(state, tmp_path / "log", ["--config", str(tmp_path / "scanside.toml")]) as process:
        _until(lambda: len(process.child_pids("edge.worker")) == 1)
        heard = Listener(process.events)
        due_s = [0.03 * n for n in range(len(raw.heads))]
        threads = [
            threading.Thread(target=lambda: replayed.append(replay(raw, process, due_s=due_s))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        heard.wait("scan.started", n=2)
        first, second = process.child_pids("edge.worker")
        spools = [{os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()} for pid in (first, second)]
        assert [sum("raw.mrd" in place for place in each) for each in spools] == [1, 1]
        os.kill(second, signal.SIGKILL)
        for thread in threads:
            thread.join()
        heard.wait("scan.done", n=2)
        heard.close()
        assert first in process.child_pids("edge.worker")
    assert [(each.problem, len(each.images)) for each in replayed] == [("", 4), ("", 4)]
    for path in state.glob("results/*/volume.npy"):
        np.testing.assert_array_equal(np.load(path), undisturbed)
    with closing(sqlite3.connect(state / "ledger.sqlite")) as db:
        assert db.execute("SELECT count(*) FROM deaths").fetchone() == (1,)  # the other scan is not blamed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header"),
        (b"<ismrmrdHeader>", "XML"),
        (b"<!DOCTYPE a [<!ENTITY b 'c'>]><ismrmrdHeader/>", "DOCTYPE"),
    ],
)
def test_bad_headers_end_with_a_reason_and_a_close(daemon: DaemonProcess, content: bytes, reason: str) -> None:
    said, closed = talk(daemon, encode_config_file("scanside") + encode_header(content))
    assert closed
    assert any(reason in text for text in said), said


def test_readouts_with_nan_are_left_out_and_named(daemon: DaemonProcess, small_scan: Path) -> None:
    raw = open_raw(small_scan)
    readouts = list(raw.acquisitions())
    spoiled = bytearray(readouts[20])
    spoiled[382:386] = np.float32(np.nan).tobytes()  # the samples begin behind id and header, at 342
    readouts[20] = bytes(spoiled)
    content = encode_config_file("scanside") + encode_header(raw.header) + b"".join(readouts)
    said, closed = talk(daemon, content)
    assert closed
    assert any("1 of" in text and "not finite numbers" in text for text in said), said


def test_no_scan_is_taken_when_the_disk_is_nearly_full(tmp_path: Path, small_scan: Path) -> None:
    config = tmp_path / "scanside.toml"
    config.write_text("[disk]\nmin_free_mib = 1000000000\n")
    with DaemonProcess(tmp_path / "state", tmp_path / "log", ["--config", str(config)]) as process:
        said, closed = talk(process, encode_config_file("scanside") + encode_header(open_raw(small_scan).header))
    assert closed
    assert any("no new scan is taken" in text and "MiB" in text for text in said)


def test_two_daemons_do_not_share_a_state_folder(daemon: DaemonProcess, tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match="another daemon"):
        DaemonProcess(tmp_path / "state", tmp_path / "log2")


def test_no_name_number_or_date_of_a_patient_leaves_the_dicom(
    daemon: DaemonProcess, listener: Listener, small_scan: Path, tmp_path: Path
) -> None:
    planted = {b"Simulated^Head": b"Zebrowski^Planted", b"</subjectInformation>": b"</subjectInformation>"}
    header = open_raw(small_scan).header
    for old, new in planted.items():
        header = header.replace(old, new)
    begin, end = header.index(b"<subjectInformation>"), header.index(b"</subjectInformation>")
    header = (
        header[:begin]
        + b"<subjectInformation><patientName>Zebrowski^Planted</patientName><patientID>PID778899</patientID>"
        + b"<patientBirthdate>1951-03-07</patientBirthdate><patientGender>F</patientGender>"
        + header[end:]
    )
    raw = open_raw(small_scan)
    content = encode_config_file("scanside") + encode_header(header) + b"".join(raw.acquisitions())
    broken = encode_config_file("scanside") + encode_header(header.replace(b"cartesian", b"Zebrowski"))
    said, _ = talk(daemon, content)
    also_said, _ = talk(daemon, broken)
    done = listener.wait("scan.done", "scan.failed", n=2)
    daemon.stop()
    secrets = ("PID778899", "1951-03-07", "19510307", "Planted", "Zebrowski")  # four digits come by chance
    state = tmp_path / "state"
    with closing(sqlite3.connect(state / "ledger.sqlite")) as db:
        ledger = "\n".join(db.iterdump())
    report = next(state.glob("results/*/report.json")).read_text()
    events = json.dumps([header for header, _ in listener.events])
    places = {"log": (tmp_path / "log").read_text(), "events": events, "ledger": ledger, "report": report}
    places["texts"] = " ".join(said + also_said)
    for place, text in places.items():
        for secret in secrets:
            assert secret not in text, (place, secret)
    dataset = pydicom.dcmread(next(state.glob("results/*/dicom/classical/0001.dcm")))
    assert str(dataset.PatientName) == "Zebrowski^Planted"  # the PACS must have it
    assert dataset.PatientID == "PID778899"
    assert len(done) == 2


def talk(process: DaemonProcess, content: bytes) -> tuple[list[str], bool]:
    """Send `content` and a CLOSE; return the texts that came back, and whether a CLOSE ended them."""
    texts: list[str] = []
    with socket.create_connection(("127.0.0.1", process.port)) as connection:
        connection.settimeout(WAIT_S)
        connection.sendall(content + encode_close())
        buffer = bytearray()
        while True:
            message = next_message(buffer)
            if message is None:
                chunk = connection.recv(1 << 16)
                if not chunk:
                    return texts, False
                buffer += chunk
                continue
            data = bytes(buffer[: message.end])
            del buffer[: message.end]
            if message.id is MessageId.CLOSE:
                return texts, True
            if message.id is MessageId.TEXT:
                texts.append(read_text(data, message))
            else:
                assert read_image(data, message).pixels.dtype == np.float32


def _until(found: Any) -> Any:
    until = time.monotonic() + WAIT_S
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return value
