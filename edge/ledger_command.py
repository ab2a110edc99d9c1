"""`scanside ledger`: copy the ledger while the daemon runs, and put a copy back."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
from pathlib import Path

from edge.ledger import LedgerError, back_up, restore
from edge.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside ledger`."""
    parser.add_argument("action", choices=["backup", "restore"], help="restore needs the daemon to be stopped")
    parser.add_argument("file", type=Path, metavar="FILE", help="the copy")
    parser.add_argument(
        "--state", type=Path, default=Settings().state, metavar="DIR", help="state folder (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; 0 when done, 1 where it could not be."""
    try:
        if args.action == "backup":
            n = back_up(args.state / "ledger.sqlite", args.file)
        else:
            n = _restore(args.state, args.file)
    except LedgerError as error:
        print(f"scanside ledger: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"scanside ledger: {error.filename or args.state} cannot be used: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{args.action}: {n} scans")
    return 0


def _restore(state: Path, copy: Path) -> int:
    lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return restore(copy, state / "ledger.sqlite")
    except BlockingIOError as error:
        raise LedgerError(f"a daemon uses {state}; stop it first") from error
    finally:
        os.close(lock)
