"""Watts and joules from the meters that a machine has: INA3221 rails, NVML, RAPL. Nothing is ever estimated.

INA3221, on Jetson modules: hwmon nodes with the voltage (mV) and current (mA) of up to three rails each, as JetPack 5
and 6 name them. The module's total is `VDD_IN` where there is such a rail (Orin Nano and NX, Xavier NX). AGX modules
have none: there the rails are added, without the memory rail where `VIN_SYS_5V0`, which feeds it, is counted. The
carrier board is not in it.
NVML, for discrete GPUs: the board's own energy counter (Volta and newer), else its power, by the module `pynvml`.
RAPL, for CPUs: the energy counters in /sys/class/powercap of each package, of memory, and of the platform ("psys",
which holds the packages: never add the two). Reading them takes the permission that the kernel asks for since 5.10.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, cast

TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "5V_IN")  # by the module's generation
FED = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}  # a rail, and the rail that feeds it
RAILS = (1, 2, 3)  # of one INA3221; hwmon's further numbers are shunt voltages and their sum
SAMPLE_S = 0.02  # between two readings of watts; the INA3221 averages over less
COUNT_S = 10.0  # between two readings of a counter, so that none goes round unseen
COUNTER_S, RAIL_S = 2.0, 0.1  # of an odometer
MEAN_S = 0.1  # over which a counter's watts are taken


class PowerError(Exception):
    """A meter cannot be read; the message says why."""


class PowerMeter(Protocol):
    """Something here that measures power."""

    name: str  # what is measured: "VDD_IN", "package-0"
    source: str  # "INA3221", "NVML" or "RAPL"

    def watts(self) -> float:
        """Return the power now, W (of a counter: the mean over the next 0.1 s); raise PowerError."""


class Counter(PowerMeter, Protocol):
    """A meter that counts energy by itself, which misses nothing."""

    range_j: float | None  # where it begins at 0 again

    def joules(self) -> float:
        """Return what it has counted so far, J; raise PowerError."""


class Survey(NamedTuple):
    """The meters that can be read, and why there are no others."""

    meters: list[PowerMeter]
    reasons: list[str]


def open_meters(root: Path = Path("/sys")) -> list[PowerMeter]:
    """Return the meters that can be read here; `look_for_meters` also says why others cannot."""
    return look_for_meters(root).meters


def look_for_meters(root: Path = Path("/sys")) -> Survey:
    """Return the meters that can be read, each after one reading, and the reasons for those that cannot.

    root: where sysfs is mounted.
    """
    meters: list[PowerMeter] = []
    reasons: list[str] = []
    for found in (_find_ina3221(root), _find_nvml(), _find_rapl(root)):
        try:
            for meter in found:
                try:
                    _probe(meter)
                    meters.append(meter)
                except PowerError as error:
                    reasons.append(f"{meter.source} {meter.name}: {error}")
        except PowerError as error:
            reasons.append(str(error))
    return Survey(meters, reasons)


def _probe(meter: PowerMeter) -> None:
    """Read a meter once; raise PowerError where that fails."""
    _adder(meter).read(0.0)


class Energy:
    """What a meter measures while a `with` block runs.

    Afterwards `joules` is the energy and `seconds` how long it took. A counter's difference where the meter counts;
    otherwise watts are read every `period_s` by a thread and joined by trapezoids. Where one reading fails, `joules`
    is None and `reason` says why: what was missed is not made up.
    """

    def __init__(self, meter: PowerMeter, period_s: float | None = None) -> None:
        """Get ready to measure with `meter`, reading it every `period_s` (by default as its kind needs)."""
        self.joules: float | None = None
        self.seconds = 0.0
        self.reason = "not measured yet"
        self._meter = meter
        self._adder = _adder(meter)
        self._period_s = period_s or (COUNT_S if isinstance(self._adder, _Counted) else SAMPLE_S)
        self._times: list[float] = []  # of the first and of the last reading
        self._failure = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="power", daemon=True)

    def __enter__(self) -> Energy:
        """Take the first reading and begin to watch."""
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the last reading and add up."""
        self._stopping.set()
        self._thread.join()
        self._read()
        self.reason = self._failure
        if not self._failure:
            self.joules = self._adder.total_j
            self.seconds = self._times[-1] - self._times[0]

    @property
    def so_far_j(self) -> float | None:
        """The energy up to the last reading; None once one has failed."""
        return None if self._failure else self._adder.total_j

    def _watch(self) -> None:
        while not self._failure and not self._stopping.wait(self._period_s):
            self._read()

    def _read(self) -> None:
        if self._failure:
            return
        now = time.monotonic()
        try:
            self._adder.read(now)
        except PowerError as error:
            self._failure = f"{self._meter.source} {self._meter.name}: {error}"
        self._times[1:] = [now]


class Odometer:
    """What each meter has counted since this was made, until it is closed; one that fails has nothing to say again."""

    def __init__(self, meters: Sequence[PowerMeter]) -> None:
        """Begin to measure with all of them."""
        self._stack = ExitStack()
        self._running = [
            (meter.source, meter.name, self._stack.enter_context(Energy(meter, _period_s(meter)))) for meter in meters
        ]

    def joules(self) -> dict[tuple[str, str], float | None]:
        """Return the energy by source and name; None where it cannot be told any more."""
        return {(source, name): energy.so_far_j for source, name, energy in self._running}

    def close(self) -> None:
        """Stop measuring."""
        self._stack.close()


def _period_s(meter: PowerMeter) -> float:
    """Often enough for what a daemon counts: a counter before it goes round, watts ten times a second."""
    return COUNTER_S if hasattr(meter, "joules") else RAIL_S


class _Counted:
    """Adds up the differences of a counter that begins again at its range."""

    def __init__(self, meter: Counter) -> None:
        self.total_j = 0.0
        self._meter = meter
        self._last: float | None = None

    def read(self, at_s: float) -> None:
        """Take a reading."""
        now = self._meter.joules()
        if self._last is not None:
            change = now - self._last
            if change < 0 and self._meter.range_j is None:
                raise PowerError("the counter went back")
            self.total_j += change if change >= 0 else change + (self._meter.range_j or 0.0)
        self._last = now


class _Sampled:
    """Joins readings of watts by trapezoids."""

    def __init__(self, meter: PowerMeter) -> None:
        self.total_j = 0.0
        self._meter = meter
        self._last: tuple[float, float] | None = None

    def read(self, at_s: float) -> None:
        """Take a reading, made at the time `at_s`."""
        watts = self._meter.watts()
        if self._last is not None:
            self.total_j += (at_s - self._last[0]) * (watts + self._last[1]) / 2
        self._last = at_s, watts


def _adder(meter: PowerMeter) -> _Counted | _Sampled:
    return _Counted(cast(Counter, meter)) if hasattr(meter, "joules") else _Sampled(meter)


def _mean_watts(meter: Counter) -> float:
    start, count = time.monotonic(), _Counted(meter)
    count.read(start)
    time.sleep(MEAN_S)
    count.read(end := time.monotonic())
    return count.total_j / (end - start)


def _read_text(path: Path) -> str:
    """Return what a sysfs file says; raise PowerError with its name where it cannot be read."""
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise PowerError(f"{path.name} cannot be read: {why}") from error


def _read_number(path: Path) -> float:
    text = _read_text(path)
    try:
        return float(text)
    except ValueError as error:
        raise PowerError(f"{path.name} holds no number") from error


class _Rails:
    """One or more rails of INA3221 sensors, added."""

    source = "INA3221"

    def __init__(self, rails: list[tuple[str, Path, int]]) -> None:
        self.name = " + ".join(name for name, _, _ in rails)
        self._files = [(node / f"in{number}_input", node / f"curr{number}_input") for _, node, number in rails]

    def watts(self) -> float:
        """Return the rails' voltage times current now."""
        return sum(_read_number(mv) * _read_number(ma) for mv, ma in self._files) * 1e-6


def _find_ina3221(root: Path) -> Iterator[PowerMeter]:
    nodes = {path.resolve() for path in root.glob("class/hwmon/hwmon*") if _says(path / "name", "ina3221")}
    nodes |= {path.resolve() for path in root.glob("bus/i2c/drivers/ina3221/*/hwmon/hwmon*")}
    if not nodes:
        raise PowerError("no INA3221 in hwmon")
    rails: list[tuple[str, Path, int]] = []
    for node in sorted(nodes):
        for number in RAILS:
            try:
                label = _read_text(node / f"in{number}_label")
            except PowerError:
                continue  # not wired, or nobody says what it measures
            if label and label != "NC" and (node / f"curr{number}_input").exists():
                rails.append((label, node, number))
    if not rails:
        raise PowerError("INA3221 without a labelled rail")
    labels = {label for label, _, _ in rails}
    for total in TOTAL_RAILS:
        if total in labels:
            yield _Rails([rail for rail in rails if rail[0] == total])
            return
    yield _Rails([rail for rail in rails if FED.get(rail[0]) not in labels])


def _says(path: Path, text: str) -> bool:
    try:
        return _read_text(path) == text
    except PowerError:
        return False


class _Nvml:
    """The power of a GPU board, for GPUs without an energy counter."""

    source = "NVML"

    def __init__(self, module: Any, handle: Any, name: str) -> None:
        self.name = name
        self._module, self._handle = module, handle

    def watts(self) -> float:
        """Return what the board reports."""
        return self._ask("nvmlDeviceGetPowerUsage") * 1e-3  # mW

    def _ask(self, function: str) -> float:
        try:
            return float(getattr(self._module, function)(self._handle))
        except self._module.NVMLError as error:
            raise PowerError(f"{function} failed: {type(error).__name__}") from error


class _NvmlCounter(_Nvml):
    """A GPU board that counts its energy since the driver was loaded."""

    range_j = None  # 64 bits of mJ

    def joules(self) -> float:
        """Return the energy since then."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption") * 1e-3  # mJ


def _find_nvml() -> Iterator[PowerMeter]:
    try:
        pynvml = import_module("pynvml")
    except ImportError as error:
        raise PowerError("no NVML: nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    except pynvml.NVMLError as error:
        raise PowerError(f"no NVML: {type(error).__name__}") from error
    if not handles:
        raise PowerError("no NVML: it knows no GPU")
    for index, (handle, name) in enumerate(zip(handles, names, strict=True)):
        words = f"{name.decode() if isinstance(name, bytes) else name} #{index}"
        counter = _NvmlCounter(pynvml, handle, words)
        try:
            counter.joules()
            yield counter
        except PowerError:
            yield _Nvml(pynvml, handle, words)


class _Rapl:
    """One zone of the CPU's energy counters."""

    source = "RAPL"

    def __init__(self, zone: Path, name: str) -> None:
        self.name = name
        self.range_j: float | None = None  # once read
        self._zone = zone

    def joules(self) -> float:
        """Return the counter, which goes round at `range_j`."""
        if self.range_j is None:
            self.range_j = _read_number(self._zone / "max_energy_range_uj") * 1e-6
        return _read_number(self._zone / "energy_uj") * 1e-6

    def watts(self) -> float:
        """Return the counter's mean change over the next 0.1 s."""
        return _mean_watts(self)


def _find_rapl(root: Path) -> Iterator[PowerMeter]:
    """Yield packages and the platform, and memory, which is a zone inside a package's but not in its count."""
    zones = sorted(root.glob("class/powercap/intel-rapl:*"))
    if not zones:
        raise PowerError("no RAPL in powercap")
    for zone in zones:
        name = _read_text(zone / "name")
        if zone.name.count(":") == 1:
            yield _Rapl(zone, name)
        elif name == "dram":
            yield _Rapl(zone, f"{_read_text(zone.parent / zone.name.rpartition(':')[0] / 'name')} dram")
