"""The daemon's settings: defaults that work, and every mistake named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edge.settings import SecuritySettings, Settings, SettingsError, check, needs_keys
from edge.settings_file import read_settings

ROOT = Path(__file__).resolve().parents[1]


def written(folder: Path, text: str) -> Path:
    path = folder / "scanside.toml"
    path.write_text(text, "utf-8")
    return path


def test_the_example_in_the_repository_says_the_defaults() -> None:
    assert read_settings(ROOT / "systemd" / "scanside.toml") == Settings()


def test_values_are_taken(tmp_path: Path) -> None:
    settings = read_settings(written(tmp_path, 'state = "/tmp/x"\n[mrd]\nport = 9100\nidle_timeout_s = 5\n'))
    assert settings.state == Path("/tmp/x")
    assert settings.mrd.port == 9100
    assert settings.mrd.idle_timeout_s == 5.0
    assert settings.mrd.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot = 1", "prot"),
        ("[mrd]\nprot = 1", "mrd.prot"),
        ("[mrd]\nport = '9002'", "mrd.port"),
        ("[mrd]\nport = true", "mrd.port"),
        ("[mrd]\nport = 70000", "mrd.port"),
        ("mrd = 3", "mrd"),
        ("[worker]\nmethod = 'magic'", "worker.method"),
        ("[network]\nprecision = 'int4'", "network.precision"),
        ("[mrd]\nhost = '0.0.0.0'", "mrd.allow"),
        ("[mrd]\nallow = ['the scanner']", "mrd.allow"),
        ("[mrd]\nallow = '10.0.0.1'", "mrd.allow"),
        ("[alerts]\naddress = 'here'", "alerts.address"),
        ("[alerts]\ngroups = []", "alerts.groups"),
        ("[alerts]\ngroups = ['a', 'a']", "alerts.groups"),
        ("[alerts]\nidentifiers = 'names'", "alerts.identifiers"),
        ("[security]\ncurve = 'never'", "security.curve"),
        ("[sinks]\nhl7 = 'ris.hospital:2575'", "sinks.hl7"),
        ("[sinks]\nhl7 = 'ris.hospital'", "HOST:PORT"),
        ("[sinks]\nfhir = 'http://ris.hospital/fhir'", "sinks.fhir"),
        ("[events]\naddress = 'udp://127.0.0.1:5570'", "events.address"),
        ("[disk]\nmin_free_mib = -1", "disk.min_free_mib"),
        ("[mrd\n", "TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named.replace(".", r"\.")):
        read_settings(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.toml"):
        read_settings(tmp_path / "gone.toml")


def test_events_may_use_ipc_and_any_loopback() -> None:
    for address in ("ipc:///run/scanside/events", "tcp://127.0.0.1:0", "tcp://[::1]:5570", "tcp://localhost:1"):
        events = dataclasses.replace(Settings().events, address=address)
        settings = dataclasses.replace(Settings(), events=events)
        check(settings)
        assert not needs_keys(address, settings.security)
        assert needs_keys(address, SecuritySettings("always"))


def test_sockets_that_others_reach_need_keys() -> None:
    for address in (
        "tcp://0.0.0.0:5570",
        "tcp://*:5570",
        "tcp://10.1.2.3:1",
        "tcp://[::]:1",
        "tcp://box:1",
        "tcp://:1",
    ):
        assert needs_keys(address, SecuritySettings())
