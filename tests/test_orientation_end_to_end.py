"""Left is left: the letter phantom from the magnet to other people's viewers, in every plane and way of scanning.

The phantom is known in patient coordinates. Its k-space is summed over a fine grid of points, so that the slice's
position is where k-space has no phase; it goes over the wire as MRD, through the chain, into DICOM, through dcm2niix,
and is looked for where it was put.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from scipy.spatial.transform import Rotation

from edge.chain import Chain
from edge.exam import Equipment, Exam, Subject
from edge.mrd import Readout
from edge.results import Results
from recon.scan import Acquisition, Encoding, ImageKey, Limit, Scan
from tests.letter import BALL_RADIUS_MM, HEAD, LANDMARKS, letter_intensity
from tests.reference import (
    SCAN_ID,
    Order,
    Receiver,
    Sending,
    along,
    centred,
    encoding_of,
    on_the_wire,
    scan_lines,
    waves,
)

FINE_MM = 1.3  # points of the phantom in the plane
DEEP_MM = 2.6  # and across it, in a slab
REACH_MM = 104.0  # half the extent of the points: beyond the head in every plane
# Coils in patient coordinates: from the left, from the back, from above; squares add up to 1 everywhere.
COIL_SHIFTS = ((1.0, 0.2, 0.1), (-0.3, 1.0, 0.2), (0.1, -0.4, 1.0), (-0.8, -0.7, -0.9))

_TILT = Rotation.from_euler("xyz", (17.0, -24.0, 31.0), degrees=True).as_matrix()
# Read, phase and slice direction as a scanner may choose them.
PLANES: dict[str, tuple[Any, Any, Any]] = {
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "sagittal": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
    "coronal": ((0, 0, -1), (1, 0, 0), (0, -1, 0)),  # read towards the feet: row and column change places
    "double oblique": (_TILT[:, 0], _TILT[:, 1], _TILT[:, 2]),
    "axial, left-handed": ((1, 0, 0), (0, 1, 0), (0, 0, -1)),
    "double oblique, left-handed": (_TILT[:, 1], -_TILT[:, 2], _TILT[:, 0]),
}


@dataclass(frozen=True)
class Letter:
    """The letter phantom in the magnet: k-space of the slice or slab at `centre_mm`, read along these directions."""

    centre_mm: Any
    read: Any
    phase: Any
    along: Any

    def kspace(self, encoding: Encoding) -> Any:
        fine = np.arange(-REACH_MM + FINE_MM / 2, REACH_MM, FINE_MM)
        m, fov = encoding.encoded_matrix, encoding.encoded_fov_mm
        deep = np.arange(-REACH_MM + DEEP_MM / 2, REACH_MM, DEEP_MM) if encoding.is_3d else np.zeros(1)
        step = DEEP_MM if encoding.is_3d else 1.0
        size = (m.x, m.y, m.z)
        scale = [np.sqrt(n) / mm * d for n, mm, d in zip(size, fov, (FINE_MM, FINE_MM, step), strict=True)]
        to_x, to_y, to_z = (
            waves(centred(n) / mm, points, -1) * factor
            for n, mm, points, factor in zip(size, fov, (fine, fine, deep), scale, strict=True)
        )
        out = np.zeros((len(COIL_SHIFTS), m.z, m.y, m.x), np.complex128)
        plane = fine[:, None] * np.asarray(self.read) + fine[:, None, None] * np.asarray(self.phase)
        for at, depth in enumerate(deep):
            points = np.asarray(self.centre_mm) + depth * np.asarray(self.along) + plane
            seen = letter_intensity(points)
            if not seen.any():
                continue
            for coil, sensitivity in enumerate(sensitivities(points)):
                lines = along(to_y, along(to_x, seen * sensitivity, 1), 0)
                out[coil] += lines if not encoding.is_3d else to_z[:, at, None, None] * lines
        return out


def sensitivities(points_mm: Any) -> Any:
    """Return complex128 (coil, y, x) at points (y, x, 3): smooth, different, the sum of squares 1 everywhere."""
    raw = np.stack([np.exp(points_mm @ np.asarray(shift) / 150) for shift in COIL_SHIFTS])
    phases = np.exp(2j * np.pi * np.arange(len(raw)) / 5)[:, None, None]
    return raw * phases / np.sqrt((raw**2).sum(0))


QUIET = Receiver(np.eye(len(COIL_SHIFTS)) * 1e-4)  # 0.5 % of the brightest ball: slices beyond the head are not empty
QUIETLY = Sending(noise=QUIET)


@dataclass(frozen=True)
class Way:
    """How a stack is scanned: matrix, what of it is kept, what is wanted, voxel in mm, and how lines are sent."""

    matrix: tuple[int, int, int] = (160, 78, 1)
    kept: tuple[int, int, int] = (80, 78, 1)
    wanted: tuple[int, int, int] = (80, 78, 1)
    voxel_mm: tuple[float, float, float] = (2.6, 2.8, 5.0)
    sending: Sending = QUIETLY
    keeps: Callable[[int, int], bool] = lambda kz, ky: True


def is_odd(place: tuple[int, int]) -> bool:
    return place[1] % 2 == 1


PLAIN = Way()
WAYS = {
    "reversed readouts": replace(PLAIN, sending=replace(QUIETLY, is_reversed=is_odd)),
    "reversed, centre as sent forward": replace(PLAIN, sending=replace(QUIETLY, is_reversed=is_odd, center=80)),
    "asymmetric echo, discards": replace(PLAIN, sending=Sending(24, None, 4, 2, is_odd, noise=QUIET)),
    "phase oversampling": replace(PLAIN, matrix=(160, 104, 1)),
    "odd": replace(PLAIN, matrix=(159, 101, 1), kept=(81, 79, 1), wanted=(81, 79, 1)),
    "finer": replace(PLAIN, wanted=(108, 107, 1)),
    "coarser": replace(PLAIN, matrix=(240, 150, 1), kept=(120, 120, 1), wanted=(81, 80, 1), voxel_mm=(1.8, 1.8, 5.0)),
    "two-fold": replace(PLAIN, keeps=lambda kz, ky: ky % 2 == 0 or abs(ky - 39) <= 12),
    "slab": replace(PLAIN, matrix=(160, 78, 52), kept=(80, 78, 52), wanted=(80, 78, 52), voxel_mm=(2.6, 2.8, 4.0)),
    "slab, oversampled and finer": replace(
        PLAIN, matrix=(160, 86, 54), kept=(80, 78, 45), wanted=(80, 78, 58), voxel_mm=(2.6, 2.8, 4.0)
    ),
}
CASES = {plane: (plane, PLAIN) for plane in PLANES} | {
    f"{plane}, {name}": (plane, WAYS[name])
    for name, plane in [
        ("reversed readouts", "double oblique"),
        ("reversed, centre as sent forward", "axial"),
        ("asymmetric echo, discards", "sagittal"),
        ("phase oversampling", "coronal"),
        ("odd", "double oblique, left-handed"),
        ("finer", "double oblique"),
        ("coarser", "sagittal"),
        ("two-fold", "double oblique"),
        ("slab", "coronal"),
        ("slab, oversampled and finer", "double oblique, left-handed"),
    ]
}
N_SLICES, GAP_MM = 23, 2.5
MIDDLE_MM = np.array([3.0, -5.5, 6.0])  # nothing lies at the isocentre


@dataclass(frozen=True)
class Scanned:
    """What was scanned and what came out: folder of the results, and where voxel (x, y, slice) should lie."""

    folder: Path
    affine: Any
    shape: tuple[int, int, int]


def readouts(plane: str, way: Way, encoding: Encoding) -> Iterator[Acquisition]:
    """Yield the lines of all slices, the slices interleaved; the single slab's where it is one."""
    read, phase, along_z = (np.asarray(v, np.float64) for v in PLANES[plane])
    m = encoding.encoded_matrix
    places = [(kz, ky) for kz in range(m.z) for ky in range(m.y) if way.keeps(kz, ky)]
    numbers = [0] if encoding.is_3d else [*range(0, N_SLICES, 2), *range(1, N_SLICES, 2)]
    for number in numbers:
        centre = MIDDLE_MM if encoding.is_3d else slice_centre(number, along_z)
        fields = {
            "position_mm": tuple(centre),
            "read_dir": tuple(read),
            "phase_dir": tuple(phase),
            "slice_dir": tuple(along_z),
        }
        last = {"last_in_slice": True, "last_in_measurement": number == numbers[-1]}
        order = Order(places, ImageKey(0, number, 0, 0, 0, 0), fields=fields, last=last)
        yield from scan_lines(Letter(centre, read, phase, along_z), encoding, order, way.sending)


def slice_centre(number: int, along_z: Any) -> Any:
    return MIDDLE_MM + (number - N_SLICES // 2) * (PLAIN.voxel_mm[2] + GAP_MM) * along_z


def true_affine(plane: str, encoding: Encoding) -> Any:
    """Return float64 (4, 4), voxel (x, y, slice, 1) to LPS mm: voxel n // 2 lies at the position MRD gives."""
    read, phase, along_z = (np.asarray(v, np.float64) for v in PLANES[plane])
    m, fov = encoding.recon_matrix, encoding.recon_fov_mm
    dx, dy = fov.x / m.x, fov.y / m.y
    if encoding.is_3d:
        dz, first = fov.z / m.z, MIDDLE_MM - m.z // 2 * fov.z / m.z * along_z
    else:
        dz, first = PLAIN.voxel_mm[2] + GAP_MM, slice_centre(0, along_z)
    out = np.eye(4)
    out[:3, 0], out[:3, 1], out[:3, 2] = dx * read, dy * phase, dz * along_z
    out[:3, 3] = first - m.x // 2 * dx * read - m.y // 2 * dy * phase
    return out


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scanned]:
    """Return what scans a case, once."""
    made: dict[str, Scanned] = {}

    def scan(case: str) -> Scanned:
        if case not in made:
            plane, way = CASES[case]
            encoding = encoding_of(way.matrix, way.wanted, way.kept, way.voxel_mm)
            n = 1 if encoding.is_3d else N_SLICES
            encoding = replace(encoding, limits=encoding.limits | {"slice": Limit(0, n - 1, 0)})
            folder = tmp_path_factory.mktemp("scan")
            exam = Exam(Subject("Letter^Phantom", "L-1"), equipment=Equipment("SIEMENS"), patient_position="HFS")
            lines = [on_the_wire(line, at) for at, line in enumerate(readouts(plane, way, encoding))]
            run_chain(folder, Scan(SCAN_ID, (encoding,), 3.0, (90.0,), (4000.0,)), exam, lines)
            m = encoding.recon_matrix
            made[case] = Scanned(folder, true_affine(plane, encoding), (m.z if encoding.is_3d else N_SLICES, m.y, m.x))
        return made[case]

    return scan


def run_chain(folder: Path, scan: Scan, exam: Exam, lines: list[Readout]) -> None:
    chain = Chain(Results(folder, scan, exam))
    for line in lines:
        chain.feed(line)
    report = chain.finish("complete", "", lambda: lines)
    assert not chain.left_out
    assert [volume["method"] for volume in report["volumes"]] == ["sense"]
    assert report["volumes"][0]["geometry_known"]


def centroid(image: Any, affine: Any, at_mm: Any, radius_mm: float) -> Any:
    """Return where what is brighter than the head lies within `radius_mm` of `at_mm`: its centre of mass, mm.

    image: (x, y, slice); affine: its voxels to mm. Weights end at the sphere smoothly, so no voxel is half in.
    """
    voxels = np.moveaxis(np.indices(image.shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(voxels - at_mm, axis=-1)
    weight = np.clip((radius_mm - distance) / 2, 0, 1) * np.clip(image - 1.3 * HEAD, 0, None)
    return (weight[..., None] * voxels).sum((0, 1, 2)) / weight.sum()


def check_landmarks(image: Any, affine: Any) -> None:
    """Find each ball where it was put, with its own brightness, in an image (x, y, slice) whose affine gives LPS mm.

    Within a quarter of a voxel: a shift by one is seen, and by half of one too (found: 0.08 in the plane, 0.16 across
    it). Brightness: Gibbs ringing and partial volume leave 10 %.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    for name, (centre, intensity) in LANDMARKS.items():
        found = centroid(image, affine, np.asarray(centre), BALL_RADIUS_MM + 4)
        away = np.abs(np.linalg.inv(affine[:3, :3] / spacing) @ (found - centre))
        assert (away < 0.25 * spacing).all(), (name, found, centre)
        nearest = np.rint(np.linalg.inv(affine) @ [*centre, 1])[:3].astype(int)
        middle = image[tuple(slice(at - 1, at + 2) for at in nearest[:2])][..., nearest[2]].mean()
        assert middle == pytest.approx(intensity, abs=0.12), name


@pytest.mark.parametrize("case", CASES)
def test_the_letter_is_where_the_volume_says(case: str, scanned: Callable[[str], Scanned]) -> None:
    """Balls at their places; and no flip or shift of the whole image would be more like the phantom."""
    scan = scanned(case)
    image = np.load(scan.folder / "volume.npy").transpose(2, 1, 0)
    assert image.shape == scan.shape[::-1]
    check_landmarks(image, scan.affine)
    voxels = np.moveaxis(np.indices(image.shape), 0, -1) @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    true = letter_intensity(voxels).ravel()

    def likeness(other: Any) -> float:
        return float(np.corrcoef(other.ravel(), true)[0, 1])

    assert likeness(image) > 0.95
    for axis in range(3):
        assert likeness(np.flip(image, axis)) < likeness(image) - 0.1
        for step in (-1, 1):
            assert likeness(np.roll(image, step, axis)) < likeness(image)


@pytest.mark.parametrize("case", CASES)
def test_dicom_has_the_geometry_of_mrd(case: str, scanned: Callable[[str], Scanned]) -> None:
    """Slice by slice, to 0.01 mm at every corner of the stack."""
    scan = scanned(case)
    volume = np.load(scan.folder / "volume.npy")
    for at, path in enumerate(sorted((scan.folder / "dicom" / "classical").glob("*.dcm"))):
        one = pydicom.dcmread(path)
        assert (one.Rows, one.Columns) == scan.shape[1:]
        row, col = np.array(one.ImageOrientationPatient, float).reshape(2, 3)
        dy, dx = map(float, one.PixelSpacing)
        for y in (0, one.Rows - 1):
            for x in (0, one.Columns - 1):
                found = np.array(one.ImagePositionPatient, float) + x * dx * row + y * dy * col
                np.testing.assert_allclose(found, (scan.affine @ [x, y, at, 1])[:3], atol=0.01)
        native = one.pixel_array * float(one.RescaleSlope)
        np.testing.assert_allclose(native, volume[at], atol=0.51 * float(one.RescaleSlope))


def need(program: str) -> str:
    """Return the path of a Debian program or skip."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


@pytest.mark.peer
@pytest.mark.parametrize("case", CASES)
def test_left_is_left_after_dcm2niix(case: str, scanned: Callable[[str], Scanned], tmp_path: Path) -> None:
    program = need("dcm2niix")
    scan = scanned(case)
    subprocess.run(
        [program, "-b", "n", "-z", "n", "-f", "out", "-o", str(tmp_path), str(scan.folder / "dicom" / "classical")],
        capture_output=True,
        check=True,
        timeout=120,
    )
    (path,) = tmp_path.glob("*.nii")
    nifti: Any = nibabel.load(path)
    image = nifti.get_fdata()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nifti.affine  # NIfTI counts to the right and to the front
    # dcm2niix may turn axes round, but each of its voxels is one of ours, at the place that MRD says, to 0.01 mm.
    volume = np.load(scan.folder / "volume.npy")
    n_slices, n_y, n_x = volume.shape
    assert sorted(image.shape) == sorted((n_x, n_y, n_slices))
    corners = np.array([[x, y, z, 1] for x in (0, n_x - 1) for y in (0, n_y - 1) for z in (0, n_slices - 1)])
    found = corners @ scan.affine.T @ np.linalg.inv(affine).T
    away = (found - np.rint(found))[:, :3] * np.linalg.norm(affine[:3, :3], axis=0)
    assert np.abs(away).max() < 0.01
    assert (np.rint(found)[:, :3] >= 0).all()
    assert (np.rint(found)[:, :3] < image.shape).all()
    voxels = np.stack([*np.indices((n_x, n_y, n_slices)), np.ones((n_x, n_y, n_slices))], -1)
    at = np.rint(voxels @ scan.affine.T @ np.linalg.inv(affine).T)[..., :3].astype(int)
    np.testing.assert_allclose(image[tuple(np.moveaxis(at, -1, 0))], volume.transpose(2, 1, 0), atol=1e-3)
    check_landmarks(image, affine)


@pytest.mark.peer
@pytest.mark.parametrize("case", ["axial", "double oblique, finer", "coronal, slab"])
def test_dciodvfy_prints_no_error(case: str, scanned: Callable[[str], Scanned]) -> None:
    program = need("dciodvfy")
    files = sorted((scanned(case).folder / "dicom" / "classical").glob("*.dcm"))
    assert len(files) == scanned(case).shape[0]
    for path in (files[0], files[-1]):
        done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False, timeout=60)
        lines = (done.stdout + done.stderr).splitlines()
        assert any("MRImage" in line for line in lines)
        # (0008,001C), Synthetic Data, is newer than the program
        assert [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line] == []


def test_without_directions_it_is_said(tmp_path: Path) -> None:
    """Directions of zeros: an axial plane is assumed, and the report does not claim to know."""
    encoding = encoding_of((32, 24, 1))
    lines = scan_lines(
        Letter(np.zeros(3), (1, 0, 0), (0, 1, 0), (0, 0, 1)), encoding, Order([(0, ky) for ky in range(24)])
    )
    chain = Chain(Results(tmp_path, Scan(SCAN_ID, (encoding,)), Exam()))
    for line in lines:
        chain.feed(on_the_wire(line))
    report = chain.finish("complete", "", list)
    assert report["volumes"][0]["geometry_known"] is False
