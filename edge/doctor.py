"""`scanside doctor`: what is here, what would be used, and what is missing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge.clock_sync import clock_state
from edge.dicom_net import Peer, echo, server_tls
from edge.dicom_stow import StowSender
from edge.keyring import Keyring
from edge.ledger import n_unread
from edge.model import RECONSTRUCTION
from edge.pacs import store_peer
from edge.power import look_for_meters
from edge.secret import SecretError, read_secret
from edge.settings import (
    IncomingSettings,
    PacsSettings,
    Settings,
    SettingsError,
    SuperResolutionSettings,
    check,
    needs_keys,
)
from edge.settings_file import read_settings
from edge.superres_model import SUPER_RESOLUTION, open_refiner
from edge.supply import Supply
from edge.triage_models import TRIAGE, close, open_tools
from recon.errors import BackendError, DeliveryError, ModelError
from recon.superres_engine import run_on_zeros

_PACKAGES = (
    "numpy",
    "scipy",
    "h5py",
    "ismrmrd",
    "pydicom",
    "pynetdicom",
    "pyzmq",
    "rich",
    "pillow",
    "defusedxml",
    "onnxruntime",
    "prometheus_client",
)
_OPTIONAL = {
    "hl7": "alerts as HL7 v2",
    "fhir.resources": "alerts as FHIR",
    "cupy-cuda12x": "GPU arrays",
    "tensorrt": "engines on the GPU",
}
_TOOLS = {
    "dciodvfy": "checks DICOM files (Debian: dicom3tools)",
    "dcm2niix": "reads DICOM geometry (Debian: dcm2niix)",
    "bart": "the reconstruction compared with (Debian: bart)",
    "ismrmrd_generate_cartesian_shepp_logan": "phantom scans (Debian: ismrmrd-tools)",
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table; `level` is ok, note (works without it) or fault."""

    level: str
    what: str
    words: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside doctor`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="the daemon's settings, to check them too")
    parser.add_argument("--state", type=Path, metavar="DIR", help="the state folder to check (the settings')")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 when the daemon could run, 1 when something stands in its way, 2 for wrong settings."""
    try:
        settings = read_settings(args.config)
        check(settings)
    except SettingsError as error:
        print(f"scanside doctor: {error}", file=sys.stderr)
        return 2
    findings = examine(settings, args.state or settings.state)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "checked", "found"):
        table.add_column(heading)
    marks = {"ok": "[green]ok[/]", "note": "[yellow]–[/]", "fault": "[red]fault[/]"}
    for finding in findings:
        table.add_row(marks[finding.level], escape(finding.what), escape(finding.words))
    Console().print(table)
    return 1 if any(finding.level == "fault" for finding in findings) else 0


def examine(settings: Settings, state: Path) -> list[Finding]:
    """Check this machine for a daemon with `settings` that keeps its state in `state`."""
    found = [
        Finding("ok", "python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"),
        *(_package(name) for name in _PACKAGES),
        *(_optional(name, use) for name, use in _OPTIONAL.items()),
        *_network(settings, state),
        triage_finding(settings, state),
        super_resolution_finding(settings.super_resolution, state),
        _power(),
        _state(state),
        _disk(state, settings.disk.min_free_mib),
        _port("MRD port", settings.mrd.host, settings.mrd.port),
    ]
    for what, address in (("event port", settings.events.address), ("alert port", settings.alerts.address)):
        scheme, _, place = address.partition("://")
        host, _, port = place.rpartition(":")
        if scheme == "tcp" and port.isdigit():
            found.append(_port(what, host.strip("[]").replace("*", "0.0.0.0"), int(port)))
    found += [clock_finding(), *secret_findings(settings, state), *archive_findings(settings.pacs)]
    found += incoming_findings(settings.incoming)
    return found + [_tool(name, use) for name, use in _TOOLS.items()]


def _package(name: str) -> Finding:
    try:
        return Finding("ok", name, version(name))
    except PackageNotFoundError:
        return Finding("fault", name, f"missing; pip install {name}")


def _optional(name: str, use: str) -> Finding:
    try:
        return Finding("ok", name, version(name))
    except PackageNotFoundError:
        return Finding("note", name, f"not installed: {use}")


def _network(settings: Settings, state: Path) -> list[Finding]:
    """Open the network that the settings name, as the daemon's worker would, and say which backends were tried."""
    classical = "NumPy on the CPU: ESPIRiT maps and CG-SENSE"
    if settings.worker.method not in ("auto", "network"):
        return [Finding("ok", "reconstruction", f"{classical}; worker.method leaves the network out")]
    model = Path(settings.network.model) if settings.network.model else RECONSTRUCTION
    try:
        chosen = settings.network
        supply = Supply(model, chosen.backend, state / "engines", chosen.precision)
    except (ModelError, BackendError) as error:
        level = "fault" if settings.worker.method == "network" else "note"
        return [Finding(level, "reconstruction", f"{classical}; no network: {error}")]
    card, tried = supply.card, supply.tried
    words = f"{classical}; then {card.name} {card.version} ({card.sha256[:12]}…) by {supply.words}"
    supply.close()
    backends = [
        Finding("note" if why_not else "ok", f"backend {kind}", why_not or "is used") for kind, why_not in tried
    ]
    return [Finding("ok", "reconstruction", words), *backends]


def triage_finding(settings: Settings, state: Path) -> Finding:
    """Open the networks that look for findings, as the triage process would, and say how many scans wait for them."""
    tools, problems = open_tools(Path(settings.triage.models) if settings.triage.models else TRIAGE)
    names = ", ".join(f"{model.card.name} {model.card.version}" for model in tools.models)
    close(tools.models)
    words = "; ".join([names or "no network: every scan is not assessed", *problems])
    n = n_unread(state / "ledger.sqlite")
    words += f"; {n} scan{'s wait' if n > 1 else ' waits'} for it" if n else ""
    return Finding("ok" if names and not problems else "note", "triage", words)


def super_resolution_finding(settings: SuperResolutionSettings, state: Path) -> Finding:
    """Open the super-resolution network as its process would, and run it once; without it nothing else is missing."""
    what, use = "super-resolution", "on" if settings.enabled else "off in the settings"
    model = Path(settings.model) if settings.model else SUPER_RESOLUTION
    try:
        refiner = open_refiner(model, settings.backend, state / "engines")
        try:
            run_on_zeros(refiner.network)
        finally:
            refiner.network.close()
    except (ModelError, BackendError) as error:
        return Finding("fault" if settings.enabled else "note", what, f"{use}; no network: {error}")
    card = refiner.card
    return Finding("ok", what, f"{use}; {card.name} {card.version} ({card.sha256[:12]}…) by {refiner.network.backend}")


def _power(root: Path = Path("/sys")) -> Finding:
    """Say which meters of watts and joules are here; without any the benchmarks leave energy out."""
    meters, reasons = look_for_meters(root)
    if not meters:
        return Finding("note", "power", f"unavailable: {'; '.join(reasons)}")
    return Finding("ok", "power", ", ".join(f"{meter.source} {meter.name}" for meter in meters))


def _state(state: Path) -> Finding:
    folder = state
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding("ok", "state folder", f"{state} can be {'written' if folder == state else 'made'}")
    except OSError as error:
        return Finding("fault", "state folder", f"{folder} cannot be written ({error.strerror}); choose --state DIR")


def _disk(state: Path, least_mib: int) -> Finding:
    folder = state
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free >> 20
    words = f"{free} MiB free, new scans are refused below {least_mib} MiB"
    return Finding("ok" if free >= least_mib else "fault", "disk", words)


def clock_finding() -> Finding:
    """Say whether somebody keeps this machine's clock right: times of alerts are worth no more than it is."""
    state = clock_state()
    if state is None:
        return Finding("note", "clock", "the kernel does not say whether it is synchronised")
    if not state.is_synchronised:
        return Finding("note", "clock", "not synchronised: times in alerts and DICOM may be wrong; apt install chrony")
    level = "ok" if state.error_s <= 1.0 else "note"
    return Finding(level, "clock", f"synchronised, at most {state.error_s:.3f} s off")


def secret_findings(settings: Settings, state: Path) -> list[Finding]:
    """Check that keys are there where they are needed, and that nobody else can read them."""
    keys = state / "keys"
    found = []
    if any(needs_keys(each.address, settings.security) for each in (settings.events, settings.alerts)):
        try:
            keyring = Keyring(keys)
            keyring.server()
            words = ", ".join(f"{client.name} ({client.role})" for client in keyring.clients())
            found.append(Finding("ok" if words else "note", "keys", words or "no client has one yet"))
        except SecretError as error:
            found.append(Finding("fault", "keys", str(error)))
    else:
        found.append(Finding("ok", "keys", "not needed: events and alerts stay on this machine"))
    secrets = [keys / "pseudonym.key", *([Path(settings.sinks.fhir_token)] if settings.sinks.fhir_token else [])]
    for path in secrets:
        if path.exists():
            try:
                read_secret(path)
            except SecretError as error:
                found.append(Finding("fault", "secret", str(error)))
    return found


def archive_findings(pacs: PacsSettings) -> list[Finding]:
    """Ask each archive that the settings name whether it is there: a C-ECHO, a search over DICOMweb."""
    found = []
    if pacs.host:
        words = f"{pacs.called_ae} at {pacs.host}:{pacs.port} answers a C-ECHO"
        if not (pacs.ca or pacs.cert):
            words += ", without TLS"
        try:
            echo(Peer(**store_peer(pacs)))
            found.append(Finding("ok", "archive", words))
        except DeliveryError as error:
            found.append(Finding("fault", "archive", f"{pacs.called_ae} at {pacs.host}:{pacs.port}: {error}"))
    if pacs.stow:
        ca, token = (Path(name) if name else None for name in (pacs.stow_ca, pacs.stow_token))
        try:
            StowSender(pacs.stow, ca=ca, token=token, timeout_s=pacs.timeout_s).check()
            found.append(Finding("ok", "DICOMweb", f"{pacs.stow} answers"))
        except DeliveryError as error:
            found.append(Finding("fault", "DICOMweb", f"{pacs.stow}: {error}"))
    return found or [Finding("ok", "archive", "none is named: objects stay in the state folder")]


def incoming_findings(incoming: IncomingSettings) -> list[Finding]:
    """Check that series of the scanner's own can come in, where they are to."""
    if not incoming.host:
        return [Finding("ok", "DICOM in", "off: series of the scanner's own are not taken")]
    found = [_port("DICOM in", incoming.host, incoming.port)]
    try:
        tls = server_tls(incoming.ca, incoming.cert, incoming.key)
    except DeliveryError as error:
        return [*found, Finding("fault", "DICOM in", str(error))]
    words = f"{incoming.ae_title} takes objects from {', '.join(incoming.callers)}"
    return [*found, Finding("ok", "DICOM in", f"{words}, {'by TLS' if tls else 'without TLS'}")]


def _port(what: str, host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding("fault", what, f"{host}:{port} cannot be used: {error.strerror}; is a daemon running?")
    return Finding("ok", what, f"{host}:{port} is free")


def _tool(name: str, use: str) -> Finding:
    path = shutil.which(name)
    return Finding("ok", name, path) if path else Finding("note", name, f"not installed: {use}; only tests use it")
