"""What segmentations and heat maps have in common: patient and study, where each frame lies, and the marks of research.

Sources: DICOM PS3.3 C.7.6.16 (multi-frame functional groups), C.7.6.17 (dimensions), C.12.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.tag import Tag

from edge.dicom_reference import Reference
from edge.dicom_values import as_decimal, as_text
from recon.scan import Volume


def describe_frames(out: Dataset, reference: Reference, volume: Volume, kind: str, software: str) -> None:
    """Enter what all frames of a derived object have in common; `kind` tells apart objects of one series of images."""
    out.update(reference.common)
    out.SpecificCharacterSet = "ISO_IR 192"
    out.StudyInstanceUID = reference.study_uid
    out.SOPInstanceUID = reference.derived_uid("instance", kind)
    out.SeriesInstanceUID = reference.derived_uid("series", kind)
    out.InstanceNumber = 1
    out.FrameOfReferenceUID = reference.frame_of_reference_uid
    out.PositionReferenceIndicator = ""
    out.BodyPartExamined = "BRAIN"
    if not out.get("Manufacturer"):
        out.Manufacturer = "Scanside"
    out.ManufacturerModelName = "Scanside"
    out.DeviceSerialNumber = "0"
    out.SoftwareVersions = as_text(software, 64)
    out.ReferencedSeriesSequence = [_referenced_series(reference)]
    out.Rows, out.Columns = volume.data.shape[1:]
    organization = Dataset()
    organization.DimensionOrganizationUID = reference.derived_uid("dimensions", kind)
    out.DimensionOrganizationSequence = [organization]
    first = (0x0062, 0x000B, 0x0062, 0x000A) if kind == "segmentation" else None
    pairs = [*([first] if first else []), (0x0020, 0x0032, 0x0020, 0x9113)]
    out.DimensionIndexSequence = [_dimension(organization.DimensionOrganizationUID, *pair) for pair in pairs]
    geometry = volume.geometry
    lie, sizes = Dataset(), Dataset()
    lie.ImageOrientationPatient = [as_decimal(v) for v in (*geometry.row_dir, *geometry.col_dir)]
    sizes.SliceThickness = as_decimal(geometry.thickness_mm)
    sizes.SpacingBetweenSlices = as_decimal(geometry.spacing_mm[0])
    sizes.PixelSpacing = [as_decimal(v) for v in geometry.spacing_mm[1:]]
    shared = Dataset()
    shared.PlaneOrientationSequence = [lie]
    shared.PixelMeasuresSequence = [sizes]
    out.SharedFunctionalGroupsSequence = [shared]


def frame_items(number: int, index: Sequence[int], volume: Volume, reference: Reference) -> Dataset:
    """Return the functional groups of one frame: place, dimension index, and the image that it comes from."""
    content, place = Dataset(), Dataset()
    content.DimensionIndexValues = list(index)
    place.ImagePositionPatient = [as_decimal(float(v)) for v in volume.geometry.origin_mm[number]]
    source = reference.image_item(number)
    source.PurposeOfReferenceCodeSequence = [_dcm("121322", "Source Image for Image Processing Operation")]
    derivation = Dataset()
    derivation.SourceImageSequence = [source]
    derivation.DerivationCodeSequence = [_dcm("113076", "Segmentation")]
    item = Dataset()
    item.FrameContentSequence = [content]
    item.PlanePositionSequence = [place]
    item.DerivationImageSequence = [derivation]
    return item


def research_marks(out: Dataset, flavour: str) -> None:
    """Mark a derived image as research, not as evidence for a diagnosis."""
    out.ImageType = ["DERIVED", flavour]
    out.ContentQualification = "RESEARCH"
    out.BurnedInAnnotation = "NO"
    out.RecognizableVisualFeatures = "NO"


def _referenced_series(reference: Reference) -> Dataset:
    item = Dataset()
    item.SeriesInstanceUID = reference.series_uid
    item.ReferencedInstanceSequence = reference.series_item().ReferencedSOPSequence
    return item


def _dimension(uid: str, group: int, element: int, in_group: int, in_element: int) -> Dataset:
    out = Dataset()
    out.DimensionOrganizationUID = uid
    out.DimensionIndexPointer = Tag(group, element)
    out.FunctionalGroupPointer = Tag(in_group, in_element)
    return out


def _dcm(value: str, meaning: str) -> Dataset:
    out = Dataset()
    out.CodeValue, out.CodingSchemeDesignator, out.CodeMeaning = value, "DCM", meaning
    return out
