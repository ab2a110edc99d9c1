"""Which images a report, a segmentation or a heat map is about, whether they came from a PACS or were made here."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from edge.dicom_mr import describe_equipment, describe_patient, describe_study
from edge.dicom_read import DicomSeries
from edge.exam import Exam
from edge.uids import derive_uid, frame_of_reference_uid, instance_uid, series_uid, study_uid
from recon.scan import Geometry, Scan

_KEPT = (  # of a series' header: patient, study and equipment
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientWeight", "PatientSize", "StudyInstanceUID",
    "StudyID", "StudyDate", "StudyTime", "StudyDescription", "AccessionNumber", "ReferringPhysicianName",
    "TimezoneOffsetFromUTC", "Manufacturer", "ManufacturerModelName", "InstitutionName", "StationName",
    "DeviceSerialNumber",
)  # fmt: skip
_WANTED = (  # type 2: there, if need be empty
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName", "Manufacturer",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reference:
    """Images of one series and what their patient, study and scanner are.

    common: those modules, and ContentDate and ContentTime. instances: SOP Instance UIDs by slice. frames: the frame of
    each in its instance, from 1; 0 where an instance is one image. seed: what the UIDs of derived objects come from.
    """

    common: Dataset = field(repr=False)
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    frame_of_reference_uid: str = field(repr=False)
    sop_class_uid: str
    instances: tuple[str, ...] = field(repr=False)
    frames: tuple[int, ...] = field(repr=False)
    seed: str = field(repr=False)

    def derived_uid(self, kind: str, *parts: str | int) -> str:
        """Return the UID that an object derived from these images always has."""
        return derive_uid(kind, "triage", self.seed, *parts)

    def image_item(self, number: int) -> Dataset:
        """Return the item that references slice `number`."""
        item = Dataset()
        item.ReferencedSOPClassUID = self.sop_class_uid
        item.ReferencedSOPInstanceUID = self.instances[number]
        if self.frames[number]:
            item.ReferencedFrameNumber = self.frames[number]
        return item

    def series_item(self) -> Dataset:
        """Return the series with every instance, each once."""
        item = Dataset()
        item.SeriesInstanceUID = self.series_uid
        item.ReferencedSOPSequence = [_instance(self.sop_class_uid, uid) for uid in dict.fromkeys(self.instances)]
        return item


def reference_of_series(series: DicomSeries) -> Reference:
    """Return the reference to a series that was read."""
    header = series.header
    common = Dataset()
    for name in _KEPT:
        if name in header:
            common[name] = header[name]
    for name in _WANTED:
        if name not in common:
            setattr(common, name, "")
    now = datetime.now().astimezone()
    common.ContentDate, common.ContentTime = f"{now:%Y%m%d}", f"{now:%H%M%S}"
    uid = str(header.SeriesInstanceUID)
    return Reference(
        common,
        str(header.StudyInstanceUID),
        uid,
        str(header.get("FrameOfReferenceUID", "") or derive_uid("frame", uid)),
        str(header.SOPClassUID),
        series.instances,
        series.frames,
        uid,
    )


def reference_of_scan(
    scan: Scan, exam: Exam, received_at: datetime | None, series: str, index: int, geometry: Geometry
) -> Reference:
    """Return the reference to a series that `edge.dicom.write_series` writes."""
    dated = received_at or datetime.now().astimezone()
    common = Dataset()
    describe_patient(common, exam)
    describe_study(common, exam, scan.scan_id, dated)
    describe_equipment(common, exam)
    del common.SeriesDate
    del common.SeriesTime
    n_slices = geometry.n_slices
    return Reference(
        common,
        study_uid(exam, scan.scan_id),
        series_uid(scan.scan_id, series, index),
        frame_of_reference_uid(exam, scan.scan_id),
        MRImageStorage,
        tuple(instance_uid(scan.scan_id, series, index, number) for number in range(n_slices)),
        (0,) * n_slices,
        f"{scan.scan_id} {series} {index}",
    )


def _instance(sop_class: str, uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
    return item
