"""Whether the kernel's clock is kept right by somebody, and how far off it may be.

Source: adjtimex(2); struct timex of linux/timex.h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_UNSYNCHRONISED = 0x0040  # STA_UNSYNC
_ERROR = 5  # TIME_ERROR


@dataclass(frozen=True)
class ClockState:
    """error_s: the kernel's bound on how far the clock is off."""

    is_synchronised: bool
    error_s: float


class _Timex(ctypes.Structure):
    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),  # more than what follows
    )


def clock_state() -> ClockState | None:
    """Return what the kernel says of its clock, None where it says nothing; changes nothing."""
    try:
        read = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return None
    timex = _Timex()
    state = read(ctypes.byref(timex))
    if state < 0:
        return None
    is_synchronised = state != _ERROR and not timex.status & _UNSYNCHRONISED
    return ClockState(is_synchronised, timex.maxerror / 1e6)
