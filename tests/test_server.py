"""The MRD server over real sockets: each failure of python-ismrmrd-server, and what a session may cost."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edge import mrd, mrd_write
from edge.mrd import MessageId
from edge.server import MrdServer
from edge.session import ServerLimits
from edge.spool import Spool
from recon.errors import DeliveryError, ScanError

HEADER = mrd_write.encode_header(b"<ismrmrdHeader/>")
CONFIG = mrd_write.encode_config_file("scanside")
READOUT = mrd_write.encode_acquisition(np.zeros((), mrd.ACQUISITION_HEADER), np.ones((4, 64), np.complex64))
CLOSE = mrd_write.encode_close()
INFO = mrd_write.ImageInfo(
    (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0), 1, 1, "series"
)


def last_readout() -> bytes:
    head = np.zeros((), mrd.ACQUISITION_HEADER)
    head["flags"] = mrd.LAST_IN_SLICE
    return mrd_write.encode_acquisition(head, np.ones((4, 64), np.complex64))


class Listening:
    """Remembers every call, and finishes each session when its scan ends; `answer` is sent before."""

    def __init__(self) -> None:
        self.calls = []
        self.sessions = {}
        self.answer = []
        self.finishes = True
        self.refusal = None
        self.tasks = set()
        self.errors = []

    async def admit(self):
        if self.refusal is not None:
            raise ScanError(self.refusal)

    def scan_opened(self, session, scan_id, config, header):
        self.sessions[scan_id] = session
        self.calls.append(("opened", scan_id, config, header))

    def scan_grew(self, scan_id, n_bytes, n_readouts):
        self.calls.append(("grew", scan_id, n_bytes, n_readouts))

    def scan_text(self, scan_id, text):
        self.calls.append(("text", scan_id, text))

    def scan_closed(self, scan_id, ending, reason):
        self.calls.append(("closed", scan_id, ending, reason))
        if self.finishes:
            task = asyncio.ensure_future(self._finish(self.sessions[scan_id]))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _finish(self, session):
        try:
            for message in self.answer:
                await session.send(message)
        except DeliveryError as error:
            self.errors.append(error)
        await session.finish()

    def of(self, kind):
        return [call for call in self.calls if call[0] == kind]

    @property
    def ending(self):
        ((_, _, ending, reason),) = self.of("closed")
        return ending, reason


class Running:
    """A server in a thread of its own with an event loop of its own."""

    def __init__(self, folder: Path, **limits) -> None:
        self.listener = Listening()
        self.spool = Spool(folder / "spool")
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = self.call(self._start(ServerLimits(**{"linger_s": 0.5, **limits})))
        self.clients = []

    async def _start(self, limits):
        server = MrdServer("127.0.0.1", 0, self.spool, self.listener, limits)
        await server.start()
        return server

    def call(self, work, timeout=20):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def connect(self, timeout=10):
        client = socket.create_connection(("127.0.0.1", self.server.port))
        client.settimeout(timeout)
        self.clients.append(client)
        return client

    def talk(self, data, half_close=False, timeout=10):
        """Send `data` and return all messages that come back until the server closes."""
        client = self.connect(timeout)
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        return replies(client)

    def settle(self, condition, timeout=10):
        """Wait until `condition` holds; the event loop's thread is another."""

        async def wait():
            while not condition():
                await asyncio.sleep(0.005)

        self.call(asyncio.wait_for(wait(), timeout))

    def stop(self):
        for client in self.clients:
            client.close()
        try:
            self.call(self.server.stop(grace_s=5))
            broken = self.server.broken
            assert not (broken.done() and broken.exception()), broken.exception()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)
            self.loop.close()


def replies(client):
    """Read until the server closes; (id, text or bytes) of each message."""
    data = b""
    while chunk := client.recv(1 << 16):
        data += chunk
    return parsed(data)


def parsed(data):
    found = []
    end = 0
    for message in mrd.messages(data):
        is_text = message.id is MessageId.TEXT
        found.append((message.id, mrd.read_text(data, message) if is_text else data[message.body : message.end]))
        end = message.end
    assert end == len(data), "the server sent something after CLOSE or half a message"
    return found


@pytest.fixture
def running(tmp_path):
    runs = []

    def start(**limits):
        runs.append(Running(tmp_path, **limits))
        return runs[-1]

    yield start
    for run in runs:
        run.stop()


def is_closed(found):
    return bool(found) and found[-1][0] is MessageId.CLOSE


def errors(found):
    return [text for kind, text in found if kind is MessageId.TEXT and text.startswith("ERROR   ")]


# The seven ways in which the reference server fails


def test_1_an_idle_client_blocks_nobody(running):
    run = running()
    idle = [run.connect() for _ in range(3)]
    idle[1].sendall(CONFIG + HEADER + READOUT[:100])
    assert is_closed(run.talk(CONFIG + HEADER + READOUT + CLOSE))
    run.settle(lambda: run.listener.of("closed"))
    assert [c[2] for c in run.listener.of("closed")] == ["complete"]


def test_2_an_unknown_id_is_answered_with_a_reason_and_close(running):
    run = running()
    found = run.talk(CONFIG + HEADER + READOUT + struct.pack("<H", 1030) + bytes(50))
    assert is_closed(found)
    (reason,) = errors(found)
    assert "1030 (n-d array)" in reason
    ending, why = run.listener.ending
    assert ending == "failed"
    assert why in reason
    run.settle(lambda: run.spool.scans()[0].ending == "failed")
    assert run.spool.scans()[0].reason == why


@pytest.mark.parametrize("cut", [1, 100, 350, len(READOUT) - 1])
def test_3_a_truncated_acquisition_leaves_all_that_came(running, cut):
    run = running()
    sent = CONFIG + HEADER + READOUT * 3 + READOUT[:cut]
    found = run.talk(sent, half_close=True)
    assert is_closed(found)
    assert "CLOSE" in errors(found)[0]
    assert run.listener.ending[0] == "interrupted"
    assert run.listener.of("grew")[-1][2:] == (len(sent), 3)
    (state,) = run.spool.scans()
    assert run.spool.path(state.scan_id).read_bytes() == sent


@pytest.mark.parametrize("config", [CONFIG, mrd_write.encode_config_text("<gadgetron/>"), b""])
def test_4_close_right_after_the_configuration_is_answered_with_close(running, config):
    run = running()
    assert run.talk(config + CLOSE) == [(MessageId.CLOSE, b"")]
    assert run.listener.calls == []
    assert run.spool.scans() == []


@pytest.mark.parametrize("name", ["json", "../x", "xmlrpc.server", "/etc/passwd", "\x1b[31m" + "x" * 900])
def test_5_a_configuration_imports_and_opens_nothing(running, name):
    run = running()
    before = set(sys.modules)
    opened = []
    is_watching = True

    def audit(event, args):
        if is_watching and event == "open" and isinstance(args[0], str) and str(run.spool.root) not in args[0]:
            opened.append(args[0])

    sys.addaudithook(audit)  # it cannot be taken away again
    found = run.talk(mrd_write.encode_config_file(name) + HEADER + READOUT + CLOSE)
    is_watching = False
    assert is_closed(found)
    info = found[0][1]
    assert info.startswith("INFO    asked for configuration ")
    assert info.endswith("not known here: the automatic reconstruction is used")
    assert "\x1b" not in info
    assert len(info) < 200
    assert set(sys.modules) == before
    assert opened == []
    assert run.listener.ending == ("complete", "")


def test_6_images_arrive_as_float32_with_one_scale_for_all(running):
    run = running()
    pixels = [np.full((3, 4), value, np.float32) for value in (1.0, 1000.0)]
    run.listener.answer = [mrd_write.encode_image(p, INFO) for p in pixels]
    client = run.connect()
    client.sendall(CONFIG + HEADER + READOUT + CLOSE)
    data = b""
    while chunk := client.recv(1 << 16):
        data += chunk
    images = [mrd.read_image(data, m) for m in mrd.messages(data) if m.id is MessageId.IMAGE]
    assert [int(image.header["data_type"]) for image in images] == [5, 5]
    for image, sent in zip(images, pixels, strict=True):
        np.testing.assert_array_equal(image.pixels[0, 0], sent)


def test_7_nothing_is_written_outside_the_spool(running, tmp_path, monkeypatch):
    run = running()
    monkeypatch.chdir(tmp_path)
    assert is_closed(run.talk(CONFIG + HEADER + READOUT + CLOSE))
    run.settle(lambda: run.spool.scans()[0].ending is not None)
    (scan,) = (tmp_path / "spool").iterdir()
    assert {str(p.relative_to(scan)) for p in scan.iterdir()} == {"raw.mrd", "state.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["spool"]


# What a scan's session is


def test_a_whole_scan_reaches_spool_and_listener(running):
    run = running()
    sent = CONFIG + HEADER + READOUT * 50 + CLOSE
    found = run.talk(sent)
    assert found[0] == (
        MessageId.TEXT, "INFO    asked for configuration scanside: the automatic reconstruction is used",
    )  # fmt: skip
    assert found[1:] == [(MessageId.CLOSE, b"")]
    opened = run.listener.calls[0]
    scan_id = opened[1]
    assert opened == ("opened", scan_id, "scanside", b"<ismrmrdHeader/>")
    assert run.listener.calls[-1] == ("closed", scan_id, "complete", "")
    assert run.listener.calls[-2] == ("grew", scan_id, len(sent), 50)
    assert run.spool.path(scan_id).read_bytes() == sent
    run.settle(lambda: run.spool.state(scan_id).ending == "complete")


def test_every_split_of_a_stream_is_read_alike(running):
    run = running()
    sent = CONFIG + HEADER + READOUT + CLOSE
    client = run.connect()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(len(sent)):
        client.sendall(sent[at : at + 1])
    assert is_closed(replies(client))
    assert run.listener.of("grew")[-1][2:] == (len(sent), 1)


def test_the_spool_has_the_bytes_before_the_listener_hears_of_them(running):
    run = running()
    sizes = []
    grew = run.listener.scan_grew

    def check(scan_id, n_bytes, n_readouts):
        sizes.append((n_bytes, run.spool.path(scan_id).stat().st_size))
        grew(scan_id, n_bytes, n_readouts)

    run.listener.scan_grew = check
    run.talk(CONFIG + HEADER + READOUT * 2000 + CLOSE)
    assert len(sizes) > 2
    assert all(told <= written for told, written in sizes)


def test_readouts_are_told_soon_even_if_nothing_more_comes(running):
    run = running()
    client = run.connect()
    client.sendall(CONFIG + HEADER + READOUT)
    run.settle(lambda: run.listener.of("grew"))
    client.sendall(READOUT)
    run.settle(lambda: run.listener.of("grew")[-1][3] == 2)
    client.sendall(CLOSE)
    assert is_closed(replies(client))


def test_the_last_readout_of_a_slice_is_told_at_once(running, monkeypatch):
    monkeypatch.setattr("edge.session._GREW_S", 1e9)
    run = running()
    client = run.connect()
    client.sendall(CONFIG + HEADER + READOUT + READOUT + last_readout())
    run.settle(lambda: run.listener.of("grew"))
    assert run.listener.of("grew")[-1][3] == 3
    client.sendall(CLOSE)
    assert is_closed(replies(client))


def test_waveforms_first_json_text_and_images_in_between(running):
    run = running()
    waveform = mrd_write.encode_waveform(np.zeros((), mrd.WAVEFORM_HEADER), np.ones((2, 9)))
    text = mrd_write.encode_text(json.dumps({"parameters": {"config": "x"}}))
    image = mrd_write.encode_image(np.ones((3, 3)), INFO)
    sent = CONFIG + text + HEADER + text + waveform + waveform + READOUT + image + READOUT + CLOSE
    assert is_closed(run.talk(sent))
    assert run.listener.of("grew")[-1][2:] == (len(sent), 2)
    assert [json.loads(c[2]) for c in run.listener.of("text")] == [{"parameters": {"config": "x"}}] * 2
    assert run.listener.calls[0][0] == "opened"  # texts that came before it are handed on after it


@pytest.mark.parametrize("ending", [b"", b"\0"])
def test_nul_ended_and_plain_strings(running, ending):
    run = running()
    body = b"<ismrmrdHeader/>" + ending
    run.talk(b"\x02\0" + struct.pack("<I", 3 + len(ending)) + b"abc" + ending
             + b"\x03\0" + struct.pack("<I", len(body)) + body + CLOSE)  # fmt: skip
    assert run.listener.of("opened")[0][2:] == ("a configuration text", b"<ismrmrdHeader/>")
    assert run.listener.ending[0] == "complete"


@pytest.mark.parametrize("bit", [53, 54])
def test_compressed_readouts_are_stepped_over(running, bit):
    run = running()
    head = np.zeros((), mrd.ACQUISITION_HEADER)
    head["flags"], head["number_of_samples"], head["active_channels"] = mrd.flag(bit), 100, 4
    squeezed = b"\xf0\x03" + head.tobytes() + struct.pack("<I", 77) + b"\xff" * 77
    assert is_closed(run.talk(CONFIG + HEADER + squeezed + READOUT + squeezed + CLOSE))
    assert run.listener.of("grew")[-1][3] == 3
    assert run.listener.ending == ("complete", "")


def test_a_query_is_answered_only_to_its_asker_and_the_session_goes_on(running):
    run = running()
    other = run.connect()
    found = run.talk(mrd_write.encode_query(77, "what?") + CONFIG + HEADER + READOUT + CLOSE)
    kind, body = found[0]
    assert kind is MessageId.RESPONSE
    correlation, n = struct.unpack_from("<QQ", body)
    assert correlation == 77
    assert "not known" in json.loads(body[16 : 16 + n])["error"]
    assert is_closed(found)
    assert run.listener.ending == ("complete", "")
    other.sendall(CLOSE)
    assert replies(other) == [(MessageId.CLOSE, b"")]


def test_data_without_a_header_opens_the_scan_and_a_late_header_breaks_it(running):
    run = running()
    found = run.talk(CONFIG + READOUT + HEADER + READOUT + CLOSE)
    assert is_closed(found)
    assert "header came after" in errors(found)[0]
    assert run.listener.of("opened")[0][3] == b""
    assert run.listener.ending[0] == "failed"


def test_a_header_that_was_cut_off_is_a_scan_that_is_heard_of(running):
    run = running()
    run.talk(CONFIG + HEADER[:9], half_close=True)
    assert [c[0] for c in run.listener.calls] == ["opened", "grew", "closed"]
    assert run.listener.ending[0] == "interrupted"


# Bounds


def test_a_header_that_claims_4_gib_is_refused_at_once_with_little_memory(running):
    run = running()
    found = run.talk(CONFIG + struct.pack("<HI", 3, 2**32 - 1) + b"x" * 1000)
    assert is_closed(found)
    assert "HEADER claims 4294967295 bytes" in errors(found)[0]
    assert run.listener.ending[0] == "failed"


def test_much_text_before_any_header_is_refused(running):
    run = running(config_bytes=10_000)
    found = run.talk(mrd_write.encode_text("x" * 3000) * 10)
    assert is_closed(found)
    assert "a scan must start sooner" in errors(found)[0]
    assert run.listener.calls == []


def test_a_scan_longer_than_allowed_is_ended_and_kept(running):
    run = running(scan_bytes=50_000)
    found = run.talk(CONFIG + HEADER + READOUT * 100)
    assert "exceeds 50000 bytes" in errors(found)[0]
    assert run.listener.ending[0] == "failed"
    assert run.spool.scans()[0].n_bytes <= 50_000


def test_a_refused_scan_is_told_why_and_leaves_nothing(running):
    run = running()
    run.listener.refusal = "the disk is 95 % full; at most 90 % may be"
    found = run.talk(CONFIG + HEADER + READOUT * 500)
    assert is_closed(found)
    assert errors(found) == ["ERROR   the disk is 95 % full; at most 90 % may be"]
    assert run.spool.scans() == []
    assert run.talk(CONFIG + CLOSE) == [(MessageId.CLOSE, b"")]


def test_one_session_too_many_is_told_so(running):
    run = running(sessions=2)
    first, second = run.connect(), run.connect()
    run.settle(lambda: run.server.n_sessions == 2)
    found = run.talk(CONFIG + HEADER + READOUT)
    assert errors(found) == ["ERROR   all 2 sessions are in use; try again later"]
    assert is_closed(found)
    first.sendall(CLOSE)
    replies(first)
    first.close()
    run.settle(lambda: run.server.n_sessions == 1)
    assert is_closed(run.talk(CONFIG + HEADER + READOUT + CLOSE))
    second.close()


def test_many_sessions_at_once_each_get_their_own_scan(running):
    run = running()
    clients = [run.connect() for _ in range(6)]
    streams = [CONFIG + HEADER + READOUT * (5 + n) + CLOSE for n in range(6)]
    for piece in range(0, max(map(len, streams)), 3000):
        for client, stream in zip(clients, streams, strict=True):
            client.sendall(stream[piece : piece + 3000])
    assert all(is_closed(replies(client)) for client in clients)
    found = sorted(run.spool.path(s.scan_id).read_bytes() for s in run.spool.scans())
    assert found == sorted(streams)


def test_silence_is_ended_with_a_reason(running):
    run = running(first_s=0.1, idle_s=0.2)
    found = replies(run.connect())
    assert errors(found) == ["ERROR   nothing was received for 0.1 s"]
    assert is_closed(found)
    client = run.connect()
    client.sendall(CONFIG + HEADER + READOUT)
    found = replies(client)
    assert errors(found) == ["ERROR   nothing was received for 0.2 s"]
    assert is_closed(found)
    assert run.listener.ending == ("interrupted", "nothing was received for 0.2 s")


def test_a_client_that_takes_no_replies_costs_a_bounded_queue_and_blocks_nobody(running):
    run = running(send_bytes=1 << 20, send_s=0.5)
    run.listener.answer = [mrd_write.encode_image(np.ones((512, 512)), INFO)] * 60
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.connect(("127.0.0.1", run.server.port))
    run.clients.append(stalled)
    stalled.sendall(CONFIG + HEADER + READOUT + CLOSE)
    run.settle(lambda: run.listener.of("closed"))
    session = next(iter(run.listener.sessions.values()))
    run.listener.answer = []
    assert is_closed(run.talk(CONFIG + HEADER + READOUT + CLOSE))
    assert session._n_waiting <= (1 << 20) + 512 * 512 * 4 + 4096
    run.settle(lambda: run.listener.errors)
    run.settle(lambda: run.server.n_sessions == 0)


def test_a_daemon_that_never_answers_does_not_keep_the_client_for_ever(running):
    run = running(answer_s=0.2)
    run.listener.finishes = False
    found = run.talk(CONFIG + HEADER + READOUT + CLOSE)
    assert errors(found) == ["ERROR   no answer was ready within 0.2 s"]
    assert is_closed(found)


def test_a_dead_peer_is_an_interrupted_scan_and_replies_to_it_are_refused(running):
    run = running()
    run.listener.finishes = False
    client = run.connect()
    client.sendall(CONFIG + HEADER + READOUT * 3)
    run.settle(lambda: run.listener.of("grew") and run.listener.of("grew")[-1][3] == 3)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()  # a reset, as of a client that was killed
    run.settle(lambda: run.listener.of("closed"))
    assert run.listener.ending[0] == "interrupted"
    (session,) = run.listener.sessions.values()

    async def send_until_refused():
        for _ in range(100):
            await session.send(READOUT)
            await asyncio.sleep(0.01)

    with pytest.raises(DeliveryError, match="client has left"):
        run.call(send_until_refused())
    run.call(session.finish())
    run.settle(lambda: run.server.n_sessions == 0)


def test_a_full_disk_ends_the_scan_with_a_reason_and_keeps_what_came(running, monkeypatch):
    run = running()
    write, room = os.write, 20_000

    def limited(file, data):
        nonlocal room
        if not os.readlink(f"/proc/self/fd/{file}").endswith("raw.mrd"):
            return write(file, data)
        if not room:
            raise OSError(errno.ENOSPC, "full")
        n = write(file, data[:room])
        room -= n
        return n

    monkeypatch.setattr(os, "write", limited)
    found = run.talk(CONFIG + HEADER + READOUT * 200)
    assert is_closed(found)
    assert "No space left on device" in errors(found)[0]
    assert run.listener.ending[0] == "failed"
    assert run.spool.scans()[0].n_bytes == 20_000


def test_a_disk_that_hangs_holds_only_its_own_session(running, monkeypatch):
    run = running()
    hanging, go_on = threading.Event(), threading.Event()
    write = os.write

    def slow(file, data):
        if bytes(data[-4:]) == b"HANG":
            hanging.set()
            go_on.wait(60)
        return write(file, data)

    monkeypatch.setattr(os, "write", slow)
    stuck = run.connect()
    stuck.sendall(CONFIG + HEADER + READOUT)
    run.settle(lambda: run.listener.of("grew"))
    stuck.sendall(mrd_write.encode_text("x")[:2] + struct.pack("<I", 8) + b"....HANG")
    assert hanging.wait(10)
    try:
        assert is_closed(run.talk(CONFIG + HEADER + READOUT + CLOSE, timeout=5))
    finally:
        go_on.set()
    stuck.sendall(CLOSE)
    assert is_closed(replies(stuck))


def test_stop_ends_sessions_with_a_reason(running):
    run = running()
    client = run.connect()
    client.sendall(CONFIG + HEADER + READOUT)
    run.settle(lambda: run.listener.of("grew"))
    run.call(run.server.stop())
    found = replies(client)
    assert "ERROR   the server is stopping" in errors(found)
    assert is_closed(found)
    assert run.listener.ending[0] == "interrupted"
    assert run.spool.scans()[0].ending == "interrupted"


def test_the_daemon_may_end_a_session_early(running):
    run = running()
    client = run.connect()
    client.sendall(CONFIG + HEADER + READOUT)
    run.settle(lambda: run.listener.of("grew"))
    (session,) = run.listener.sessions.values()
    run.call(session.text("WARNING", "the header cannot be used"))
    run.call(session.finish())
    found = replies(client)
    assert (MessageId.TEXT, "WARNING the header cannot be used") in found
    assert is_closed(found)
    run.settle(lambda: run.listener.of("closed"))
    assert run.listener.ending[0] == "interrupted"
    with pytest.raises(DeliveryError):
        run.call(session.send(READOUT))


def test_a_bug_in_a_session_is_handed_to_the_daemon_and_others_go_on(tmp_path):
    run = Running(tmp_path)
    try:
        opened = run.listener.scan_opened
        run.listener.scan_opened = lambda *args: 1 // 0
        assert not is_closed(run.talk(CONFIG + HEADER + READOUT))
        run.settle(run.server.broken.done)
        assert isinstance(run.server.broken.exception(), ZeroDivisionError)
        run.listener.scan_opened = opened
        assert is_closed(run.talk(CONFIG + HEADER + READOUT + CLOSE))
        assert {s.ending for s in Spool(run.spool.root).recover()} == {"interrupted"}
    finally:
        with pytest.raises(AssertionError):
            run.stop()


def test_a_port_in_use_is_said(running, tmp_path):
    run = running()

    async def second():
        await MrdServer("127.0.0.1", run.server.port, run.spool, run.listener).start()

    with pytest.raises(DeliveryError, match="cannot be listened on"):
        run.call(second())
