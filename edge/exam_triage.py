"""Triage of a scan once its volumes are made: the leading images are read, findings go into report, event and DICOM.

What leads is read: the network's volume where the scan is trusted or degraded, the classical one where no network
served. An untrusted scan is not assessed at all, whatever it shows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge.contrast_name import contrast_of_timing, contrast_of_words
from edge.dicom_reference import reference_of_scan
from edge.evidence import write_evidence
from edge.results import Results
from edge.triage_json import findings_json, measurements_json
from edge.triage_models import TRIAGE, open_tools
from edge.verdict import summary
from recon.errors import DeliveryError, ScanError
from recon.quality import Level
from recon.scan import Scan
from triage.assess import Assessed, Site, Tools, assess_series, fuse
from triage.findings import LABELS, Findings, State, not_assessed

log = logging.getLogger(__name__)

NO_TRIAGE = "no triage network is installed"
NOT_YET = "triage has not read this scan yet"


@dataclass(frozen=True)
class ExamTriage:
    """What triages every scan of a process: networks, the site's choices, and whether research objects are written."""

    tools: Tools
    site: Site
    is_research: bool = False


def open_triage(settings: Mapping[str, Any]) -> ExamTriage:
    """Return triage as the settings' section has it; what cannot be opened is logged, and then not assessed."""
    tools, problems = open_tools(Path(settings["models"]) if settings["models"] else TRIAGE)
    for problem in problems:
        log.warning("triage incomplete: %s", problem)
    return ExamTriage(
        tools, Site(enabled_labels(settings), settings["alpha"], settings["min_coverage_mm"]), settings["research"]
    )


def enabled_labels(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the findings that the settings' section has looked for."""
    return tuple(label for label in LABELS if settings[label])


def unread_report(why: str = NOT_YET, labels: tuple[str, ...] = LABELS) -> dict[str, Any]:
    """Return `findings`, `measurements` and `triage` of the report of a scan that triage has not read."""
    return _report(not_assessed(why, labels), [])


def triage_scan(triage: ExamTriage, results: Results, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of a reconstructed scan with what triage says of it; it is written, and what goes into DICOM.

    Raises DeliveryError where the disk does not take it; anything else that goes wrong is a finding not assessed.
    """
    begun = time.perf_counter()
    triaged = triage_report(triage, results, report["quality"], report["ending"])
    took_ms = round((time.perf_counter() - begun) * 1e3, 1)
    out = {**report, **triaged, "stage_ms": {**report["stage_ms"], "triage": took_ms}}
    results.write_report(out)
    return out


def triage_report(
    triage: ExamTriage, results: Results, quality: Mapping[str, Any], ending: str = "complete"
) -> dict[str, Any]:
    """Return `findings`, `measurements` and `triage` of the report, and write what goes into DICOM.

    quality: the verdict on the scan, as reports carry it. Raises as `triage_scan`.
    """
    labels = triage.site.labels
    if quality["verdict"] == Level.UNTRUSTED.value:
        return unread_report(f"the scan is {summary(quality)}", labels)
    if not triage.tools.models:
        return unread_report(NO_TRIAGE, labels)
    assessed: list[Assessed] = []
    read: list[dict[str, Any]] = []
    for index, series, volume, contrast in results.leading_volumes():
        name = contrast_of_scan(results, contrast)
        try:
            found = assess_series(volume, name, triage.tools, triage.site)
        except ScanError as error:
            found = Assessed(name, not_assessed(f"triage failed: {error.code}", labels))
        found = _of_volume(_unless_interrupted(found, ending), index)
        reference = reference_of_scan(results.scan, results.exam, results.received_at, series, index, volume.geometry)
        folder = results.folder / "dicom" / (f"findings_{index:03d}" if index else "findings")
        notes = [f"Verdict on the scan: {summary(quality)}."] if quality["verdict"] else []
        try:
            write_evidence(folder, volume, found, reference, triage.is_research, notes)
        except OSError as error:
            raise DeliveryError(f"the findings cannot be written: {error.strerror}") from error
        assessed.append(found)
        read.append({"volume": index, "series": series, "contrast": name or None, "dicom": f"dicom/{folder.name}"})
    return _report(fuse(assessed, labels), read)


def contrast_of_scan(results: Results, contrast: int = 0) -> str:
    """Return the contrast of a live scan, by its names and then by its times; "" where neither tells."""
    scan: Scan = results.scan
    exam = results.exam
    found = contrast_of_words(exam.series_description, scan.protocol, exam.sequence_type)
    if found:
        return found
    words = f"{exam.sequence_type} {scan.protocol}".lower()
    is_gradient_echo = any(word in words for word in ("gradient", "flash", "gre", "ffe", "spgr"))
    return contrast_of_timing(scan.te_ms, scan.tr_ms, scan.ti_ms, is_gradient_echo, contrast)


def _report(findings: Findings, read: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "findings": findings_json(findings),
        "measurements": measurements_json(findings.measurements),
        "triage": read,
    }


def _of_volume(assessed: Assessed, index: int) -> Assessed:
    found = tuple(replace(each, volume=index) for each in assessed.findings.findings)
    return replace(assessed, findings=replace(assessed.findings, findings=found))


def _unless_interrupted(assessed: Assessed, ending: str) -> Assessed:
    """A scan that stopped half way may be flagged, and is never *not flagged*."""
    if ending == "complete":
        return assessed
    found = tuple(
        replace(each, state=State.NOT_ASSESSED, reason="the scan was interrupted: the rest of the head was not seen")
        if each.state is State.NOT_FLAGGED
        else each
        for each in assessed.findings.findings
    )
    return replace(assessed, findings=replace(assessed.findings, findings=found))
