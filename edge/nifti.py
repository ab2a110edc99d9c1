"""NIfTI files as volumes: slices along the axis with the largest voxels, placed in the patient by the file's affine."""

from __future__ import annotations

import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError

from recon.arrays import Array
from recon.errors import AcquisitionError
from recon.scan import Geometry, Provenance, Volume

ENDINGS = (".nii", ".nii.gz")
MAX_VOXELS = 1 << 28
TO_LPS = np.diag([-1.0, -1.0, 1.0])  # NIfTI's world has x to the right and y to the front
_SKEW = 0.02  # off right angles, by the cosine


def is_nifti(path: Path) -> bool:
    """Whether the name says NIfTI."""
    return path.name.lower().endswith(ENDINGS)


def read_nifti(path: Path) -> Volume:
    """Return the first volume in a NIfTI file; raises AcquisitionError where it holds none that can be placed.

    The slice axis is the one with the largest voxels; where all are alike, the one nearest to the body's long axis. A
    single slice is a volume. A file without an orientation is taken for axial slices, and says so (`is_known` False).
    """
    try:
        image = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        if not 2 <= len(shape) <= 4 or 0 in shape or np.prod(shape[:3]) > MAX_VOXELS:
            raise AcquisitionError(f"the image is {'×'.join(map(str, shape))}; two or three axes are needed")
        data = np.asarray(image.dataobj, np.float32)
        has_place = int(image.header["qform_code"]) > 0 or int(image.header["sform_code"]) > 0
        affine = np.asarray(image.affine, np.float64)
    except (OSError, EOFError, ValueError, KeyError, zlib.error, ImageFileError) as error:
        raise AcquisitionError(f"not a NIfTI file that can be read ({type(error).__name__})") from error
    if data.ndim == 4:
        data = data[..., 0]
    if data.ndim == 2:
        data = data[..., None]
    return _volume(data, affine, has_place, path)


def _volume(data: Array, affine: Array, has_place: bool, path: Path) -> Volume:
    columns = TO_LPS @ affine[:3, :3]
    sizes = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or sizes.min() <= 0:
        raise AcquisitionError("the file's voxel sizes are not above 0")
    directions = columns / sizes
    order = _order(data.shape, sizes, directions)
    slice_axis, y_axis, x_axis = order
    row, col = directions[:, x_axis], directions[:, y_axis]
    if abs(row @ col) > _SKEW:
        raise AcquisitionError("the file's axes are not at right angles; resample it first")
    col = col - row * (row @ col)
    col = col / np.linalg.norm(col)
    volume = np.ascontiguousarray(data.transpose(order))
    step = columns[:, slice_axis]
    start = TO_LPS @ affine[:3, 3]
    if np.cross(row, col) @ step < 0:  # slices follow row × column, as everywhere here
        volume = volume[::-1].copy()
        start, step = start + step * (len(volume) - 1), -step
    spacing = (float(sizes[slice_axis]), float(sizes[y_axis]), float(sizes[x_axis]))
    origin = start + np.arange(len(volume))[:, None] * step
    geometry = Geometry(
        origin, (float(row[0]), float(row[1]), float(row[2])), (float(col[0]), float(col[1]), float(col[2])),
        spacing, spacing[0], has_place,
    )  # fmt: skip
    return Volume(volume, geometry, Provenance("unknown", "unknown", (f"read from {_ending(path)}",)))


def _ending(path: Path) -> str:
    return "a compressed NIfTI file" if path.name.lower().endswith(".gz") else "a NIfTI file"


def _order(shape: tuple[int, ...], sizes: Array, directions: Array) -> tuple[int, int, int]:
    """Return the axes of the file as slice, y, x."""
    thin = [axis for axis in range(3) if shape[axis] == 1]
    if thin:
        slice_axis = thin[-1]
    elif sizes.max() > 1.3 * np.median(sizes):
        slice_axis = int(np.argmax(sizes))
    else:
        slice_axis = int(np.argmax(np.abs(directions[2])))
    x_axis, y_axis = (axis for axis in range(3) if axis != slice_axis)
    return slice_axis, y_axis, x_axis
