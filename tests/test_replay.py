"""The replay client against our server: what it sends, what it saves, and how it ends."""

from __future__ import annotations

import argparse
import socket
import threading

import ismrmrd
import numpy as np
import pytest

from edge import mrd, mrd_write, replay
from edge.rawfile import open_raw
from edge.undersample import undersample
from recon.errors import AcquisitionError, DeliveryError
from tests.test_rawfile import write_file, xml
from tests.test_server import Running


def image(series, at, value, shape=(3, 4), **more):
    info = mrd_write.ImageInfo(
        (0.0, 0.0, 5.0 * at), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (4.0, 3.0, 5.0), series, at + 1,
        f"series {series}", slice=at, **more,
    )  # fmt: skip
    return mrd_write.encode_image(np.full(shape, value, np.float32), info)


@pytest.fixture
def run(tmp_path):
    running = Running(tmp_path / "server")
    yield running
    running.stop()


def command(*words):
    parser = argparse.ArgumentParser()
    replay.configure(parser)
    return replay.run(parser.parse_args([str(w) for w in words]))


def test_a_file_is_streamed_and_its_images_saved(run, tmp_path, capsys):
    write_file(tmp_path / "a.h5")
    # slices out of order, two series, as a server may send them
    run.listener.answer = [image(1, 1, 11), image(1, 0, 10), image(2, 0, 20), image(2, 1, 21)]
    out = tmp_path / "out"
    assert command(tmp_path / "a.h5", "--to", f"127.0.0.1:{run.server.port}", "--out", out) == 0
    (state,) = run.spool.scans()
    sent = open_raw(run.spool.path(state.scan_id))
    raw = open_raw(tmp_path / "a.h5")
    assert list(sent.acquisitions()) == list(raw.acquisitions())
    assert list(sent.waveforms()) == list(raw.waveforms())
    assert sent.header == raw.header
    first, second = np.load(out / "series_1.npy"), np.load(out / "series_2.npy")
    assert (first.dtype, first.shape) == (np.float32, (2, 3, 4))
    assert first[:, 0, 0].tolist() == [10, 11]
    assert second[:, 0, 0].tolist() == [20, 21]
    with ismrmrd.Dataset(str(out / "images.h5"), mode="r") as file:
        read = file.read_image("image_1", 1)
        np.testing.assert_array_equal(read.data[0, 0], first[1])
        assert ismrmrd.Meta.deserialize(read.attribute_string)["SeriesDescription"] == "series 1"
    captured = capsys.readouterr()
    assert "41 readouts sent" in captured.out
    assert "4 images back" in captured.out
    assert "INFO    asked for configuration scanside" in captured.err


def test_lines_are_dropped_before_they_are_sent(run, tmp_path):
    write_file(tmp_path / "a.h5")
    run.listener.answer = [image(1, 0, 1)]
    words = (tmp_path / "a.h5", "--to", f"127.0.0.1:{run.server.port}", "--accelerate", 4, "--acs", 4)
    assert command(*words) == 0
    sent = open_raw(run.spool.path(run.spool.scans()[0].scan_id))
    expected = undersample(open_raw(tmp_path / "a.h5"), 4, 4)
    assert list(sent.acquisitions()) == list(expected.acquisitions())
    assert sent.header == expected.header


def test_no_images_is_a_failure_with_a_reason(run, tmp_path, capsys):
    write_file(tmp_path / "a.h5")
    assert command(tmp_path / "a.h5", "--to", f"127.0.0.1:{run.server.port}", "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "scanside replay: the server sent no images"
    assert not (tmp_path / "out").exists()


def test_a_refusal_is_shown(run, tmp_path, capsys):
    write_file(tmp_path / "a.h5")
    run.listener.refusal = "the disk is full"
    assert command(tmp_path / "a.h5", "--to", f"127.0.0.1:{run.server.port}") == 1
    assert "ERROR   the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--to", "nowhere"], "HOST:PORT is needed"),
        (["--to", "127.0.0.1:99999"], "HOST:PORT is needed"),
        (["--accelerate", "0"], "R from 1"),
        (["--rate", "fast"], "max, real, or a number"),
        (["--rate", "-3"], "max, real, or a number"),
    ],
)
def test_wrong_use_is_told_apart(tmp_path, capsys, words, reason):
    write_file(tmp_path / "a.h5")
    assert command(tmp_path / "a.h5", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_a_missing_file_is_wrong_use_and_a_useless_one_a_failure(tmp_path, capsys):
    assert command(tmp_path / "a.h5") == 2
    (tmp_path / "b.h5").write_bytes(b"nothing")
    assert command(tmp_path / "b.h5") == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_nobody_listening_is_said(tmp_path, monkeypatch):
    write_file(tmp_path / "a.h5")
    monkeypatch.setattr(replay, "_CONNECT_TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DeliveryError, match="no server answers"):
        replay.stream_file(open_raw(tmp_path / "a.h5"), "127.0.0.1", port)


def serve_once(answer, reads=True):
    """A server that takes all, sends `answer` and hangs up; returns its port and thread."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listening, listening.accept()[0] as connection:
            connection.settimeout(10)
            data = b""
            while reads and not data.endswith(mrd_write.encode_close()):
                data += connection.recv(1 << 16)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return listening.getsockname()[1], thread


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (image(1, 0, 1), "ended the connection without CLOSE"),
        (image(1, 0, 1) + b"\xff\xff", "cannot be read: message id 65535"),
        (image(1, 0, 1)[:-3], "without CLOSE"),
    ],
)
def test_a_broken_answer_is_a_failure_that_keeps_whole_images(tmp_path, answer, problem):
    write_file(tmp_path / "a.h5")
    port, thread = serve_once(answer)
    result = replay.stream_file(open_raw(tmp_path / "a.h5"), "127.0.0.1", port)
    thread.join(10)
    assert problem in result.problem
    assert len(result.images) == (0 if answer == image(1, 0, 1)[:-3] else 1)


def test_a_silent_server_is_given_up(tmp_path):
    write_file(tmp_path / "a.h5")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        result = replay.stream_file(open_raw(tmp_path / "a.h5"), "127.0.0.1", listening.getsockname()[1], answer_s=0.2)
    assert result.problem == "the server fell silent"


def test_rates(tmp_path):
    write_file(tmp_path / "a.h5", stamp=4)
    raw = open_raw(tmp_path / "a.h5")
    assert replay.times_due(raw, "max") is None
    assert replay.times_due(raw, "100")[:3] == pytest.approx([0, 0.01, 0.02])
    assert replay.times_due(raw, "real")[:3] == pytest.approx([0, 0.004, 0.008])
    vendor = b"<acquisitionSystemInformation><systemVendor>SIEMENS</systemVendor></acquisitionSystemInformation>"
    siemens = xml().replace(b"<encoding>", vendor + b"<encoding>", 1)
    write_file(tmp_path / "b.h5", stamp=4, header=siemens)
    assert replay.times_due(open_raw(tmp_path / "b.h5"), "real")[:3] == pytest.approx([0, 0.01, 0.02])
    write_file(tmp_path / "c.h5", stamp=0)
    assert replay.times_due(open_raw(tmp_path / "c.h5"), "real")[:3] == pytest.approx(
        [0, 0.01, 0.02]
    )  # TR 20, 2 slices
    write_file(tmp_path / "d.h5", stamp=0, header=xml().replace(b"<TR>20</TR>", b""))
    with pytest.raises(AcquisitionError, match="neither time stamps nor TR"):
        replay.times_due(open_raw(tmp_path / "d.h5"), "real")


def test_readouts_wait_until_they_are_due(run, tmp_path):
    write_file(tmp_path / "a.h5", n_lines=4)
    raw = open_raw(tmp_path / "a.h5")
    result = replay.stream_file(raw, "127.0.0.1", run.server.port, due_s=[0.05 * n for n in range(len(raw.heads))])
    assert result.sent_s >= 0.05 * (len(raw.heads) - 1)  # a lower bound, however slow the machine is
    assert result.n_readouts == len(raw.heads) == 9


def taken(*messages):
    return [mrd.read_image(m, mrd.next_message(m)) for m in messages]


def test_several_repetitions_stand_before_the_slices():
    images = taken(*(image(1, at, 10 * r + at, repetition=r) for at in (1, 0) for r in (2, 0, 1)))
    (stack,) = replay.series(images).values()
    assert stack.shape == (3, 2, 3, 4)
    assert stack[:, :, 0, 0].tolist() == [[0, 1], [10, 11], [20, 21]]


def test_one_image_may_hold_all_slices():
    (stack,) = replay.series(taken(image(1, 0, 5, shape=(6, 3, 4)))).values()
    assert stack.shape == (6, 3, 4)


def test_images_of_one_series_must_have_one_size():
    with pytest.raises(AcquisitionError, match="series 1 differ in size"):
        replay.series(taken(image(1, 0, 5), image(1, 1, 5, shape=(4, 4))))
