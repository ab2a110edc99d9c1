"""`scanside ack`: say that somebody takes an alert, so that nobody else is called."""

from __future__ import annotations

import argparse
import sys

from edge.alert_options import add_connection, connect
from recon.errors import DeliveryError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside ack`."""
    parser.add_argument("alert_id", metavar="ALERT_ID", help="as scanside watch shows it")
    parser.add_argument("--by", required=True, metavar="NAME", help="who takes it: kept in the ledger and audit trail")
    parser.add_argument("--wait", type=float, default=10.0, metavar="S", help="for the daemon's answer (%(default)g)")
    add_connection(parser)


def run(args: argparse.Namespace) -> int:
    """Acknowledge; 0 once the daemon has confirmed it, 1 where it refused or did not answer."""
    try:
        with connect(args) as client:
            confirmed = client.ack(args.alert_id, args.by, args.wait)
    except DeliveryError as error:
        print(f"scanside ack: {error}", file=sys.stderr)
        return 1
    print(f"acknowledged at {confirmed['at']} by {confirmed['by']}: read the full study")
    return 0
