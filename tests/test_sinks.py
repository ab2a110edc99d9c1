"""Alerts for other systems: there once, whatever the receiver does, or given up with a reason."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edge.alert import Times, alerts_of
from edge.courier import Courier, RejectedError
from edge.deliveries import Deliveries
from edge.ledger import Ledger
from recon.errors import DeliveryError

FINDING = {
    "finding": "haemorrhage",
    "state": "flagged",
    "probability": 0.8,
    "evidence": "simulated",
    "model": "m|1^&~\\",
}
TIMES = Times(raised="2026-11-25T10:11:12.345Z")
(ALERT,) = alerts_of("S" * 26, {"findings": [FINDING]}, {"exam_key": "E" * 24, "patient_key": "P" * 24}, TIMES)
CONTENT = json.loads(json.dumps(ALERT.to_json()))
KEY = CONTENT["alert_id"]


class FakeSink:
    """Answers as a list says: None takes it, an error is raised."""

    name = "fake"

    def __init__(self, answers: list[DeliveryError | None]) -> None:
        self.answers, self.got = answers, list[str]()

    def send(self, key: str, content: Any) -> None:
        self.got.append(key)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer


def deliver(ledger: Ledger, sink: Any, until: Callable[[Deliveries], bool], **options: Any) -> list[tuple[str, str]]:
    """Run a courier until all is as wanted; return the outcomes."""
    outcomes: list[tuple[str, str]] = []

    async def run() -> None:
        deliveries = Deliveries(ledger)
        courier = Courier(
            sink,
            deliveries,
            first_pause_s=0.01,
            on_outcome=lambda d, state, why: outcomes.append((state, why)),
            **options,
        )
        task = asyncio.create_task(courier.run())
        for _ in range(2000):
            if until(deliveries):
                break
            assert not task.done()
            await asyncio.sleep(0.01)
        else:
            raise AssertionError("it did not come to an end")
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
    return outcomes


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def is_done(deliveries: Deliveries) -> bool:
    return not deliveries.waiting("fake")


def test_what_fails_is_tried_again_and_entered_once(ledger: Ledger) -> None:
    for _ in range(2):
        Deliveries(ledger).enter("fake", KEY, CONTENT, "t")
    sink = FakeSink([DeliveryError("away"), DeliveryError("away"), None])
    assert deliver(ledger, sink, is_done) == [("delivered", "")]
    assert sink.got == [KEY] * 3
    assert Deliveries(ledger).count() == {("fake", "delivered"): 1}


def test_what_never_arrives_is_given_up_with_its_reason_and_can_be_revived(ledger: Ledger) -> None:
    deliveries = Deliveries(ledger)
    for key in ("A", "B"):
        deliveries.enter("fake", key, CONTENT, "t")
    sink = FakeSink([RejectedError("no such patient"), *[DeliveryError("away")] * 3])
    outcomes = deliver(ledger, sink, is_done, attempts=3)
    assert outcomes == [("dead", "no such patient"), ("dead", "given up: away")]
    assert {(d.key, d.attempts) for d in deliveries.dead()} == {("A", 1), ("B", 3)}
    assert deliveries.revive("fake", "A") == 1
    assert deliveries.revive("fake") == 1
    assert deliver(ledger, sink, is_done) == [("delivered", "")] * 2
    assert deliveries.dead() == []


def test_one_that_fails_does_not_hold_up_the_others(ledger: Ledger) -> None:
    deliveries = Deliveries(ledger)
    for key in ("bad", "good 1", "good 2"):
        deliveries.enter("fake", key, CONTENT, "t")

    class Picky(FakeSink):
        def send(self, key: str, content: Any) -> None:
            self.got.append(key)
            if key == "bad":
                raise DeliveryError("not this one")

    deliver(ledger, Picky([]), lambda d: d.count().get(("fake", "delivered")) == 2)


class MllpServer:
    """Takes messages and answers as told: a code, "drop" (closes first), "garbage" or "other" (another's id)."""

    def __init__(self, answers: list[str]) -> None:
        self.answers, self.got = answers, list[str]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                buffer = b""
                while not buffer.endswith(b"\x1c\r"):
                    chunk = connection.recv(65536)
                    if not chunk:
                        break
                    buffer += chunk
                if not buffer:
                    return
                message = buffer[1:-2].decode()
                self.got.append(message)
                answer = self.answers.pop(0) if self.answers else "AA"
                control = "X" if answer == "other" else message.split("|")[9]
                code = "AA" if answer == "other" else answer
                if answer == "garbage":
                    connection.sendall(b"\x0bhello\x1c\r")
                elif answer != "drop":
                    ack = f"MSH|^~\\&|RIS||SCANSIDE||20261125||ACK^R01|1|P|2.5.1\rMSA|{code}|{control}\r"
                    connection.sendall(b"\x0b" + ack.encode() + b"\x1c\r")

    def close(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)):
            pass  # wakes the thread
        self._thread.join()
        self._server.close()


def test_an_alert_is_an_oru_that_hl7_reads(ledger: Ledger) -> None:
    hl7 = pytest.importorskip("hl7")
    from edge.hl7_sink import Hl7Sink, control_id, encode_oru

    message = hl7.parse(encode_oru(KEY, CONTENT))
    assert str(message["MSH"][0][9]) == "ORU^R01^ORU_R01"
    assert (str(message["MSH"][0][10]), str(message["MSH"][0][12])) == (control_id(KEY), "2.5.1")
    assert str(message["MSH"][0][7]) == "20261125101112.345+0000"
    assert str(message["PID"][0][3]).split("^")[0] == "P" * 24
    assert str(message["OBR"][0][25]) == "P"
    assert {str(segment[11]) for segment in message["OBX"]} == {"P"}
    assert [str(segment[8]) for segment in message["OBX"]][:2] == ["AA", "AA"]
    values = {str(segment[3]).split("^")[0]: str(segment[5]) for segment in message["OBX"]}
    assert values["PROBABILITY"] == "0.8"
    assert message.unescape(values["MODEL"]) == "m|1^&~\\"
    assert values["ACR"].startswith("RID49480^")
    assert "Not for diagnostic use" in str(message["NTE"][0])

    server = MllpServer(["drop", "garbage", "AE", "other", "AA"])
    sink = Hl7Sink("127.0.0.1", server.port, timeout_s=5.0)
    Deliveries(ledger).enter("hl7", KEY, CONTENT, "t")
    assert deliver(ledger, sink, lambda d: not d.waiting("hl7")) == [("delivered", "")]
    assert len(server.got) == 5
    assert len(set(server.got)) == 1  # the same message each time, under one control id
    server.answers = ["AR"]
    with pytest.raises(RejectedError, match="AR"):
        sink.send(KEY, CONTENT)
    server.close()
    with pytest.raises(DeliveryError, match="cannot be reached"):
        sink.send(KEY, CONTENT)


class FhirServer(ThreadingHTTPServer):
    """Creates conditionally, and fails as told: a status, or "lost" (created, but the answer never comes)."""

    def __init__(self, answers: list[int | str]) -> None:
        self.answers, self.resources = answers, dict[str, Any]()
        self.authorization: str | None = None
        super().__init__(("127.0.0.1", 0), _FhirHandler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _FhirHandler(BaseHTTPRequestHandler):
    server: FhirServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.authorization = self.headers.get("Authorization")
        answer = self.server.answers.pop(0) if self.server.answers else 200
        if isinstance(answer, int) and answer != 200:
            self.send_response(answer)
            if answer == 302:
                self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            return
        statuses = []
        for entry in body["entry"]:
            key = f"{entry['request']['url']}?{entry['request']['ifNoneExist']}"
            statuses.append("200 OK" if key in self.server.resources else "201 Created")
            self.server.resources.setdefault(key, entry["resource"])
        if answer == "lost":
            return
        out = json.dumps({"resourceType": "Bundle", "entry": [{"response": {"status": s}} for s in statuses]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *args: Any) -> None:
        pass


def test_an_alert_is_a_fhir_transaction_that_creates_once(ledger: Ledger, tmp_path: Path) -> None:
    pytest.importorskip("fhir.resources")
    from fhir.resources.R4B.bundle import Bundle

    from edge.fhir_sink import FhirSink, encode_bundle

    bundle = Bundle.model_validate_json(encode_bundle(KEY, CONTENT))
    report, communication = (entry.resource for entry in bundle.entry)
    assert (report.status, communication.status, communication.priority) == ("preliminary", "in-progress", "stat")
    assert report.subject.identifier.value == "P" * 24
    assert communication.about[0].reference == bundle.entry[0].fullUrl
    assert report.meta.security[0].code == "AIAST"
    assert "Not for diagnostic use" in communication.payload[0].contentString

    token = tmp_path / "token"
    token.write_text("secret-token\n")
    server = FhirServer([503, "lost", 302, 429, 200])
    sink = FhirSink(f"http://127.0.0.1:{server.server_port}/fhir", token=token, timeout_s=5.0)
    with pytest.raises(DeliveryError, match="chmod 600"):
        sink.send(KEY, CONTENT)
    token.chmod(0o600)
    Deliveries(ledger).enter("fhir", KEY, CONTENT, "t")
    assert deliver(ledger, sink, lambda d: not d.waiting("fhir")) == [("delivered", "")]
    assert sorted(key.split("?")[0] for key in server.resources) == ["Communication", "DiagnosticReport"]
    assert server.authorization == "Bearer secret-token"
    server.answers = [422]
    with pytest.raises(RejectedError, match="422"):
        sink.send(KEY, CONTENT)
    server.close()
    with pytest.raises(DeliveryError, match="cannot be reached"):
        sink.send(KEY, CONTENT)
