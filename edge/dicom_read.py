"""DICOM folders as volumes, series by series, with what triage must know of each: what made it, and may it be used.

Sources: DICOM PS3.3 C.7.6.2 (image plane), C.7.6.16 (multi-frame functional groups), C.12.1 (Synthetic Data).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from edge.contrast_name import contrast_of_timing, contrast_of_words
from edge.dicom_mr import SYNTHESIZING, SYNTHETIC_TITLE
from recon.arrays import Array
from recon.errors import AcquisitionError
from recon.scan import Geometry, Provenance, Volume

MAX_FILES = 100_000
_EVEN = 0.02  # of the distance between slices: more uneven ones are no stack
_PLACE_MM = 0.01
_OURS = ("SUPER_RESOLVED",)  # in the Image Type of series of this project that hold what was never measured
MODALITY = "MR"


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """One series of images. header: its first file's, without pixels. instances: SOP Instance UIDs by slice; a file of
    many frames stands for each of them. refusal: why triage must not look at it, "" where it may."""

    volume: Volume
    contrast: str
    folder: Path
    header: Dataset = field(repr=False)
    instances: tuple[str, ...] = field(repr=False, default=())
    frames: tuple[int, ...] = field(repr=False, default=())
    refusal: str = ""


class _Plane(NamedTuple):
    pixels: Array
    position_mm: Array
    row_dir: Array
    col_dir: Array
    spacing_mm: tuple[float, float]
    thickness_mm: float
    instance: str
    frame: int
    b_value: float


def read_series(folder: Path) -> Iterator[DicomSeries | AcquisitionError]:
    """Yield every MR series under `folder`, or why one cannot be read; raises AcquisitionError where there is none."""
    by_series: dict[str, list[Path]] = {}
    for path in _files(folder):
        try:
            head = dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "Modality", "Rows"])
        except (InvalidDicomError, OSError, ValueError, KeyError, AttributeError):
            continue
        if head.get("Modality") == MODALITY and head.get("Rows") and head.get("SeriesInstanceUID"):
            by_series.setdefault(str(head.SeriesInstanceUID), []).append(path)
    if not by_series:
        raise AcquisitionError("the folder holds no MR images in DICOM, and no NIfTI file")
    for paths in by_series.values():
        try:
            yield _series(paths)
        except AcquisitionError as error:
            yield error


def read_header(path: Path) -> Dataset:
    """Return what a file says before its pixels; raises AcquisitionError where it cannot be read."""
    try:
        return dcmread(path, stop_before_pixels=True)
    except Exception as error:  # damaged files fail in as many ways as there are elements
        raise AcquisitionError(f"a file cannot be read ({type(error).__name__})") from error


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_file():
        yield folder
        return
    n = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            n += 1
            if n > MAX_FILES:
                raise AcquisitionError(f"more than {MAX_FILES} files in the folder; name the series' own folder")
            yield Path(place) / name


def _series(paths: list[Path]) -> DicomSeries:
    planes: list[_Plane] = []
    first: Dataset | None = None
    holds_synthetic = False
    for path in paths:
        try:
            file = dcmread(path)
            planes += _planes(file)
        except AcquisitionError:
            raise
        except Exception as error:  # damaged files fail in as many ways as there are elements
            raise AcquisitionError(f"a file of the series cannot be read ({type(error).__name__})") from error
        holds_synthetic |= is_synthetic(file)
        if first is None:
            del file.PixelData
            first = file
    assert first is not None
    strongest = max(plane.b_value for plane in planes)
    planes = [plane for plane in planes if plane.b_value == strongest]  # of a diffusion series, what shows restriction
    volume, order = _stack(planes, first, holds_synthetic)
    return DicomSeries(
        volume,
        _contrast(first, strongest),
        paths[0].parent,
        first,
        tuple(planes[k].instance for k in order),
        tuple(planes[k].frame for k in order),
        _refusal(first),
    )


def _planes(file: Dataset) -> list[_Plane]:
    try:
        pixels = file.pixel_array
    except Exception as error:  # pydicom's decoders raise what they like
        syntax = file.file_meta.get("TransferSyntaxUID", "") if hasattr(file, "file_meta") else ""
        name = getattr(syntax, "name", syntax)
        raise AcquisitionError(f"pixels cannot be decoded ({name}); decompress the series first") from error
    if file.get("SamplesPerPixel", 1) != 1:
        raise AcquisitionError("the series is in colour; magnitude images are needed")
    uid = str(file.SOPInstanceUID)
    if "PerFrameFunctionalGroupsSequence" not in file:
        if "ImageOrientationPatient" not in file or "ImagePositionPatient" not in file:
            raise AcquisitionError("the images do not say where they lie in the patient")
        return [_plane(pixels, file, file, file, file, file, uid, 0)]
    shared = file.SharedFunctionalGroupsSequence[0]
    out = []
    for number, own in enumerate(file.PerFrameFunctionalGroupsSequence):
        place, lie, measures, scale, diffusion = (
            next((group[0] for where in (own, shared) if (group := where.get(name))), Dataset())
            for name in (
                "PlanePositionSequence",
                "PlaneOrientationSequence",
                "PixelMeasuresSequence",
                "PixelValueTransformationSequence",
                "MRDiffusionSequence",
            )
        )
        out.append(_plane(pixels[number], place, lie, measures, scale, diffusion, uid, number + 1))
    return out


def _plane(
    pixels: Array,
    place: Dataset,
    lie: Dataset,
    measures: Dataset,
    scale: Dataset,
    diffusion: Dataset,
    uid: str,
    frame: int,
) -> _Plane:
    direction = np.array([float(v) for v in lie.ImageOrientationPatient]).reshape(2, 3)
    slope, intercept = float(scale.get("RescaleSlope", 1) or 1), float(scale.get("RescaleIntercept", 0) or 0)
    row_mm, column_mm = (float(v) for v in measures.PixelSpacing)
    return _Plane(
        pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept),
        np.array([float(v) for v in place.ImagePositionPatient]),
        direction[0],
        direction[1],
        (row_mm, column_mm),
        float(measures.get("SliceThickness", 0) or 0),
        uid,
        frame,
        float(diffusion.get("DiffusionBValue", 0) or 0),
    )


def _stack(planes: list[_Plane], header: Dataset, is_synthetic: bool) -> tuple[Volume, list[int]]:
    """Return the planes in order along their normal as one volume, and that order."""
    one = planes[0]
    normal = np.cross(one.row_dir, one.col_dir)
    for each in planes:
        if np.abs(each.row_dir - one.row_dir).max() > 1e-3 or np.abs(each.col_dir - one.col_dir).max() > 1e-3:
            raise AcquisitionError("the series holds slices of several directions (a localizer?); one is needed")
        if each.pixels.shape != one.pixels.shape or each.spacing_mm != one.spacing_mm:
            raise AcquisitionError("the series holds slices of several sizes; one is needed")
    along = np.array([each.position_mm @ normal for each in planes])
    order = [int(k) for k in np.argsort(along, kind="stable")]
    distinct = [order[0]]  # of several images at one place (echoes, phases) the first counts
    for k in order[1:]:
        if along[k] - along[distinct[-1]] > _PLACE_MM:
            distinct.append(k)
    steps = np.diff(along[distinct])
    distance = float(np.median(steps)) if len(steps) else (one.thickness_mm or 5.0)
    if len(steps) and np.abs(steps - distance).max() > max(_EVEN * distance, 0.05):
        raise AcquisitionError("slices are missing or lie at uneven distances; a whole stack is needed")
    geometry = Geometry(
        np.stack([planes[k].position_mm for k in distinct]),
        _triple(one.row_dir),
        _triple(one.col_dir),
        (distance, *one.spacing_mm),
        one.thickness_mm or distance,
        "no slice directions" not in str(header.get("ImageComments", "")),
    )
    made = Provenance("unknown", "unknown", ("read from DICOM",), is_measured=not is_synthetic)
    return Volume(np.stack([planes[k].pixels for k in distinct]), geometry, made), distinct


def is_synthetic(file: Dataset) -> bool:
    """Whether the file says that its content was made rather than measured, by the standard's tag or by our marks."""
    purposes = [
        code.get("CodeValue", "")
        for item in file.get("ContributingEquipmentSequence", [])
        for code in item.get("PurposeOfReferenceCodeSequence", [])
    ]
    return (
        str(file.get("SyntheticData", "")).upper() == "YES"
        or any(mark.startswith(_OURS) for mark in _values(file.get("ImageType")))
        or SYNTHESIZING[0] in purposes
        or str(file.get("SeriesDescription", "")).startswith(SYNTHETIC_TITLE[:5])
        or "added by a learned prior" in str(file.get("DerivationDescription", ""))
    )


def _refusal(header: Dataset) -> str:
    derivation = str(header.get("DerivationDescription", ""))
    if "Verdict on the scan: untrusted" in derivation or "[untrusted]" in str(header.get("SeriesDescription", "")):
        return "the scan was judged untrusted when it was reconstructed"
    return ""


def _contrast(header: Dataset, b_value: float) -> str:
    words = [str(header.get(name, "")) for name in ("SeriesDescription", "ProtocolName", "SequenceName")]
    found = contrast_of_words(*words)
    if not found and b_value >= 500:
        found = "dwi"
    if not found:
        te, tr, ti = (_number(header, name) for name in ("EchoTime", "RepetitionTime", "InversionTime"))
        found = contrast_of_timing(te, tr, ti, "GR" in _values(header.get("ScanningSequence")))
    return "t1ce" if found == "t1" and str(header.get("ContrastBolusAgent", "")).strip() else found


def _number(header: Dataset, name: str) -> list[float]:
    value = header.get(name)
    return [float(value)] if value else []


def _values(value: Any) -> list[str]:
    return [] if value is None else [str(value)] if isinstance(value, str) else [str(each) for each in value]


def _triple(values: Array) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])
