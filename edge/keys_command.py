"""`scanside keys`: who may connect to the daemon's sockets, and what for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge.audit import TRAIL, AuditTrail
from edge.keyring import ROLES, Keyring
from edge.settings import Settings
from recon.errors import DeliveryError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside keys`."""
    parser.epilog = (
        "A viewer hears events and alerts, a responder may acknowledge too, an admin may also list deliveries given up "
        "and have them tried again. A revoked key is refused at once, by a running daemon too."
    )
    actions = parser.add_subparsers(dest="action", metavar="create|list|revoke", required=True)
    create = actions.add_parser("create", help="make a key for a client; the daemon's own is made with the first")
    create.add_argument("name", metavar="NAME", help="letters, digits, points, dashes and underscores")
    create.add_argument("--role", required=True, choices=ROLES, help="what the client may do")
    create.add_argument("--out", type=Path, metavar="FILE", help="the client's file, mode 0600 (NAME.key)")
    revoke = actions.add_parser("revoke", help="refuse a client from now on")
    revoke.add_argument("name", metavar="NAME", help="as scanside keys list shows it")
    for action in (create, revoke, actions.add_parser("list", help="show the clients and their roles")):
        action.add_argument("--state", type=Path, default=Settings().state, metavar="DIR", help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Do it; 0 when done, 1 where it could not be."""
    keyring = Keyring(args.state / "keys")
    try:
        if args.action == "list":
            return _list(keyring)
        audit = AuditTrail(args.state / TRAIL)
        try:
            return _create(keyring, audit, args) if args.action == "create" else _revoke(keyring, audit, args.name)
        finally:
            audit.close()
    except DeliveryError as error:
        print(f"scanside keys: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"scanside keys: the state folder {args.state} cannot be used: {error.strerror}", file=sys.stderr)
        return 1


def _create(keyring: Keyring, audit: AuditTrail, args: argparse.Namespace) -> int:
    out = args.out or Path(f"{args.name}.key")
    client = keyring.create(args.name, args.role, out)
    audit.record("keys", user="local", objects={"key": client.name}, reason=f"created as {client.role}")
    print(f"{out}: bring it to the client, and delete it here")
    return 0


def _revoke(keyring: Keyring, audit: AuditTrail, name: str) -> int:
    if not keyring.revoke(name):
        print(f"scanside keys: no client is called {name}", file=sys.stderr)
        return 1
    audit.record("keys", user="local", objects={"key": name}, reason="revoked")
    print(f"{name} is refused from now on")
    return 0


def _list(keyring: Keyring) -> int:
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "role", "created"):
        table.add_column(heading)
    for client in keyring.clients():
        table.add_row(client.name, client.role, client.created_at)
    Console().print(table)
    return 0
