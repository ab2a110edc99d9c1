"""Keys: who has none, a wrong one, or a role that may not, is refused and written down."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from edge.audit import TRAIL, AuditTrail, verify
from edge.client import AlertClient, ClientKey, read_client_key
from edge.command import main
from edge.doctor import clock_finding, secret_findings
from edge.front import Front
from edge.gate import Gate
from edge.keyring import Keyring
from edge.ledger import Ledger
from edge.mrd_write import encode_close
from edge.router import Router
from edge.secret import SecretError, random_secret
from edge.server import MrdServer
from edge.settings import Settings
from edge.spool import Spool
from edge.wire import Publisher, Subscriber, encode_event
from recon.errors import DeliveryError

WAIT_S = 20.0


class Guarded:
    """A router and a publisher behind a gate, and the clients' keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keyring = Keyring(folder / "keys")
        self.keys: dict[str, ClientKey] = {}
        for name, role in (("wall", "viewer"), ("desk", "responder"), ("it", "admin")):
            self.keyring.create(name, role, folder / f"{name}.key")
            self.keys[name] = read_client_key(folder / f"{name}.key")
        self.audit = AuditTrail(folder / "audit.jsonl")
        self.gate = Gate(self.keyring, self.audit)
        self.router = Router("tcp://127.0.0.1:0", self.gate)
        self.router.open()
        self.publisher = Publisher("tcp://127.0.0.1:0", self.gate)
        self.gate.watch()

    def close(self) -> None:
        for each in (self.router, self.publisher, self.gate, self.audit):
            each.close()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "audit.jsonl").read_text().splitlines()]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    opened = Guarded(tmp_path)
    yield opened
    opened.close()


def what_comes(guarded: Guarded, client: AlertClient, for_s: float) -> list[tuple[str, str]]:
    until = time.monotonic() + for_s
    found: list[tuple[str, str]] = []
    while time.monotonic() < until and not found:
        client.receive(0.05)
        found += [(message.user, message.source) for message in guarded.router.receive()]
    return found


def test_a_known_key_is_let_in_under_its_name(guarded: Guarded) -> None:
    with AlertClient(guarded.router.address, "called anything", key=guarded.keys["desk"]) as client:
        assert what_comes(guarded, client, WAIT_S)[0] == ("desk", "127.0.0.1")
    assert (guarded.keyring.role_of("desk"), guarded.keyring.role_of("nobody")) == ("responder", None)
    assert guarded.keyring.role_of("../server") is None


def strangers(guarded: Guarded) -> dict[str, ClientKey | None]:
    public, secret = zmq.curve_keypair()
    known = guarded.keys["desk"]
    return {
        "no key": None,
        "unknown key": ClientKey("x", public, secret, known.server),
        "wrong server": dataclasses.replace(known, server=public),
        "another's public key": dataclasses.replace(known, secret=secret),
    }


def test_strangers_are_refused_and_written_down(guarded: Guarded) -> None:
    for n, key in enumerate(strangers(guarded).values(), 1):
        with AlertClient(guarded.router.address, "stranger", key=key) as client:
            until = time.monotonic() + WAIT_S
            while len({record["EventOutcomeDescription"] for record in guarded.records()}) < min(n, 2):
                assert not what_comes(guarded, client, 0.1)
                assert time.monotonic() < until
    reasons = {record["EventOutcomeDescription"].split(" (")[0] for record in guarded.records()}
    assert reasons == {"a connection without a key, or with the wrong server's", "a key that is not known here"}
    assert {record["what"] for record in guarded.records()} == {"refused"}
    assert verify(guarded.folder / "audit.jsonl")[1] == ""


def test_a_revoked_key_is_refused(guarded: Guarded) -> None:
    assert guarded.keyring.revoke("desk")
    assert not guarded.keyring.revoke("desk")
    with AlertClient(guarded.router.address, "desk", key=guarded.keys["desk"]) as client:
        assert not what_comes(guarded, client, 0.5)
    assert guarded.keyring.role_of("desk") is None


def test_events_are_for_known_keys_alone(guarded: Guarded) -> None:
    key = guarded.keys["wall"]
    known = Subscriber(guarded.publisher.address, (key.public, key.secret, key.server))
    stranger = Subscriber(guarded.publisher.address)
    until = time.monotonic() + WAIT_S
    event = None
    while event is None:
        assert time.monotonic() < until
        guarded.publisher.send(encode_event("heartbeat", 1, "t", {}, None))
        event = known.receive(0.05)
    assert stranger.receive(0.3) is None
    known.close()
    stranger.close()


def test_only_the_scanners_that_are_named_may_connect(tmp_path: Path) -> None:
    async def knock(allow: list[str]) -> tuple[bytes, list[str]]:
        strangers: list[str] = []
        server = MrdServer("127.0.0.1", 0, Spool(tmp_path / "spool"), NoListener(), None, allow, strangers.append)
        await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(encode_close())
        try:
            answer = await reader.read()
        except ConnectionResetError:
            answer = b""
        writer.close()
        await server.stop()
        return answer, strangers

    assert asyncio.run(knock(["10.0.0.0/8", "::1"])) == (b"", ["127.0.0.1"])
    for allow in ([], ["127.0.0.0/8"], ["10.0.0.1", "127.0.0.1"]):
        answer, strangers = asyncio.run(knock(allow))
        assert answer
        assert not strangers


class NoListener:
    """A daemon that no scan reaches."""

    async def admit(self) -> None:
        raise AssertionError

    scan_opened = scan_grew = scan_text = scan_closed = None


def test_elsewhere_nothing_is_bound_without_keys(tmp_path: Path) -> None:
    settings = dataclasses.replace(Settings(), state=tmp_path)
    for section in ("events", "alerts"):
        here = {
            each: dataclasses.replace(getattr(settings, each), address="tcp://127.0.0.1:0")
            for each in ("events", "alerts")
        }
        here[section] = dataclasses.replace(here[section], address="tcp://0.0.0.0:0")
        ledger, audit = Ledger(tmp_path / "ledger.sqlite"), AuditTrail(tmp_path / TRAIL)
        with pytest.raises(DeliveryError, match="scanside keys create"):
            Front(dataclasses.replace(settings, **here), ledger, audit)
        audit.close()
        ledger.close()


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, out = ["--state", str(tmp_path)], tmp_path / "desk.key"
    assert main(["keys", "create", "desk", "--role", "responder", "--out", str(out), *state]) == 0
    assert out.stat().st_mode & 0o777 == 0o600
    secret = json.loads(out.read_text())["secret"]
    said = capsys.readouterr().out
    assert main(["keys", "create", "desk", "--role", "viewer", "--out", str(tmp_path / "2"), *state]) == 1
    assert main(["keys", "create", "../evil", "--role", "viewer", "--out", str(tmp_path / "3"), *state]) == 1
    assert main(["keys", "create", "wall", "--role", "viewer", "--out", str(out), *state]) == 1  # out is there already
    assert main(["keys", "list", *state]) == 0
    said += capsys.readouterr().out
    assert "responder" in said
    assert "wall" not in said
    assert main(["keys", "revoke", "desk", *state]) == 0
    assert main(["keys", "revoke", "desk", *state]) == 1
    assert secret not in said + (tmp_path / TRAIL).read_text()
    trail = [json.loads(line) for line in (tmp_path / TRAIL).read_text().splitlines()]
    assert [record["EventOutcomeDescription"] for record in trail] == ["created as responder", "revoked"]


def test_key_files_that_others_may_read_are_refused(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "keys")
    keyring.create("desk", "responder", tmp_path / "desk.key")
    (tmp_path / "desk.key").chmod(0o644)
    with pytest.raises(SecretError, match="chmod 600"):
        read_client_key(tmp_path / "desk.key")
    (tmp_path / "keys" / "server.json").chmod(0o640)
    with pytest.raises(SecretError, match="chmod 600"):
        keyring.server()
    (tmp_path / "keys" / "clients" / "desk.json").chmod(0o666)
    assert keyring.role_of("desk") is None
    public = json.loads((tmp_path / "keys" / "clients" / "desk.json").read_text())["public"]
    assert keyring.by_public(public) is None


def test_doctor_looks_at_keys_and_secrets(tmp_path: Path) -> None:
    settings = Settings()
    assert [finding.level for finding in secret_findings(settings, tmp_path)] == ["ok"]
    alerts = dataclasses.replace(settings.alerts, address="tcp://0.0.0.0:5571")
    open_to_all = dataclasses.replace(settings, alerts=alerts)
    (missing,) = secret_findings(open_to_all, tmp_path)
    assert missing.level == "fault"
    assert "scanside keys create" in missing.words
    Keyring(tmp_path / "keys").create("desk", "responder", tmp_path / "desk.key")
    assert secret_findings(open_to_all, tmp_path)[0].words == "desk (responder)"
    random_secret(tmp_path / "keys" / "pseudonym.key")
    (tmp_path / "keys" / "pseudonym.key").chmod(0o644)
    assert [finding.level for finding in secret_findings(open_to_all, tmp_path)] == ["ok", "fault"]
    assert clock_finding().level in ("ok", "note")
