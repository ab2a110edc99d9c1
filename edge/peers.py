"""The clients of the alert socket: who they are, and what each has yet to be sent."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from edge.outbox import Pending


@dataclass
class Peer:
    """One connection that has said hello.

    name: what it calls itself. user, role: what its key says it is. groups: whose alerts it wants, all of them where
    empty. after: the last event it knows. session: what its acknowledgements carry, another at each connection.
    next_s: by alert, when on the monotonic clock it is to be sent again, and how often it was sent.
    lost_after: the last event before a message that its queue had no room for.
    """

    name: str
    user: str
    role: str
    groups: frozenset[str]
    after: int
    session: str = field(default_factory=lambda: secrets.token_urlsafe(12), repr=False)
    next_s: dict[str, tuple[float, int]] = field(default_factory=dict)
    lost_after: int | None = None

    def wants(self, alert: Pending, escalated_to: tuple[str, ...]) -> bool:
        """Whether an unanswered alert, which these groups have been handed by now, is for this client."""
        return alert.seq > self.after and (not self.groups or not self.groups.isdisjoint(escalated_to))
