"""Coils that fall silent in noisy scans or behind the centre of k-space, and clean scans beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export.slices import Slice
from export.trials import KEY, Setting, Stream, draw_subject, read
from recon.assemble import Assembler
from recon.coil_watch import CoilFault
from recon.dead_coils import GAIN, MIN_LINES, SILENT, find_dead
from recon.line_checks import LineChecks
from recon.line_faults import Kind
from recon.reconstruct import reconstruct_classical, sense_coils
from recon.scan import Role
from tests.slices import make_slice

SETTING = Setting((96, 80), 4, 2, 20, 0.03, "from the centre", True, False)
N_NOISE = 4


def scan_of(seed: int = 3, setting: Setting = SETTING) -> Stream:
    y, x = np.mgrid[-1:1:160j, -1:1:160j]
    pixels = np.where(x**2 / 0.5 + y**2 / 0.7 < 1, 120 + 60 * np.sin(7 * x) * np.cos(5 * y), 0)
    source = Slice(pixels.astype(np.uint8), (1.2, 1.2), "someone", "T1w", "brain", 1.0)
    return read(draw_subject(np.random.default_rng(seed), source, setting), setting, 1)


def silenced(stream: Stream, coil: int, first: int) -> Stream:
    """The scan with nothing but noise in a coil from a readout on."""
    rng = np.random.default_rng(9)
    noise = stream.acquisitions[0].samples[coil]
    out = []
    for number, each in enumerate(stream.acquisitions):
        samples = each.samples.copy()
        if number >= first and each.role is not Role.NOISE:
            samples[coil] = noise[rng.permutation(len(noise))]
        out.append(replace(each, samples=samples))
    return stream.changed(out)


def found(stream: Stream) -> list[CoilFault]:
    assembler = Assembler(stream.scan)
    for number, each in enumerate(stream.acquisitions):
        assembler.add(each, number)
    kspace, encoding = assembler.kspace(KEY), stream.scan.encodings[0]
    coils = sense_coils(kspace.calibration, encoding.encoded_matrix.y, kspace.samples.shape[1], True)
    start = reconstruct_classical(kspace, encoding, "sense", coils).start
    assert start is not None
    return find_dead(kspace, coils, start.image, assembler.order(KEY)[0])


@pytest.mark.parametrize("has_noise", [True, False])
@pytest.mark.parametrize("order", ["sequential", "from the centre", "two passes"])
def test_a_clean_scan_has_no_dead_coil(order: str, has_noise: bool) -> None:
    assert found(scan_of(setting=SETTING._replace(order=order, has_noise=has_noise))) == []


def test_a_coil_that_dies_behind_the_centre_is_found_where_its_readouts_do_not_show_it() -> None:
    clean = scan_of(setting=SETTING._replace(sigma=0.003))
    onset = N_NOISE + 22
    broken = silenced(clean, 2, onset)
    checks = LineChecks(broken.scan)
    for number, each in enumerate(broken.acquisitions):
        checks.add(each, number)
    checks.complete(KEY)
    assert Kind.DEAD_COIL not in {fault.kind for fault in checks.report().faults}
    (fault,) = found(broken)
    assert (fault.coil, fault.from_start, fault.threshold) == (2, False, GAIN)
    assert abs(fault.order - onset) <= 8
    assert f"from readout {fault.order} on" in fault.words


@pytest.mark.parametrize("has_noise", [True, False])
def test_a_coil_that_never_worked_is_found_in_a_noisy_scan(has_noise: bool) -> None:
    stream = scan_of(setting=SETTING._replace(sigma=0.02, has_noise=True))
    broken = silenced(stream, 1, 0)
    if not has_noise:
        broken = replace(broken, acquisitions=broken.acquisitions[N_NOISE:])
    (fault,) = found(broken)
    assert (fault.coil, fault.order, fault.from_start) == (1, N_NOISE if has_noise else 0, True)
    assert fault.value < fault.threshold == SILENT


def test_one_coil_and_too_few_lines_are_not_judged() -> None:
    made = make_slice(np.random.default_rng(0), n_coils=1, step=1)
    coils = sense_coils(None, 8, 1, True)
    assert find_dead(made.start.kspace, coils, made.start.image, np.arange(made.start.kspace.samples.shape[2])) == []
    two = make_slice(np.random.default_rng(0), n_coils=2, step=1).start
    coils = replace(coils, matrix=np.eye(2, dtype=np.complex64), maps=two.maps)
    order = np.full(two.kspace.samples.shape[2], -1)
    order[:3] = np.arange(3)
    assert find_dead(two.kspace, coils, two.image, order) == []


def test_a_coil_is_named_once() -> None:
    checks = LineChecks(scan_of().scan)
    fault = CoilFault(2, 7, 0.1, GAIN, "coil 2 is dead", False)
    assert [each.coil for each in checks.note_dead([fault], KEY)] == [2]
    assert checks.note_dead([fault], KEY) == []
    assert checks.report().counts == {Kind.DEAD_COIL: 1}


def test_what_is_silent_in_the_last_lines_alone_is_not_called_dead() -> None:
    stream = scan_of(setting=SETTING._replace(order="sequential", sigma=0.002))
    n = len(stream.acquisitions)
    assert found(silenced(stream, 1, n - MIN_LINES + 1)) == []
    (fault,) = found(silenced(stream, 1, n - 2 * MIN_LINES))
    assert fault.coil == 1
