"""What a process of the daemon's says on its standard output: JSON lines, pixels behind those that carry any."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import numpy as np

from recon.arrays import Array


class Reports:
    """Standard output as a line of reports; `edge.crew` reads them."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def send(self, report: str, payload: Array | None = None, **fields: Any) -> None:
        """Send one report, and float32 pixels behind it."""
        n_bytes = 0 if payload is None else payload.nbytes
        line = json.dumps({"report": report, "n_bytes": n_bytes, **fields}, allow_nan=False)
        self._out.write(line.encode() + b"\n")
        if payload is not None:
            self._out.write(np.ascontiguousarray(payload, "<f4").data)
        self._out.flush()
