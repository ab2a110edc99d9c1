"""`scanside watch`: the alerts as the emergency desk sees them, in a table that keeps itself up to date."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge.alert import NOTICE
from edge.alert_options import add_connection, connect
from edge.client import AlertClient, Message
from recon.errors import DeliveryError

_KEPT = 200  # alerts in the table, the newest
_WIDE = 140


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside watch`."""
    parser.add_argument("--json", action="store_true", help="one line of JSON for each message, instead of a table")
    parser.add_argument("--group", action="append", default=[], metavar="NAME", help="only what this group is told")
    parser.add_argument("--sound", action="store_true", help="ring the bell for a new or escalated alert")
    parser.add_argument("--after", type=int, default=0, metavar="SEQ", help="leave out alerts up to this event")
    parser.add_argument("--seconds", type=float, metavar="S", help="end after so long (default: run until Ctrl-C)")
    add_connection(parser)


def run(args: argparse.Namespace) -> int:
    """Show alerts until told to stop; 1 where the daemon refuses this client."""
    until = time.monotonic() + args.seconds if args.seconds else float("inf")
    try:
        with connect(args, args.after, args.group) as client:
            return _print_lines(client, until) if args.json else _show_table(client, until, args.sound)
    except DeliveryError as error:
        print(f"scanside watch: {error}", file=sys.stderr)
        return 1


def _print_lines(client: AlertClient, until: float) -> int:
    """Print each alert when it is new or changed, and each acknowledgement, as a line of JSON."""
    board = Board()
    while time.monotonic() < until:
        message = client.receive(min(1.0, max(until - time.monotonic(), 0.0)))
        if message is None:
            continue
        if message["op"] == "refused":
            raise DeliveryError(f"the daemon refuses this client: {message['reason']}")
        if board.take(message):
            print(json.dumps(message), flush=True)
    return 0


def _show_table(client: AlertClient, until: float, sound: bool) -> int:
    board = Board()
    console = Console()
    with Live(
        board.table(client.is_connected, console.width), console=console, auto_refresh=False, screen=console.is_terminal
    ) as live:
        while time.monotonic() < until:
            message = client.receive(min(0.5, max(until - time.monotonic(), 0.0)))
            if message is not None:
                if message["op"] == "refused":
                    raise DeliveryError(f"the daemon refuses this client: {message['reason']}")
                if board.take(message) and sound and message["op"] == "alert" and message["state"] == "open":
                    console.bell()
            live.update(board.table(client.is_connected, console.width), refresh=True)
    return 0


class Board:
    """The alerts that were heard of; each is there once, however often it came."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.alerts: dict[str, Message] = {}
        self._now = now
        self._due_at: dict[str, float] = {}

    def take(self, message: Message) -> bool:
        """Enter a message; return whether it says anything new."""
        alert_id = message.get("alert_id", "")
        known = self.alerts.get(alert_id)
        if message["op"] == "alert":
            if message["due_in_s"] is not None:
                self._due_at[alert_id] = self._now() + message["due_in_s"]
            is_new = known is None or (known["state"], known["level"]) != (message["state"], message["level"])
            if known is not None and known["state"] == "acknowledged":
                return False  # an older copy that was on its way
            self.alerts[alert_id] = message
            while len(self.alerts) > _KEPT:
                self._drop()
            return is_new
        if message["op"] == "acknowledged" and known is not None and known["state"] != "acknowledged":
            self.alerts[alert_id] = {
                **known, "state": "acknowledged", "by": message["by"], "acknowledged_at": message["at"],
            }  # fmt: skip
            return True
        return False

    def table(self, is_connected: bool, width: int = 200) -> Table:
        """Return the board as it is now: open alerts first, the most urgent at the top."""
        table = Table(title="Scanside alerts" if is_connected else "Scanside alerts – NO CONNECTION TO THE DAEMON")
        table.title_style = "bold" if is_connected else "bold white on red"
        table.caption = NOTICE
        for heading in self._columns(width):
            table.add_column(heading, no_wrap=heading in ("alert", "raised"))
        for alert in sorted(self.alerts.values(), key=lambda a: (a["state"] != "open", a["acr_category"], a["seq"])):
            cells = self._cells(alert)
            table.add_row(*(Text(cells[heading]) for heading in self._columns(width)), style=_style(alert))
        return table

    def _columns(self, width: int) -> list[str]:
        """Return what there is room for in `width` characters: what a person acts on stays."""
        wide = ["alert", "finding", "ACR", "p", "quality", "evidence", "exam", "raised", "state"]
        return wide if width >= _WIDE else ["alert", "finding", "ACR", "p", "state"]

    def _cells(self, alert: Message) -> dict[str, str]:
        left_s = self._due_at.get(alert["alert_id"], 0.0) - self._now()
        state = f"{alert['group']}, {max(left_s, 0):.0f} s left"
        if alert["state"] == "acknowledged":
            state = f"taken by {alert['by']} at {alert['acknowledged_at'][11:19]}"
        elif alert["level"]:
            state = f"ESCALATED ×{alert['level']} to {state}"
        return {
            "alert": alert["alert_id"],
            "finding": " or ".join([alert["finding"], *(each["finding"] for each in alert.get("also", ()))]),
            "ACR": str(alert["acr_category"]),
            "p": "–" if alert["probability"] is None else f"{alert['probability']:.2f}",
            "quality": alert["quality"]["verdict"] or "no verdict",
            "evidence": alert["evidence"] or "–",
            "exam": alert["exam"].get("exam_key", "–")[:8],
            "raised": alert["times"]["raised"][11:19],
            "state": state,
        }

    def _drop(self) -> None:
        """Forget the oldest, an answered one where there is one."""
        answered = [alert_id for alert_id, alert in self.alerts.items() if alert["state"] == "acknowledged"]
        self.alerts.pop((answered or list(self.alerts))[0])


def _style(alert: dict[str, Any]) -> str:
    if alert["state"] == "acknowledged":
        return "dim"
    return "bold red" if alert["level"] else "yellow"
