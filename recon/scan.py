"""The values a scan passes through the house as: each frozen, checked when made, never changed.

Directions and positions are in the patient system LPS, mm (x to the patient's left, y to posterior, z to superior).
The centre of k-space and of every image axis is index n // 2; transforms are orthonormal.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from recon.arrays import Array, closed, to_host
from recon.errors import AcquisitionError, ShapeError

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class Size(NamedTuple):
    """Three numbers along the encoding's axes: x is the readout, y the first and z the second phase-encoding step."""

    x: float
    y: float
    z: float


class Matrix(NamedTuple):
    """Three counts along the encoding's axes, as `Size`."""

    x: int
    y: int
    z: int


class Limit(NamedTuple):
    """The range of one encoding counter and the value that stands for the centre of k-space."""

    minimum: int
    maximum: int
    center: int


@dataclass(frozen=True)
class Encoding:
    """One encoding of a scan: how counters in the readouts map to k-space, and what image is wanted.

    `limits` holds a `Limit` for each counter that the header limits, by its ISMRMRD name (`kspace_encoding_step_1`,
    `kspace_encoding_step_2`, `average`, `slice`, `contrast`, `phase`, `repetition`, `set`, `segment`).
    `calibration` is ISMRMRD's calibrationMode ("" where the header has none).
    """

    encoded_matrix: Matrix
    encoded_fov_mm: Size
    recon_matrix: Matrix
    recon_fov_mm: Size
    limits: dict[str, Limit] = field(default_factory=dict)
    trajectory: str = "cartesian"
    acceleration: tuple[int, int] = (1, 1)
    calibration: str = ""

    @property
    def is_3d(self) -> bool:
        """True where a second phase-encoding direction resolves the slices."""
        return self.encoded_matrix.z > 1


@dataclass(frozen=True)
class Scan:
    """What is known of a scan before its first readout; no name, number or date of a patient.

    `n_coils` and `noise_bandwidth_ratio` are None where the header does not say.
    """

    scan_id: str
    encodings: tuple[Encoding, ...]
    field_t: float | None = None
    te_ms: tuple[float, ...] = ()
    tr_ms: tuple[float, ...] = ()
    ti_ms: tuple[float, ...] = ()
    flip_deg: tuple[float, ...] = ()
    protocol: str = ""
    n_coils: int | None = None
    noise_bandwidth_ratio: float | None = None

    def __post_init__(self) -> None:
        if not self.encodings:
            raise AcquisitionError("the header holds no encoding; at least one is needed")


class Role(enum.Enum):
    """What a readout is for."""

    NOISE = "noise"
    IMAGING = "imaging"
    CALIBRATION = "calibration"
    CALIBRATION_AND_IMAGING = "calibration and imaging"
    OTHER = "other"  # navigators, phase correction, feedback, dummies: never image data


class ImageKey(NamedTuple):
    """Readouts that share these counters make one image."""

    encoding: int
    slice: int
    contrast: int
    phase: int
    repetition: int
    set: int


@dataclass(frozen=True, eq=False)
class Acquisition:
    """One readout: complex64 (coil, kx) as the receiver gave it, and its place.

    `step_1`, `step_2` and `average` are the header's counters as sent. `center_sample`, `discard_pre` and
    `discard_post` count samples as sent, before any reversal. `sample_time_us` is 0 where it is not known.
    """

    samples: Array
    role: Role
    key: ImageKey
    step_1: int
    step_2: int = 0
    average: int = 0
    segment: int = 0
    center_sample: int = 0
    discard_pre: int = 0
    discard_post: int = 0
    is_reversed: bool = False
    last_in_slice: bool = False
    last_in_repetition: bool = False
    last_in_measurement: bool = False
    sample_time_us: float = 0.0
    time_stamp: int = 0
    position_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    read_dir: tuple[float, float, float] = (0.0, 0.0, 0.0)
    phase_dir: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slice_dir: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.samples.ndim != 2 or 0 in self.samples.shape:
            raise ShapeError("samples of a readout", self.samples.shape, ("coil", "kx"))
        object.__setattr__(self, "samples", closed(self.samples, np.complex64))


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a stack of slices lie.

    origin_mm: float64 (slice, 3), centre of voxel (y, x) = (0, 0) of each slice.
    row_dir: the unit direction in which x grows; col_dir: the one in which y grows; at right angles.
    spacing_mm: (slice, y, x); the first is the distance between slice centres, `thickness_mm` their thickness.
    is_known: False where the scanner sent no directions and an axial plane was assumed.
    """

    origin_mm: Array
    row_dir: tuple[float, float, float]
    col_dir: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    thickness_mm: float
    is_known: bool = True

    def __post_init__(self) -> None:
        origin = np.asarray(self.origin_mm, np.float64)
        if origin.ndim != 2 or origin.shape[1] != 3 or not len(origin):
            raise ShapeError("origin_mm", origin.shape, ("slice", 3))
        row, col = np.asarray(self.row_dir, np.float64), np.asarray(self.col_dir, np.float64)
        if abs(np.linalg.norm(row) - 1) > 1e-3 or abs(np.linalg.norm(col) - 1) > 1e-3 or abs(row @ col) > 1e-3:
            raise AcquisitionError(
                f"image directions {self.row_dir} and {self.col_dir} are not two unit vectors at right angles"
            )
        if (
            min(*self.spacing_mm, self.thickness_mm) <= 0
            or not np.isfinite([*self.spacing_mm, self.thickness_mm]).all()
        ):
            raise AcquisitionError(
                f"voxel size {self.spacing_mm} mm, {self.thickness_mm} mm thick: all must be above 0"
            )
        if not np.isfinite(origin).all():
            raise AcquisitionError("a slice position is not a finite number")
        object.__setattr__(self, "origin_mm", closed(origin))

    @property
    def n_slices(self) -> int:
        """How many slices."""
        return len(self.origin_mm)

    @property
    def normal(self) -> tuple[float, float, float]:
        """row_dir × col_dir, the normal of the slices in DICOM's sense."""
        x, y, z = np.cross(self.row_dir, self.col_dir)
        return float(x), float(y), float(z)

    def affine(self) -> Array:
        """Return float64 (4, 4): voxel (x, y, slice, 1) to LPS mm, for slices at equal distances."""
        out = np.eye(4)
        out[:3, 0] = np.asarray(self.row_dir) * self.spacing_mm[2]
        out[:3, 1] = np.asarray(self.col_dir) * self.spacing_mm[1]
        steps = np.diff(self.origin_mm, axis=0)
        out[:3, 2] = steps.mean(axis=0) if len(steps) else np.asarray(self.normal) * self.spacing_mm[0]
        out[:3, 3] = self.origin_mm[0]
        return out

    @classmethod
    def from_centres(
        cls,
        centre_mm: Array,
        read_dir: Sequence[float],
        phase_dir: Sequence[float],
        shape: tuple[int, int],
        spacing_mm: tuple[float, float, float],
        thickness_mm: float,
        is_known: bool = True,
    ) -> Geometry:
        """Return the geometry of slices (y, x) = `shape` whose voxel (ny // 2, nx // 2) lies at `centre_mm` (slice, 3).

        An inverse Fourier transform with its centre at n // 2 puts the centre of the excited volume, which is what
        ISMRMRD calls the position, on that voxel; it is also where Gadgetron's DICOM writer puts it.
        """
        row = np.asarray(read_dir, np.float64)
        col = np.asarray(phase_dir, np.float64)
        corner = row * (shape[1] // 2) * spacing_mm[2] + col * (shape[0] // 2) * spacing_mm[1]
        return cls(
            np.atleast_2d(np.asarray(centre_mm, np.float64)) - corner,
            (float(row[0]), float(row[1]), float(row[2])),
            (float(col[0]), float(col[1]), float(col[2])),
            spacing_mm,
            thickness_mm,
            is_known,
        )


@dataclass(frozen=True, eq=False)
class KSpace:
    """Assembled k-space of one image key, the readout already transformed to x (its direction is never undersampled).

    samples: complex64 (slice, coil, ky, x), noise variance 1 a coil sample before averaging; 0 where not measured.
        For a scan whose second phase encoding is undersampled the first axis is kz (`slice_encoded`).
    averages: uint16 (slice, ky), how many readouts were averaged into each line; 0 where not measured. On the host,
        as NumPy, wherever `samples` are: it decides which lines are worked on, and is small.
    calibration: complex64 (slice, coil, ky, x), the contiguous block of lines around the centre of k-space that were
        all measured (its own centre at n // 2), in the units of `samples`; z already resolved for a 3-D scan. None
        where there are too few such lines to calibrate on.
    noise_scale: native units of the receiver per unit of noise standard deviation.
    noise_is_measured: False where the level was estimated from the outermost samples.
    to_native: complex64 (coil, coil) that undoes the whitening, on the host; None where that is `noise_scale` alone.
    samples and calibration are of one module, NumPy or CuPy; what is made of them follows it.
    """

    samples: Array
    averages: Array
    noise_scale: float
    noise_is_measured: bool
    calibration: Array | None = None
    slice_encoded: bool = False
    to_native: Array | None = None

    def __post_init__(self) -> None:
        if self.samples.ndim != 4:
            raise ShapeError("k-space", self.samples.shape, ("slice", "coil", "ky", "x"))
        n_slices, _, n_ky, _ = self.samples.shape
        if self.averages.shape != (n_slices, n_ky):
            raise ShapeError("averages", self.averages.shape, (n_slices, n_ky))
        if self.calibration is not None and self.calibration.ndim != 4:
            raise ShapeError("calibration", self.calibration.shape, ("slice", "coil", "ky", "x"))
        object.__setattr__(self, "averages", closed(to_host(self.averages)))
        for name in ("samples", "calibration"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, closed(value))

    @property
    def measured(self) -> Array:
        """Bool (slice, ky) on the host: which lines were measured."""
        return self.averages > 0


@dataclass(frozen=True, eq=False)
class CoilMaps:
    """Receive sensitivities: complex64 (slice, coil, y, x); the sum of abs² over coil is 1 on the support, 0 off it."""

    maps: Array

    def __post_init__(self) -> None:
        if self.maps.ndim != 4:
            raise ShapeError("coil maps", self.maps.shape, ("slice", "coil", "y", "x"))
        object.__setattr__(self, "maps", closed(self.maps, np.complex64))


@dataclass(frozen=True)
class Provenance:
    """How a volume came to be, and whether it is a measurement.

    method: "sense", "root-sum-of-squares", "zero-filled" or "network".
    is_measured: False for anything a prior added detail to on purpose (super-resolution); triage refuses those.
    model_sha256 and backend are "" where no network was used. steps are in order, in words.
    """

    method: str
    software: str
    steps: tuple[str, ...] = ()
    is_measured: bool = True
    model_sha256: str = ""
    backend: str = ""


@dataclass(frozen=True, eq=False)
class Volume:
    """An image series: float32 (slice, y, x) in native units, where it lies and how it came to be."""

    data: Array
    geometry: Geometry
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.data.ndim != 3 or self.data.shape[0] != self.geometry.n_slices:
            raise ShapeError("volume", self.data.shape, (self.geometry.n_slices, "y", "x"))
        object.__setattr__(self, "data", closed(self.data, np.float32))
