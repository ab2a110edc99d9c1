"""The event stream as a subscriber sees it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from edge.wire import Publisher, Subscriber, encode_event, utc_now
from recon.errors import DeliveryError


def test_an_event_arrives_as_it_was_sent() -> None:
    publisher = Publisher("tcp://127.0.0.1:0")
    subscriber = Subscriber(publisher.address)
    pixels = np.arange(6, dtype="<f4")
    until = time.monotonic() + 10
    event = None
    while event is None:  # a subscription takes a moment
        assert time.monotonic() < until
        publisher.send(encode_event("image", 7, utc_now(), {"scan_id": "A", "slice": 2}, pixels.tobytes()))
        event = subscriber.receive(0.05)
    header, payload = event
    assert header.pop("at").endswith("Z")
    assert header == {"v": 1, "seq": 7, "kind": "image", "scan_id": "A", "slice": 2}
    assert payload == pixels.tobytes()
    subscriber.close()
    publisher.close()


def test_times_are_rfc_3339_in_utc() -> None:
    assert utc_now().endswith("Z")
    assert len(utc_now()) == len("2026-11-21T10:00:00.000Z")


def test_an_address_in_use_is_named() -> None:
    publisher = Publisher("tcp://127.0.0.1:0")
    with pytest.raises(DeliveryError, match=r"127\.0\.0\.1"):
        Publisher(publisher.address)
    publisher.close()


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode_event("quality", 1, utc_now(), {"x": float("nan")}, None)


def test_a_subscriber_that_reads_nothing_costs_bounded_memory_and_no_time() -> None:
    publisher = Publisher("tcp://127.0.0.1:0")
    with zmq.Context() as context, context.socket(zmq.SUB) as deaf:
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.setsockopt(zmq.SUBSCRIBE, b"")
        deaf.connect(publisher.address)
        until = time.monotonic() + 10
        while not deaf.poll(50):  # a subscription takes a moment
            assert time.monotonic() < until
            publisher.send(encode_event("heartbeat", 1, utc_now(), {}, None))
        pixels = bytes(200_000)
        before = resident_mib()
        for seq in range(3000):  # 600 MB
            publisher.send(encode_event("image", seq, utc_now(), {}, pixels[seq:]))
        assert resident_mib() - before < 120  # 200 messages wait, and what the sockets hold
    publisher.close()


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
