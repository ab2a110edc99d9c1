"""Which settings a running daemon takes over when it is told to read them again, and which wait for a restart."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from edge.settings import Settings

# Sockets and the state folder stay as they are while scans and clients use them; the rest is looked at when it is used.
LIVE = frozenset(
    {
        "mrd.allow",
        "events.heartbeat_s",
        "events.keep",
        "alerts.groups",
        "alerts.deadline_s",
        "alerts.resend_s",
        "disk.min_free_mib",
        "disk.keep_free_mib",
    }
)


def take_over(running: Settings, read: Settings) -> tuple[Settings, list[str], list[str]]:
    """Return the running settings with what can be taken over of `read`; which keys were, and which need a restart."""
    taken, waiting = [], []
    for key in _differences(running, read):
        if key not in LIVE:
            waiting.append(key)
            continue
        section, name = key.split(".")
        value = getattr(getattr(read, section), name)
        running = replace(running, **{section: replace(getattr(running, section), **{name: value})})
        taken.append(key)
    return running, taken, waiting


def _differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    found = []
    for each in fields(one):
        a, b = getattr(one, each.name), getattr(other, each.name)
        if is_dataclass(a):
            found += _differences(a, b, f"{prefix}{each.name}.")
        elif a != b:
            found.append(prefix + each.name)
    return found
