"""The spool: nothing that was written is lost, and a restart knows how each stream ended."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge import mrd_write
from edge.mrd import ACQUISITION_HEADER, MessageId, read_acquisition, read_text
from edge.spool import Spool, new_scan_id
from recon.errors import DeliveryError, ScanError

READOUT = mrd_write.encode_acquisition(np.zeros((), ACQUISITION_HEADER), np.ones((2, 4), np.complex64))


def test_scan_ids_are_ulids_in_form_and_hold_no_time():
    ids = {new_scan_id() for _ in range(2000)}
    assert len(ids) == 2000
    assert {len(i) for i in ids} == {26}
    assert set("".join(ids)) == set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
    assert {i[0] for i in ids} == set("01234567")  # 128 bits; a time would make the first characters all alike


def test_what_is_appended_is_in_the_file_at_once_and_the_ending_beside_it(tmp_path):
    spool = Spool(tmp_path / "deep" / "spool")
    writer = spool.create()
    writer.append(b"abc")
    writer.append(memoryview(b"defg"))
    assert spool.path(writer.scan_id).read_bytes() == b"abcdefg"
    assert spool.state(writer.scan_id).ending is None
    writer.finish("failed", "a reason")
    writer.finish("complete")
    state = spool.state(writer.scan_id)
    assert (state.ending, state.reason, state.n_bytes) == ("failed", "a reason", 7)
    assert spool.scans() == [state]
    assert oct(spool.path(writer.scan_id).stat().st_mode & 0o777) == "0o600"
    assert oct(spool.path(writer.scan_id).parent.stat().st_mode & 0o777) == "0o700"


def test_a_reader_follows_a_growing_file_and_old_views_stay_good(tmp_path):
    spool = Spool(tmp_path)
    writer = spool.create()
    reader = spool.open(writer.scan_id)
    assert list(reader.messages()) == []
    writer.append(READOUT + READOUT[:50])
    (first,) = reader.messages()
    samples = read_acquisition(reader.buffer, first).samples
    writer.append(READOUT[50:] + mrd_write.encode_close())
    second, close = reader.messages()
    assert (second.start, close.id) == (len(READOUT), MessageId.CLOSE)
    np.testing.assert_array_equal(read_acquisition(reader.buffer, second).samples, samples)
    np.testing.assert_array_equal(samples, np.ones((2, 4)))
    assert [m.id for m in reader.messages()] == [MessageId.CLOSE]
    reader.close()
    reader.close()
    np.testing.assert_array_equal(samples, np.ones((2, 4)))
    writer.finish("complete")


def test_recovery_judges_scans_that_nobody_ended(tmp_path):
    spool = Spool(tmp_path)
    streams = {
        "interrupted": READOUT + READOUT[:99],
        "complete": READOUT + mrd_write.encode_close(),
        "failed": READOUT + b"\xff\xff",
    }
    ids = {}
    for ending, stream in streams.items():
        writer = spool.create()
        writer.append(stream)
        ids[writer.scan_id] = ending
    done = spool.create()
    done.finish("complete")
    again = Spool(tmp_path)
    recovered = again.recover()
    assert {s.scan_id: s.ending for s in recovered} == ids
    assert all(s.reason for s in recovered if s.ending != "complete")
    assert again.recover() == []
    assert {s.ending for s in again.scans()} == {"interrupted", "complete", "failed"}


def test_recovery_tidies_what_a_crash_left(tmp_path):
    spool = Spool(tmp_path)
    scan_id = spool.create().scan_id
    (tmp_path / new_scan_id()).mkdir()
    (tmp_path / f".deleted-{new_scan_id()}").mkdir()
    (tmp_path / "something of the site").mkdir()
    assert [s.scan_id for s in spool.scans()] == [scan_id]
    spool.recover()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([scan_id, "something of the site"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"ending": "odd"}', b'{"ending": "complete", "n_bytes": 99}'])
def test_a_state_that_a_power_cut_spoiled_counts_as_none(tmp_path, content):
    spool = Spool(tmp_path)
    writer = spool.create()
    writer.append(READOUT)
    writer.finish("complete")
    (tmp_path / writer.scan_id / "state.json").write_bytes(content)
    assert spool.state(writer.scan_id).ending is None
    assert [s.ending for s in spool.recover()] == ["interrupted"]


def test_kill_minus_9_loses_nothing_that_was_appended(tmp_path):
    """The child writes readouts and says how many; it is killed in the middle of one."""
    code = (
        "import sys; from pathlib import Path; from edge.spool import Spool; w = Spool(Path(sys.argv[1])).create()\n"
        "data = sys.stdin.buffer.read()\n"
        "while True:\n w.append(data); print(w.n_bytes, flush=True)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    child.stdin.write(READOUT)
    child.stdin.close()
    told = [int(child.stdout.readline()) for _ in range(50)][-1]
    child.send_signal(signal.SIGKILL)
    child.stdout.read()
    child.stdout.close()
    child.wait()
    spool = Spool(tmp_path)
    (state,) = spool.recover()
    assert state.ending == "interrupted"
    assert state.n_bytes >= told
    reader = spool.open(state.scan_id)
    messages = list(reader.messages())
    assert len(messages) >= 50
    assert all(bytes(reader.buffer[m.start : m.end]) == READOUT for m in messages)
    reader.close()


def test_a_full_disk_is_said_and_what_was_written_is_kept(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    writer = spool.create()
    room = 100
    write = os.write

    def limited(file, data):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "full")
        n = write(file, data[:room])
        room -= n
        return n

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(DeliveryError, match="No space left on device") as caught:
        writer.append(b"x" * 150)
    assert "after 100 bytes" in str(caught.value)
    monkeypatch.undo()
    writer.finish("failed", "the disk is full")
    assert spool.path(writer.scan_id).read_bytes() == b"x" * 100


def test_a_long_stream_is_read_in_windows_and_a_longer_message_widens_them(tmp_path, monkeypatch):
    monkeypatch.setattr("edge.spool._WINDOW", mmap.ALLOCATIONGRANULARITY)
    spool = Spool(tmp_path)
    writer = spool.create()
    texts = ["x" * n for n in (10, 3000, 5000, 20, 40000, 7, *range(900, 930))]
    for text in texts:
        writer.append(mrd_write.encode_text(text))
    reader = spool.open(writer.scan_id)
    found, places = [], []
    for message in reader.messages():
        found.append(read_text(reader.buffer, message))
        places.append(reader.base + message.start)
    assert found == texts
    assert places == [sum(len(mrd_write.encode_text(text)) for text in texts[:n]) for n in range(len(texts))]
    assert reader.base > 0
    writer.append(mrd_write.encode_text("more")[:5])
    assert list(reader.messages()) == []
    writer.append(mrd_write.encode_text("more")[5:])
    assert [read_text(reader.buffer, message) for message in reader.messages()] == ["more"]
    writer.finish("complete")


def test_the_last_of_the_disk_is_kept_for_results(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    writer = spool.create()
    writer.append(b"x" * 100)
    real = os.fstatvfs(writer._file)
    nearly_full = SimpleNamespace(f_bavail=(70 << 20) // real.f_frsize, f_frsize=real.f_frsize, f_blocks=real.f_blocks)
    monkeypatch.setattr("os.fstatvfs", lambda file: nearly_full)
    writer.append(b"x" * 100)
    with pytest.raises(DeliveryError, match=r"disk is full: 70 MiB are left and 64 MiB .* after 200 bytes"):
        writer.append(b"x" * (7 << 20))
    monkeypatch.undo()
    writer.finish("failed", "the disk is full")
    assert spool.path(writer.scan_id).read_bytes() == b"x" * 200


def test_deletion_and_free_space(tmp_path):
    spool = Spool(tmp_path)
    writer = spool.create()
    reader = spool.open(writer.scan_id)
    writer.append(READOUT)
    assert len(list(reader.messages())) == 1
    spool.delete(writer.scan_id)
    assert bytes(reader.buffer) == READOUT  # whoever still reads is not disturbed
    reader.close()
    assert list(tmp_path.iterdir()) == []
    assert spool.free_bytes() > 0
    with pytest.raises(ScanError, match="not in the spool"):
        spool.delete(writer.scan_id)


def test_a_spool_whose_folder_is_gone_says_so(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.root.rmdir()
    with pytest.raises(DeliveryError, match="No such file"):
        spool.create()


@pytest.mark.parametrize("name", ["..", "../x", "", "a" * 26, "8" + "0" * 25, "0" * 25, "0" * 26 + "/.."])
def test_only_scan_ids_lead_into_the_spool(tmp_path, name):
    with pytest.raises(ScanError, match="not a scan id"):
        Spool(tmp_path).path(name)
