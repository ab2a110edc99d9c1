"""Which DICOM objects a scan has left, in the order in which an archive should have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def objects_of(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """Return the objects that a scan's report names, by their places in its results folder."""
    said = [each for volume in report["volumes"] for each in (volume, volume["classical"], volume.get("network"))]
    folders = [each["dicom"] for each in [*said, *report["triage"]] if each]
    files = [path for name in dict.fromkeys(folders) for path in sorted((folder / name).glob("*.dcm"))]
    note = folder / "dicom" / "quality_note.dcm"
    return [str(path.relative_to(folder)) for path in [*files, *([note] if note.exists() else [])]]
