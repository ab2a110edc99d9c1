"""Simulated scans as a scanner streams them, readout by readout, with their truth: what the verdict is calibrated on.

A head may move while its lines are read, lines come in the orders that sequences use, and the noise may or may not have
been measured before: that is what tells a verdict's thresholds from those of one kind of scan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from export.simulated import FIELD_MM, draw_coils, draw_image, see
from export.slices import Slice
from recon.arrays import Array
from recon.fourier import resize_centred, to_kspace
from recon.scan import Acquisition, Encoding, ImageKey, Limit, Matrix, Role, Scan, Size

KEY = ImageKey(0, 0, 0, 0, 0, 0)
OVERSAMPLING = 2  # of the readout
N_NOISE = 4  # noise readouts
ORDERS = ("sequential", "from the centre", "two passes", "shots")
N_SHOTS = 8
NOISE_SHARE = 0.7  # of scans measure their noise
SHAPES = ((128, 128), (144, 160), (160, 144), (160, 192), (192, 160), (192, 192), (256, 192))
N_COILS = (1, 2, 4, 6, 8, 8, 8, 12, 16)
SIGMA = (0.003, 0.04)  # of the peak: standard deviation of the noise
DEGREES_PER_MM = 0.5  # a head that moves also turns
MOVES = ("step", "drift", "twitch")


class Setting(NamedTuple):
    """How a scan is read. shape: (y, x). sigma: noise, of the peak. order: one of `ORDERS`.

    separate: whether the calibration lines are a scan of their own, before the image's lines.
    """

    shape: tuple[int, int]
    n_coils: int
    acceleration: int
    n_acs: int
    sigma: float
    order: str
    has_noise: bool
    separate: bool


class Move(NamedTuple):
    """A rigid motion of a head: mm along y and x, and degrees; from which rank of the image's lines, and how."""

    mm: tuple[float, float]
    degrees: float
    onset: int
    kind: str


@dataclass(frozen=True, eq=False)
class Subject:
    """A head in its coils on a grid `FINENESS` times as fine: complex64 (y, x) and (coil, y, x)."""

    image: Array
    coils: Array


@dataclass(frozen=True, eq=False)
class Stream:
    """A scan as it is streamed, and what is right.

    truths: root-sum-of-squares of the coils without noise, float32 (y, x), of each pose that the head took.
    onset: rank of the first line of the image after a motion began; None where nothing moved.
    """

    scan: Scan
    acquisitions: tuple[Acquisition, ...]
    truths: tuple[Array, ...]
    onset: int | None = None

    def changed(self, acquisitions: list[Acquisition]) -> Stream:
        """Return the scan with other readouts, the last one marked as the last."""
        acquisitions[-1] = replace(acquisitions[-1], last_in_slice=True, last_in_measurement=True)
        return replace(self, acquisitions=tuple(acquisitions))


def draw_setting(rng: np.random.Generator) -> Setting:
    """Return how a scan is read, within what the network was trained for."""
    n_coils = int(rng.choice(N_COILS))
    acceleration = min(int(rng.choice((1, 2, 2, 3, 4, 4, 5, 6, 8))), {1: 2, 2: 4}.get(n_coils, 8))
    sigma = float(np.exp(rng.uniform(*np.log(SIGMA))))
    return Setting(
        SHAPES[rng.integers(len(SHAPES))],
        n_coils,
        acceleration,
        int(rng.choice((16, 20, 24, 32))),
        sigma,
        ORDERS[rng.integers(len(ORDERS))],
        bool(rng.random() < NOISE_SHARE),
        bool(acceleration > 1 and rng.random() < 0.25),
    )


def draw_subject(rng: np.random.Generator, source: Slice, setting: Setting) -> Subject:
    """Return a head made of a real magnitude image, and its receive coils."""
    image, _ = draw_image(rng, source, setting.shape)
    return Subject(image, draw_coils(rng, setting.n_coils, image.shape))


def draw_move(rng: np.random.Generator, mm: float, n_lines: int) -> Move:
    """Return a motion of `mm`, and of `DEGREES_PER_MM` as many degrees, that begins at 15 to 85 % of the lines."""
    angle = rng.uniform(0, 2 * np.pi)
    degrees = float(rng.choice((-1, 1))) * DEGREES_PER_MM * mm
    onset = int(rng.uniform(0.15, 0.85) * n_lines)
    way = (float(mm * np.sin(angle)), float(mm * np.cos(angle)))
    return Move(way, degrees, onset, MOVES[rng.integers(len(MOVES))])


def pattern(setting: Setting) -> tuple[Array, Array]:
    """Return which lines the lattice measures and which calibrate, both bool (ky)."""
    n = setting.shape[0]
    lattice = np.arange(n) % setting.acceleration == 0
    central = np.zeros(n, bool)
    if setting.acceleration > 1:
        central[n // 2 - setting.n_acs // 2 : n // 2 - setting.n_acs // 2 + setting.n_acs] = True
    return lattice, central


def in_order(lines: Array, order: str, n: int) -> Array:
    """Return row numbers `lines` in the order in which a sequence reads them; `n` rows in all."""
    if order == "from the centre":
        return lines[np.argsort(np.abs(lines - n // 2 + 0.25))]
    if order == "two passes":
        return np.concatenate((lines[::2], lines[1::2]))
    if order == "shots":
        return np.concatenate([lines[first::N_SHOTS] for first in range(N_SHOTS)])
    return lines


def moved(image: Array, mm: tuple[float, float], degrees: float) -> Array:
    """Return a fine image, complex64 (y, x), moved and turned about the centre of the field of view."""
    per_mm = max(image.shape) / FIELD_MM
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s], [s, c]])
    centre = np.array(image.shape) // 2
    offset = centre - turn @ (centre + np.array(mm) * per_mm)
    parts = [ndimage.affine_transform(part, turn, offset, order=3) for part in (image.real, image.imag)]
    return (parts[0] + 1j * parts[1]).astype(np.complex64)


def read(
    subject: Subject,
    setting: Setting,
    seed: int,
    move: Move | None = None,
    calibration_mm: float = 0.0,
    lattice: Array | None = None,
) -> Stream:
    """Return the scan of `subject`; the same `seed` gives the same noise, whatever else is asked.

    move: of the head. calibration_mm: how far away the head was when separate calibration lines were read.
    lattice: bool (ky), in place of the setting's.
    """
    rng = np.random.default_rng(seed)
    n_y, n_x = setting.shape
    regular, central = pattern(setting)
    lattice = regular if lattice is None else lattice
    rows = in_order(np.flatnonzero(lattice if setting.separate else lattice | central), setting.order, n_y)
    poses = [subject.image]
    pose_of = np.zeros(len(rows), int)
    if move is not None:
        after = np.arange(len(rows)) - move.onset
        length = len(rows) - move.onset
        if move.kind == "drift":
            pose_of = np.where(after < 0, 0, 1 + after * 3 // length)
            poses += [_moved(subject.image, move, (step + 1) / 3) for step in range(3)]
        else:
            is_away = (after >= 0) & ((move.kind == "step") | (after < max(4, length // 3)))
            pose_of = is_away.astype(int)
            poses.append(_moved(subject.image, move, 1.0))
    seen = [see(image, subject.coils) for image in poses]
    truths = tuple(np.sqrt((np.abs(each) ** 2).sum(0)) for each in seen)
    level = np.float32(setting.sigma * float(np.percentile(truths[0], 99.5)))
    full = [_lines(each) for each in seen]
    noise = rng.standard_normal((2, setting.n_coils, n_y + N_NOISE + setting.n_acs, OVERSAMPLING * n_x), np.float32)
    noise = (noise[0] + 1j * noise[1]) * (level * np.float32(0.5**0.5))
    out = [
        _readout(noise[:, n_y + number], Role.NOISE, number) for number in range(N_NOISE if setting.has_noise else 0)
    ]
    if setting.separate:
        turned = Move((0.0, calibration_mm), DEGREES_PER_MM * calibration_mm, 0, "step")
        away = _lines(see(_moved(subject.image, turned, 1.0), subject.coils)) if calibration_mm else full[0]
        first = n_y + N_NOISE
        out += [
            _readout(away[:, row] + noise[:, first + number], Role.CALIBRATION, int(row))
            for number, row in enumerate(np.flatnonzero(central))
        ]
    role = {False: Role.IMAGING, True: Role.CALIBRATION_AND_IMAGING}
    out += [
        _readout(full[pose][:, row] + noise[:, row], role[bool(central[row]) and not setting.separate], int(row))
        for row, pose in zip(rows, pose_of, strict=True)
    ]
    stream = Stream(scan_of(setting), (), truths, None if move is None else move.onset)
    return stream.changed(out)


def scan_of(setting: Setting) -> Scan:
    """Return the header of such a scan."""
    n_y, n_x = setting.shape
    mm = FIELD_MM / max(n_y, n_x)
    encoding = Encoding(
        Matrix(OVERSAMPLING * n_x, n_y, 1),
        Size(OVERSAMPLING * n_x * mm, n_y * mm, 5.0),
        Matrix(n_x, n_y, 1),
        Size(n_x * mm, n_y * mm, 5.0),
        {"kspace_encoding_step_1": Limit(0, n_y - 1, n_y // 2)},
        acceleration=(setting.acceleration, 1),
        calibration="separate" if setting.separate else "embedded" if setting.acceleration > 1 else "",
    )
    return Scan("trial", (encoding,), n_coils=setting.n_coils)


def _moved(image: Array, move: Move, share: float) -> Array:
    return moved(image, (share * move.mm[0], share * move.mm[1]), share * move.degrees)


def _lines(seen: Array) -> Array:
    """Return every readout of coil images (coil, y, x), oversampled: complex64 (coil, ky, kx)."""
    return to_kspace(resize_centred(seen, 2, OVERSAMPLING * seen.shape[2]), (1, 2))


def _readout(samples: Array, role: Role, row: int) -> Acquisition:
    return Acquisition(samples, role, KEY, row if role is not Role.NOISE else 0, center_sample=samples.shape[1] // 2)
