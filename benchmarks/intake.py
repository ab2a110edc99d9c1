"""How fast do readouts reach the spool, and does the server's memory stay flat however long the stream is?

`python -m benchmarks.intake` runs the server in one process and a sender in this one, over loopback: 16 coils × 512
samples by default. `--file-sender N` sends one more stream the way python-ismrmrd-server's client does, readout by
readout from an ISMRMRD file through the ismrmrd package. Prints one JSON record.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import struct
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np

from benchmarks.record import make_record, write_record
from edge.mrd import ACQUISITION_HEADER
from edge.mrd_write import encode_acquisition, encode_close, encode_config_file, encode_header
from edge.server import MrdServer
from edge.session import Session
from edge.spool import Ending, Spool

_HEADER = b"<ismrmrdHeader/>"


class _Finisher:
    """Ends each session when its stream ends, as a daemon without images would."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    async def admit(self) -> None:
        """Take every scan."""

    def scan_opened(self, session: Session, scan_id: str, config: str, header: bytes) -> None:
        self._sessions[scan_id] = session

    def scan_grew(self, scan_id: str, n_bytes: int, n_readouts: int) -> None:
        """Nothing is done with what came."""

    def scan_text(self, scan_id: str, text: str) -> None:
        """Nothing is done with texts."""

    def scan_closed(self, scan_id: str, ending: Ending, reason: str) -> None:
        self._sessions.pop(scan_id).close_soon()


def _serve(root: Path, pipe: Connection) -> None:
    """Serve until the other end of `pipe` says so."""

    async def main() -> None:
        server = MrdServer("127.0.0.1", 0, Spool(root), _Finisher())
        await server.start()
        pipe.send(server.port)
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await server.stop()

    asyncio.run(main())


def _resident_mib(pid: int) -> float:
    """Return the resident memory of process `pid` that is its own: pages of files do not count."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _stream(port: int, pid: int, message: bytes, n_readouts: int) -> dict[str, float]:
    """Send `n_readouts` readouts, wait for the server's CLOSE, and return what was measured."""
    resident = [_resident_mib(pid)]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        start = time.perf_counter()
        connection.sendall(encode_config_file("scanside") + encode_header(_HEADER))
        for at in range(n_readouts):
            connection.sendall(message)
            if at % 512 == 0:
                resident.append(_resident_mib(pid))
        connection.sendall(encode_close())
        while connection.recv(65536):
            pass
        seconds = time.perf_counter() - start
    resident.append(_resident_mib(pid))
    return {
        "readouts": n_readouts,
        "seconds": round(seconds, 3),
        "readouts_per_s": round(n_readouts / seconds, 1),
        "mb_per_s": round(n_readouts * len(message) / seconds / 1e6, 1),
        "server_peak_mib": round(max(resident), 1),
    }


def _stream_like_the_reference(port: int, folder: Path, coils: int, samples: int, n_readouts: int) -> dict[str, float]:
    """Send an ISMRMRD file as the reference client does: one read and four sends for each readout."""
    path = str(folder / "reference.h5")
    with ismrmrd.Dataset(path, mode="w") as file:
        file.write_xml_header(_HEADER)
        acquisition = ismrmrd.Acquisition.from_array(np.ones((coils, samples), np.complex64))
        for _ in range(n_readouts):
            file.append_acquisition(acquisition)
    with ismrmrd.Dataset(path, mode="r") as file, socket.create_connection(("127.0.0.1", port)) as connection:
        start = time.perf_counter()
        connection.sendall(encode_config_file("scanside") + encode_header(_HEADER))
        for at in range(n_readouts):
            readout = file.read_acquisition(at)
            connection.sendall(struct.pack("<H", 1008))
            connection.sendall(bytes(readout.getHead()))
            connection.sendall(readout.traj.tobytes())
            connection.sendall(readout.data.tobytes())
        connection.sendall(encode_close())
        while connection.recv(65536):
            pass
        seconds = time.perf_counter() - start
    return {"readouts": n_readouts, "seconds": round(seconds, 3), "readouts_per_s": round(n_readouts / seconds, 1)}


def measure(coils: int, samples: int, lengths: list[int], n_reference: int = 0) -> dict[str, Any]:
    """Return the record: one stream for each of `lengths`, after one short stream that warms up."""
    message = encode_acquisition(np.zeros((), ACQUISITION_HEADER), np.ones((coils, samples), np.complex64))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="scanside-intake-") as folder:
        ours, theirs = context.Pipe()
        server = context.Process(target=_serve, args=(Path(folder) / "spool", theirs))
        server.start()
        try:
            port, pid = ours.recv(), int(server.pid or 0)
            _stream(port, pid, message, 64)
            streams = [_stream(port, pid, message, n) for n in lengths]
            reference = (
                _stream_like_the_reference(port, Path(folder), coils, samples, n_reference) if n_reference else {}
            )
            ours.send("stop")
            server.join(10)
        finally:
            server.kill()
    settings = {"coils": coils, "samples": samples, "bytes_per_readout": len(message)}
    return make_record("intake", settings, {"streams": streams, "reference_style_sender": reference})


def main() -> None:
    """Measure as the command line says and print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coils", type=int, default=16)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[5_000, 20_000, 60_000], help="readouts a stream")
    parser.add_argument("--file-sender", type=int, default=0, metavar="N", help="readouts sent the reference's way")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args()
    write_record(measure(args.coils, args.samples, args.lengths, args.file_sender), args.json)


if __name__ == "__main__":
    main()
