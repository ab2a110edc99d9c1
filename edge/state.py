"""The state folder as one daemon has it: locked against a second one, with its ledger and audit trail open."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from edge.audit import TRAIL, AuditTrail
from edge.ledger import Ledger
from edge.secret import random_secret
from recon.errors import DeliveryError


class State:
    """What is open while a daemon runs."""

    def __init__(self, folder: Path) -> None:
        """Open it, made if need be; raises DeliveryError where it cannot be used."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeliveryError(f"the state folder {folder} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise DeliveryError(f"another daemon uses the state folder {folder}; stop it or choose --state") from error
        try:
            self.ledger = Ledger(folder / "ledger.sqlite")
        except sqlite3.Error as error:
            raise DeliveryError(f"{folder / 'ledger.sqlite'} is not a ledger that can be opened") from error
        try:
            self.audit = AuditTrail(folder / TRAIL)
        except OSError as error:
            raise DeliveryError(f"the audit trail in {folder} cannot be written: {error.strerror}") from error
        random_secret(folder / "keys" / "pseudonym.key")

    def close(self) -> None:
        """Close both, and let another daemon in."""
        self.audit.close()
        self.ledger.close()
        os.close(self._lock)
