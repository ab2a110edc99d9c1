"""What single readouts show: each fault is found in the line that has it, and clean scans, real ones too, show none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.header import read_header
from edge.intake import to_acquisition
from edge.rawfile import open_raw
from edge.recon_file import readouts
from edge.undersample import undersample
from recon.assemble import Assembler
from recon.interference import noise_tones
from recon.lattice import central_run, read_pattern
from recon.line_checks import LineChecks
from recon.line_faults import MAX_KEPT, Kind, LineFault, LineReport
from recon.network import TrainedRange
from recon.outliers import jumps, line_level, spike_columns
from recon.scan import Acquisition, Encoding, ImageKey, Limit, Matrix, Role, Scan, Size

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "kspace"
SPOILED = "hku_S3_FLAIR_nocage_rawEMI"
NAMES = sorted(path.stem for path in REAL.glob("*.h5")) if REAL.exists() else []
NY, NX = 64, 96


def scan_of(ny: int = NY, acceleration: int = 1, **limits: Limit) -> Scan:
    fov = Size(240, 240, 5)
    encoding = Encoding(
        Matrix(NX, ny, 1), fov, Matrix(NX, ny, 1), fov, {"kspace_encoding_step_1": Limit(0, ny - 1, ny // 2), **limits},
        acceleration=(acceleration, 1),
    )  # fmt: skip
    return Scan("0" * 26, (encoding,))


def lines_of(
    ny: int = NY, n_coils: int = 4, n_slices: int = 2, rows: list[int] | None = None, seed: int = 0
) -> list[Acquisition]:
    """A disc in coils of unlike phase, with noise: readouts slice by slice, in the order of `rows`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : ny * 1j, -1 : 1 : NX * 1j]
    disc = ((x / 0.6) ** 2 + (y / 0.7) ** 2 < 1) * (1 + 0.3 * np.sin(7 * x + 3 * y))
    maps = np.stack([np.exp(-((x - np.cos(a)) ** 2) - (y - np.sin(a)) ** 2 + 3j * a * x) for a in range(n_coils)])
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(maps * disc, axes=(1, 2)), norm="ortho"), axes=(1, 2))
    out = []
    for number in range(n_slices):
        noise = rng.normal(size=(2, *kspace.shape)) * 0.01
        noisy = (kspace + noise[0] + 1j * noise[1]).astype(np.complex64)
        for row in range(ny) if rows is None else rows:
            out.append(
                Acquisition(noisy[:, row], Role.IMAGING, ImageKey(0, number, 0, 0, 0, 0), row, time_stamp=len(out) + 1)
            )
    return out


def checked(
    lines: list[Acquisition], scan: Scan | None = None, trained: TrainedRange | None = None
) -> tuple[LineReport, list[LineFault]]:
    """The report at the end, and what was announced with each readout."""
    checks = LineChecks(scan or scan_of(), trained)
    early = [fault for order, line in enumerate(lines) for fault in checks.add(line, order)]
    return checks.report(checks.open_keys), early


def changed(line: Acquisition, change: Callable[[np.ndarray], None]) -> Acquisition:
    samples = np.array(line.samples)
    change(samples)
    return replace(line, samples=samples)


def kinds(report: LineReport) -> dict[Kind, int]:
    return dict(report.counts)


def test_a_clean_scan_shows_nothing_and_its_lines_are_known() -> None:
    report, early = checked(lines_of())
    assert not report.faults
    assert not early
    assert report.n_readouts == 2 * NY
    assert report.duration_s == pytest.approx((2 * NY - 1) * 2.5e-3)
    assert all(each.all() for each in report.measured.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_said_at_once(bad: float) -> None:
    lines = lines_of()
    lines[20] = changed(lines[20], lambda s: s.__setitem__((1, 5), bad))
    report, early = checked(lines)
    (fault,) = early
    assert (fault.kind, fault.order, fault.line, fault.value) == (Kind.NOT_FINITE, 20, 20, 1)
    assert kinds(report) == {Kind.NOT_FINITE: 1, Kind.MISSING: 1}


@settings(max_examples=30, deadline=None)
@given(row=st.integers(0, NY - 1), column=st.integers(0, NX - 1), seed=st.integers(0, 5))
def test_a_spike_off_the_centre_is_found_where_it_is(row: int, column: int, seed: int) -> None:
    if abs(row - NY // 2) <= 4 and abs(column - NX // 2) <= 8:
        return
    lines = lines_of(n_slices=1, seed=seed)
    lines[row] = changed(lines[row], lambda s: s.__setitem__((slice(None), column), 50.0))
    report, _ = checked(lines)
    assert [(fault.line, fault.order) for fault in report.faults if fault.kind is Kind.SPIKE] == [(row, row)]


def test_a_spike_is_announced_before_its_image_ends() -> None:
    lines = lines_of(n_slices=1)
    lines[10] = changed(lines[10], lambda s: s.__setitem__((slice(None), 70), 30.0))
    _, early = checked(lines[:20])
    assert [fault.order for fault in early if fault.kind is Kind.SPIKE] == [10]


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_plateau_is_clipped_and_noise_zeros_and_small_integers_are_not(share: float) -> None:
    level = share * max(float(np.abs(line.samples.view(np.float32)).max()) for line in lines_of())

    def clip(samples: np.ndarray) -> None:
        parts = samples.view(np.float32)
        np.clip(parts, -level, level, out=parts)

    report, early = checked([changed(line, clip) for line in lines_of()])
    assert any(fault.kind is Kind.CLIPPED for fault in early)
    assert set(kinds(report)) == {Kind.CLIPPED}
    rng = np.random.default_rng(3)
    noise = [
        replace(line, samples=rng.normal(size=(4, 2 * NX)).astype(np.float32).view(np.complex64)) for line in lines_of()
    ]
    integers = [replace(line, samples=np.round(line.samples * np.float32(200))) for line in lines_of()]
    zeros = [replace(line, samples=np.zeros((4, NX), np.complex64)) for line in lines_of()]
    for lines in (noise, integers, zeros):
        assert Kind.CLIPPED not in kinds(checked(lines)[0])


def test_a_place_that_was_measured_again_is_a_duplicate_but_averages_are_not() -> None:
    lines = lines_of(n_slices=1)
    report, _ = checked([*lines[:40], lines[12], *lines[40:]])
    (fault,) = report.faults
    assert (fault.kind, fault.line, fault.order, fault.value) == (Kind.DUPLICATE, 12, 40, 2)
    twice = [replace(line, average=n) for n in range(2) for line in lines]
    assert not checked(twice, scan_of(average=Limit(0, 1, 0)))[0].faults
    assert not checked(twice)[0].faults  # a header that is silent: all alike


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(32, 129),
    acceleration=st.integers(1, 4),
    acs=st.integers(0, 24),
    offset=st.integers(0, 3),
    data=st.data(),
)
def test_a_pattern_is_read_whatever_its_numbers_and_a_missing_line_is_named(
    n: int, acceleration: int, acs: int, offset: int, data: st.DataObject
) -> None:
    measured = np.zeros(n, bool)
    measured[offset % acceleration :: acceleration] = True
    measured[n // 2 - acs // 2 : n // 2 - acs // 2 + acs] = True
    whole = read_pattern(measured)
    assert not whole.missing
    if measured.sum() > 10 and (n - acs) > 6 * acceleration:
        assert whole.acceleration == acceleration
        lattice = np.arange(offset % acceleration, n, acceleration)
        lost = data.draw(st.sampled_from(lattice[2:-2].tolist()))
        measured[lost] = False
        assert read_pattern(measured).missing == (lost,)


def test_random_sampling_is_no_pattern_with_holes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        measured = rng.random(128) < 0.35
        measured[52:76] = True
        assert read_pattern(measured).missing == ()


def test_the_central_run_is_counted_around_the_centre() -> None:
    measured = np.zeros(10, bool)
    measured[3:7] = True
    assert central_run(measured) == 4
    measured[5] = False
    assert central_run(measured) == 0


def test_sampling_that_belies_its_header_or_has_no_calibration_is_said() -> None:
    rows = list(range(0, NY, 2))
    report, _ = checked(lines_of(rows=rows))
    assert kinds(report) == {Kind.SAMPLING: 1, Kind.CALIBRATION: 2}
    assert "2 rows apart; the header says acceleration 1" in report.faults[0].words
    central = sorted({*rows, *range(24, 40)})
    assert not checked(lines_of(rows=central), scan_of(acceleration=2))[0].faults
    narrow = TrainedRange((32, 512), 1.0, 16, 16, 0.6)
    outside, _ = checked(lines_of(rows=central), scan_of(acceleration=2), narrow)
    assert "the network was trained for up to 1" in outside.faults[0].words
    beyond = replace(lines_of()[0], step_1=99)
    (fault,) = checked([beyond])[1]
    assert (fault.kind, fault.order) == (Kind.SAMPLING, 0)


def test_lines_that_follow_a_seeming_end_take_back_what_was_said_of_the_sampling() -> None:
    lines = lines_of(n_slices=1)
    checks = LineChecks(scan_of())
    for order, line in enumerate(lines[:24]):
        checks.add(line, order)
    checks.complete(lines[0].key)
    for order, line in enumerate(lines[24:], 24):
        checks.add(line, order)
    report = checks.report(checks.open_keys)
    assert not report.faults
    assert not report.counts


@pytest.mark.parametrize("from_start", [True, False])
@pytest.mark.parametrize("how", ["zeros", "noise"])
def test_a_dead_coil_is_named_with_when_it_died(how: str, from_start: bool) -> None:
    rng = np.random.default_rng(1)
    first = 0 if from_start else NY + 20

    def kill(samples: np.ndarray) -> None:
        noise = rng.normal(size=2 * NX).astype(np.float32).view(np.complex64) * np.float32(0.01)
        samples[2] = 0 if how == "zeros" else noise

    lines = [changed(line, kill) if order >= first else line for order, line in enumerate(lines_of())]
    report, early = checked(lines)
    (fault,) = [fault for fault in early if fault.kind is Kind.DEAD_COIL]
    assert (fault.coil, fault.from_start) == (2, from_start)
    assert first <= fault.order <= first + (0 if how == "zeros" else NY // 2)
    assert set(kinds(report)) <= {Kind.DEAD_COIL, Kind.GAIN_JUMP}


def test_a_coil_far_too_weak_is_named_when_an_image_is_complete() -> None:
    lines = [changed(line, lambda s: s.__setitem__(1, s[1] * 1e-3)) for line in lines_of()]
    report, _ = checked(lines)
    assert [(fault.kind, fault.coil) for fault in report.faults] == [(Kind.DEAD_COIL, 1)]


@pytest.mark.parametrize("n_coils", [1, 4])
def test_a_jump_of_the_gain_is_found_in_its_line(n_coils: int) -> None:
    lines = lines_of(n_slices=1, n_coils=n_coils)
    single = list(lines)
    single[50] = changed(single[50], lambda s: s.__imul__(3))
    (fault,) = checked(single)[0].faults
    assert (fault.kind, fault.line) == (Kind.GAIN_JUMP, 50)
    assert "back with the next" in fault.words
    lasting = [changed(line, lambda s: s.__imul__(3)) if order >= 12 else line for order, line in enumerate(lines)]
    (fault,) = checked(lasting)[0].faults
    assert (fault.kind, fault.line) == (Kind.GAIN_JUMP, 12)


def test_levels_without_a_number_are_not_judged() -> None:
    assert np.isnan(line_level(np.zeros(8, np.float32)))
    assert jumps(np.full(32, np.nan), np.ones(32, bool)) == []
    assert len(spike_columns(np.zeros(32, np.float32))) == 0


@pytest.mark.parametrize("where", ["lines", "noise"])
def test_a_transmitter_is_heard_in_its_column(where: str) -> None:
    rng = np.random.default_rng(2)
    tone = 30
    wave = np.exp(2j * np.pi * (np.arange(NX) - NX // 2) * -tone / NX)

    def send(samples: np.ndarray) -> None:
        samples += (0.02 * np.exp(2j * np.pi * rng.random()) * wave).astype(np.complex64)

    lines = lines_of()
    if where == "lines":
        report, _ = checked([changed(line, send) for line in lines])
    else:
        noise = rng.normal(size=(4, 2 * NX)).astype(np.float32).view(np.complex64) * np.float32(0.01)
        quiet = replace(lines[0], role=Role.NOISE, samples=noise)
        assert not checked([quiet, *lines])[0].faults
        report, early = checked([changed(quiet, send), *lines])
        assert early[0].order == 0
    fault = report.faults[0]
    assert fault.kind is Kind.INTERFERENCE
    assert f"columns {tone:+d}" in fault.words


@pytest.mark.parametrize("n_coils", [1, 2, 8])
def test_white_noise_is_no_transmitter(n_coils: int) -> None:
    rng = np.random.default_rng(4)
    for _ in range(1000 if n_coils == 1 else 200):
        noise = rng.normal(size=(n_coils, 1024)).astype(np.float32).view(np.complex64)
        assert noise_tones(noise)[0] == []


def test_noise_that_rose_after_its_readouts_is_broadband_interference() -> None:
    rng = np.random.default_rng(2)
    lines = lines_of()
    samples = rng.normal(size=(4, 2 * NX)).astype(np.float32).view(np.complex64) * np.float32(0.001)
    report, _ = checked([replace(lines[0], role=Role.NOISE, samples=samples), *lines])
    assert kinds(report) == {Kind.INTERFERENCE: 1}


def test_a_broken_scanner_fills_no_memory() -> None:
    lines = [changed(line, lambda s: s.__setitem__((0, 0), np.nan)) for line in lines_of(n_slices=8)]
    report, _ = checked(lines)
    assert report.counts[Kind.NOT_FINITE] == 8 * NY
    assert len(report.faults) == MAX_KEPT


def real_lines(name: str, acceleration: int) -> tuple[Scan, list[Acquisition]]:
    raw = undersample(open_raw(REAL / f"{name}.h5"), acceleration, 24)
    scan, _ = read_header(raw.header, "0" * 26)
    return scan, [to_acquisition(each.header, each.samples) for each in readouts(raw)]


@pytest.mark.real_data
@pytest.mark.skipif(not NAMES, reason="no real scans here")
@pytest.mark.parametrize("acceleration", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_real_scans_are_clean_but_for_the_one_without_a_shield(name: str, acceleration: int) -> None:
    scan, lines = real_lines(name, acceleration)
    report, _ = checked(lines, scan)
    if name == SPOILED:
        assert kinds(report) == {Kind.INTERFERENCE: 1}
        assert "columns +58" in report.faults[0].words
    else:
        assert not report.faults, report.faults[0].words


def test_cost_is_a_share_of_the_assemblers() -> None:
    rng = np.random.default_rng(0)
    fov = Size(240, 240, 5)
    scan = Scan("0" * 26, (Encoding(Matrix(512, 256, 1), fov, Matrix(256, 256, 1), Size(120, 240, 5)),))
    samples = rng.normal(size=(256, 16, 1024)).astype(np.float32).view(np.complex64)
    key = ImageKey(0, 0, 0, 0, 0, 0)
    lines = [Acquisition(each, Role.IMAGING, key, row) for row, each in enumerate(samples)]
    spent = {}
    for name, make in (("assembler", lambda: Assembler(scan).add), ("checks", lambda: LineChecks(scan).add)):
        add = make()
        begin = time.process_time()
        for order, line in enumerate(lines):
            add(line) if name == "assembler" else add(line, order)  # type: ignore[operator]
        spent[name] = time.process_time() - begin
    print(f"checks cost {spent['checks'] / spent['assembler']:.2f} of the assembler's time")
    assert spent["checks"] < 2 * spent["assembler"]
