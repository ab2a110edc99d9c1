"""The alert desk: sends every alert again and again until somebody takes it, and hands it on where nobody does.

Clients talk JSON over `edge.router`; docs/alerts.md describes each message. What they are told is committed first: an
alert with the result it comes from, an acknowledgement and an escalation with the event that says so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from edge.alert import Alert
from edge.audit import AuditTrail
from edge.deadline import Clock, Deadline
from edge.event_log import EventLog
from edge.ledger import Ledger
from edge.outbox import Outbox, Pending
from edge.peers import Peer
from edge.router import Incoming, PeerGoneError, Router
from edge.wire import utc_now

log = logging.getLogger(__name__)

MAY_ACKNOWLEDGE = frozenset({"responder", "admin"})
_MOST_PEERS = 256
_MOST_EVENTS = 200  # in one answer to `snapshot`
_MOST_ANSWERED = 50  # acknowledged alerts that a client is told of when it says hello
_BEAT_S = 2.0
_IDLE_S = 0.5  # the longest sleep, whatever the clocks do


@dataclass(frozen=True)
class DeskRules:
    """groups: who is told, and who next where nobody answered within `deadline_s`. resend_s: between two sendings."""

    groups: tuple[str, ...] = ("reading-room",)
    deadline_s: float = 300.0
    resend_s: float = 5.0


class Desk:
    """Serves alerts while `run` runs; `enter` adds new ones. All within the daemon's event loop."""

    def __init__(
        self,
        ledger: Ledger,
        events: EventLog,
        router: Router,
        rules: DeskRules,
        clock: Clock,
        audit: AuditTrail,
        role_of: Callable[[str], str | None] = lambda user: "admin",
        on_entered: Callable[[Mapping[str, Any]], None] = lambda alert: None,
    ) -> None:
        """role_of: the role of a key's owner, None for one that has been revoked.

        on_entered: called with each new alert within the transaction that enters it.
        """
        self.rules = rules
        self._ledger, self._events, self._router = ledger, events, router
        self._outbox = Outbox(ledger)
        self._clock = clock
        self._audit = audit
        self._role_of = role_of
        self._on_entered = on_entered
        self._more: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {}
        self._peers: dict[bytes, Peer] = {}
        self._beat_at = 0.0
        self._wake = asyncio.Event()
        with ledger.transaction():
            for alert in self._outbox.unanswered():
                if alert.deadline.boot != clock.boot:
                    self._outbox.set_deadline(alert.alert_id, alert.deadline.carried_over(clock))
        self._open: dict[str, Pending] = {alert.alert_id: alert for alert in self._outbox.unanswered()}

    @property
    def n_open(self) -> int:
        """How many alerts nobody has acknowledged."""
        return len(self._open)

    @property
    def n_clients(self) -> int:
        """How many clients have said hello."""
        return len(self._peers)

    def oldest_s(self) -> float:
        """Return for how long the oldest unanswered alert's present group has been waited for, 0 without any."""
        waits = [alert.deadline.wait_s - alert.deadline.left_s(self._clock) for alert in self._open.values()]
        return max(waits, default=0.0)

    def enter(self, alerts: Iterable[Alert]) -> list[str]:
        """Enter the alerts that are new, with their events, within the caller's `EventLog.together`; return their ids.

        The caller calls `announce` once all is committed.
        """
        entered = []
        for alert in alerts:
            if self._outbox.knows(alert.alert_id):
                continue
            content = alert.to_json()
            seq = self._events.publish("alert", alert.scan_id, {"group": self.rules.groups[0], **content})
            self._outbox.enter(content, seq, utc_now(), Deadline.after(self.rules.deadline_s, self._clock))
            self._on_entered(content)
            entered.append(alert.alert_id)
        return entered

    def offer(self, op: str, answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        """Answer one more op, for admins."""
        self._more[op] = answer

    def announce(self, alert_ids: Iterable[str]) -> None:
        """Begin to send alerts that were entered and committed."""
        for alert_id in alert_ids:
            alert = self._outbox.get(alert_id)
            if alert is not None and not alert.acknowledged_at:
                self._audit.record("alert", objects={"alert": alert_id, "scan": alert.scan_id})
                self._open[alert_id] = alert
        self._wake.set()

    async def run(self) -> None:
        """Serve for ever."""
        loop = asyncio.get_running_loop()
        handle = self._router.fileno()
        loop.add_reader(handle, self._wake.set)
        try:
            while True:
                self._wake.clear()
                pause_s = self.turn()
                if not pause_s:
                    await asyncio.sleep(0)
                    continue
                timer = loop.call_later(pause_s, self._wake.set)  # before 3.12, wait_for may swallow a cancellation
                await self._wake.wait()
                timer.cancel()
        finally:
            loop.remove_reader(handle)

    def turn(self) -> float:
        """Take what came, hand on what is due, send what is to be sent; return after how many seconds to come again."""
        for message in self._router.receive():
            self._take(message)
        self._escalate()
        now = time.monotonic()
        if now - self._beat_at >= _BEAT_S:
            self._beat_at = now
            for peer_id in list(self._peers):
                self._send(peer_id, {"op": "heartbeat", "seq": self._ledger.last_seq, "open": self.n_open})
        next_s = min(
            (self._send_due(peer_id, peer, now) for peer_id, peer in list(self._peers.items())), default=_IDLE_S
        )
        if self._router.has_input():
            return 0.0
        left_s = min((alert.deadline.left_s(self._clock) for alert in self._open.values()), default=_IDLE_S)
        return max(min(next_s, left_s, _IDLE_S), 0.001)

    # What clients say

    def _take(self, message: Incoming) -> None:
        body = message.body
        if body is None or not isinstance(body.get("op"), str):
            self._refuse(message, "message", "a JSON object with an op is needed: hello, ack or snapshot")
            return
        role = self._role_of(message.user)
        if role is None:
            self._peers.pop(message.peer, None)
            self._refuse(message, "key", "this key has been revoked")
            return
        takers = {"hello": self._on_hello, "ack": self._on_ack, "snapshot": self._on_snapshot}
        taker = takers.get(body["op"])
        if taker is not None:
            taker(message, body, role)
        elif body["op"] not in self._more:
            self._refuse(message, "message", "this op is not known; hello, ack and snapshot are")
        elif role != "admin":
            self._refuse(message, "role", f"a {role} may not ask for this; an admin may")
        else:
            self._send(message.peer, self._more[body["op"]](body))

    def _on_hello(self, message: Incoming, body: Mapping[str, Any], role: str) -> None:
        name, after, groups = body.get("client"), body.get("after", 0), body.get("groups", [])
        if not _is_name(name) or not _is_count(after) or not isinstance(groups, list) or len(groups) > 100:
            self._refuse(message, "message", "hello needs a client's name, and may have after (a number) and groups")
            return
        if any(group not in self.rules.groups for group in groups):
            self._refuse(message, "group", f"a group is not known; these are: {', '.join(self.rules.groups)}")
            return
        peer = self._peers.get(message.peer)
        is_new = peer is None
        if peer is None:
            if len(self._peers) >= _MOST_PEERS:
                self._refuse(message, "full", f"{_MOST_PEERS} clients are served already")
                return
            peer = self._peers[message.peer] = Peer(name, message.user, role, frozenset(groups), after)
            self._audit.record("login", user=message.user or name, role=role, source=message.source)
        peer.role, peer.groups, peer.after = role, frozenset(groups), min(peer.after, after)
        welcome = {
            "op": "welcome",
            "v": 1,
            "seq": self._ledger.last_seq,
            "role": role,
            "session": peer.session,
            "groups": list(self.rules.groups),
            "deadline_s": self.rules.deadline_s,
            "open": self.n_open,
        }
        if self._send(message.peer, welcome) and is_new:
            for alert in self._outbox.answered(after, _MOST_ANSWERED):
                self._send(message.peer, self._message(alert))

    def _on_ack(self, message: Incoming, body: Mapping[str, Any], role: str) -> None:
        alert_id, by = body.get("alert_id"), body.get("by")
        peer = self._peers.get(message.peer)
        if not _is_name(alert_id) or not _is_name(by):
            self._refuse(message, "message", "ack needs alert_id and by, texts of at most 128 printable characters")
        elif peer is None:
            self._refuse(message, "hello", "say hello first: an unknown connection acknowledges nothing", alert_id)
        elif role not in MAY_ACKNOWLEDGE:
            self._refuse(message, "role", f"a {role} may not acknowledge; a responder or admin may", alert_id)
        elif body.get("session", "" if message.user else peer.session) != peer.session:
            self._refuse(message, "session", "this acknowledgement belongs to another connection", alert_id)
        else:
            self._acknowledge(message, peer, alert_id, by)

    def _acknowledge(self, message: Incoming, peer: Peer, alert_id: str, by: str) -> None:
        alert, via = self._outbox.get(alert_id), message.user or peer.name
        if alert is None:
            self._refuse(message, "unknown", "no alert has this id", alert_id)
            return
        if alert.acknowledged_at:
            if (alert.acknowledged_by, alert.acknowledged_via) == (by, via):  # its answer was lost
                self._send(message.peer, _acknowledged(alert))
                return
            self._refuse(message, "acknowledged", "somebody has acknowledged this alert already", alert_id)
            self._send(message.peer, _acknowledged(alert))
            return
        at = utc_now()
        with self._events.together():
            self._outbox.acknowledge(alert_id, by, via, at)
            fields = {"alert_id": alert_id, "by": by, "via": via}
            seq = self._events.publish("alert.acknowledged", alert.scan_id, fields)
        objects = {"alert": alert_id, "scan": alert.scan_id}
        self._audit.record("acknowledged", user=via, role=peer.role, source=message.source, objects=objects, reason=by)
        log.info("alert acknowledged id=%s scan=%s", alert_id, alert.scan_id)
        self._open.pop(alert_id, None)
        taken = self._outbox.get(alert_id)
        assert taken is not None
        for peer_id, each in list(self._peers.items()):
            each.next_s.pop(alert_id, None)
            if not self._send(peer_id, _acknowledged(taken)):
                self._note_loss(peer_id, seq - 1)

    def _on_snapshot(self, message: Incoming, body: Mapping[str, Any], role: str) -> None:
        after = body.get("after", 0)
        if not _is_count(after):
            self._refuse(message, "message", "snapshot needs after, the number of the last event that is known")
            return
        rows = self._ledger.events(after, _MOST_EVENTS)
        events = [{"v": 1, "seq": seq, "kind": kind, "at": at, **fields} for seq, kind, _, at, fields in rows]
        last = rows[-1][0] if rows else after
        answer = {"op": "events", "after": after, "events": events, "more": last < self._ledger.last_seq}
        if rows and rows[0][0] > after + 1:
            answer["forgotten"] = rows[0][0] - 1  # older ones are not kept any more
        self._send(message.peer, answer)

    def _refuse(self, message: Incoming, code: str, reason: str, alert_id: str = "") -> None:
        """Tell a client why not, and write it down."""
        what = "restricted" if code in ("role", "session", "acknowledged", "key") else "refused"
        peer = self._peers.get(message.peer)
        objects = {"alert": alert_id} if alert_id else {}
        role, user = (peer.role, message.user or peer.name) if peer else ("", message.user)
        self._audit.record(
            what, "serious", user=user, role=role, source=message.source, objects=objects, reason=f"{code}: {reason}"
        )
        log.warning("alert client refused code=%s", code)
        answer = {"op": "refused", "code": code, "reason": reason}
        try:
            self._router.send(message.peer, {**answer, "alert_id": alert_id} if alert_id else answer)
        except PeerGoneError:
            self._peers.pop(message.peer, None)

    # What clients are told

    def _escalate(self) -> None:
        """Hand every alert whose deadline has passed to the next group; the last one is told again and again."""
        due = [alert for alert in self._open.values() if alert.deadline.left_s(self._clock) <= 0]
        if not due:
            return
        with self._events.together():
            for alert in due:
                level = alert.level + 1
                fields = {
                    "alert_id": alert.alert_id,
                    "level": level,
                    "group": self._groups(level)[-1],
                    "is_last_group": level >= len(self.rules.groups) - 1,
                    "late_s": round(-alert.deadline.left_s(self._clock), 3),
                }
                seq = self._events.publish("alert.escalated", alert.scan_id, fields)
                self._outbox.escalate(alert.alert_id, seq, Deadline.after(self.rules.deadline_s, self._clock))
        for alert in due:
            escalated = self._outbox.get(alert.alert_id)
            assert escalated is not None
            self._open[alert.alert_id] = escalated
            for peer in self._peers.values():
                peer.next_s.pop(alert.alert_id, None)
            group = self._groups(escalated.level)[-1]
            self._audit.record("escalated", objects={"alert": alert.alert_id, "scan": alert.scan_id}, reason=group)
            log.warning("alert escalated id=%s scan=%s level=%d", alert.alert_id, alert.scan_id, escalated.level)

    def _send_due(self, peer_id: bytes, peer: Peer, now: float) -> float:
        """Send one client what is due; return in how many seconds something will be."""
        if peer.lost_after is not None and self._send(peer_id, {"op": "gap", "after": peer.lost_after}):
            peer.lost_after = None
        next_s = _IDLE_S
        for alert in self._open.values():
            if not peer.wants(alert, self._groups(alert.level)):
                continue
            due_s, n_sent = peer.next_s.get(alert.alert_id, (now, 0))
            if due_s <= now:
                if not self._send(peer_id, {**self._message(alert), "attempt": n_sent + 1}):
                    return _IDLE_S  # its queue is full: it is slow, and will be sent the rest later
                due_s, n_sent = now + self.rules.resend_s, n_sent + 1
                peer.next_s[alert.alert_id] = (due_s, n_sent)
            next_s = min(next_s, due_s - now)
        return next_s

    def _message(self, alert: Pending) -> dict[str, Any]:
        """Return an alert as clients are sent it."""
        return {
            "op": "alert",
            "v": 1,
            "seq": alert.seq,
            **alert.content,
            "state": "acknowledged" if alert.acknowledged_at else "open",
            "level": alert.level,
            "group": self._groups(alert.level)[-1],
            "due_in_s": None if alert.acknowledged_at else round(max(alert.deadline.left_s(self._clock), 0.0), 1),
            "sent": utc_now(),
            **(
                {"by": alert.acknowledged_by, "acknowledged_at": alert.acknowledged_at} if alert.acknowledged_at else {}
            ),
        }

    def _groups(self, level: int) -> tuple[str, ...]:
        """Return the groups that have been told of an alert at this level."""
        return self.rules.groups[: level + 1]

    def _send(self, peer_id: bytes, message: Mapping[str, Any]) -> bool:
        """Send one message; False where it did not go out. A client that has left is forgotten."""
        try:
            return self._router.send(peer_id, message)
        except PeerGoneError:
            self._peers.pop(peer_id, None)
            return False

    def _note_loss(self, peer_id: bytes, after: int) -> None:
        peer = self._peers.get(peer_id)
        if peer is not None and peer.lost_after is None:
            peer.lost_after = after


def _acknowledged(alert: Pending) -> dict[str, Any]:
    return {
        "op": "acknowledged",
        "alert_id": alert.alert_id,
        "scan_id": alert.scan_id,
        "by": alert.acknowledged_by,
        "via": alert.acknowledged_via,
        "at": alert.acknowledged_at,
    }


def _is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= 128 and value.isprintable()


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
