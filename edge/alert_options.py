"""The options that `scanside watch` and `scanside ack` share: where the daemon is, and with which key."""

from __future__ import annotations

import argparse
import getpass
from collections.abc import Sequence
from pathlib import Path

from edge.client import AlertClient, read_client_key
from edge.settings import AlertSettings


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add --to, --key and --name."""
    address = AlertSettings().address
    parser.add_argument("--to", default=address, metavar="ADDRESS", help="the daemon's alert socket (%(default)s)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="this client's key, from scanside keys create")
    parser.add_argument("--name", metavar="NAME", help="what this client is called (its key's name, else user name)")


def connect(args: argparse.Namespace, after: int = 0, groups: Sequence[str] = ()) -> AlertClient:
    """Return a client as the options say; raises DeliveryError where the key cannot be used."""
    key = read_client_key(args.key) if args.key else None
    name = args.name or (key.name if key else getpass.getuser())
    return AlertClient(args.to, name, after=after, groups=groups, key=key)
