"""Secrets on disk: files that nobody else may read, refused where they are not."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from edge.atomic import sync_folder
from recon.errors import DeliveryError

_CREDENTIALS = Path("/run/credentials")


class SecretError(DeliveryError):
    """A secret is missing, or others could read it."""

    code = "secret"


def read_secret(path: Path) -> bytes:
    """Return the content of a file that belongs to this user (or root) and that no one else may read.

    Raises SecretError with the command that mends it. systemd credentials pass: they are mode 0400 or 0440 of root, in
    a folder that only the service sees.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SecretError(f"the secret {path} cannot be read: {os.strerror(error.errno or 0)}") from error
    try:
        status = os.fstat(file)
        is_credential = path.is_relative_to(_CREDENTIALS) and status.st_uid == 0
        if status.st_uid not in (os.getuid(), 0):
            raise SecretError(f"the secret {path} belongs to somebody else; it must belong to this user")
        if stat.S_IMODE(status.st_mode) & 0o077 and not is_credential:
            mode = stat.S_IMODE(status.st_mode)
            raise SecretError(f"the secret {path} has mode {mode:04o}: others may read it; chmod 600 {path}")
        return os.read(file, 1 << 16)
    finally:
        os.close(file)


def check_secret(path: Path) -> None:
    """Refuse a file as `read_secret` does, for libraries that read it themselves."""
    read_secret(path)


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file with mode 0600; raises SecretError where there is one already or the disk does not allow it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, content)
            os.fsync(file)
        finally:
            os.close(file)
        sync_folder(path.parent)
    except OSError as error:
        raise SecretError(f"the secret {path} cannot be written: {os.strerror(error.errno or 0)}") from error


def random_secret(path: Path) -> bytes:
    """Return the 32 random bytes kept at `path`, made now where there are none; raises SecretError."""
    if not path.exists():
        write_secret(path, secrets.token_bytes(32))
    content = read_secret(path)
    if len(content) != 32:
        raise SecretError(f"the secret {path} has {len(content)} bytes; 32 are needed")
    return content
