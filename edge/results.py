"""A scan's results on disk: volumes as NumPy files and DICOM series, a picture, and the report that names them.

`volume.npy` is the series that leads (float32 (slice, y, x), native units), `classical.npy` the classical one that is
always kept beside it. Further volumes (contrasts, phases, repetitions, sets) carry their index: `volume_001.npy`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from edge.atomic import write_atomically
from edge.dicom import write_series
from edge.exam import Exam
from edge.preview import scan_preview
from recon.arrays import Array
from recon.errors import DeliveryError
from recon.scan import Scan, Volume

SERIES_NUMBER = {"network": 0, "classical": 1, "super-resolved": 2}  # within the ten numbers that each volume has


@dataclass(frozen=True)
class Results:
    """Where and for whom the results of one scan are written."""

    folder: Path
    scan: Scan
    exam: Exam
    received_at: datetime | None = None

    def write_volumes(self, volumes: Mapping[str, Volume], index: int, contrast: int) -> dict[str, Any]:
        """Write the series of one volume of the scan, its number `index`, and return what the report says of them.

        volumes: by series, "classical" always among them; "network" leads where there is one.
        Raises DeliveryError where the disk does not take it.
        """
        suffix = f"_{index:03d}" if index else ""
        lead = "network" if "network" in volumes else "classical"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            said = {series: self._write_series(volume, series, index, contrast) for series, volume in volumes.items()}
            write_atomically(self.folder / f"classical{suffix}.npy", _npy(volumes["classical"].data))
            write_atomically(self.folder / f"volume{suffix}.npy", _npy(volumes[lead].data))
            if index == 0:
                scan_preview(self.folder / "preview.png", volumes[lead])
        except OSError as error:
            raise DeliveryError(f"the results cannot be written: {error.strerror}") from error
        volume = volumes[lead]
        return {
            "index": index,
            "file": f"volume{suffix}.npy",
            "shape": list(volume.data.shape),
            "spacing_mm": [round(mm, 6) for mm in volume.geometry.spacing_mm],
            "geometry_known": volume.geometry.is_known,
            **said[lead],
            "classical": {"file": f"classical{suffix}.npy", **said["classical"]},
        }

    def _write_series(self, volume: Volume, series: str, index: int, contrast: int) -> dict[str, Any]:
        folder = self.folder / "dicom" / (f"{series}_{index:03d}" if index else series)
        files = write_series(
            volume,
            self.scan,
            self.exam,
            series,
            folder,
            series_number=10 * index + SERIES_NUMBER[series] + 1,
            received_at=self.received_at,
            image_index=index,
            contrast=contrast,
        )
        provenance = volume.provenance
        return {
            "series": series,
            "dicom": f"dicom/{folder.name}",
            "dicom_files": len(files),
            "method": provenance.method,
            "steps": list(provenance.steps),
            "model_sha256": provenance.model_sha256,
            "backend": provenance.backend,
        }

    def write_report(self, report: dict[str, Any]) -> None:
        """Write report.json; raises DeliveryError where the disk does not take it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
        except OSError as error:
            raise DeliveryError(f"the report cannot be written: {error.strerror}") from error


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
