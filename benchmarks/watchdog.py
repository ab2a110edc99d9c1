"""Does the shipped unit serve under a real systemd, and is a hung daemon back within 30 seconds?

Boots systemd in namespaces of its own (processes, mounts, network, cgroups; nothing of the machine is changed), with
`systemd/scanside.service` and `scanside.toml` as they are, but for what they have installed: this repository in a
virtual environment of the system's Python. Waits until the unit is active, streams a scan through it, then stops the
daemon with SIGSTOP several times, as a hang does, and measures until systemd calls the unit active again under another
process. Needs root, systemd, unshare and cgroups of version 1, and a system Python of the version that runs this.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.figures import new_parser
from benchmarks.record import make_record, write_record
from edge.simulate import simulate_file
from recon.errors import DeliveryError
from recon.protocol import Protocol

_ROOT = Path(__file__).resolve().parents[1]
_PROMISED_S = 30.0
_START_S = 300.0
_CGROUPS = Path("/sys/fs/cgroup")
_CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
_MASKED = (  # what a machine does at its start, and a test must not
    "systemd-udevd.service systemd-udev-trigger.service systemd-networkd.service systemd-timesyncd.service "
    "systemd-logind.service getty.target systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service "
    "systemd-sysctl.service systemd-modules-load.service systemd-random-seed.service dev-hugepages.mount "
    "dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount systemd-remount-fs.service "
    "systemd-update-utmp.service systemd-binfmt.service systemd-sysusers.service systemd-journal-flush.service"
)
_INSIDE = """
set -e
mount --make-rprivate /
ip link set lo up
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys
umount -R /sys/fs/cgroup
mount -o bind,remount,ro /sys
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for c in {controllers}; do mkdir /sys/fs/cgroup/$c; mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c; done
mkdir /sys/fs/cgroup/systemd; mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
for d in /run /var/lib /var/log /var/tmp /var/cache /etc/systemd/system /opt /mnt; do
    mount -t tmpfs -o mode=755 tmpfs $d
done
mkdir /run/lock /mnt/up /mnt/work
mount -t overlay -o lowerdir=/etc,upperdir=/mnt/up,workdir=/mnt/work overlay /etc
mkdir -p /opt/scanside/src /opt/scanside/packages /etc/scanside
mount --bind {packages} /opt/scanside/packages
cp -r {root}/recon {root}/triage {root}/edge /opt/scanside/src
/usr/bin/python3 -m venv --without-pip /opt/scanside/venv
printf '%s\\n' /opt/scanside/src /opt/scanside/packages \\
    > /opt/scanside/venv/lib/python{version}/site-packages/scanside.pth
printf '%s\\n' '#!/opt/scanside/venv/bin/python' 'import sys' 'from edge.command import main' 'sys.exit(main())' \\
    > /opt/scanside/venv/bin/scanside
chmod 755 /opt/scanside/venv/bin/scanside
chmod -R a+rX /opt/scanside/src
install -m 644 {root}/systemd/scanside.toml /etc/scanside/scanside.toml
cp {root}/systemd/scanside.service /etc/systemd/system/
for u in {masked}; do ln -sf /dev/null /etc/systemd/system/$u; done
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=scanside.service
"""


def main() -> None:
    """Boot, hang, measure; print or write one JSON record."""
    parser = new_parser("watchdog", __doc__)
    parser.add_argument(
        "--hangs", type=int, default=5, metavar="N", help="how often; 0 tries a start and a scan (%(default)s)"
    )
    args = parser.parse_args()
    if args.quick:
        args.hangs = 1
    try:
        results = measure(args)
    except (DeliveryError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"benchmarks.watchdog: {error}") from error
    write_record(make_record("watchdog", {"hangs": args.hangs, "systemd": _systemd_version()}, results), args.json)
    if not results["scan_served"] or max(results["back_after_s"], default=0.0) > _PROMISED_S:
        raise SystemExit("not as promised")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return how long the unit took to start, and to come back; raises DeliveryError where it never does."""
    with tempfile.TemporaryDirectory(prefix="watchdog") as folder:
        scan = Path(folder) / "scan.h5"
        simulate_file(scan, Protocol(matrix=(64, 64), n_slices=4, n_coils=4, n_calibration=16), "none", 0)
        with Machine() as machine:
            begun = time.monotonic()
            pid = machine.wait_until_active(0)
            started_s = time.monotonic() - begun
            scanside = "/opt/scanside/venv/bin/scanside"
            sent = machine.run(scanside, "replay", str(scan), "--to", "127.0.0.1:9002", "--out", "/mnt/images")
            back_s = []
            for _ in range(args.hangs):
                begun = time.monotonic()
                machine.stop_daemon()
                pid = machine.wait_until_active(pid)
                back_s.append(round(time.monotonic() - begun, 1))
            n_restarts = int(machine.show("NRestarts"))
    return {
        "active_after_s": round(started_s, 1),
        "scan_served": sent.returncode == 0,
        "back_after_s": back_s,
        "restarts": n_restarts,
        "load": [round(each, 1) for each in os.getloadavg()],
    }


class Machine:
    """A systemd with nothing but the unit; a context manager."""

    def __init__(self) -> None:
        """Boot it; raises DeliveryError where this machine or user cannot."""
        if os.getuid() or not (_CGROUPS / "systemd").is_dir() or not Path("/lib/systemd/systemd").exists():
            raise DeliveryError("root, systemd and cgroups of version 1 are needed")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        system = subprocess.run(["/usr/bin/python3", "--version"], capture_output=True, text=True, check=True).stdout
        if not system.startswith(f"Python {version}."):
            raise DeliveryError(f"this runs on Python {version}, the system has {system.strip()}; they must agree")
        self._cgroup = f"watchdog-{os.getpid()}"
        (packages,) = [path for path in sys.path if path.endswith("site-packages") and Path(path, "zmq").exists()][:1]
        inside = _INSIDE.format(
            controllers=" ".join(_CONTROLLERS), root=_ROOT, packages=packages, version=version, masked=_MASKED
        )
        enter = "; ".join(f"echo $$ > {each}/cgroup.procs" for each in self._make_cgroups())
        spaces = "unshare --fork --kill-child --pid --mount --uts --ipc --net --cgroup"
        self._process = subprocess.Popen(
            ["bash", "-c", f'{enter}; exec {spaces} bash -c "$1"', "bash", inside],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all of it: the first process of its namespace takes the others along."""
        init = self._init()
        if init is not None:
            os.kill(init, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        time.sleep(0.5)  # until the kernel has buried them
        for name in (*_CONTROLLERS, "systemd"):
            own = _CGROUPS / name / self._cgroup
            for folder in [*sorted((path for path in own.rglob("*") if path.is_dir()), reverse=True), own]:
                with suppress(OSError):
                    folder.rmdir()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        init = self._init()
        if init is None:
            raise DeliveryError("systemd ended")
        inside = ["nsenter", "-t", str(init), "-m", "-p", "-u", "-i", "-n", "-C", *command]
        return subprocess.run(inside, capture_output=True, text=True, check=False)

    def show(self, what: str) -> str:
        """Return a property of the unit; "" where systemd does not answer yet."""
        return self.run("systemctl", "show", "scanside", "--value", f"-p{what}").stdout.strip()

    def stop_daemon(self) -> None:
        """Stop the daemon's main process without its knowing, as a hang does."""
        self.run("kill", "-STOP", self.show("MainPID"))

    def wait_until_active(self, former: int) -> int:
        """Return the unit's main process, another than `former`, once systemd calls the unit active."""
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise DeliveryError("systemd did not start")
            if self._init() is not None and self.show("ActiveState") == "active":
                pid = int(self.show("MainPID") or 0)
                if pid not in (0, former):
                    return pid
            time.sleep(0.1)
        raise DeliveryError(f"the unit was not active within {_START_S:g} s")

    def _init(self) -> int | None:
        """The namespace's first process, once it is there."""
        try:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def _make_cgroups(self) -> list[Path]:
        made = []
        for name in (*_CONTROLLERS, "systemd"):
            own = _CGROUPS / name / self._cgroup
            own.mkdir()
            made.append(own)
            if name == "cpuset":
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (own / file).write_text((own.parent / file).read_text())
        return made


def _systemd_version() -> str:
    said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


if __name__ == "__main__":
    main()
