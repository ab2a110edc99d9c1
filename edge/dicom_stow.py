"""Objects to an archive by DICOMweb, one a request, over a connection that stays open.

Sources: DICOM PS3.18 10.5 (store), PS3.18 I.2 (the answer).
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from edge.courier import UnreachableError
from edge.dicom_store import Item, Outcome
from edge.secret import SecretError, read_secret
from recon.errors import DeliveryError

_BOUNDARY = "scanside-object"
_CHUNK = 1 << 18
_LONGEST_ANSWER = 1 << 20
_HEAD = f"--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
_TAIL = f"\r\n--{_BOUNDARY}--\r\n".encode()
_HEADERS = {
    "Content-Type": f'multipart/related; type="application/dicom"; boundary={_BOUNDARY}',
    "Accept": "application/dicom+json",
}
_NEVER = frozenset({400, 406, 409, 413, 415, 422})  # this object, ever
_NOBODY = frozenset({301, 302, 307, 308, 401, 403, 404, 405, 408, 425, 429, 502, 503, 504})  # no object, at present


class StowSender:
    """An archive's DICOMweb base address."""

    def __init__(self, url: str, *, token: Path | None = None, ca: Path | None = None, timeout_s: float = 30.0) -> None:
        """token: a file with a bearer token, read for each batch. ca: certificates instead of the system's.

        Raises DeliveryError where the certificates cannot be used.
        """
        parts = urlsplit(url)
        self._path = f"{parts.path.rstrip('/')}/studies"
        self._token = token
        if parts.scheme != "https":
            self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
            return
        try:
            context = ssl.create_default_context(cafile=str(ca) if ca else None)
        except (OSError, ssl.SSLError) as error:
            raise DeliveryError(f"the certificates in {ca} cannot be used") from error
        self._connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=timeout_s, context=context
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def check(self) -> None:
        """Return where the archive answers a search; raises DeliveryError where it does not."""
        status, _ = self._request("GET", f"{self._path}?limit=1")
        self.close()
        if status not in (200, 204):
            raise DeliveryError(f"the archive answers HTTP {status}")

    def send(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Yield what becomes of each item; raises UnreachableError where the archive takes none at all."""
        try:
            for item in items:
                yield self._store(item)
        finally:
            self.close()

    def _store(self, item: Item) -> Outcome:
        try:
            file = item.path.open("rb")
        except OSError as error:
            return Outcome(item.key, "dead", f"the file cannot be read: {error.strerror}")
        with file:
            length = len(_HEAD) + file.seek(0, 2) + len(_TAIL)
            file.seek(0)
            status, answer = self._request("POST", self._path, _body(file), length)
        if status in (200, 202) and not _failures(answer):
            return Outcome(item.key, "delivered")
        reasons = _failures(answer)
        if reasons or status in _NEVER:
            is_passing = any(0xA700 <= reason <= 0xA7FF or reason == 0x0110 for reason in reasons)
            words = ", ".join(f"{reason:04X}" for reason in reasons)
            why = f"the archive refuses it with HTTP {status}{f', reason {words}' if words else ''}"
            return Outcome(item.key, "waiting" if is_passing else "dead", why)
        if status in _NOBODY:
            raise UnreachableError(f"the archive answers HTTP {status}")
        return Outcome(item.key, "waiting", f"the archive answers HTTP {status}")

    def _request(
        self, method: str, path: str, body: Iterator[bytes] | None = None, length: int = 0
    ) -> tuple[int, bytes]:
        headers = dict(_HEADERS) if body is not None else {"Accept": _HEADERS["Accept"]}
        if body is not None:
            headers["Content-Length"] = str(length)
        try:
            if self._token is not None:
                headers["Authorization"] = f"Bearer {read_secret(self._token).decode('ascii').strip()}"
            self._connection.request(method, path, body, headers)
            with self._connection.getresponse() as answer:
                return answer.status, answer.read(_LONGEST_ANSWER)
        except SecretError as error:
            raise UnreachableError(str(error)) from error
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            self.close()
            raise UnreachableError(f"the archive cannot be reached: {type(error).__name__}") from error


def _body(file: BinaryIO) -> Iterator[bytes]:
    yield _HEAD
    while chunk := file.read(_CHUNK):
        yield chunk
    yield _TAIL


def _failures(answer: bytes) -> list[int]:
    """Return the failure reasons of an answer in DICOM JSON (0008,1198)(0008,1197); none where it has none."""
    try:
        failed = json.loads(answer)["00081198"]["Value"]
        return [int(item["00081197"]["Value"][0]) for item in failed]
    except (ValueError, KeyError, IndexError, TypeError):
        return []
