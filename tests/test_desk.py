"""The alert desk: told until somebody answers, handed on where nobody does, and never twice in effect."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from edge.alert import Alert, Times, alert_id, alerts_of
from edge.audit import AuditTrail, verify
from edge.client import AlertClient, RefusedError
from edge.deadline import Deadline
from edge.desk import Desk, DeskRules
from edge.event_log import EventLog
from edge.follow import Follower
from edge.ledger import Ledger
from edge.outbox import Outbox
from edge.router import Router
from edge.wire import Publisher
from recon.errors import DeliveryError

WAIT_S = 20.0
SCAN = "A" * 26
FINDING = {
    "finding": "infarct", "state": "flagged", "why": "", "probability": 0.93, "conformal": ["present"], "alpha": 0.1,
    "contrast": "dwi", "evidence": "simulated", "key_slice": 7, "volume": 0, "volume_ml": 3.5,
    "box_mm": [[0, 0, 0], [9, 9, 9]], "model": "triage 1", "model_sha256": "ab" * 32, "operating_point": "sensitive",
}  # fmt: skip
QUALITY = {"verdict": "degraded", "reasons": [{"code": "spike"}]}


@dataclass
class FakeClock:
    """A clock that a test sets."""

    boot: str = "first"
    boot_s: float = 100.0
    epoch_s: float = 1_700_000_000.0

    def since_boot_s(self) -> float:
        return self.boot_s

    def wall_s(self) -> float:
        return self.epoch_s


def an_alert(n: int = 0, **changed: Any) -> Alert:
    report = {"quality": QUALITY, "findings": [{**FINDING, **changed}]}
    scan_id = SCAN[:-4] + f"{n:04d}"
    (alert,) = alerts_of(scan_id, report, {"exam_key": "E"}, Times(raised="2026-11-25T10:00:00.000Z"))
    return alert


class Office:
    """A desk in a thread of its own, with its ledger, as the daemon has one."""

    def __init__(self, folder: Path, clock: FakeClock, rules: DeskRules, roles: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._rules, self._clock, self.roles = rules, clock, roles or {"": "admin"}
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(WAIT_S)

    async def _run(self) -> None:
        ledger = Ledger(self.folder / "ledger.sqlite")
        publisher = Publisher("tcp://127.0.0.1:0")
        self.events = EventLog(ledger, publisher)
        router = Router("tcp://127.0.0.1:0")
        router.open()
        self.address, self.events_address = router.address, publisher.address
        audit = AuditTrail(self.folder / "audit.jsonl")
        self.desk = Desk(ledger, self.events, router, self._rules, self._clock, audit, self.roles.get)
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        running = asyncio.create_task(self.desk.run())
        self._ready.set()
        await self._stop.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for each in (router, publisher, audit, ledger):
            each.close()

    def enter(self, *alerts: Alert) -> list[str]:
        return self.do(lambda: self._enter(alerts))

    def _enter(self, alerts: tuple[Alert, ...]) -> list[str]:
        with self.events.together():
            entered = self.desk.enter(alerts)
        self.desk.announce(entered)
        return entered

    def do(self, act: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(WAIT_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


RULES = DeskRules(("reading-room", "on-call", "chief"), deadline_s=60.0, resend_s=0.2)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def office(tmp_path: Path, clock: FakeClock) -> Iterator[Office]:
    opened = Office(tmp_path, clock, RULES)
    yield opened
    opened.close()


def wait_for(client: AlertClient, op: str, **wanted: Any) -> dict[str, Any]:
    until = time.monotonic() + WAIT_S
    heard = []
    while time.monotonic() < until:
        message = client.receive(0.2)
        if message is not None:
            heard.append(message["op"])
            if message["op"] == op and all(message[name] == value for name, value in wanted.items()):
                return message
    raise AssertionError(f"{op} {wanted} did not come; heard {heard[-20:]}")


def test_an_alert_says_all_that_its_finding_knew() -> None:
    alert = an_alert()
    said = alert.to_json()
    for name in ("probability", "conformal", "alpha", "contrast", "evidence", "volume_ml", "box_mm", "operating_point"):
        assert json.loads(json.dumps(said[name])) == FINDING[name]
    assert (said["model"], said["model_sha256"]) == (FINDING["model"], FINDING["model_sha256"])
    assert (said["acr_category"], said["acr_code"]) == (1, "RID49480")
    assert said["quality"] == {"verdict": "degraded", "reasons": ["spike"]}
    assert said["key_image"] == {"volume": 0, "slice": 7, "preview": f"results/{alert.scan_id}/preview.png"}
    assert said["notice"] == "For notification only. Not for diagnostic use. Read the full study."
    assert json.loads(json.dumps(said, allow_nan=False)) == json.loads(json.dumps(said))


def test_only_flagged_findings_alert_and_nonsense_is_refused() -> None:
    report = {"findings": [{**FINDING, "state": "not flagged"}, {**FINDING, "state": "not assessed"}]}
    assert alerts_of(SCAN, report, {}, Times()) == []
    assert an_alert(probability=float("nan")).probability is None
    with pytest.raises(DeliveryError, match=r"0\.\.1"):
        an_alert(probability=1.5)
    with pytest.raises(DeliveryError, match="category"):
        an_alert(acr_category=7)


def test_the_id_belongs_to_scan_finding_and_model() -> None:
    ids = {alert_id(s, f, m) for s in ("A", "B") for f in ("infarct", "mass") for m in (None, "1", "2")}
    assert len(ids) == 12
    assert alert_id("A", "mass", "1") == alert_id("A", "mass", "1")


def test_an_alert_comes_again_and_again_until_somebody_takes_it(office: Office) -> None:
    with AlertClient(office.address, "desk") as client, AlertClient(office.address, "wall") as other:
        (alert,) = office.enter(an_alert())
        assert [wait_for(client, "alert")["attempt"] for _ in range(3)] == [1, 2, 3]
        wait_for(other, "alert", alert_id=alert)
        confirmed = client.ack(alert, "Dr Who")
        assert (confirmed["by"], confirmed["via"]) == ("Dr Who", "desk")
        wait_for(other, "acknowledged", alert_id=alert, by="Dr Who")
        until = time.monotonic() + 3 * RULES.resend_s
        while time.monotonic() < until:
            message = other.receive(0.1)
            assert message is None or message["op"] != "alert"
        kinds = [event["kind"] for event in client.snapshot(0)]
        assert kinds == ["alert", "alert.acknowledged"]


def test_a_rerun_never_alerts_twice_even_after_the_answer(office: Office) -> None:
    with AlertClient(office.address, "desk") as client:
        (alert,) = office.enter(an_alert())
        assert office.enter(an_alert(probability=0.5)) == []
        client.ack(alert, "me")
        assert office.enter(an_alert()) == []
        assert [event["kind"] for event in client.snapshot(0)] == ["alert", "alert.acknowledged"]


def test_one_answer_counts(office: Office) -> None:
    with AlertClient(office.address, "one") as one, AlertClient(office.address, "two") as two:
        (alert,) = office.enter(an_alert())
        one.ack(alert, "first")
        with pytest.raises(RefusedError, match="already"):
            two.ack(alert, "second")
        assert one.ack(alert, "first")["by"] == "first"  # a lost confirmation may be asked for again
        with pytest.raises(RefusedError, match="no alert has this id"):
            one.ack("nothing", "first")
        assert sum(event["kind"] == "alert.acknowledged" for event in one.snapshot(0)) == 1
    assert verify(office.folder / "audit.jsonl")[1] == ""
    assert "already" in (office.folder / "audit.jsonl").read_text()


def test_an_acknowledgement_of_another_connection_is_refused(office: Office) -> None:
    with AlertClient(office.address, "one") as one:
        (alert,) = office.enter(an_alert())
        wait_for(one, "welcome")
        stolen = {"op": "ack", "alert_id": alert, "by": "thief", "session": one.session}
    with Raw(office.address) as raw:
        raw.say(stolen)
        assert raw.hear("refused")["code"] == "hello"
        raw.say({"op": "hello", "client": "one"})
        assert raw.hear("welcome")["session"] != stolen["session"]
        raw.say(stolen)
        assert raw.hear("refused")["code"] == "session"
    assert office.do(lambda: office.desk.n_open) == 1
    assert (office.folder / "audit.jsonl").read_text().count("session: ") == 1


def test_nobody_answers_and_the_next_group_is_told(office: Office, clock: FakeClock) -> None:
    with (
        AlertClient(office.address, "all") as everyone,
        AlertClient(office.address, "second", groups=["on-call"]) as second,
        AlertClient(office.address, "third", groups=["chief"]) as third,
    ):
        for client in (everyone, second, third):
            wait_for(client, "welcome")
        (alert,) = office.enter(an_alert())
        assert wait_for(everyone, "alert")["group"] == "reading-room"
        assert not any(m["op"] == "alert" for m in _all_of(second, 0.5))
        clock.boot_s += RULES.deadline_s + 0.25
        told = wait_for(second, "alert", alert_id=alert)
        assert (told["group"], told["level"]) == ("on-call", 1)
        wait_for(everyone, "alert", level=1)
        assert not any(m["op"] == "alert" for m in _all_of(third, 0.5))
        for level in (2, 3):  # the last group is told again and again
            clock.boot_s += RULES.deadline_s + 0.25
            assert wait_for(third, "alert", level=level)["group"] == "chief"
        escalations = [event for event in everyone.snapshot(0) if event["kind"] == "alert.escalated"]
        assert [event["group"] for event in escalations] == ["on-call", "chief", "chief"]
        assert [event["is_last_group"] for event in escalations] == [False, True, True]
        assert all(event["late_s"] <= 0.3 for event in escalations)
        second.ack(alert, "night shift")
        clock.boot_s += 10 * RULES.deadline_s
        assert not any(m["op"] == "alert" for m in _all_of(third, 0.5))


def test_neither_a_stepped_clock_nor_a_restart_moves_a_deadline(tmp_path: Path, clock: FakeClock) -> None:
    office = Office(tmp_path, clock, RULES)
    office.enter(an_alert())
    clock.boot_s += 20
    clock.epoch_s -= 86_400  # the wall clock goes back a day, and forward a year
    time.sleep(0.1)
    clock.epoch_s += 366 * 86_400
    office.close()
    office = Office(tmp_path, clock, RULES)
    with AlertClient(office.address, "desk") as client:
        message = wait_for(client, "alert")
        assert (message["level"], message["due_in_s"]) == (0, 40.0)
        office.close()
        clock.boot, clock.boot_s = "second", 5.0  # another boot: the wall clock decides
        clock.epoch_s += 3
    office = Office(tmp_path, clock, RULES)
    with AlertClient(office.address, "desk") as client:
        assert wait_for(client, "alert")["level"] == 1
    office.close()


def test_deadlines_of_another_boot_never_wait_longer_than_once() -> None:
    clock = FakeClock()
    deadline = Deadline.after(60.0, clock)
    clock.boot, clock.boot_s = "second", 1.0
    clock.epoch_s -= 10_000
    assert deadline.left_s(clock) == 60.0
    assert deadline.carried_over(clock).left_s(clock) == 60.0
    clock.epoch_s += 10_100
    assert deadline.left_s(clock) < 0
    assert replace(deadline, boot="").left_s(clock) < 0


def test_numbers_and_open_alerts_survive_a_restart(tmp_path: Path, clock: FakeClock) -> None:
    office = Office(tmp_path, clock, RULES)
    first, second = (office.enter(an_alert(n))[0] for n in range(2))
    with AlertClient(office.address, "desk") as client:
        client.ack(first, "me")
    office.close()
    office = Office(tmp_path, clock, RULES)
    with AlertClient(office.address, "desk") as client:
        old = wait_for(client, "alert", alert_id=first)  # a late joiner hears of answered ones too, once
        assert (old["state"], old["by"]) == ("acknowledged", "me")
        assert wait_for(client, "alert", alert_id=second)["state"] == "open"
        office.enter(an_alert(2))
        assert [event["seq"] for event in client.snapshot(0)] == [1, 2, 3, 4]
        assert [event["seq"] for event in client.snapshot(3)] == [4]
    with AlertClient(office.address, "later", after=2) as client:
        assert wait_for(client, "alert", state="open")["seq"] == 4
    office.close()


def test_long_histories_come_in_pieces_and_say_what_is_forgotten(office: Office) -> None:
    for _n in range(5):
        office.do(lambda: [office.events.publish("heartbeat", "", {}) for _ in range(100)])
    with AlertClient(office.address, "desk") as client:
        assert [event["seq"] for event in client.snapshot(0)] == list(range(1, 501))
    with Raw(office.address) as raw:
        office.do(lambda: office.desk._ledger.prune_events(keep=100))
        raw.say({"op": "snapshot", "after": 0})
        answer = raw.hear("events")
        assert (answer["forgotten"], answer["events"][0]["seq"], answer["more"]) == (400, 401, False)


def test_a_gap_is_filled_in_its_place(office: Office) -> None:
    def publish(n: int) -> None:
        office.do(lambda: [office.events.publish("heartbeat", "", {}) for _ in range(n)])

    publish(5)  # nobody listens yet: lost on the wire
    follower = Follower(office.events_address, office.address, "archive", after=2)
    seqs: list[int] = []
    until = time.monotonic() + WAIT_S
    while len(seqs) < 10 and time.monotonic() < until:
        publish(1)
        while (event := follower.receive(0.1)) is not None:
            seqs.append(event[0]["seq"])
    follower.close()
    assert seqs == list(range(3, 3 + len(seqs)))
    assert follower.n_healed >= 3


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\x00", b"[]", b"{}", b'{"op":1}', b'{"op":"fly"}', b'{"op":"hello"}', b'{"op":"snapshot","after":-1}',
        b'{"op":"hello","client":"x","after":true}', b'{"op":"hello","client":"x","groups":["nobody"]}',
        b'{"op":"hello","client":"a\\nb"}', b'{"op":"ack","alert_id":"x","by":""}',
        b'{"op":"ack","alert_id":[],"by":"x"}',
        b"[" * 5000,
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_words(office: Office, said: bytes) -> None:
    with Raw(office.address) as raw:
        raw.socket.send(said)
        assert raw.hear("refused")["reason"]


def test_who_does_not_read_delays_nobody(office: Office) -> None:
    deaf = [Raw(office.address, rcvhwm=1) for _ in range(3)]
    for n, raw in enumerate(deaf):
        raw.say({"op": "hello", "client": f"deaf {n}"})
    with AlertClient(office.address, "desk") as client:
        wait_for(client, "welcome")
        alerts = [office.enter(an_alert(n))[0] for n in range(150)]
        heard: set[str] = set()
        until = time.monotonic() + WAIT_S
        while len(heard) < 150 and time.monotonic() < until:
            message = client.receive(0.2)
            if message is not None and message["op"] == "alert":
                heard.add(message["alert_id"])
        assert heard == set(alerts)
        for alert in alerts[:5]:
            client.ack(alert, "me")
    for raw in deaf:
        raw.close()


def test_clients_that_left_are_forgotten(office: Office) -> None:
    for n in range(20):
        with Raw(office.address) as raw:
            raw.say({"op": "hello", "client": f"{n}"})
            raw.hear("welcome")
    until = time.monotonic() + WAIT_S
    while office.do(lambda: office.desk.n_clients):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_viewer_may_look_but_not_answer(tmp_path: Path, clock: FakeClock) -> None:
    office = Office(tmp_path, clock, RULES, roles={"": "viewer"})
    with AlertClient(office.address, "wall") as client:
        (alert,) = office.enter(an_alert())
        wait_for(client, "alert")
        with pytest.raises(RefusedError, match="a viewer may not acknowledge"):
            client.ack(alert, "me")
        assert office.do(lambda: office.desk.n_open) == 1
        office.roles.clear()
        with pytest.raises(RefusedError, match="revoked"):
            client.ack(alert, "me")
    office.close()
    trail = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    restricted = [record for record in trail if record["what"] == "restricted"]
    assert [record["EventOutcomeDescription"].split(":")[0] for record in restricted[:2]] == ["role", "key"]
    assert restricted[0]["EventTypeCode"]["csd-code"] == "110132"


class Raw:
    """A DEALER without any help."""

    def __init__(self, address: str, rcvhwm: int = 1000) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVHWM, rcvhwm)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def say(self, message: dict[str, Any]) -> None:
        self.socket.send(json.dumps(message).encode())

    def hear(self, op: str) -> dict[str, Any]:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            if self.socket.poll(200):
                message: dict[str, Any] = json.loads(self.socket.recv())
                if message["op"] == op:
                    return message
        raise AssertionError(f"{op} did not come")

    def close(self) -> None:
        self.socket.close()
        self._context.term()


def _all_of(client: AlertClient, for_s: float) -> list[dict[str, Any]]:
    until = time.monotonic() + for_s
    found = []
    while (left_s := until - time.monotonic()) > 0:
        message = client.receive(left_s)
        if message is not None:
            found.append(message)
    return found


def test_the_first_answer_stands(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    outbox = Outbox(ledger)
    alert = an_alert()
    with ledger.transaction():
        outbox.enter(alert.to_json(), 1, "2026-11-25T10:00:00.000Z", Deadline.after(60, FakeClock()))
        assert outbox.acknowledge(alert.alert_id, "Ada", "desk", "2026-11-25T10:01:00.000Z")
        assert not outbox.acknowledge(alert.alert_id, "Bo", "ward", "2026-11-25T10:02:00.000Z")
    (kept,) = outbox.answered(0, 10)
    assert (kept.acknowledged_by, kept.acknowledged_via) == ("Ada", "desk")
    assert outbox.unanswered() == []
    ledger.close()


def test_a_place_is_told_once_under_its_likeliest_name() -> None:
    box = [[0.0, 0.0, 0.0], [30.0, 30.0, 20.0]]
    inside = [[10.0, 10.0, 5.0], [40.0, 30.0, 20.0]]
    elsewhere = [[-60.0, 0.0, 0.0], [-40.0, 20.0, 20.0]]
    findings = [
        {**FINDING, "finding": "infarct", "probability": 0.9, "box_mm": inside},
        {**FINDING, "finding": "mass", "probability": 0.99, "box_mm": box},
        {**FINDING, "finding": "haemorrhage", "probability": 0.7, "box_mm": elsewhere},
        {**FINDING, "finding": "other", "probability": 0.6, "box_mm": None},
    ]
    alerts = alerts_of(SCAN, {"quality": QUALITY, "findings": findings}, {}, Times())
    assert [(each.finding, [also["finding"] for also in each.also]) for each in alerts] == [
        ("mass", ["infarct"]),
        ("haemorrhage", []),
        ("other", []),
    ]
    above = [[5.0, 5.0, 22.0], [20.0, 20.0, 27.0]]  # in the next slice
    findings[0]["box_mm"] = above
    assert len(alerts_of(SCAN, {"quality": QUALITY, "findings": findings}, {}, Times())) == 3
    assert alerts[0].acr_category == 1  # as urgent as the infarct that it may be
    assert alerts[0].to_json()["also"] == ({"finding": "infarct", "probability": 0.9, "evidence": "simulated"},)
