"""The daemon's settings: one TOML file, read once, into nested frozen values.

Unknown keys, wrong types and values out of range stop the start with the key's name. Every default works.
"""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from edge.model import PRECISIONS
from edge.supply import BACKENDS
from recon.reconstruct import METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class SettingsError(Exception):
    """The settings cannot be used; the message names the key."""


@dataclass(frozen=True)
class MrdSettings:
    """The scanner's side: where to listen, and what one session may cost."""

    host: str = "127.0.0.1"
    port: int = 9002
    max_sessions: int = 16
    first_data_timeout_s: float = 120.0
    idle_timeout_s: float = 600.0
    max_message_mib: int = 64


@dataclass(frozen=True)
class WorkerSettings:
    """The reconstruction process. `method` is one of `recon`'s; one silent for `timeout_s` at work is restarted."""

    method: str = "auto"
    timeout_s: float = 120.0
    max_scan_mib: int = 8192


@dataclass(frozen=True)
class NetworkSettings:
    """The trained reconstruction network: its folder ("" is the one that comes with this version) and what runs it.

    `precision` "int8" needs a network whose card offers it.
    """

    model: str = ""
    backend: str = "auto"
    precision: str = "auto"


@dataclass(frozen=True)
class TriageSettings:
    """Which findings are looked for, and how: `alpha` is the share of each class that conformal sets may miss.

    Less of a head than `min_coverage_mm` is never *not flagged*. `models`: another folder of networks ("" is the one
    that comes with this version). `research` also writes segments and heat maps, which mark places in images.
    """

    infarct: bool = True
    haemorrhage: bool = True
    mass: bool = True
    alpha: float = 0.1
    min_coverage_mm: float = 60.0
    research: bool = False
    models: str = ""


@dataclass(frozen=True)
class EventSettings:
    """The ZeroMQ event stream."""

    address: str = "tcp://127.0.0.1:5570"
    heartbeat_s: float = 5.0
    keep: int = 100_000


@dataclass(frozen=True)
class DiskSettings:
    """New scans are refused while the state folder's disk has less than `min_free_mib` left."""

    min_free_mib: int = 2048


@dataclass(frozen=True)
class Settings:
    """All of it; `state` is the folder for spool, ledger and results."""

    state: Path = Path("/var/lib/scanside")
    mrd: MrdSettings = field(default_factory=MrdSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    triage: TriageSettings = field(default_factory=TriageSettings)
    events: EventSettings = field(default_factory=EventSettings)
    disk: DiskSettings = field(default_factory=DiskSettings)


_RANGES: dict[str, tuple[float, float]] = {
    "mrd.port": (0, 65535),
    "mrd.max_sessions": (1, 1000),
    "mrd.first_data_timeout_s": (0.1, 86400),
    "mrd.idle_timeout_s": (0.1, 86400),
    "mrd.max_message_mib": (1, 4096),
    "worker.timeout_s": (1, 86400),
    "worker.max_scan_mib": (1, 1 << 20),
    "triage.alpha": (0.001, 0.5),
    "triage.min_coverage_mm": (0, 300),
    "events.heartbeat_s": (0.05, 3600),
    "events.keep": (100, 10**9),
    "disk.min_free_mib": (0, 1 << 30),
}
_CHOICES = {"worker.method": METHODS, "network.backend": BACKENDS, "network.precision": PRECISIONS}


def read_settings(path: Path | None) -> Settings:
    """Read the TOML file at `path` (None: all defaults); raise SettingsError naming the first key that is wrong."""
    if path is None:
        return Settings()
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {path} is not TOML: {error}") from error
    settings: Settings = _section(Settings, table, "")
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raise SettingsError for a value out of its range, or an event socket that is not on loopback."""
    for key, (low, high) in _RANGES.items():
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        if not low <= value <= high:
            raise SettingsError(f"{key} is {value}; it must lie in {low:g}..{high:g}")
    for key, choices in _CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        if value not in choices:
            raise SettingsError(f"{key} is {value!r}; it must be one of {', '.join(choices)}")
    address = settings.events.address
    scheme, _, place = address.partition("://")
    if scheme == "tcp":
        host = place.rpartition(":")[0].strip("[]")
        if not _is_loopback(host):
            raise SettingsError(
                f"events.address is {address!r}: an unencrypted socket must stay on loopback (127.0.0.1)"
            )
    elif scheme != "ipc":
        raise SettingsError(f"events.address is {address!r}; it must begin with tcp:// or ipc://")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _section(kind: Any, table: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in known:
            raise SettingsError(f"{key} is not a setting; known here: {', '.join(sorted(known))}")
        wanted = hints[name]
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                raise SettingsError(f"{key} must be a section, [{key}]")
            values[name] = _section(wanted, value, f"{key}.")
        elif wanted is Path and isinstance(value, str):
            values[name] = Path(value)
        elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            values[name] = float(value)
        elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
            values[name] = value
        else:
            raise SettingsError(f"{key} is {value!r}; a value of type {wanted.__name__} is needed")
    return kind(**values)
