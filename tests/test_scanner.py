"""The simulated scanner: what is read, in which order, and that k-space is the transform of what was seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from edge.anatomy import load_anatomy
from recon.contrast import CONTRASTS, TISSUES, signal
from recon.errors import AcquisitionError
from recon.fourier import resize_centred, to_image
from recon.head import STORED_TISSUES, make_head, tissue_fractions, to_atlas
from recon.lesions import measure, place_lesion
from recon.protocol import ORIENTATIONS, OVERSAMPLING, Protocol, geometry, lines, slice_order
from recon.receive import helmet, noise_covariance, sensitivities
from recon.scan import Acquisition, Role
from recon.scanner import _fold, noise_readouts, noise_sigma, scan, scan_slice

SMALL = Protocol(matrix=(64, 64), n_slices=3, n_coils=4, acceleration=1, n_calibration=16, gap_mm=8, snr=1e5)
HEAD = make_head(load_anatomy(), 1)


def kspace_of(readouts: tuple[Acquisition, ...], protocol: Protocol) -> np.ndarray:
    """Place readouts by their counters, as any reader would: complex64 (coil, y, kx)."""
    ny, nx = protocol.matrix[0], OVERSAMPLING * protocol.matrix[1]
    out = np.zeros((protocol.n_coils, ny, nx), np.complex64)
    for readout in readouts:
        row = readout.step_1 + protocol.first_row
        start = nx // 2 - readout.center_sample
        out[:, row, start : start + readout.samples.shape[1]] += readout.samples / protocol.n_averages
    return out


def rss(kspace: np.ndarray, width: int) -> np.ndarray:
    images = resize_centred(to_image(kspace, (1, 2)), 2, width)
    return np.sqrt((np.abs(images) ** 2).sum(axis=0))


@pytest.mark.parametrize("matrix", [(64, 64), (63, 80), (72, 65)])
@pytest.mark.parametrize("orientation", ["axial", "oblique"])
def test_a_full_scan_reconstructs_to_the_truth(matrix: tuple[int, int], orientation: str) -> None:
    protocol = replace(SMALL, matrix=matrix, orientation=orientation)
    scanned = scan_slice(HEAD, protocol, 1)
    image = rss(kspace_of(scanned.readouts, protocol), matrix[1])
    assert np.abs(image - scanned.image).max() < 1e-3 * scanned.image.max()


def test_energy_is_the_same_on_both_sides() -> None:
    scanned = scan_slice(HEAD, SMALL, 1)
    kspace = kspace_of(scanned.readouts, SMALL)
    images = to_image(kspace, (1, 2))
    assert np.sum(np.abs(kspace) ** 2) == pytest.approx(np.sum(np.abs(images) ** 2), rel=1e-5)
    inside = np.sum(scanned.image.astype(np.float64) ** 2)
    assert inside == pytest.approx(np.sum(np.abs(images) ** 2), rel=0.03)  # the rest rings into the oversampled part


def test_the_same_head_at_twice_the_resolution_is_the_same_head() -> None:
    fine = scan_slice(HEAD, replace(SMALL, matrix=(128, 128)), 1).image
    coarse = scan_slice(HEAD, SMALL, 1).image
    blocks = fine.reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.corrcoef(blocks[8:56, 8:56].ravel(), coarse[8:56, 8:56].ravel())[0, 1] > 0.9


def test_axial_slices_lie_as_their_geometry_says() -> None:
    protocol = replace(SMALL, matrix=(128, 128), n_slices=1, contrast=CONTRASTS["t1"])
    lesion = place_lesion(HEAD, "mass", 3)
    assert lesion is not None
    centre = np.asarray(measure(HEAD, lesion).centre_mm)
    stack = geometry(protocol)
    aimed = replace(protocol, shift_mm=float((centre - stack.origin_mm[0]) @ np.asarray(stack.normal)))
    scanned = scan_slice(HEAD, aimed, 0, lesion)
    y, x = (float(v.mean()) for v in np.nonzero(scanned.lesion))
    stack = geometry(aimed)
    found = stack.affine() @ (x, y, 0, 1)
    assert found[:3] == pytest.approx(centre, abs=2.5)


@pytest.mark.parametrize("orientation", list(ORIENTATIONS))
def test_directions_make_a_right_handed_frame(orientation: str) -> None:
    protocol = replace(SMALL, orientation=orientation)
    stack = geometry(protocol)
    readout = scan_slice(HEAD, replace(protocol, matrix=(32, 32)), 1).readouts[0]
    assert np.cross(readout.read_dir, readout.phase_dir) == pytest.approx(np.asarray(readout.slice_dir), abs=1e-9)
    middle = stack.affine() @ (protocol.matrix[1] // 2, protocol.matrix[0] // 2, 1, 1)
    assert middle[:3] == pytest.approx(readout.position_mm, abs=1e-6)


@pytest.mark.parametrize("acceleration", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n_calibration", [0, 15, 24])
def test_lines_and_their_roles(acceleration: int, n_calibration: int) -> None:
    protocol = replace(SMALL, matrix=(96, 64), acceleration=acceleration, n_calibration=n_calibration)
    by_row = {line.row: line.role for line in lines(protocol)}
    centre = set(range(48 - n_calibration // 2, 48 - n_calibration // 2 + n_calibration))
    assert set(by_row) == centre | set(range(0, 96, acceleration))
    for row, role in by_row.items():
        if acceleration == 1 or row not in centre:
            assert role is Role.IMAGING
        else:
            assert role is (Role.CALIBRATION if row % acceleration else Role.CALIBRATION_AND_IMAGING)


def test_flags_end_slices_and_the_measurement() -> None:
    protocol = replace(SMALL, acceleration=2, n_averages=2)
    readouts = list(scan(HEAD, protocol))
    assert [r.role for r in readouts[:5]].count(Role.NOISE) == 4
    imaging = [r for r in readouts if r.role is not Role.NOISE]
    assert list(dict.fromkeys(r.key.slice for r in imaging)) == [0, 2, 1] == list(slice_order(protocol))
    ends = [r.key.slice for r in imaging if r.last_in_slice]
    assert ends == [0, 2, 1]
    assert [r.last_in_measurement for r in imaging].count(True) == 1
    assert imaging[-1].last_in_measurement
    assert imaging[-1].last_in_repetition
    assert {r.average for r in imaging} == {0, 1}
    stamps = [r.time_stamp for r in readouts]
    assert stamps == sorted(set(stamps))


def test_partial_fourier_and_partial_echo_keep_the_centre() -> None:
    protocol = replace(SMALL, partial_fourier=0.75, partial_echo=0.75)
    scanned = scan_slice(HEAD, protocol, 1)
    assert len(scanned.readouts) == 48
    assert scanned.readouts[0].samples.shape == (4, 96)
    kspace = kspace_of(scanned.readouts, protocol)
    peak = np.unravel_index(np.abs(kspace).sum(axis=0).argmax(), kspace.shape[1:])
    assert np.abs(np.asarray(peak) - (32, 64)).max() <= 2
    full = kspace_of(scan_slice(HEAD, SMALL, 1).readouts, SMALL)
    tolerance = 2e-4 * np.abs(full).max()
    assert np.abs(kspace[:, 16:, 32:] - full[:, 16:, 32:]).max() < tolerance


def test_noise_readouts_have_the_covariance_of_the_images_noise() -> None:
    protocol = replace(SMALL, matrix=(256, 256), snr=20)
    noise = np.concatenate([r.samples for r in noise_readouts(protocol)], axis=1)
    found = noise @ noise.conj().T / noise.shape[1] / (2 * noise_sigma(protocol) ** 2)
    assert np.abs(found - noise_covariance(helmet(4), protocol.seed)).max() < 0.15  # 2048 samples
    low = replace(SMALL, snr=10)
    loud = kspace_of(scan_slice(HEAD, low, 1).readouts, low) - kspace_of(scan_slice(HEAD, SMALL, 1).readouts, SMALL)
    assert np.sqrt(np.mean(np.abs(loud) ** 2) / 2) == pytest.approx(noise_sigma(low), rel=0.05)


def test_averages_lower_the_noise() -> None:
    def level(n: int) -> float:
        protocol = replace(SMALL, snr=5, n_averages=n)
        clean = kspace_of(scan_slice(HEAD, SMALL, 1).readouts, SMALL)
        return float(np.std(kspace_of(scan_slice(HEAD, protocol, 1).readouts, protocol) - clean))

    assert level(4) == pytest.approx(level(1) / 2, rel=0.05)


def test_motion_starts_at_its_line() -> None:
    moving = replace(SMALL, motion_mm=4, motion_deg=3, motion_onset=0.75)
    still, moved = (kspace_of(scan_slice(HEAD, p, 1).readouts, p) for p in (SMALL, moving))
    change = np.abs(moved - still).max(axis=(0, 2))
    assert change[:48].max() < 1e-4 * np.abs(still).max()
    assert change[48:].min() > 3 * change[:48].max()
    truth = scan_slice(HEAD, moving, 1).image
    assert np.array_equal(truth, scan_slice(HEAD, SMALL, 1).image)  # the truth lies still


def test_spikes_and_lost_readouts_are_counted() -> None:
    faulty = replace(SMALL, acceleration=2, n_spikes=3, n_missing=5)
    clean = replace(SMALL, acceleration=2)
    bad, good = ([r for r in scan(HEAD, p) if r.role is not Role.NOISE] for p in (faulty, clean))
    assert len(good) - len(bad) == 5
    places = {(r.key.slice, r.step_1): r.samples for r in good}
    struck = [r for r in bad if np.abs(r.samples - places[r.key.slice, r.step_1]).max() > 0.1 * np.abs(r.samples).max()]
    assert 1 <= len(struck) <= 3  # one may have been lost
    lost = set(places) - {(r.key.slice, r.step_1) for r in bad}
    centre = range(32 - 8, 32 + 8)
    assert not any(step in centre for _, step in lost)
    assert [r.key.slice for r in bad if r.last_in_slice] == [0, 2, 1]


def test_coil_maps_are_what_the_coils_saw() -> None:
    protocol = replace(SMALL, matrix=(128, 128))
    scanned = scan_slice(HEAD, protocol, 1)
    total = (np.abs(scanned.maps) ** 2).sum(axis=0)
    assert total == pytest.approx(np.ones_like(total), abs=1e-4)
    images = resize_centred(to_image(kspace_of(scanned.readouts, protocol), (1, 2)), 2, 128)
    combined = np.abs((scanned.maps.conj() * images).sum(axis=0))
    inside = scanned.image > 0.3 * scanned.image.max()
    assert combined[inside] == pytest.approx(scanned.image[inside], rel=0.02)


def test_the_seed_decides_everything() -> None:
    noisy = replace(SMALL, snr=10)
    one, again = scan_slice(HEAD, noisy, 2), scan_slice(HEAD, noisy, 2)
    other = scan_slice(HEAD, replace(noisy, seed=1), 2)
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(one.readouts, again.readouts, strict=True))
    assert not np.array_equal(one.readouts[0].samples, other.readouts[0].samples)


def test_what_lies_outside_the_field_of_view_wraps_around() -> None:
    protocol = replace(SMALL, fov_mm=(140.0, 240.0))
    wrapped = scan_slice(HEAD, protocol, 1).image
    assert (wrapped[[0, -1]] > 0.1 * wrapped.max()).sum() > 10
    values = np.arange(1, 12, dtype=float)[None]
    folded = _fold(values, -3, 4, 1)[0]
    assert folded.sum() == values.sum()
    assert folded.tolist() == [4 + 8, 1 + 5 + 9, 2 + 6 + 10, 3 + 7 + 11]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_coils", 0), ("n_coils", 33), ("acceleration", 0), ("n_slices", 0), ("snr", 0), ("snr", float("nan")),
        ("partial_fourier", 0.4), ("matrix", (16, 64)), ("orientation", "upside down"), ("n_missing", 10**6),
        ("n_calibration", 65), ("motion_onset", 2), ("seed", -1),
    ],
)  # fmt: skip
def test_impossible_protocols_are_refused_in_one_line(field: str, value: object) -> None:
    with pytest.raises(AcquisitionError) as caught:
        replace(SMALL, **{field: value})
    assert "\n" not in str(caught.value)
    assert "is right" in str(caught.value) or "can be simulated" in str(caught.value)


def test_white_matter_has_its_signal_in_the_readouts_units() -> None:
    protocol = replace(SMALL, matrix=(128, 128), n_slices=1, thickness_mm=2, shift_mm=10, contrast=CONTRASTS["t2"])
    scanned = scan_slice(HEAD, protocol, 0)
    stack = geometry(protocol)
    y, x = np.mgrid[:128, :128]
    points = (stack.affine() @ np.stack([x, y, 0 * x, 0 * x + 1]).reshape(4, -1))[:3].astype(np.float32)
    white = tissue_fractions(HEAD, to_atlas(HEAD, points))[STORED_TISSUES.index("wm")].reshape(128, 128)
    deep = ndimage.minimum_filter(white, 7) > 0.99
    assert deep.sum() > 30
    seen = np.sqrt((np.abs(sensitivities(helmet(4), points.T.astype(float))) ** 2).sum(axis=0)).reshape(128, 128)
    expected = signal(TISSUES["wm"], protocol.contrast) * seen[deep]
    assert np.median(scanned.image[deep] / expected) == pytest.approx(1, abs=0.04)  # texture and Gibbs' ringing
