"""What was flagged as a DICOM segmentation: binary, one segment a finding, on the very voxels of the images.

For research: marking a place in an image is more than a notification.
Sources: DICOM PS3.3 A.51 (Segmentation IOD), C.8.20 (segmentation image), C.7.6.17 (dimensions).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage

from edge.dicom import encode
from edge.dicom_frames import describe_frames, frame_items, research_marks
from edge.dicom_reference import Reference
from edge.dicom_sr import FINDINGS, Code
from recon.arrays import Array
from recon.scan import Volume
from triage.findings import Finding

SERIES_NUMBER = 9002
_ABNORMAL = Code("49755003", "SCT", "Morphologically Altered Structure")
_ARTIFICIAL = Code("123110", "DCM", "Artificial Intelligence")


def segmentation(
    masks: Mapping[str, Array], findings: Mapping[str, Finding], volume: Volume, reference: Reference, software: str
) -> bytes:
    """Return the file of binary segments; the same arguments give the same bytes.

    masks: by finding, bool (slice, y, x) on the voxels of `volume`, each with something in it. findings: by the same
    labels, whose model is named. Raises ValueError without masks.
    """
    if not masks:
        raise ValueError("a segmentation of nothing cannot be written")
    frames = [
        (segment, number)
        for segment, mask in enumerate(masks.values(), 1)
        for number in np.flatnonzero(mask.any(axis=(1, 2))).tolist()
    ]
    out = Dataset()
    describe_frames(out, reference, volume, "segmentation", software)
    out.SOPClassUID = SegmentationStorage
    out.Modality = "SEG"
    out.SeriesNumber = SERIES_NUMBER
    out.SeriesDescription = "Scanside triage segments - RESEARCH"
    research_marks(out, "PRIMARY")
    out.SegmentationType = "BINARY"
    out.SegmentsOverlap = "UNDEFINED"
    out.ContentLabel = "TRIAGE"
    out.ContentDescription = "Outlines of what triage flagged"
    out.ContentCreatorName = "Scanside"
    out.SegmentSequence = [_segment(number, label, findings[label], software) for number, label in enumerate(masks, 1)]
    out.NumberOfFrames = len(frames)
    out.PerFrameFunctionalGroupsSequence = [_frame(segment, number, volume, reference) for segment, number in frames]
    out.SamplesPerPixel, out.PhotometricInterpretation = 1, "MONOCHROME2"
    out.BitsAllocated, out.BitsStored, out.HighBit, out.PixelRepresentation = 1, 1, 0, 0
    out.LossyImageCompression = "00"
    each = list(masks.values())
    bits = np.concatenate([each[segment - 1][number].ravel() for segment, number in frames])
    packed = np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()
    out.PixelData = packed + b"\0" * (len(packed) % 2)
    out["PixelData"].VR = "OB"
    return encode(out)


def _frame(segment: int, number: int, volume: Volume, reference: Reference) -> Dataset:
    item = frame_items(number, [segment, number + 1], volume, reference)
    which = Dataset()
    which.ReferencedSegmentNumber = segment
    item.SegmentIdentificationSequence = [which]
    return item


def _segment(number: int, label: str, finding: Finding, software: str) -> Dataset:
    name, _, version = (finding.model or software).rpartition(" ")
    out = Dataset()
    out.SegmentNumber, out.SegmentLabel = number, label
    out.SegmentAlgorithmType, out.SegmentAlgorithmName = "AUTOMATIC", name or "Scanside"
    out.SegmentedPropertyCategoryCodeSequence = [_coded(_ABNORMAL)]
    out.SegmentedPropertyTypeCodeSequence = [_coded(FINDINGS[label])]
    algorithm = Dataset()
    algorithm.AlgorithmFamilyCodeSequence = [_coded(_ARTIFICIAL)]
    algorithm.AlgorithmName, algorithm.AlgorithmVersion = name or "Scanside", version or "0"
    out.SegmentationAlgorithmIdentificationSequence = [algorithm]
    return out


def _coded(code: Code) -> Dataset:
    out = Dataset()
    out.CodeValue, out.CodingSchemeDesignator, out.CodeMeaning = code
    return out
