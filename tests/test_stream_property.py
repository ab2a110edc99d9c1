"""Streams that were flipped, cut, grown, doubled and spliced: never a hang, never a bug, always a reason and CLOSE."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge import mrd, mrd_write
from edge.framer import Framer
from edge.mrd import MessageId
from recon.errors import StreamError
from tests.test_server import INFO, Running, errors, is_closed

LIMITS = mrd.Limits(text_bytes=10_000, attribute_bytes=5_000, acquisition_bytes=50_000, image_bytes=50_000)


def acquisition(n_coils, n_samples, n_dims=0, flags=0):
    head = np.zeros((), mrd.ACQUISITION_HEADER)
    head["flags"], head["version"] = flags, 1
    return mrd_write.encode_acquisition(head, np.ones((n_coils, n_samples)), np.zeros((n_samples, n_dims)))


def compressed(n):
    head = np.zeros((), mrd.ACQUISITION_HEADER)
    head["flags"], head["number_of_samples"], head["active_channels"] = mrd.flag(53), 8, 2
    return b"\xf0\x03" + head.tobytes() + struct.pack("<I", n) + bytes(n)


MESSAGES = st.one_of(
    st.builds(acquisition, st.integers(0, 4), st.integers(0, 20), st.integers(0, 3), st.sampled_from([0, 64, 128])),
    st.builds(compressed, st.integers(0, 50)),
    st.builds(lambda n: mrd_write.encode_image(np.ones((n, n)), INFO), st.integers(1, 5)),
    st.builds(
        lambda n: mrd_write.encode_waveform(np.zeros((), mrd.WAVEFORM_HEADER), np.ones((2, n))), st.integers(0, 9)
    ),
    st.builds(mrd_write.encode_text, st.text(max_size=30)),
    st.builds(mrd_write.encode_query, st.integers(0, 2**64 - 1), st.text(max_size=9)),
)


@st.composite
def valid_streams(draw):
    start = draw(st.sampled_from([mrd_write.encode_config_file("scanside"), mrd_write.encode_config_text("<x/>"), b""]))
    body = draw(st.lists(MESSAGES, max_size=8))
    return start + mrd_write.encode_header(b"<ismrmrdHeader/>") + b"".join(body) + mrd_write.encode_close()


@st.composite
def mutated_streams(draw):
    data = bytearray(draw(valid_streams()))
    other = draw(valid_streams())
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        end = draw(st.integers(at, min(len(data), at + 400)))
        match draw(st.sampled_from(["flip", "cut", "drop", "insert", "double", "splice"])):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "drop":
                del data[at:end]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=40))
            case "double":
                data[at:at] = data[at:end]
            case "splice":
                data[at:] = other[draw(st.integers(0, len(other) - 1)) :]
    return bytes(data)


def pieces(data, cuts):
    places = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def walk(data):
    """What the parser makes of the whole stream at once: its messages, and the error that ends them."""
    found = []
    try:
        for message in mrd.messages(data, 0, LIMITS):
            found.append(message)
    except StreamError as error:
        return found, str(error)
    return found, None


@settings(max_examples=1000, deadline=None)
@given(valid_streams(), st.lists(st.integers(0, 10_000), max_size=12))
def test_a_valid_stream_is_read_alike_in_any_pieces(data, cuts):
    framer = Framer(LIMITS)
    frames = [frame for piece in pieces(data, cuts) for frame in framer.feed(piece)]
    found, error = walk(data)
    assert framer.error is None
    assert error is None
    assert framer.is_closed
    assert framer.n_readouts == sum(m.id is MessageId.ACQUISITION for m in found)
    control = [m for m in found if m.id not in {MessageId.ACQUISITION, MessageId.IMAGE, MessageId.WAVEFORM}]
    assert [f.data for f in frames] == [data[m.start : m.end] for m in control]
    assert found[-1].end == len(data)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated_streams(), st.lists(st.integers(0, 10_000), max_size=6))
def test_a_mutated_stream_ends_with_close_an_error_or_a_wait_alike_in_any_pieces(data, cuts):
    whole, split = Framer(LIMITS), Framer(LIMITS)
    frames = whole.feed(data)
    assert [f for piece in pieces(data, cuts) for f in split.feed(piece)] == frames
    assert (split.n_readouts, split.is_closed, str(split.error)) == (
        whole.n_readouts, whole.is_closed, str(whole.error),
    )  # fmt: skip
    assert whole.error is None or str(whole.error)
    found, _ = walk(data)
    if whole.error is None:
        assert whole.is_closed == (bool(found) and found[-1].id is MessageId.CLOSE)
        assert whole.n_readouts == sum(m.id is MessageId.ACQUISITION for m in found)
    for message in found:  # what can be framed can be read
        match message.id:
            case MessageId.ACQUISITION:
                mrd.read_acquisition(data, message)
            case MessageId.IMAGE:
                mrd.read_image(data, message)
            case MessageId.WAVEFORM:
                mrd.read_waveform(data, message)
            case MessageId.QUERY:
                mrd.read_query(data, message)
            case MessageId.CONFIG_FILE | MessageId.CONFIG_TEXT | MessageId.HEADER | MessageId.TEXT:
                mrd.read_text(data, message)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=500))
def test_noise_never_holds_more_than_a_limit_allows(data):
    framer = Framer(LIMITS)
    framer.feed(data)
    assert len(framer._held) <= len(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("property"), wire=LIMITS, linger_s=0.3, config_bytes=20_000)
    yield running
    running.stop()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=mutated_streams())
def test_the_live_server_always_answers_with_close_and_a_reason_where_there_is_one(run, data):
    found = run.talk(data, half_close=True, timeout=5)
    assert is_closed(found)
    framer = Framer(LIMITS)
    framer.feed(data)
    assert bool(errors(found)) == (not framer.is_closed or framer.error is not None)
    broken = run.server.broken
    assert not broken.done()
    if framer.is_scan:
        run.settle(lambda: len(run.listener.of("opened")) == len(run.listener.of("closed")))
        assert run.listener.calls[-1][0] == "closed"
        expected = "failed" if framer.error else "complete" if framer.is_closed else "interrupted"
        assert run.listener.calls[-1][2] == expected
    run.listener.calls.clear()
