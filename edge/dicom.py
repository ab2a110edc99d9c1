"""Volumes as DICOM: one MR Image Storage series each, one file a slice, marked for what it is.

Sources: DICOM PS3.3 A.4 (MR Image IOD), C.7.6.2 (image plane), C.11.1 and C.11.2 (rescale and window).
"""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, ExplicitVRLittleEndian

from edge.atomic import sync_folder, write_atomically
from edge.dicom_mr import mr_header
from edge.dicom_values import as_decimal
from edge.exam import Exam
from edge.uids import derive_uid, instance_uid
from edge.window import display_window
from recon.arrays import Array
from recon.errors import ScanError, ShapeError
from recon.quality import Verdict
from recon.scan import Geometry, Scan, Volume

TOP_LEVEL = 32767  # 15 bits: the same number to readers that take 16-bit pixels as signed and as unsigned


def write_series(
    volume: Volume,
    scan: Scan,
    exam: Exam,
    series: str,
    folder: Path,
    *,
    series_number: int,
    received_at: datetime | None = None,
    image_index: int = 0,
    contrast: int = 0,
    verdict: Verdict | None = None,
) -> list[Path]:
    """Write `volume` as one MR series into `folder` (made if need be) and return its files in slice order.

    series: which volume of the scan: "network", "classical" or "super-resolved"; part of every UID.
    received_at: when the scan came; stands in for dates that the header lacks. Best in the scanner's time zone.
    image_index: tells apart several volumes of one scan (repetitions, contrasts, phases, sets), each a series.
    contrast: which of the scan's echo and inversion times belongs to this volume.
    verdict: on the scan, said in the derivation description; None says nothing.

    Files are 0001.dcm …, or i002-0001.dcm … from the second volume (image_index 1) on, each written whole or not at
    all. Equal arguments give equal bytes. Pixel × Rescale Slope is the volume's native value, to half a slope; pixels
    are signed only where the volume goes below 0.
    Raises ScanError if a voxel is not a finite number, ShapeError if there is none; OSError as the file system does.
    """
    pixels, slope = quantise(volume.data)
    header = mr_header(volume, scan, exam, series, series_number, received_at, image_index, contrast, verdict)
    _describe_pixels(header, pixels, slope, display_window(volume.data))
    row_dir, col_dir = _right_angles(volume.geometry)
    header.ImageOrientationPatient = [as_decimal(v) for v in (*row_dir, *col_dir)]
    normal = np.cross(row_dir, col_dir)

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, plane in enumerate(pixels):
        origin = volume.geometry.origin_mm[index]
        header.SOPInstanceUID = instance_uid(scan.scan_id, series, image_index, index)
        header.InstanceNumber = index + 1
        header.ImagePositionPatient = [as_decimal(v) for v in origin]
        header.SliceLocation = as_decimal(float(origin @ normal))
        header.PixelData = plane.tobytes()
        name = f"{index + 1:04}.dcm" if image_index == 0 else f"i{image_index + 1:03}-{index + 1:04}.dcm"
        write_atomically(folder / name, encode(header))
        paths.append(folder / name)
    sync_folder(folder)
    return paths


def quantise(data: Array) -> tuple[Array, float]:
    """Return `data` (float32 (slice, y, x)) as little-endian 16-bit levels and the slope back: level × slope ≈ value.

    0 stays 0; the level type is uint16, or int16 where a value is negative. The slope is exactly what its decimal
    string says, so that reading it back gives the same values. Raises ScanError, ShapeError.
    """
    if 0 in data.shape:
        raise ShapeError("volume", data.shape, ("slice", "y", "x"))
    n_bad = data.size - int(np.isfinite(data).sum())
    if n_bad:
        raise ScanError(f"{n_bad} of {data.size} voxels are not finite numbers; DICOM holds finite values only")
    peak = max(float(data.max()), -float(data.min()))
    slope = float(as_decimal(peak / TOP_LEVEL)) if peak > 0 else 1.0
    kind = "<i2" if data.min() < 0 else "<u2"
    levels = np.rint(data.astype(np.float64) / slope).clip(-TOP_LEVEL, TOP_LEVEL)
    return levels.astype(kind), slope


def _describe_pixels(out: Dataset, pixels: Array, slope: float, window: tuple[float, float]) -> None:
    out.SamplesPerPixel = 1
    out.PhotometricInterpretation = "MONOCHROME2"
    out.Rows, out.Columns = pixels.shape[1:]
    out.BitsAllocated, out.BitsStored, out.HighBit = 16, 16, 15
    out.PixelRepresentation = int(pixels.dtype.kind == "i")
    out.RescaleIntercept = "0"
    out.RescaleSlope = as_decimal(slope)
    out.RescaleType = "US"
    low, high = window
    out.WindowCenter = as_decimal((low + high) / 2)
    out.WindowWidth = as_decimal(high - low)
    out.VOILUTFunction = "LINEAR_EXACT"  # native units may be tiny, and plain LINEAR needs a width of 1 or more


def _right_angles(geometry: Geometry) -> tuple[Array, Array]:
    """Return row and column direction, float64 (3,), exactly of length 1 and at right angles, as DICOM demands."""
    row = np.asarray(geometry.row_dir, np.float64)
    row = row / np.linalg.norm(row)
    col = np.asarray(geometry.col_dir, np.float64)
    col = col - row * (row @ col)
    return row, col / np.linalg.norm(col)


def encode(header: Dataset) -> bytes:
    """Return the file that holds `header`, explicit little endian."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = header.SOPClassUID
    meta.MediaStorageSOPInstanceUID = UID(header.SOPInstanceUID)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(derive_uid("implementation"))
    meta.ImplementationVersionName = "SCANSIDE"
    header.file_meta = meta
    file = io.BytesIO()
    dcmwrite(file, header, enforce_file_format=True)
    return file.getvalue()
