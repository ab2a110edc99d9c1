"""The process that sends objects to one archive: work in on standard input, outcomes out on standard output, as JSON.

It holds nothing: killed at any moment, what it has not answered for is sent again under the same UIDs. It is a process
of its own because a DICOM library that encodes and waits would take turns with the daemon's event loop, and alerts
with it; it yields to everybody else, and one object at a time passes through it in pieces.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from edge.courier import UnreachableError
from edge.crash import log_crashes
from edge.dicom_net import Peer, silence_libraries
from edge.dicom_store import Item, Outcome, StoreSender
from edge.dicom_stow import StowSender
from recon.errors import DeliveryError

_NICE = 10


class Sender(Protocol):
    """Sends to one archive."""

    def send(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Yield what becomes of each item; raises UnreachableError where the archive takes nothing at present."""


def open_sender(settings: Mapping[str, Any]) -> Sender:
    """Return the sender that `settings` describe, as `edge.pacs` makes them; raises DeliveryError."""
    if settings["kind"] == "stow":
        token, ca = (Path(settings[name]) if settings[name] else None for name in ("token", "ca"))
        return StowSender(settings["url"], token=token, ca=ca, timeout_s=settings["timeout_s"])
    listen = tuple(settings["listen"]) if settings["listen"] else None
    return StoreSender(Peer(**settings["peer"]), listen, settings["commitment_s"])


def serve(orders: Iterator[bytes], settings: Mapping[str, Any]) -> None:
    """Answer each batch of items with its outcomes and a last line; ends with the orders."""
    sender: Sender | None = None
    for line in orders:
        items = [Item(key, Path(path), attempts) for key, path, attempts in json.loads(line)]
        unreachable = ""
        try:
            sender = sender or open_sender(settings)
            for outcome in sender.send(items):
                _say(outcome=list(outcome))
        except UnreachableError as error:
            unreachable = str(error)
        except DeliveryError as error:  # a certificate, a secret or a port that is not to be had: nothing can be sent
            unreachable = str(error)
        _say(end=True, unreachable=unreachable)


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Serve standard input; the one argument is the settings as JSON."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    log_crashes()
    silence_libraries()
    with suppress(OSError):
        os.nice(_NICE)
    with suppress(BrokenPipeError):
        serve(iter(sys.stdin.buffer.readline, b""), json.loads(sys.argv[1]))
    sys.stdout = None  # nothing is left to flush into a broken pipe
    os._exit(0)  # whatever threads a peer holds up


if __name__ == "__main__":
    sys.exit(main())
