"""CURVE keys of the daemon and of its clients, one role each; files that nobody else may read.

`keys/server.json` holds the daemon's pair, `keys/clients/NAME.json` the public key and role of each client: removing
that file revokes it. The secret of a client is only in the file that `scanside keys create` writes for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from edge.secret import SecretError, read_secret, write_secret
from edge.wire import utc_now

ROLES = ("viewer", "responder", "admin")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Client:
    """Whose key it is, and what it may do."""

    name: str
    role: str
    public: str
    created_at: str


class Keyring:
    """The keys under a state folder's `keys`."""

    def __init__(self, folder: Path) -> None:
        """Use the keys in `folder`; nothing is read yet."""
        self._server = folder / "server.json"
        self._clients = folder / "clients"
        self._seen: tuple[int, int] | None = None
        self._by_public: dict[str, Client] = {}

    def server(self) -> tuple[bytes, bytes]:
        """Return the daemon's public and secret key; raises SecretError where there is none."""
        if not self._server.exists():
            raise SecretError(f"there is no key {self._server}: scanside keys create NAME --role ROLE makes one")
        found = _object(self._server)
        try:
            return found["public"].encode("ascii"), found["secret"].encode("ascii")
        except (KeyError, AttributeError, UnicodeEncodeError) as error:
            raise SecretError(f"{self._server} is not a key that this program wrote") from error

    def create(self, name: str, role: str, out: Path) -> Client:
        """Make a key for a client, and write what it needs to `out`; makes the daemon's first where there is none.

        Raises SecretError where the name is taken, or no name, or a file cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise SecretError("a client's name has 1 to 64 letters, digits, points, dashes and underscores")
        if role not in ROLES:
            raise SecretError(f"role {role!r} is not known; {', '.join(ROLES)} are")
        if not self._server.exists():
            public, secret = zmq.curve_keypair()
            write_secret(self._server, _json({"public": public.decode(), "secret": secret.decode()}))
        public, secret = zmq.curve_keypair()
        client = Client(name, role, public.decode(), utc_now())
        server_public = self.server()[0].decode()
        write_secret(
            self._clients / f"{name}.json", _json({"role": role, "public": client.public, "at": client.created_at})
        )
        try:
            write_secret(
                out,
                _json(
                    {
                        "v": 1,
                        "name": name,
                        "role": role,
                        "public": client.public,
                        "secret": secret.decode(),
                        "server_public": server_public,
                    }
                ),
            )
        except SecretError:
            self.revoke(name)
            raise
        return client

    def clients(self) -> list[Client]:
        """Return all clients by name; raises SecretError where a file may be read by others or is none of ours."""
        found = []
        for path in sorted(self._clients.glob("*.json")):
            each = _object(path)
            if each.get("role") not in ROLES or not isinstance(each.get("public"), str):
                raise SecretError(f"{path} is not a key that this program wrote")
            found.append(Client(path.stem, each["role"], each["public"], str(each.get("at", ""))))
        return found

    def revoke(self, name: str) -> bool:
        """Remove a client's key; False where there is none. It counts at once, for open connections too."""
        try:
            (self._clients / f"{name}.json").unlink()
        except FileNotFoundError:
            return False
        return True

    def by_public(self, public: str) -> Client | None:
        """Return whose public key this is, as the files are now; nobody's where one of them cannot be used."""
        try:
            status = self._clients.stat()
            seen = (status.st_mtime_ns, status.st_nlink)
            if seen != self._seen:
                self._by_public = {client.public: client for client in self.clients()}
                self._seen = seen
        except (OSError, SecretError):
            self._seen, self._by_public = None, {}
        return self._by_public.get(public)

    def role_of(self, name: str) -> str | None:
        """Return a client's role, None where its key was revoked."""
        path = self._clients / f"{name}.json"
        if not _NAME.fullmatch(name) or not path.exists():
            return None
        try:
            role = _object(path).get("role")
        except SecretError:
            return None
        return role if role in ROLES else None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_secret(path))
    except ValueError as error:
        raise SecretError(f"{path} is not a key that this program wrote") from error
    return found if isinstance(found, dict) else {}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
