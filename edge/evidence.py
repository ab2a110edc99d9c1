"""What triage leaves in DICOM for one series: the structured report always; segments and heat maps in research mode."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edge.atomic import sync_folder, write_atomically
from edge.dicom_map import heat_map
from edge.dicom_reference import Reference
from edge.dicom_seg import segmentation
from edge.dicom_sr import structured_report
from edge.volumes import software
from recon.scan import Volume
from triage.assess import Assessed
from triage.measure import OUTLINE

REPORT, SEGMENTS = "findings.dcm", "segments.dcm"


def write_evidence(
    folder: Path,
    volume: Volume,
    assessed: Assessed,
    reference: Reference,
    is_research: bool,
    notes: Iterable[str] = (),
) -> list[Path]:
    """Write the report, and in research mode what was flagged as segments and heat maps; return the files.

    Every one of them is about measured images: others are refused before they get here. Raises OSError.
    """
    made = software()
    files = {REPORT: structured_report(assessed.findings, reference, made, notes)}
    if is_research and assessed.maps:
        found = {each.label: each for each in assessed.findings.findings}
        masks = {label: each >= min(OUTLINE, float(each.max())) for label, each in assessed.maps.items()}
        files[SEGMENTS] = segmentation(masks, found, volume, reference, made)
        for number, (label, values) in enumerate(assessed.maps.items()):
            files[f"heat_map_{label}.dcm"] = heat_map(label, values, volume, reference, made, number)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SEGMENTS, *(path.name for path in folder.glob("heat_map_*.dcm"))):
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    sync_folder(folder)
    return [folder / name for name in files]
