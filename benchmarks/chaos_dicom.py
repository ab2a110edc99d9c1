"""The hospital's DICOM nodes under `benchmarks.chaos`, both dcmtk's: an archive, and a scanner that sends series."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from shutil import which

from pydicom import dcmread

from edge.dicom import encode
from tests.archive import image

STORED = "(Success)"
N_OBJECTS = 3  # of a series
_KINDS = 200  # series that are sent, one after the other and again from the first


def is_here() -> bool:
    """Whether dcmtk is installed."""
    return which("storescp") is not None and which("storescu") is not None


class Archive:
    """An archive that can be killed, or hang, and comes again with what it had."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir()
        self.folder, self.port = folder, port
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Come up."""
        command = ["storescp", "-aet", "PACS", "-od", str(self.folder), str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def die(self) -> None:
        """Go, whatever is under way."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def hang(self, seconds: float) -> None:
        """Take no byte for a while."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self._process.send_signal(signal.SIGCONT)

    def instances(self) -> set[str]:
        """Return the objects that it holds whole."""
        found = set()
        for path in self.folder.iterdir():
            with suppress(Exception):  # cut short as it was killed; it is sent again under the same name
                found.add(str(dcmread(path).SOPInstanceUID))
        return found


class Modality:
    """A scanner that sends small series of its own, one after the other, and counts what was answered with success."""

    def __init__(self, folder: Path, port: int, pause_s: float) -> None:
        self.counts: Counter[str] = Counter()
        self.answered: set[tuple[int, int]] = set()  # series and object
        self._folder, self._port, self._pause_s = folder, port, pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the series in flight."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(self._pause_s):
            files = []
            for n in range(N_OBJECTS):
                path = self._folder / f"series_{n}.dcm"
                path.write_bytes(encode(image(f"chaos {number % _KINDS}", n)))
                files.append(str(path))
            command = ["storescu", "-v", "-aet", "MR1", "-aec", "SCANSIDE", "127.0.0.1", str(self._port), *files]
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
            except subprocess.TimeoutExpired:
                self.counts["not answered"] += 1
                continue
            n_stored = said.count(STORED)
            self.answered |= {(number % _KINDS, n) for n in range(n_stored)}
            self.counts["whole" if n_stored == N_OBJECTS else "cut short" if n_stored else "nobody there"] += 1
            number += n_stored == N_OBJECTS  # a scanner sends what was not taken again
