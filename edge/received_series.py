"""A series that the scanner reconstructed itself: read, triaged, and reported as scans are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge.dicom_identity import exam_of
from edge.dicom_read import DicomSeries, read_header, read_series
from edge.dicom_reference import reference_of_series
from edge.evidence import write_evidence
from edge.exam import Exam
from edge.exam_triage import NO_TRIAGE, ExamTriage
from edge.preview import scan_preview
from edge.pseudonym import exam_keys
from edge.results import write_report
from edge.secret import read_secret
from edge.triage_json import findings_json, measurements_json
from recon.errors import AcquisitionError, DeliveryError, ScanError
from triage.assess import Assessed, assess_series
from triage.findings import not_assessed


class ReceivedSeries:
    """One series in a folder."""

    def __init__(self, order: Mapping[str, Any], settings: Mapping[str, Any], triage: ExamTriage) -> None:
        self._scan_id: str = order["scan_id"]
        self._folder, self._results = Path(order["folder"]), Path(order["results"])
        self._settings, self._triage = settings, triage

    def read(self) -> dict[str, Any]:
        """Triage it, write what it gives, and return what the daemon is told; raises ScanError where it cannot be."""
        files = sorted(self._folder.glob("*.dcm"))
        if not files:
            raise AcquisitionError("no object of the series is left")
        try:
            (found,) = list(read_series(self._folder))
        except AcquisitionError as error:
            found = error
        if isinstance(found, AcquisitionError):
            assessed, objects = Assessed("", not_assessed(str(found), self._triage.site.labels)), []
        else:
            assessed = self._assess(found)
            objects = self._write(found, assessed, len(files))
        return self._report(assessed, objects, len(files), exam_of(read_header(files[0])))

    def _assess(self, series: DicomSeries) -> Assessed:
        triage = self._triage
        if not triage.tools.models:
            return Assessed(series.contrast, not_assessed(NO_TRIAGE, triage.site.labels))
        if series.refusal or not series.contrast:
            why = series.refusal or "neither names nor times of the series tell its contrast"
            return Assessed(series.contrast, not_assessed(why, triage.site.labels))
        try:
            return assess_series(series.volume, series.contrast, triage.tools, triage.site)
        except ScanError as error:
            return Assessed(series.contrast, not_assessed(f"triage failed: {error.code}", triage.site.labels))

    def _write(self, series: DicomSeries, assessed: Assessed, n_files: int) -> list[str]:
        """Write the picture and the report in DICOM, one for each number of objects that the series has had."""
        reference = reference_of_series(series)
        reference = replace(reference, seed=f"{reference.seed} {n_files}")
        folder = self._results / "dicom" / f"findings_of_{n_files:04d}"
        try:
            self._results.mkdir(parents=True, exist_ok=True)
            scan_preview(self._results / "preview.png", series.volume, "As the scanner made it")
            files = write_evidence(folder, series.volume, assessed, reference, self._triage.is_research)
        except OSError as error:
            raise DeliveryError(f"the findings cannot be written: {error.strerror}") from error
        return [str(path.relative_to(self._results)) for path in files]

    def _report(self, assessed: Assessed, objects: list[str], n_files: int, exam: Exam) -> dict[str, Any]:
        secret = read_secret(Path(self._settings["pseudonym_key"]))
        said = {
            "findings": findings_json(assessed.findings),
            "measurements": measurements_json(assessed.findings.measurements),
            "contrast": assessed.contrast or None,
            "n_objects": n_files,
        }
        report = {"v": 1, "scan_id": self._scan_id, "source": "dicom", **said, "dicom": objects}
        write_report(self._results, report)
        keys = exam_keys(exam, self._scan_id, secret, self._settings["identifiers"])
        return {"exam": keys, "is_study_known": True, "objects": objects, **said}
