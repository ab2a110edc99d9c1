"""Threads that give way: their niceness, what inherits it, and that a scan's network runs in one."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from edge.priority import lowered
from edge.supply import Supply
from recon.errors import BackendError
from recon.unrolled import run_on_nothing


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def inherited() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(niceness).result()


def test_a_lowered_thread_and_those_it_makes_are_nicer_and_the_caller_is_as_before() -> None:
    own = niceness()
    with lowered("aside", 3) as thread:
        assert thread.submit(niceness).result() == own + 3
        assert thread.submit(inherited).result() == own + 3
    assert niceness() == own


def test_a_scans_network_is_run_by_the_thread_that_the_supply_was_given() -> None:
    class Counting(ThreadPoolExecutor):
        n = 0

        def submit(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            self.n += 1
            return super().submit(*args, **kwargs)

    with Counting(1) as thread:
        supply = Supply(backend="cpu", thread=thread)
        network = supply.network()
        assert thread.n == 0
        run_on_nothing(network)
        assert thread.n == 1
        supply.close()


def test_what_fails_in_the_thread_fails_for_the_caller() -> None:
    def fail() -> None:
        raise BackendError("no")

    thread: Executor
    with lowered("aside", 1) as thread, pytest.raises(BackendError, match="no"):
        thread.submit(fail).result()
