"""What systemd is told: that the daemon serves, that its pipeline is alive, that it reloads or stops.

Source: sd_notify(3), sd_watchdog_enabled(3). The socket's name is the one thing that systemd passes by environment.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress


class Notifier:
    """systemd's notification socket; without one, as at a terminal, nothing is sent."""

    def __init__(self) -> None:
        """Find out whether somebody wants to know."""
        name = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name

    def ready(self) -> None:
        """Say that scanners can connect."""
        self._send("READY=1")

    def alive(self, words: str) -> None:
        """Feed the watchdog. To be called by the pipeline when it has seen its own heartbeat, and by nothing else."""
        self._send(f"WATCHDOG=1\nSTATUS={words}")

    def reloading(self) -> None:
        """Say that the settings are being read again; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the daemon ends."""
        self._send("STOPPING=1")

    def _send(self, state: str) -> None:
        if self._address:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as wire:
                wire.setblocking(False)
                wire.sendto(state.encode(), self._address)
