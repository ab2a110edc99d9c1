"""Is an alert lost, or acted on twice, whatever happens? `python -m benchmarks.chaos --faults 100`.

Scanners stream tiny scans into one daemon, every scan is flagged (`benchmarks.flagging`), and a desk answers: most
alerts at once, some only after they were escalated. Meanwhile faults come at random: kill -9 of daemon, worker and
triage, each stopped for a while, the wall clock stepped by up to a year, clients that leave, subscribers that read
nothing, a torn spool, a full disk, an archive that dies or hangs, a receiver of DICOM that is killed while a scanner
sends series, a triage network with a byte changed. With --retention the disk is always too full, so that whatever was
delivered and answered is deleted. At the end all of it is counted. Prints one JSON record; exit code 1 where anything
was lost.

Clock steps need gcc, a full disk the right to mount a tmpfs, archive and series dcmtk; without, these faults are left
out and the record says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from pydicom import dcmread
from rich.console import Console
from rich.progress import Progress

from benchmarks.chaos_dicom import Archive, Modality, is_here
from benchmarks.chaos_world import (
    Desk,
    Ear,
    Scanner,
    Supervisor,
    boot_s,
    build_clock_shift,
    events,
    free_port,
    rows,
)
from benchmarks.flagging import DELETED, OPEN_ALERTS
from benchmarks.record import make_record, write_record
from benchmarks.sender import encode_scan
from edge.audit import TRAIL, Head, verify
from edge.client import AlertClient
from edge.incoming import FOLDER
from edge.ledger import read_note
from edge.model import MODEL
from edge.rawfile import open_raw
from edge.simulate import simulate_file
from edge.triage_models import TRIAGE
from recon.protocol import Protocol

DEADLINE_S = 2.0
_DRAIN_S = 300.0
_DELETING_S = 15.0  # longer than between two looks at the disk
_LONGEST_PAUSE_S = 30.0
_WEIGHTS = {
    "daemon killed": 3,
    "worker killed": 3,
    "triage killed": 3,
    "daemon stopped for a while": 4,
    "worker stopped for a while": 4,
    "triage stopped for a while": 3,
    "wall clock stepped": 8,
    "desk disconnected": 8,
    "dead subscriber": 4,
    "spool torn while the daemon was down": 1,
    "disk full for a while": 1,
    "archive dead for a while": 4,
    "archive hung for a while": 2,
    "receiver of series killed": 3,
    "triage network corrupt": 1,
}
_DICOM = {"archive dead for a while", "archive hung for a while", "receiver of series killed"}
_CONFIG = """
[worker]
method = "sense"
timeout_s = 30.0
[triage]
infarct = false
haemorrhage = false
mass = false
models = "{models}"
[events]
keep = 10000000
heartbeat_s = 1.0
[alerts]
groups = ["first", "second", "third"]
deadline_s = {deadline_s}
resend_s = 0.5
[disk]
min_free_mib = 0
keep_free_mib = {keep_free_mib}
"""
_ALWAYS_FULL_MIB = 1 << 30
_DICOM_CONFIG = """
[pacs]
host = "127.0.0.1"
port = {archive}
attempts = 100000
longest_pause_s = 2.0
timeout_s = 5.0
[incoming]
host = "127.0.0.1"
port = {incoming}
callers = ["MR1"]
quiet_s = 1.0
"""


def main() -> None:
    """Run the faults, count, and print what became of scans and alerts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--scanners", type=int, default=2, metavar="N", help="at once (%(default)s)")
    parser.add_argument("--worlds", type=int, default=1, metavar="N", help="daemons side by side (%(default)s)")
    parser.add_argument("--retention", action="store_true", help="delete what was delivered; needs dcmtk")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="S", help="no further fault after so long")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args()
    if args.retention and not is_here():
        raise SystemExit("--retention needs an archive: apt install dcmtk")
    results = run(args) if args.worlds == 1 else run_worlds(args)
    names = ("faults", "worlds", "scanners", "seed", "retention")
    settings = {**{name: getattr(args, name) for name in names}, "deadline_s": DEADLINE_S}
    write_record(make_record("chaos", settings, results), args.json)
    if any(results["lost"].values()):
        raise SystemExit("something was lost, or happened twice")


def run_worlds(args: argparse.Namespace) -> dict[str, Any]:
    """Share the faults among daemons, each in a world and a process of its own; return sums, and each world's results.

    Most of a world's time is waiting. Times and memory of the sum are the largest of any world.
    """
    with tempfile.TemporaryDirectory(prefix="worlds") as folder:
        records = [Path(folder, f"{number}.json") for number in range(args.worlds)]
        running = []
        for number, record in enumerate(records):
            n_faults = args.faults // args.worlds + (number < args.faults % args.worlds)
            options = {"--faults": n_faults, "--scanners": args.scanners, "--seconds": args.seconds}
            options |= {"--seed": args.seed + number, "--json": record}
            words = [str(word) for option in options.items() for word in option]
            words += ["--retention"] if args.retention else []
            running.append(subprocess.Popen([sys.executable, "-m", "benchmarks.chaos", *words]))
        for process in running:
            process.wait()
        worlds = [json.loads(record.read_text())["results"] for record in records]
    return {**_together(worlds), "of_each_world": worlds}


def _together(parts: list[Any]) -> Any:
    """Return dictionaries added up entry by entry; of what is no whole number the largest."""
    if isinstance(parts[0], dict):
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _together([part[name] for part in parts if name in part]) for name in names}
    if isinstance(parts[0], list):
        return sorted({each for part in parts for each in part})
    if all(isinstance(part, int) for part in parts):
        return sum(parts)
    return max((part for part in parts if part is not None), default=None)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was done and what became of it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos")))
        state = folder / "disk" / "state"
        (folder / "disk").mkdir()
        disk = _mount(folder / "disk", stack)
        state.mkdir(mode=0o700)
        config = folder / "scanside.toml"
        models = folder / "models"
        shutil.copytree(TRIAGE / "infarct", models / "infarct")
        keep_free_mib = _ALWAYS_FULL_MIB if args.retention else 0
        config.write_text(_CONFIG.format(models=models, deadline_s=DEADLINE_S, keep_free_mib=keep_free_mib))
        archive = port = None
        if is_here():
            port = free_port()
            archive = Archive(folder / "archive", free_port())
            stack.callback(archive.die)
            with config.open("a") as file:
                file.write(_DICOM_CONFIG.format(archive=archive.port, incoming=port))
        simulate_file(folder / "scan.h5", Protocol(matrix=(32, 32), n_slices=1, n_coils=2, n_calibration=12), "none", 0)
        shift = build_clock_shift(folder)
        supervisor = Supervisor(folder, state, config, shift[0] if shift else [])
        stack.callback(supervisor.stop)
        ear = Ear(supervisor)
        desk = Desk(supervisor, 0.3, args.seed)
        scan = encode_scan(open_raw(folder / "scan.h5"))
        scanners = [Scanner(scan, supervisor, 0.5) for _ in range(args.scanners)]
        modality = Modality(folder, port, 1.0) if port else None
        world = World(
            supervisor, desk, random.Random(args.seed), shift[1] if shift else None, disk, archive, models / "infarct"
        )
        begun = time.monotonic()
        for scanner in scanners:
            scanner.wait_for_answer()
        with Progress(console=Console(stderr=True)) as progress:
            for _ in progress.track(range(args.faults), description="faults"):
                if time.monotonic() - begun > args.seconds:
                    break
                world.pause()
                world.strike()
        for scanner in scanners:
            scanner.wait_for_answer()
        for scanner in scanners:
            scanner.stop()
        if modality:
            modality.stop()
        desk.answer_all.set()
        drained = _drain(state, supervisor)
        if args.retention:
            time.sleep(_DELETING_S)
        with AlertClient(supervisor.alerts, "auditor") as client:
            unhealed = ear.heal(client)
        for each in (desk, ear):
            each.stop()
        supervisor.stop()
        world.close()
        sent = sum((scanner.counts for scanner in scanners), Counter())
        return {
            "wall_s": round(time.monotonic() - begun, 1),
            "faults": dict(world.counts),
            "left_out": world.left_out(),
            "scans": dict(sent),
            "series": dict(modality.counts) if modality else {},
            **count(state, desk, ear, supervisor, world, drained, unhealed, sent["answered"], modality),
        }


@dataclass
class World:
    """All that can be disturbed."""

    supervisor: Supervisor
    desk: Desk
    rng: random.Random
    shift: Path | None
    disk: Path | None
    archive: Archive | None
    model: Path
    n_taken: int = 0  # corrupt networks that nobody refused
    counts: Counter[str] = field(default_factory=Counter)
    stops: list[tuple[float, float]] = field(default_factory=list)
    deaf: list[zmq.Socket[bytes]] = field(default_factory=list)
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)

    def left_out(self) -> list[str]:
        """Return the faults that this machine does not allow."""
        without = {} if self.shift else {"wall clock stepped"}
        return sorted({*without, *([] if self.disk else ["disk full for a while"]), *([] if self.archive else _DICOM)})

    def pause(self) -> None:
        """Wait for up to a second, or, half of the times, until the desk has heard of another alert."""
        n, until = len(self.desk.acted), time.monotonic() + _LONGEST_PAUSE_S
        if self.rng.random() < 0.5:
            while len(self.desk.acted) == n and time.monotonic() < until:
                time.sleep(0.02)
        time.sleep(self.rng.random())

    def strike(self) -> None:
        """Let one fault happen, and return when the daemon is there again."""
        names = [name for name in _WEIGHTS if name not in self.left_out()]
        (name,) = self.rng.choices(names, [_WEIGHTS[each] for each in names])
        faults: dict[str, Callable[[], None]] = {
            "daemon killed": self._kill_daemon,
            "worker killed": self._kill_worker,
            "triage killed": self._kill_triage,
            "daemon stopped for a while": self._stop_daemon,
            "worker stopped for a while": lambda: self._stop("edge.worker"),
            "triage stopped for a while": lambda: self._stop("edge.triage_process"),
            "wall clock stepped": self._step_clock,
            "desk disconnected": self.desk.reconnect.set,
            "dead subscriber": self._add_deaf,
            "spool torn while the daemon was down": self._tear_spool,
            "disk full for a while": self._fill_disk,
            "archive dead for a while": self._kill_archive,
            "archive hung for a while": self._hang_archive,
            "receiver of series killed": self._kill_receiver,
            "triage network corrupt": self._spoil_model,
        }
        faults[name]()
        self.counts[name] += 1
        self.supervisor.wait_until_up()

    def close(self) -> None:
        """Let the deaf go."""
        self.context.destroy(0)

    def _kill_daemon(self) -> None:
        self.supervisor.wait_until_up().kill()

    def _kill_worker(self) -> None:
        self._signal("edge.worker", signal.SIGKILL)

    def _kill_triage(self) -> None:
        self._signal("edge.triage_process", signal.SIGKILL)

    def _kill_receiver(self) -> None:
        self._signal("edge.incoming_process", signal.SIGKILL)

    def _kill_archive(self) -> None:
        assert self.archive is not None
        self.archive.die()
        time.sleep(self.rng.random() * 3.0)
        self.archive.start()

    def _hang_archive(self) -> None:
        assert self.archive is not None
        self.archive.hang(self.rng.random() * 3.0)

    def _spoil_model(self) -> None:
        """Change one byte of a network, have triage start with it, and put the byte back once it was refused."""
        path = self.model / MODEL
        n_before = self._n_refused()
        at = self.rng.randrange(path.stat().st_size)
        _flip(path, at)
        self._kill_triage()
        until = time.monotonic() + 60.0
        while self._n_refused() == n_before and time.monotonic() < until:
            time.sleep(0.1)
        self.n_taken += self._n_refused() == n_before
        _flip(path, at)
        self._kill_triage()

    def _n_refused(self) -> int:
        return self.supervisor.log.read_bytes().count(b"triage network not available")

    def _signal(self, module: str, number: int) -> int | None:
        pid = self.supervisor.wait_until_up().child_pid(module)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return pid

    def _stop_daemon(self) -> None:
        pid = self.supervisor.wait_until_up().pid
        begun = boot_s()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.rng.random() * 1.5)
            os.kill(pid, signal.SIGCONT)
        self.stops.append((begun, boot_s()))

    def _stop(self, module: str) -> None:
        pid = self._signal(module, signal.SIGSTOP)
        time.sleep(self.rng.random() * 2.0)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _step_clock(self) -> None:
        assert self.shift is not None
        seconds = self.rng.choice([-1, 1]) * 10 ** self.rng.uniform(0, 7.5)
        with self.shift.open("r+b") as file:
            file.write(struct.pack("=d", seconds))

    def _add_deaf(self) -> None:
        """Subscribe to everything and read nothing; the oldest of ten leaves."""
        if len(self.deaf) >= 10:
            self.deaf.pop(0).close(0)
        kind, address = self.rng.choice([(zmq.SUB, self.supervisor.events), (zmq.DEALER, self.supervisor.alerts)])
        deaf = self.context.socket(kind)
        deaf.setsockopt(zmq.RCVHWM, 1)
        if kind == zmq.SUB:
            deaf.setsockopt(zmq.SUBSCRIBE, b"")
        deaf.connect(address)
        if kind == zmq.DEALER:
            deaf.send(json.dumps({"op": "hello", "client": "deaf"}).encode())
        self.deaf.append(deaf)

    def _tear_spool(self) -> None:
        """Kill the daemon, and cut or spoil the end of a stream that had not come whole."""
        self.supervisor.wait_until_up().kill()
        spool = self.supervisor.state / "spool"
        cut = [path for path in spool.glob("*/raw.mrd") if not (path.parent / "state.json").exists()]
        if cut:
            with suppress(OSError), self.rng.choice(cut).open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                if self.rng.random() < 0.5:
                    file.truncate(max(size - self.rng.randrange(1, 400), 0))
                else:
                    file.write(self.rng.randbytes(self.rng.randrange(1, 400)))
            self.counts["… with a stream to tear"] += 1

    def _fill_disk(self) -> None:
        assert self.disk is not None
        path = self.disk / "filler"
        begun = boot_s()
        with suppress(OSError), path.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        time.sleep(0.5 + self.rng.random() * 2.0)
        path.unlink(missing_ok=True)
        self.supervisor.wait_until_up()
        self.stops.append((begun, boot_s()))


def count(
    state: Path,
    desk: Desk,
    ear: Ear,
    supervisor: Supervisor,
    world: World,
    drained: bool,
    unhealed: int,
    n_answered: int,
    modality: Modality | None,
) -> dict[str, Any]:
    """Return what the ledger, the desk and the listener know of it all."""
    happened = events(state)
    scans = {
        scan_id: (what, ending) for scan_id, what, ending in rows(state, "SELECT scan_id, state, ending FROM scans")
    }
    alerts = rows(state, "SELECT alert_id, scan_id, acknowledged_at FROM alerts")
    series = {event["scan_id"] for event in happened if event["kind"] == "scan.started" and event.get("source")}
    whole = {path.parent.name for path in state.glob("spool/*/state.json") if b'"complete"' in path.read_bytes()}
    whole |= {scan_id for scan_id, (_, ending) in scans.items() if ending == "complete"} - series
    with_alert = {scan_id for _, scan_id, _ in alerts}
    raised = Counter(event["alert_id"] for event in happened if event["kind"] == "alert")
    taken = Counter(event["alert_id"] for event in happened if event["kind"] == "alert.acknowledged")
    done = {scan_id for scan_id, (what, _) in scans.items() if what == "done"}
    triaged = [event for event in happened if event["kind"] == "scan.done" and event["scan_id"] in series]
    n_triaged = sum({event["scan_id"]: event["objects"] for event in triaged}.values())
    delivered = {_uid(state, key) for (key,) in rows(state, "SELECT key FROM deliveries WHERE state = 'delivered'")}
    kept = world.archive.instances() if world.archive else set()
    deleted = {scan_id for (scan_id,) in rows(state, "SELECT scan_id FROM deleted")}
    gone = {name for name in scans if not (state / "spool" / name).exists() and not (state / FOLDER / name).exists()}
    is_open = {path.parent.name for path in state.glob(f"{DELETED}/*/{OPEN_ALERTS}") if path.read_text() != "0"}
    seqs = [event["seq"] for event in happened]
    lateness = _lateness(desk, ear, supervisor, world)
    late = [seconds for seconds, _ in lateness]
    note = read_note(state / "ledger.sqlite", "audit")
    lost = {
        "complete scans not finished": sum(scans.get(scan_id, ("", ""))[0] != "done" for scan_id in whole),
        "scans answered to the scanner and not finished": max(n_answered - len(done - series), 0),
        "scans still open": sum(what not in ("done", "failed") for what, _ in scans.values()),
        "finished scans without their alert": len(done - with_alert),
        "alerts never heard at the desk": len({alert_id for alert_id, _, _ in alerts} - set(desk.acted)),
        "alerts never answered": sum(not at for _, _, at in alerts),
        "scans with two alerts": sum(n > 1 for n in Counter(scan_id for _, scan_id, _ in alerts).values()),
        "alerts raised twice": sum(n > 1 for n in raised.values()),
        "alerts acknowledged twice": sum(n > 1 for n in taken.values()),
        "alerts acted on twice": sum(n > 1 for n in desk.acted.values()),
        "gaps in the ledger's numbers": seqs[-1] - seqs[0] + 1 - len(seqs),
        "events lost on the wire and not given back": unhealed,
        "escalations later than 1 s": sum(each > 1.0 for each in late),
        "faults in the audit trail": bool(verify(state / TRAIL, Head.from_text(note) if note else None)[1]),
        "objects of series answered for and not triaged": max(len(modality.answered) - n_triaged, 0) if modality else 0,
        "objects called delivered that the archive lacks": len(delivered - kept) if world.archive else 0,
        "scans gone that nobody deleted": len(gone - deleted),
        "scans deleted before the archive had them": sum(not _was_kept(state, scan_id, kept) for scan_id in gone),
        "scans deleted with an open alert": len(gone & is_open),
        "objects given up": rows(state, "SELECT count(*) FROM deliveries WHERE state = 'dead'")[0][0],
        "corrupt networks taken": world.n_taken,
        "not at rest in the end": not drained,
    }
    return {
        "lost": {name: int(n) for name, n in lost.items()},
        "scans_done": len(done),
        "scans_complete": len(whole),
        "scans_failed": sum(what == "failed" for what, _ in scans.values()),
        "series_done": len(done & series),
        "scans_deleted": len(deleted - series),
        "series_deleted": len(deleted & series),
        "objects_delivered": len(delivered),
        "alerts": len(alerts),
        "alert_messages_heard": desk.n_heard,
        "escalations": len(late),
        "escalation_late_s": {"p50": _at(late, 0.5), "p99": _at(late, 0.99), "max": _at(late, 1.0)},
        "late_escalations": [what for seconds, what in lateness if seconds > 1.0],
        "events": len(seqs),
        "events_lost_on_the_wire_and_given_back": ear.n_lost - unhealed,
        "daemon_starts": supervisor.n_starts,
        "daemon_starts_refused": supervisor.n_failed_starts,
        "daemon_rss_mib_max": round(supervisor.rss_mib, 1),
    }


def _uid(state: Path, key: str) -> str:
    """Return the instance UID of an object that was sent, which may have been deleted since."""
    path = state / "results" / key
    return str(dcmread(path if path.exists() else state / DELETED / key, stop_before_pixels=True).SOPInstanceUID)


def _was_kept(state: Path, scan_id: str, archive: set[str]) -> bool:
    """Whether the archive has every object of a scan that was deleted."""
    objects = {
        str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)
        for path in (state / DELETED / scan_id).rglob("*.dcm")
    }
    if not objects:  # of a series that could not be read
        return not rows(state, f"SELECT 1 FROM deliveries WHERE key LIKE '{scan_id}/%'")
    return objects <= archive


def _lateness(desk: Desk, ear: Ear, supervisor: Supervisor, world: World) -> list[tuple[float, str]]:
    """Return how late each escalation was heard, and what happened meanwhile, the least late first.

    Late is after its deadline, or after the daemon could run again: while nobody ran nothing could be escalated. A
    daemon that is taken away again within the second that it has for it has not had it, and its next return counts.
    """
    found = []
    away = sorted([*supervisor.down, *world.stops])
    for _, header, heard_s in ear.heard_s.values():
        due_s = able_s = heard_s - header["late_s"]
        for begin, end in away:
            if begin <= max(able_s, due_s + 0.5) + (1.0 if able_s > due_s else 0.0) and able_s < end <= heard_s + 0.5:
                able_s = end
        spans = [
            f"{begin - due_s:.1f}..{end - due_s:.1f}" for begin, end in away if end > due_s - 5 and begin < heard_s + 5
        ]
        late_s = round(max(heard_s - able_s, 0.0), 3)
        found.append((late_s, f"due at 0, heard at {heard_s - due_s:.1f} s, away {', '.join(spans) or 'never'}"))
    return sorted(found)


def _drain(state: Path, supervisor: Supervisor) -> bool:
    """Wait until every scan is finished and every alert answered."""
    until = time.monotonic() + _DRAIN_S
    while time.monotonic() < until:
        supervisor.wait_until_up()
        waiting = rows(state, "SELECT count(*) FROM scans WHERE state NOT IN ('done', 'failed')")[0][0]
        waiting += rows(state, "SELECT count(*) FROM alerts WHERE acknowledged_at = ''")[0][0]
        waiting += rows(state, "SELECT count(*) FROM deliveries WHERE state = 'waiting'")[0][0]
        if not waiting:
            time.sleep(2.0)
            return True
        time.sleep(0.2)
    return False


def _mount(folder: Path, stack: ExitStack) -> Path | None:
    """Mount a small tmpfs; None where this user may not."""
    options = ["-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
        return None
    stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
    return folder


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x55]))


def _at(samples: list[float], share: float) -> float | None:
    return samples[min(int(share * len(samples)), len(samples) - 1)] if samples else None


if __name__ == "__main__":
    main()
