"""Threads that give way to other processes' more urgent work: images first, then the network's, then all the rest.

Several processes reconstruct on few cores. Linux has a niceness for each thread, and a thread inherits that of the one
that made it; without privilege it can be raised, never lowered. So what may wait has threads of its own.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress


def lowered(name: str, nice: int) -> Executor:
    """Return one thread whose niceness is `nice` above this thread's, and that of whatever threads it makes, too."""

    def lower() -> None:
        with suppress(OSError):  # where threads have no niceness they run like the others
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + nice)

    return ThreadPoolExecutor(1, name, lower)
