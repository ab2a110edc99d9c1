"""Who and what was scanned, as the raw header says: for DICOM only, never for logs, events or errors.

The fields keep their DICOM meaning; an empty string means that the header did not say. Their values stay out of `repr`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Subject:
    """The patient (ISMRMRD subjectInformation). Dates as YYYYMMDD, sex as M, F or O."""

    name: str = field(default="", repr=False)
    identifier: str = field(default="", repr=False)
    birth_date: str = field(default="", repr=False)
    sex: str = field(default="", repr=False)
    weight_kg: float | None = field(default=None, repr=False)
    height_m: float | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Study:
    """The study (ISMRMRD studyInformation). Date as YYYYMMDD, time as HHMMSS."""

    instance_uid: str = field(default="", repr=False)
    identifier: str = field(default="", repr=False)
    accession_number: str = field(default="", repr=False)
    date: str = field(default="", repr=False)
    time: str = field(default="", repr=False)
    description: str = field(default="", repr=False)
    referring_physician: str = field(default="", repr=False)
    body_part: str = field(default="", repr=False)


@dataclass(frozen=True)
class Equipment:
    """The scanner (ISMRMRD acquisitionSystemInformation)."""

    manufacturer: str = ""
    model: str = ""
    institution: str = field(default="", repr=False)
    station: str = field(default="", repr=False)
    serial_number: str = field(default="", repr=False)
    resonance_hz: int | None = None


@dataclass(frozen=True)
class Exam:
    """All that DICOM needs beside the pixels (with ISMRMRD's measurementInformation)."""

    subject: Subject = Subject()
    study: Study = Study()
    equipment: Equipment = Equipment()
    measurement_id: str = field(default="", repr=False)
    patient_position: str = ""
    series_description: str = ""
    frame_of_reference_uid: str = field(default="", repr=False)
    sequence_type: str = ""
