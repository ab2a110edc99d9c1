"""What the simulated scanner is asked to do: where the slices lie and which lines are read, in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from recon.contrast import CONTRASTS, Contrast
from recon.errors import AcquisitionError
from recon.receive import MAX_COILS
from recon.scan import Geometry, Role

OVERSAMPLING = 2  # of the readout

_TILT = math.radians(18)  # about the ear-to-ear axis, as for slices along the skull base
_TURN = math.radians(7)  # a head never lies quite straight
ORIENTATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "axial": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    "sagittal": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
    "coronal": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
    "oblique": (
        (math.cos(_TURN), math.sin(_TURN), 0.0),
        (-math.sin(_TURN) * math.cos(_TILT), math.cos(_TURN) * math.cos(_TILT), math.sin(_TILT)),
    ),
}
CENTRES_MM: dict[str, tuple[float, float, float]] = {
    "axial": (0.0, 12.0, 18.0),
    "sagittal": (0.0, 12.0, -2.0),
    "coronal": (0.0, 14.0, -2.0),
    "oblique": (0.0, 12.0, 18.0),
}


class Line(NamedTuple):
    """One phase-encoding line: its row in k-space (centre at n // 2) and what it is read for."""

    row: int
    role: Role


@dataclass(frozen=True)
class Protocol:
    """A two-dimensional multi-slice scan of the head.

    matrix, fov_mm: (y, x), y phase-encoded and x read out (with OVERSAMPLING). orientation: one of ORIENTATIONS.
    acceleration and n_calibration: every R-th row (offset 0) and the central rows that are read as well.
    partial_fourier, partial_echo: the share of rows and of readout samples that is read, 0.6 to 1; the early ones are
        left out.
    shift_mm: how far the stack is moved along its normal from the middle of the brain.
    snr: signal of white matter in the middle of the head over the noise's standard deviation (real part), for one
        average and R = 1.
    motion_mm, motion_deg: where the head lies from `motion_onset` (0 to 1) of each slice's lines on.
    n_spikes, n_missing: readouts of the whole scan with a spark in them, and readouts that never arrive.

    Raises AcquisitionError, in one line, for a value that no scan could have.
    """

    contrast: Contrast = field(default_factory=lambda: CONTRASTS["flair"])
    matrix: tuple[int, int] = (256, 256)
    fov_mm: tuple[float, float] = (240.0, 240.0)
    n_slices: int = 12
    thickness_mm: float = 5.0
    gap_mm: float = 2.0
    orientation: str = "axial"
    shift_mm: float = 0.0
    n_coils: int = 8
    acceleration: int = 4
    n_calibration: int = 24
    partial_fourier: float = 1.0
    partial_echo: float = 1.0
    n_averages: int = 1
    snr: float = 30.0
    motion_mm: float = 0.0
    motion_deg: float = 0.0
    motion_onset: float = 0.5
    n_spikes: int = 0
    n_missing: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        within("matrix", min(self.matrix), 32, 1024)
        within("matrix", max(self.matrix), 32, 1024)
        within("field of view (mm)", min(self.fov_mm), 100, 500)
        within("field of view (mm)", max(self.fov_mm), 100, 500)
        within("number of slices", self.n_slices, 1, 200)
        within("slice thickness (mm)", self.thickness_mm, 0.5, 20)
        within("gap between slices (mm)", self.gap_mm, 0, 50)
        within("shift of the stack (mm)", self.shift_mm, -200, 200)
        within("number of coils", self.n_coils, 1, MAX_COILS)
        within("acceleration", self.acceleration, 1, 16)
        within("number of calibration lines", self.n_calibration, 0, self.matrix[0])
        within("partial Fourier", self.partial_fourier, 0.6, 1)
        within("partial echo", self.partial_echo, 0.6, 1)
        within("number of averages", self.n_averages, 1, 16)
        within("signal-to-noise ratio", self.snr, 0.1, 1e6)
        within("motion (mm)", self.motion_mm, 0, 50)
        within("motion (degrees)", self.motion_deg, 0, 45)
        within("motion onset", self.motion_onset, 0, 1)
        within("seed", self.seed, 0, 2**63 - 1)
        if self.orientation not in ORIENTATIONS:
            raise AcquisitionError(f"orientation {self.orientation!r}: one of {', '.join(ORIENTATIONS)} is right")
        n_readouts = len(lines(self)) * self.n_averages * self.n_slices
        within("number of spikes", self.n_spikes, 0, n_readouts)
        within("number of missing readouts", self.n_missing, 0, n_readouts // 4)

    @property
    def n_samples(self) -> int:
        """Samples of a readout as received."""
        return round(OVERSAMPLING * self.matrix[1] * self.partial_echo)

    @property
    def first_row(self) -> int:
        """The first row that is read; partial Fourier leaves out the rows before it."""
        return self.matrix[0] - round(self.matrix[0] * self.partial_fourier)


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise AcquisitionError unless low ≤ value ≤ high (a NaN is never within)."""
    if not low <= value <= high:
        raise AcquisitionError(f"{name} {value:g}: {low:g} to {high:g} can be simulated")


def geometry(protocol: Protocol) -> Geometry:
    """Return where the slices' voxels lie, slice 0 first, along row_dir × col_dir."""
    row, col = ORIENTATIONS[protocol.orientation]
    distance = protocol.thickness_mm + protocol.gap_mm
    offsets = (np.arange(protocol.n_slices) - (protocol.n_slices - 1) / 2) * distance + protocol.shift_mm
    centres = np.asarray(CENTRES_MM[protocol.orientation]) + offsets[:, None] * np.cross(row, col)
    (ny, nx), (fov_y, fov_x) = protocol.matrix, protocol.fov_mm
    return Geometry.from_centres(centres, row, col, (ny, nx), (distance, fov_y / ny, fov_x / nx), protocol.thickness_mm)


def lines(protocol: Protocol) -> tuple[Line, ...]:
    """Return the lines of one slice in the order they are read: the R-grid from row 0 and the calibration rows."""
    n = protocol.matrix[0]
    low = n // 2 - protocol.n_calibration // 2
    calibration = range(low, low + protocol.n_calibration)
    out = []
    for row in range(protocol.first_row, n):
        on_grid = row % protocol.acceleration == 0
        if row in calibration and protocol.acceleration > 1:
            out.append(Line(row, Role.CALIBRATION_AND_IMAGING if on_grid else Role.CALIBRATION))
        elif on_grid:
            out.append(Line(row, Role.IMAGING))
    return tuple(out)


def slice_order(protocol: Protocol) -> tuple[int, ...]:
    """Return the order in which the slices are read: every second one first, so that neighbours do not saturate."""
    return (*range(0, protocol.n_slices, 2), *range(1, protocol.n_slices, 2))
