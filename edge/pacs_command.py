"""`scanside pacs`: what waits for the archive and what was given up, with reasons; and have that tried again.

It reads the ledger whether the daemon runs or not; a daemon that runs sees within seconds what is to be tried again.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections import Counter
from pathlib import Path

from edge.audit import TRAIL, AuditTrail
from edge.deliveries import Deliveries
from edge.ledger import Ledger
from edge.pacs import STORE, STOW, waited_s
from edge.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside pacs`."""
    parser.add_argument(
        "action", choices=["list", "dead", "retry"], help="the queue; what was given up; have that tried again"
    )
    parser.add_argument("scan", nargs="?", default="", metavar="SCAN_ID", help="of this scan only")
    parser.add_argument(
        "--state", type=Path, default=Settings().state, metavar="DIR", help="state folder (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; 0 when done, 1 where the ledger or audit trail cannot be used."""
    path = args.state / "ledger.sqlite"
    if not path.exists():
        return _fail(f"there is no ledger {path}")
    try:
        ledger = Ledger(path)
    except sqlite3.Error as error:
        return _fail(f"{path} cannot be opened: {type(error).__name__}")
    try:
        deliveries = Deliveries(ledger)
        if args.action == "list":
            _list(deliveries, args.scan)
        elif args.action == "dead":
            _show_dead(deliveries, args.scan)
        else:
            _retry(deliveries, args.scan, args.state)
    except (OSError, sqlite3.Error) as error:
        return _fail(f"{args.state} cannot be used: {type(error).__name__}")
    finally:
        ledger.close()
    return 0


def _list(deliveries: Deliveries, scan: str) -> None:
    counts = deliveries.count()
    for sink in (STORE, STOW):
        n = {state: counts.get((sink, state), 0) for state in ("waiting", "delivered", "dead")}
        oldest = waited_s(deliveries.oldest(sink))
        print(f"{sink}  waiting={n['waiting']} delivered={n['delivered']} dead={n['dead']} oldest_s={oldest:.0f}")
        for each in deliveries.waiting(sink, 1000):
            if each.key.startswith(scan):
                print(f"  {each.key}  attempts={each.attempts}  {each.reason}".rstrip())


def _show_dead(deliveries: Deliveries, scan: str) -> None:
    dead = [each for each in deliveries.dead(100_000) if each.sink in (STORE, STOW) and each.key.startswith(scan)]
    for (sink, scan_id, reason), n in Counter((d.sink, d.key.partition("/")[0], d.reason) for d in dead).items():
        print(f"{sink}  {scan_id}  {n} objects  {reason}")


def _retry(deliveries: Deliveries, scan: str, state: Path) -> None:
    dead = [each for each in deliveries.dead(100_000) if each.sink in (STORE, STOW) and each.key.startswith(scan)]
    n = sum(deliveries.revive(each.sink, each.key) for each in dead)
    audit = AuditTrail(state / TRAIL)
    try:
        audit.record("restricted", objects={"scan": scan or "all"}, reason=f"{n} objects for the archive tried again")
    finally:
        audit.close()
    print(f"{n} objects are tried again")


def _fail(reason: str) -> int:
    print(f"scanside pacs: {reason}", file=sys.stderr)
    return 1
