"""Engines on disk: `engines/<key>/engine.plan` with `engine.json` beside it, built on the device that runs them.

The key is made of GPU, runtime, model, profile and precision; an engine for any other combination is never found. A
folder appears whole, by a rename; a plan whose bytes are not those that were built is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from edge.atomic import sync_folder, write_atomically
from recon.engine import Identity
from recon.errors import BackendError
from recon.parity import Parity

log = logging.getLogger(__name__)

PLAN = "engine.plan"
ABOUT = "engine.json"
_NICE = 10


@dataclass(frozen=True)
class Engine:
    """A built engine. `refusal`: why it must not serve, as its parity check found; "" before and after it passed."""

    folder: Path
    identity: Identity
    plan_sha256: str
    seconds: float
    parity: tuple[float, float] | None = None
    refusal: str = ""

    def read_plan(self) -> bytes:
        """Return the plan; raises BackendError where it is not the one that was built."""
        try:
            plan = (self.folder / PLAN).read_bytes()
        except OSError as error:
            raise BackendError(f"the engine of {self.identity.profile} cannot be read: {error.strerror}") from error
        if hashlib.sha256(plan).hexdigest() != self.plan_sha256:
            raise BackendError(f"the engine of {self.identity.profile} is damaged: not the bytes that were built")
        return plan

    def judge(self, parity: Parity) -> Engine:
        """Return the engine with the outcome of its parity check, written beside its plan."""
        refusal = "" if parity.is_passed else f"its images differ from the reference: {parity}"
        judged = replace(self, parity=(parity.ssim, parity.difference), refusal=refusal)
        judged.write()
        return judged

    def write(self) -> None:
        """Write what is known of the engine beside its plan."""
        content = {
            "identity": asdict(self.identity),
            "plan_sha256": self.plan_sha256,
            "seconds": self.seconds,
            "parity": self.parity,
            "refusal": self.refusal,
        }
        write_atomically(self.folder / ABOUT, json.dumps(content, indent=1).encode())


class EngineCache:
    """The engines in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, identity: Identity) -> Engine | None:
        """Return the engine of `identity` if one was built; one that is damaged is removed, and not returned."""
        folder = self.folder / identity.key
        if not folder.is_dir():
            return None
        try:
            engine = _read(folder)
            if engine.identity != identity:
                raise BackendError("the engine's description is another engine's")
            engine.read_plan()
        except BackendError as error:
            log.warning("engine removed key=%s code=%s", identity.key, error.code)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return engine

    def __iter__(self) -> Iterator[tuple[Path, Engine | BackendError]]:
        """Yield each engine's folder with the engine, or with what is wrong with it."""
        for folder in sorted(self.folder.glob("*/")) if self.folder.is_dir() else ():
            if folder.name.startswith("."):
                continue
            try:
                engine = _read(folder)
                engine.read_plan()
                yield folder, engine
            except BackendError as error:
                yield folder, error

    def build(self, identity: Identity, model: Path, library: str) -> Build:
        """Start building the engine of `identity` from the ONNX file `model` in a process of its own."""
        return Build(self.folder, identity, model, library)


class Build:
    """An engine that is being built; `poll` until it says so, then `finish`.

    done, of: the builder's steps so far and in all (0 before it knows). A build that is not finished leaves nothing
    that `EngineCache` would take for an engine.
    """

    def __init__(self, folder: Path, identity: Identity, model: Path, library: str) -> None:
        self.identity = identity
        self.done, self.of = 0, 0
        self._place = folder / identity.key
        self._part = folder / f".{identity.key}.part"
        self._last: dict[str, Any] = {}
        self._rest = b""
        try:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
        except OSError as error:
            raise BackendError(f"the engine folder {folder} cannot be written: {error.strerror}") from error
        timings = folder / f"timings-{hashlib.sha256((identity.gpu + identity.runtime).encode()).hexdigest()[:12]}"
        words = ["-m", "export.engine", "--model", str(model), "--profile", identity.profile, "--library", library]
        self._process = subprocess.Popen(
            [
                "nice",
                "-n",
                str(_NICE),
                sys.executable,
                *words,
                "--out",
                str(self._part),
                "--timing-cache",
                str(timings),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        os.set_blocking(self._out.fileno(), False)

    def poll(self) -> bool:
        """Take in what the builder has said; return whether it has ended."""
        has_ended = self._process.poll() is not None
        while chunk := self._out.read(1 << 16):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                self._hear(line)
        return has_ended

    def wait(self, timeout_s: float) -> bool:
        """Wait a while for the builder's end, then `poll`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self.poll()

    def finish(self) -> Engine:
        """Return the engine, in its place; raises BackendError with the builder's reason where there is none."""
        code = self._process.wait()
        self.poll()
        self._out.close()
        try:
            if code != 0 or "plan_sha256" not in self._last:
                killed = "it was killed, perhaps for want of memory" if code < 0 else f"it ended with code {code}"
                raise BackendError(f"no engine for {self.identity.profile}: {self._last.get('error', killed)}")
            seconds = float(self._last["seconds"])
            engine = Engine(self._part, self.identity, str(self._last["plan_sha256"]), seconds)
            engine.write()
            shutil.rmtree(self._place, ignore_errors=True)
            self._part.replace(self._place)
            sync_folder(self._place.parent)
        except OSError as error:
            raise BackendError(f"no engine for {self.identity.profile}: {error.strerror}") from error
        finally:
            shutil.rmtree(self._part, ignore_errors=True)
        return replace(engine, folder=self._place)

    def stop(self) -> None:
        """End the builder, whose work is lost."""
        self._process.kill()
        self._process.wait()
        self._out.close()
        shutil.rmtree(self._part, ignore_errors=True)

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _hear(self, line: bytes) -> None:
        try:
            said = json.loads(line)
        except ValueError:
            return  # a library's own chatter
        if isinstance(said, dict):
            self._last = said
            self.done, self.of = int(said.get("done", self.done)), int(said.get("of", self.of))


def _read(folder: Path) -> Engine:
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        identity = Identity(**about["identity"])
        parity = None if about["parity"] is None else tuple(about["parity"])
        engine = Engine(
            folder,
            identity,
            about["plan_sha256"],
            about["seconds"],
            parity,
            about["refusal"],
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BackendError(f"the engine in {folder.name} has no readable {ABOUT}") from error
    if folder.name != identity.key:
        raise BackendError(f"the engine in {folder.name} is described as another")
    return engine
