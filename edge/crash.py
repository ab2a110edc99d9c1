"""What a process says of its own bugs: type and place, never the words of an exception, which may hold patient data."""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType

log = logging.getLogger(__name__)


def log_crashes() -> None:
    """Log an unforeseen exception as its type and the functions it passed, instead of printing it."""
    sys.excepthook = _log


def _log(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    frames = " < ".join(f"{f.name}:{f.lineno}" for f in reversed(traceback.extract_tb(trace)))
    log.critical("crash type=%s at=%s", kind.__name__, frames)
