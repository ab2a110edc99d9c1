"""The daemon's settings as nested frozen values; `edge.settings_file` reads them.

Unknown keys, wrong types and values out of range stop the start with the key's name. Every default works.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from edge.model import PRECISIONS
from edge.pseudonym import IDENTIFIERS
from edge.supply import BACKENDS
from recon.reconstruct import METHODS


class SettingsError(Exception):
    """The settings cannot be used; the message names the key."""


@dataclass(frozen=True)
class MrdSettings:
    """The scanner's side: where to listen, to whom, and what one session may cost.

    `allow`: addresses and networks (10.1.2.0/24) that may connect, needed where `host` is not loopback.
    """

    host: str = "127.0.0.1"
    port: int = 9002
    max_sessions: int = 16
    first_data_timeout_s: float = 120.0
    idle_timeout_s: float = 600.0
    max_message_mib: int = 64
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerSettings:
    """Reconstruction. `method` is one of `recon`'s; a process, of triage too, silent for `timeout_s` is restarted.

    `processes`: how many may reconstruct side by side; another starts when scans overlap, so one scanner has one.
    """

    method: str = "auto"
    processes: int = 4
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
class SuperResolutionSettings:
    """A second, synthetic volume with finer voxels, made after triage; off unless `enabled`.

    `thin_slices`: how many thinner ones are made of each thick slice, 1 for none. `style`: strength of the 7 T style
    that is rendered beside it, 0 for none. `model`: another network's folder ("" is the one that comes with this
    version). `backend`: what runs it; the CPU unless another is named, as a GPU has no lowest priority to run it at.
    """

    enabled: bool = False
    thin_slices: int = 1
    style: float = 0.0
    model: str = ""
    backend: str = "cpu"


@dataclass(frozen=True)
class EventSettings:
    """The ZeroMQ event stream."""

    address: str = "tcp://127.0.0.1:5570"
    heartbeat_s: float = 5.0
    keep: int = 100_000


@dataclass(frozen=True)
class AlertSettings:
    """The alert socket; who is told, in which order, and for how long each of these groups is waited for.

    `identifiers` "study" adds Study Instance UID and accession number to alerts, which are pseudonymous otherwise.
    """

    address: str = "tcp://127.0.0.1:5571"
    groups: tuple[str, ...] = ("reading-room",)
    deadline_s: float = 300.0
    resend_s: float = 5.0
    identifiers: str = "pseudonymous"


@dataclass(frozen=True)
class SecuritySettings:
    """`curve` "elsewhere" asks for keys on every socket that is not loopback or ipc://, "always" on those too."""

    curve: str = "elsewhere"


@dataclass(frozen=True)
class SinkSettings:
    """Where alerts go beside the alert socket; "" is nowhere.

    `hl7` is HOST:PORT of an MLLP listener, `fhir` a server's base address. Elsewhere than on loopback both need TLS:
    `hl7_ca` checks the listener's certificate, `fhir` begins with https://. `fhir_token` is a file of mode 0600.
    """

    hl7: str = ""
    hl7_ca: str = ""
    fhir: str = ""
    fhir_ca: str = ""
    fhir_token: str = ""
    attempts: int = 20
    timeout_s: float = 10.0


@dataclass(frozen=True)
class PacsSettings:
    """The archive that finished scans go to; "" is nowhere.

    By C-STORE to `host`, by STOW-RS to `stow`, a DICOMweb base address, or both. `ca`, `cert` and `key` are files for
    DICOM TLS. `commitment` is HOST:PORT where the archive reports what it has committed to keep; "" does not ask.
    An object that failed `attempts` times, with pauses of up to `longest_pause_s` between them, is given up.
    """

    host: str = ""
    port: int = 104
    called_ae: str = "PACS"
    calling_ae: str = "SCANSIDE"
    ca: str = ""
    cert: str = ""
    key: str = ""
    commitment: str = ""
    commitment_s: float = 60.0
    stow: str = ""
    stow_ca: str = ""
    stow_token: str = ""
    attempts: int = 500
    longest_pause_s: float = 600.0
    timeout_s: float = 30.0


@dataclass(frozen=True)
class IncomingSettings:
    """Where series that the scanner reconstructs itself come in by C-STORE; "" is nowhere.

    `callers`: AE titles that may send. `allow`: addresses and networks that may connect; it, or `ca`, which asks for
    certificates, is needed beyond loopback. A series is complete `quiet_s` after its last object.
    """

    host: str = ""
    port: int = 11112
    ae_title: str = "SCANSIDE"
    callers: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    ca: str = ""
    cert: str = ""
    key: str = ""
    quiet_s: float = 15.0
    max_object_mib: int = 512
    max_associations: int = 8
    timeout_s: float = 30.0
    idle_s: float = 120.0


@dataclass(frozen=True)
class MetricsSettings:
    """`address` is HOST:PORT on loopback where Prometheus may ask; "" is nowhere."""

    address: str = ""


@dataclass(frozen=True)
class DiskSettings:
    """New scans are refused while the state folder's disk has less than `min_free_mib` left.

    Below `keep_free_mib` the oldest scans that the archive has whole are deleted; 0 deletes none.
    """

    min_free_mib: int = 2048
    keep_free_mib: int = 8192


@dataclass(frozen=True)
class Settings:
    """All of it; `state` is the folder for spool, ledger and results."""

    state: Path = Path("/var/lib/scanside")
    mrd: MrdSettings = field(default_factory=MrdSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    triage: TriageSettings = field(default_factory=TriageSettings)
    super_resolution: SuperResolutionSettings = field(default_factory=SuperResolutionSettings)
    events: EventSettings = field(default_factory=EventSettings)
    alerts: AlertSettings = field(default_factory=AlertSettings)
    sinks: SinkSettings = field(default_factory=SinkSettings)
    pacs: PacsSettings = field(default_factory=PacsSettings)
    incoming: IncomingSettings = field(default_factory=IncomingSettings)
    security: SecuritySettings = field(default_factory=SecuritySettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    disk: DiskSettings = field(default_factory=DiskSettings)


_RANGES: dict[str, tuple[float, float]] = {
    "mrd.port": (0, 65535),
    "mrd.max_sessions": (1, 1000),
    "mrd.first_data_timeout_s": (0.1, 86400),
    "mrd.idle_timeout_s": (0.1, 86400),
    "mrd.max_message_mib": (1, 4096),
    "worker.processes": (1, 16),
    "worker.timeout_s": (1, 86400),
    "worker.max_scan_mib": (1, 1 << 20),
    "triage.alpha": (0.001, 0.5),
    "triage.min_coverage_mm": (0, 300),
    "super_resolution.thin_slices": (1, 4),
    "super_resolution.style": (0, 1),
    "events.heartbeat_s": (0.05, 3600),
    "events.keep": (100, 10**9),
    "alerts.deadline_s": (0.05, 86400),
    "alerts.resend_s": (0.05, 3600),
    "sinks.attempts": (1, 1000),
    "sinks.timeout_s": (0.1, 600),
    "pacs.port": (1, 65535),
    "pacs.commitment_s": (0.1, 3600),
    "pacs.attempts": (1, 100_000),
    "pacs.longest_pause_s": (0.05, 86400),
    "pacs.timeout_s": (0.1, 600),
    "incoming.port": (0, 65535),
    "incoming.quiet_s": (0.05, 3600),
    "incoming.max_object_mib": (1, 4096),
    "incoming.max_associations": (1, 100),
    "incoming.timeout_s": (0.1, 600),
    "incoming.idle_s": (0.1, 86400),
    "disk.min_free_mib": (0, 1 << 30),
    "disk.keep_free_mib": (0, 1 << 30),
}
_CHOICES = {
    "worker.method": METHODS,
    "network.backend": BACKENDS,
    "super_resolution.backend": BACKENDS,
    "network.precision": PRECISIONS,
    "alerts.identifiers": IDENTIFIERS,
    "security.curve": ("elsewhere", "always"),
}


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
    for key in ("events.address", "alerts.address"):
        scheme, _, place = getattr(settings, key.split(".")[0]).address.partition("://")
        if scheme not in ("tcp", "ipc") or not place:
            raise SettingsError(f"{key} is {scheme!r}…; it must begin with tcp:// or ipc://")
    if settings.metrics.address and not is_loopback(host_and_port(settings.metrics.address, 0)[0]):
        raise SettingsError("metrics.address must be on loopback: it has no password")
    _check_scanners(settings.mrd)
    _check_sinks(settings.sinks)
    _check_pacs(settings.pacs)
    _check_incoming(settings.incoming)
    groups = settings.alerts.groups
    if not groups or len(set(groups)) < len(groups) or not all(name and name.isprintable() for name in groups):
        raise SettingsError(f"alerts.groups is {list(groups)}; it must name at least one group, and each once")


def needs_keys(address: str, security: SecuritySettings) -> bool:
    """Whether clients of a ZeroMQ socket must show a key: wherever another machine could reach it."""
    scheme, _, place = address.partition("://")
    is_local = scheme == "ipc" or is_loopback(place.rpartition(":")[0].strip("[]"))
    return security.curve == "always" or not is_local


def host_and_port(place: str, least_port: int = 1) -> tuple[str, int]:
    """Return both of HOST:PORT; raises SettingsError where it is something else."""
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit() or not least_port <= int(port) < 65536:
        raise SettingsError(f"{place!r} must be HOST:PORT")
    return host.strip("[]"), int(port)


def _check_networks(key: str, allow: tuple[str, ...]) -> None:
    for each in allow:
        try:
            ipaddress.ip_network(each)
        except ValueError as error:
            raise SettingsError(f"{key} names {each!r}; an address or network is needed, as 10.1.2.0/24") from error


def _check_scanners(mrd: MrdSettings) -> None:
    _check_networks("mrd.allow", mrd.allow)
    if not mrd.allow and not is_loopback(mrd.host):
        raise SettingsError(f"mrd.host is {mrd.host!r}: MRD has no password, so mrd.allow must name the scanners")


def _check_sinks(sinks: SinkSettings) -> None:
    if sinks.hl7 and not sinks.hl7_ca and not is_loopback(host_and_port(sinks.hl7)[0]):
        raise SettingsError("sinks.hl7 is not on this machine: sinks.hl7_ca is needed, for TLS")
    if sinks.fhir:
        parts = urlsplit(sinks.fhir)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise SettingsError("sinks.fhir must begin with https://, or be on this machine")


def check_ae_title(key: str, title: str) -> None:
    """Raise SettingsError where `title` is no application entity title: 1 to 16 characters of ASCII."""
    if not 1 <= len(title.strip()) <= 16 or not (title.isascii() and title.isprintable()) or "\\" in title:
        raise SettingsError(f"{key} is {title!r}; an AE title has 1 to 16 characters of ASCII, and no backslash")


def _check_pacs(pacs: PacsSettings) -> None:
    check_ae_title("pacs.called_ae", pacs.called_ae)
    check_ae_title("pacs.calling_ae", pacs.calling_ae)
    if pacs.key and not pacs.cert:
        raise SettingsError("pacs.key needs pacs.cert, the certificate that it belongs to")
    if pacs.commitment:
        host_and_port(pacs.commitment)
    if pacs.stow:
        parts = urlsplit(pacs.stow)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise SettingsError("pacs.stow must begin with https://, or be on this machine")


def _check_incoming(incoming: IncomingSettings) -> None:
    _check_networks("incoming.allow", incoming.allow)
    check_ae_title("incoming.ae_title", incoming.ae_title)
    for title in incoming.callers:
        check_ae_title("incoming.callers", title)
    if (incoming.key or incoming.ca) and not incoming.cert:
        raise SettingsError("incoming.key and incoming.ca need incoming.cert, the certificate that we show")
    if incoming.host and not incoming.callers:
        raise SettingsError("incoming.callers must name the AE titles that may send")
    if incoming.host and not is_loopback(incoming.host) and not (incoming.allow or incoming.ca):
        raise SettingsError(f"incoming.host is {incoming.host!r}: incoming.allow or incoming.ca must say who may send")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
