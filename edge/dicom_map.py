"""How sure a network is of a finding at each voxel, as a DICOM parametric map (32-bit floats): for research.

Sources: DICOM PS3.3 A.75 (Parametric Map IOD), C.8.32 (parametric map), PS3.16 CID 7180.
"""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ParametricMapStorage

from edge.dicom import encode
from edge.dicom_frames import describe_frames, frame_items, research_marks
from edge.dicom_reference import Reference
from recon.arrays import Array
from recon.scan import Volume

SERIES_NUMBER = 9003


def heat_map(label: str, values: Array, volume: Volume, reference: Reference, software: str, number: int = 0) -> bytes:
    """Return the file of one finding's probabilities, float32 (slice, y, x) on the voxels of `volume`.

    number: of the finding among those of the series; each is a series of its own. The same arguments, the same bytes.
    """
    out = Dataset()
    describe_frames(out, reference, volume, f"heat map {label}", software)
    out.SOPClassUID = ParametricMapStorage
    out.Modality = "MR"
    out.SeriesNumber = SERIES_NUMBER + number
    out.SeriesDescription = f"Scanside triage heat map, {label} - RESEARCH"
    research_marks(out, "PRIMARY")
    out.ImageType = ["DERIVED", "PRIMARY", "SALIENCY", "NONE"]
    out.ContentLabel = "HEAT_MAP"
    out.ContentDescription = f"Probability of {label} at each voxel, uncalibrated"
    out.ContentCreatorName = "Scanside"
    out.LossyImageCompression = "00"
    out.PresentationLUTShape = "IDENTITY"
    out.AcquisitionContextSequence = []
    out.SamplesPerPixel, out.PhotometricInterpretation, out.BitsAllocated = 1, "MONOCHROME2", 32
    shared = out.SharedFunctionalGroupsSequence[0]
    shared.ParametricMapFrameTypeSequence = [_frame_type()]
    shared.FrameVOILUTSequence = [_window()]
    shared.PixelValueTransformationSequence = [_identity()]
    shared.RealWorldValueMappingSequence = [_mapping()]
    out.NumberOfFrames = len(values)
    out.PerFrameFunctionalGroupsSequence = [frame_items(k, [k + 1], volume, reference) for k in range(len(values))]
    for item in out.PerFrameFunctionalGroupsSequence:
        del item.DerivationImageSequence[0].DerivationCodeSequence
        item.DerivationImageSequence[0].DerivationCodeSequence = [_coded("113095", "DCM", "Pixel by pixel mask")]
    out.FloatPixelData = np.ascontiguousarray(values, "<f4").tobytes()
    return encode(out)


def _frame_type() -> Dataset:
    out = Dataset()
    out.FrameType = ["DERIVED", "PRIMARY", "SALIENCY", "NONE"]
    return out


def _window() -> Dataset:
    out = Dataset()
    out.WindowCenter, out.WindowWidth = "0.5", "1"
    return out


def _identity() -> Dataset:
    out = Dataset()
    out.RescaleIntercept, out.RescaleSlope, out.RescaleType = "0", "1", "US"
    return out


def _mapping() -> Dataset:
    out = Dataset()
    out.DoubleFloatRealWorldValueFirstValueMapped = 0.0
    out.DoubleFloatRealWorldValueLastValueMapped = 1.0
    out.RealWorldValueIntercept, out.RealWorldValueSlope = 0.0, 1.0
    out.LUTExplanation, out.LUTLabel = "Probability", "PROBABILITY"
    out.MeasurementUnitsCodeSequence = [_coded("1", "UCUM", "no units")]
    quantity = Dataset()
    quantity.ValueType = "CODE"
    quantity.ConceptNameCodeSequence = [_coded("246205007", "SCT", "Quantity")]
    quantity.ConceptCodeSequence = [_coded("130404", "DCM", "Saliency")]
    out.QuantityDefinitionSequence = [quantity]
    return out


def _coded(value: str, scheme: str, meaning: str) -> Dataset:
    out = Dataset()
    out.CodeValue, out.CodingSchemeDesignator, out.CodeMeaning = value, scheme, meaning
    return out
