"""A series that the scanner reconstructed itself, as the worker takes it: read, triaged, and reported as scans are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from edge.atomic import write_atomically
from edge.dicom_identity import exam_of
from edge.dicom_read import DicomSeries, read_header, read_series
from edge.dicom_reference import reference_of_series
from edge.evidence import write_evidence
from edge.exam_triage import NO_TRIAGE, ExamTriage
from edge.preview import scan_preview
from edge.pseudonym import exam_keys
from edge.secret import read_secret
from edge.triage_json import findings_json, measurements_json
from recon.errors import AcquisitionError, DeliveryError, ScanError
from triage.assess import Assessed, assess_series
from triage.findings import LABELS, not_assessed

MAKING = "series"  # what the daemon is told the worker is at


class Reports(Protocol):
    """Where the worker's reports go."""

    def send(self, report: str, **fields: Any) -> None:
        """Send one."""


class ReceivedSeries:
    """One series in a folder; all of it is done in one turn."""

    def __init__(
        self, order: dict[str, Any], reports: Reports, settings: dict[str, Any], triage: ExamTriage | None
    ) -> None:
        self.scan_id: str = order["scan_id"]
        self.is_done = False
        self._folder, self._results = Path(order["folder"]), Path(order["results"])
        self._reports, self._settings, self._triage = reports, settings, triage

    def turn(self) -> bool:
        """Triage it and report; raises ScanError where the results cannot be written."""
        self._reports.send("making", scan_id=self.scan_id, image_key=MAKING)
        files = sorted(self._folder.glob("*.dcm"))
        if not files:
            raise AcquisitionError("no object of the series is left")
        labels = LABELS if self._triage is None else self._triage.site.labels
        try:
            (found,) = list(read_series(self._folder))
        except AcquisitionError as error:
            found = error
        if isinstance(found, AcquisitionError):
            assessed, objects = Assessed("", not_assessed(str(found), labels)), []
        else:
            assessed = self._assess(found)
            objects = self._write(found, assessed, len(files))
        self._report(assessed, objects, len(files), exam_of(read_header(files[0])))
        self.is_done = True
        return False

    def work_ahead(self) -> bool:
        """There is none."""
        return False

    def close(self) -> None:
        """Nothing is held."""

    def _assess(self, series: DicomSeries) -> Assessed:
        triage = self._triage
        if triage is None or not triage.tools.models:
            return Assessed(series.contrast, not_assessed(NO_TRIAGE, LABELS if triage is None else triage.site.labels))
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
            is_research = self._triage is not None and self._triage.is_research
            files = write_evidence(folder, series.volume, assessed, reference, is_research)
        except OSError as error:
            raise DeliveryError(f"the findings cannot be written: {error.strerror}") from error
        return [str(path.relative_to(self._results)) for path in files]

    def _report(self, assessed: Assessed, objects: list[str], n_files: int, exam: Any) -> None:
        secret = read_secret(Path(self._settings["pseudonym_key"]))
        said = {
            "findings": findings_json(assessed.findings),
            "measurements": measurements_json(assessed.findings.measurements),
            "contrast": assessed.contrast or None,
            "n_objects": n_files,
        }
        report = {"v": 1, "scan_id": self.scan_id, "source": "dicom", **said, "dicom": objects}
        try:
            self._results.mkdir(parents=True, exist_ok=True)
            write_atomically(self._results / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
        except OSError as error:
            raise DeliveryError(f"the report cannot be written: {error.strerror}") from error
        self._reports.send(
            "done",
            scan_id=self.scan_id,
            exam=exam_keys(exam, self.scan_id, secret, self._settings["identifiers"]),
            is_study_known=True,
            objects=objects,
            **said,
        )
