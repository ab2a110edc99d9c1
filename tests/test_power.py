"""Watts and joules: sysfs trees and an NVML made for the test, and meters that fail."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from edge import power
from edge.atomic import write_atomically
from edge.doctor import _power
from edge.metrics import Metrics
from edge.power import Energy, PowerError, look_for_meters, open_meters


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def hwmon(root: Path, number: int, rails: dict[int, tuple[str, int, int]], name: str = "ina3221") -> Path:
    """Return an hwmon node with rails: label, mV, mA."""
    node = write(root / "class" / "hwmon" / f"hwmon{number}", name=name)
    for index, (label, mv, ma) in rails.items():
        write(node, **{f"in{index}_label": label, f"in{index}_input": mv, f"curr{index}_input": ma})
    return node


def rapl(root: Path, zone: str, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    folder = root / "class" / "powercap" / zone
    return write(folder, name=name, energy_uj=energy_uj, max_energy_range_uj=range_uj)


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


class FakeNvmlError(Exception):
    pass


def nvml(monkeypatch: pytest.MonkeyPatch, n: int = 1, has_counter: bool = True) -> dict[str, float]:
    """Put a pynvml in place; the values that it answers with may be changed."""
    values = {"mw": 250_000.0, "mj": 5_000.0, "broken": 0.0}
    module = ModuleType("pynvml")

    def energy(handle: int) -> float:
        if values["broken"] or not has_counter:
            raise FakeNvmlError
        return values["mj"]

    def usage(handle: int) -> float:
        if values["broken"]:
            raise FakeNvmlError
        return values["mw"]

    for name, function in {
        "NVMLError": FakeNvmlError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: n,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda handle: b"Some GPU",
        "nvmlDeviceGetPowerUsage": usage,
        "nvmlDeviceGetTotalEnergyConsumption": energy,
    }.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return values


def test_a_machine_without_meters_says_why(tmp_path: Path) -> None:
    found = look_for_meters(tmp_path)
    assert found.meters == []
    assert found.reasons == ["no INA3221 in hwmon", "no NVML: nvidia-ml-py is not installed", "no RAPL in powercap"]


def test_the_total_rail_is_taken(tmp_path: Path) -> None:
    hwmon(tmp_path, 0, {1: ("temp", 1, 1)}, name="thermal")
    hwmon(tmp_path, 3, {1: ("VDD_IN", 5000, 1200), 2: ("VDD_CPU_GPU_CV", 5000, 400), 3: ("VDD_SOC", 5000, 200)})
    (meter,) = open_meters(tmp_path)
    assert (meter.source, meter.name) == ("INA3221", "VDD_IN")
    assert meter.watts() == pytest.approx(6.0)


def test_without_a_total_the_rails_are_added_each_once(tmp_path: Path) -> None:
    rails = {1: ("VDD_GPU_SOC", 20_000, 300), 2: ("VDD_CPU_CV", 20_000, 200), 3: ("VIN_SYS_5V0", 5000, 800)}
    hwmon(tmp_path, 3, {**rails, 7: ("sum of shunt voltages", 1, 1)})
    second = hwmon(tmp_path, 4, {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 5000, 300)})
    drivers = tmp_path / "bus" / "i2c" / "drivers" / "ina3221" / "1-0041" / "hwmon"
    drivers.mkdir(parents=True)
    (drivers / "hwmon4").symlink_to(second)  # the same node on its other path
    (meter,) = open_meters(tmp_path)
    assert meter.name == "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert meter.watts() == pytest.approx(6 + 4 + 4)


def test_a_node_found_by_its_driver_alone_counts(tmp_path: Path) -> None:
    node = tmp_path / "bus" / "i2c" / "drivers" / "ina3221" / "1-0040" / "hwmon" / "hwmon1"
    write(node, in1_label="VDD_IN", in1_input=12_000, curr1_input=500)
    (meter,) = open_meters(tmp_path)
    assert meter.watts() == pytest.approx(6.0)


def test_a_rail_without_a_label_is_not_guessed_at(tmp_path: Path) -> None:
    write(hwmon(tmp_path, 1, {}), in1_input=5000, curr1_input=1000)
    found = look_for_meters(tmp_path)
    assert found.meters == []
    assert "INA3221 without a labelled rail" in found.reasons
    hwmon(tmp_path, 1, {2: ("GPU", 5000, 1000)})
    (meter,) = open_meters(tmp_path)
    assert meter.name == "GPU"


def test_what_cannot_be_read_is_a_reason(tmp_path: Path) -> None:
    node = hwmon(tmp_path, 1, {1: ("VDD_IN", 5000, 1000)})
    (node / "in1_input").write_text("off\n")
    zone = rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    (zone / "energy_uj").unlink()
    (zone / "energy_uj").mkdir()  # even root cannot read it
    found = look_for_meters(tmp_path)
    assert found.meters == []
    assert "INA3221 VDD_IN: in1_input holds no number" in found.reasons
    assert "RAPL package-0: energy_uj cannot be read: Is a directory" in found.reasons


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_counters_that_only_root_may_read_are_named(tmp_path: Path) -> None:
    (rapl(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj").chmod(0)
    assert "RAPL package-0: energy_uj cannot be read: Permission denied" in look_for_meters(tmp_path).reasons


def test_rapl_zones_inside_a_package_are_not_counted_twice(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 100)
    rapl(tmp_path, "intel-rapl:0:0", "core", 50)
    rapl(tmp_path, "intel-rapl:0:1", "dram", 70)
    rapl(tmp_path, "intel-rapl:1", "psys", 300)
    assert [meter.name for meter in open_meters(tmp_path)] == ["package-0", "package-0 dram", "psys"]


def test_a_broken_zone_leaves_the_others(tmp_path: Path) -> None:
    (rapl(tmp_path, "intel-rapl:0", "package-0", 100) / "max_energy_range_uj").unlink()
    rapl(tmp_path, "intel-rapl:1", "package-1", 100)
    found = look_for_meters(tmp_path)
    assert [meter.name for meter in found.meters] == ["package-1"]
    assert any("max_energy_range_uj cannot be read" in reason for reason in found.reasons)


def test_a_counter_goes_round(tmp_path: Path) -> None:
    zone = rapl(tmp_path, "intel-rapl:0", "package-0", 900_000)
    (meter,) = open_meters(tmp_path)
    with Energy(meter) as energy:
        write(zone, energy_uj=200_000)
    assert energy.joules == pytest.approx(0.3)
    assert energy.reason == ""
    assert energy.seconds > 0


def test_a_counter_that_is_read_often_adds_up_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 0)
    (meter,) = open_meters(tmp_path)
    counts = iter([0.0, 0.7, 0.4, 0.1])
    monkeypatch.setattr(meter, "joules", lambda: next(counts))
    step = power._Counted(meter)
    for _ in range(4):
        step.read(0.0)
    assert step.total_j == pytest.approx(0.7 + 0.7 + 0.7)


def test_watts_of_a_counter_are_its_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = rapl(tmp_path, "intel-rapl:0", "package-0", 900_000)
    (meter,) = open_meters(tmp_path)
    times = iter([10.0, 10.5])
    monkeypatch.setattr(power.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(power.time, "sleep", lambda seconds: write(zone, energy_uj=400_000))
    assert meter.watts() == pytest.approx(1.0)


def test_watts_are_joined_by_trapezoids(tmp_path: Path) -> None:
    node = hwmon(tmp_path, 1, {1: ("VDD_IN", 1000, 2000)})
    (meter,) = open_meters(tmp_path)
    step = power._Sampled(meter)
    step.read(0.0)
    write(node, curr1_input=4000)
    step.read(1.0)
    step.read(1.5)
    assert step.total_j == pytest.approx(3 * 1.0 + 4 * 0.5)


def test_constant_power_gives_its_product_with_time(tmp_path: Path) -> None:
    hwmon(tmp_path, 1, {1: ("VDD_IN", 1000, 2000)})
    (meter,) = open_meters(tmp_path)
    with Energy(meter, period_s=0.001) as energy:
        sum(range(100_000))
    assert energy.joules is not None
    assert energy.joules == pytest.approx(2 * energy.seconds)


def test_a_sensor_that_disappears_gives_no_number(tmp_path: Path) -> None:
    node = hwmon(tmp_path, 1, {1: ("VDD_IN", 1000, 2000)})
    (meter,) = open_meters(tmp_path)
    with Energy(meter) as energy:
        (node / "curr1_input").unlink()
    assert energy.joules is None
    assert energy.reason == "INA3221 VDD_IN: curr1_input cannot be read: No such file or directory"
    with pytest.raises(PowerError, match="curr1_input"):
        meter.watts()


def test_one_missed_reading_is_not_papered_over(tmp_path: Path) -> None:
    node = hwmon(tmp_path, 1, {1: ("VDD_IN", 1000, 2000)})
    (meter,) = open_meters(tmp_path)
    energy = Energy(meter, period_s=0.001)
    with energy:
        (node / "curr1_input").unlink()
        energy._thread.join(10)  # it stops at the failure
        write(node, curr1_input=2000)
    assert energy.joules is None


def test_a_gpu_counts_its_own_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = nvml(monkeypatch)
    (meter,) = open_meters(tmp_path)
    assert (meter.source, meter.name) == ("NVML", "Some GPU #0")
    assert meter.watts() == pytest.approx(250.0)
    with Energy(meter) as energy:
        values["mj"] += 1_500
    assert energy.joules == pytest.approx(1.5)
    with Energy(meter) as energy:
        values["mj"] = 0  # the driver was loaded again
    assert energy.joules is None
    assert "went back" in energy.reason


def test_an_older_gpu_gives_watts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = nvml(monkeypatch, n=2, has_counter=False)
    meters = open_meters(tmp_path)
    assert [meter.name for meter in meters] == ["Some GPU #0", "Some GPU #1"]
    with Energy(meters[0], period_s=0.001) as energy:
        sum(range(100_000))
    assert energy.joules == pytest.approx(250 * energy.seconds)
    values["broken"] = 1
    assert open_meters(tmp_path) == []
    assert any("NVML" in reason for reason in look_for_meters(tmp_path).reasons)


def test_an_nvml_without_gpu_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, n=0)
    assert "no NVML: it knows no GPU" in look_for_meters(tmp_path).reasons


def test_an_odometer_counts_until_a_meter_fails_and_metrics_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power, "COUNTER_S", 0.01)
    zone = rapl(tmp_path, "intel-rapl:0", "package-0", 5_000_000, 100_000_000)
    metrics = Metrics()

    def told() -> float | None:
        labels = {"source": "RAPL", "meter": "package-0"}
        return metrics.registry.get_sample_value("scanside_energy_joules_total", labels)

    odometer = power.Odometer(open_meters(tmp_path))
    for uj, joules in ((7_000_000, 2.0), (12_500_000, 7.5)):
        write_atomically(zone / "energy_uj", str(uj).encode())
        until = time.monotonic() + 20
        while odometer.joules()["RAPL", "package-0"] != pytest.approx(joules) and time.monotonic() < until:
            time.sleep(0.01)
        metrics.set_energy(odometer.joules())
        assert told() == pytest.approx(joules)
    (zone / "energy_uj").unlink()
    while odometer.joules()["RAPL", "package-0"] is not None and time.monotonic() < until:
        time.sleep(0.01)
    metrics.set_energy(odometer.joules())
    assert told() is None
    odometer.close()


def test_the_doctor_says_what_is_here(tmp_path: Path) -> None:
    finding = _power(tmp_path)
    assert (finding.level, finding.what) == ("note", "power")
    assert finding.words.startswith("unavailable: no INA3221 in hwmon; ")
    hwmon(tmp_path, 1, {1: ("VDD_IN", 1000, 2000)})
    rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    finding = _power(tmp_path)
    assert (finding.level, finding.words) == ("ok", "INA3221 VDD_IN, RAPL package-0")
