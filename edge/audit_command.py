"""`scanside audit verify`: is the audit trail as it was written?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge.audit import TRAIL, Head, verify
from edge.ledger import read_note
from edge.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside audit`."""
    parser.add_argument("action", choices=["verify"], help="read every record and check that each follows the last")
    parser.add_argument(
        "--state", type=Path, default=Settings().state, metavar="DIR", help="state folder (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Say how many records hold; 0 where all do, 1 where one does not or the trail cannot be read."""
    note = read_note(args.state / "ledger.sqlite", "audit")
    try:
        n, fault = verify(args.state / TRAIL, Head.from_text(note) if note else None)
    except OSError as error:
        print(f"scanside audit: the trail in {args.state} cannot be read: {error.strerror}", file=sys.stderr)
        return 1
    if fault:
        print(f"scanside audit: {n} records hold, then {fault}", file=sys.stderr)
        return 1
    against = "" if note else "; no ledger says how many there must be"
    print(f"{n} records, each as it was written{against}")
    return 0
