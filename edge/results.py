"""A scan's results on disk: volumes as NumPy files and DICOM series, a picture, and the report that names them.

`volume.npy` is the series that leads (float32 (slice, y, x), native units), `classical.npy` the classical one that is
always kept beside it, `network.npy` the network's where it may not lead. Further volumes (contrasts, phases,
repetitions, sets) carry their index: `volume_001.npy`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from edge.atomic import sync_folder, write_atomically
from edge.dicom import write_series
from edge.dicom_quality import quality_note
from edge.exam import Exam
from edge.preview import scan_preview
from recon.arrays import Array
from recon.errors import DeliveryError
from recon.quality import Level, Verdict
from recon.scan import Scan, Volume

SERIES_NUMBER = {
    "network": 0,
    "classical": 1,
    "super-resolved": 2,
    "super-resolved-style": 3,
}  # within the ten numbers that each volume has
_MAX_LEADING = 4  # volumes that triage and super-resolution see: a dynamic scan's repetitions show the same head again


@dataclass(frozen=True)
class _Written:
    """A volume on disk. series: by name, without pixels. lead: which of them is `volume.npy`."""

    series: Mapping[str, Volume]
    lead: str
    contrast: int


@dataclass(frozen=True)
class Results:
    """Where and for whom the results of one scan are written."""

    folder: Path
    scan: Scan
    exam: Exam
    received_at: datetime | None = None
    _written: dict[int, _Written] = field(default_factory=dict, repr=False)

    def write_volumes(
        self, volumes: Mapping[str, Volume], index: int, contrast: int, verdict: Verdict | None = None
    ) -> dict[str, Any]:
        """Write the series of one volume of the scan, its number `index`, and return what the report says of them.

        volumes: by series, "classical" always among them; "network" leads where there is one, unless the verdict is
        untrusted: then the classical series leads, and the network's is kept as `network.npy`.
        Raises DeliveryError where the disk does not take it.
        """
        suffix = f"_{index:03d}" if index else ""
        is_trusted = verdict is None or verdict.level is not Level.UNTRUSTED
        lead = "network" if "network" in volumes and is_trusted else "classical"
        beside = self.folder / f"network{suffix}.npy"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            said = {
                series: self.write_series(volume, series, index, contrast, verdict)
                for series, volume in volumes.items()
            }
            write_atomically(self.folder / f"classical{suffix}.npy", npy(volumes["classical"].data))
            if "network" in volumes and lead != "network":
                write_atomically(beside, npy(volumes["network"].data))
            write_atomically(self.folder / f"volume{suffix}.npy", npy(volumes[lead].data))
            if lead == "network":
                beside.unlink(missing_ok=True)
            if index == 0:
                scan_preview(self.folder / "preview.png", volumes[lead])
        except OSError as error:
            raise DeliveryError(f"the results cannot be written: {error.strerror}") from error
        volume = volumes[lead]
        kept = {series: replace(each, data=each.data[:, :0, :0].copy()) for series, each in volumes.items()}
        self._written[index] = _Written(kept, lead, contrast)
        out = {
            "index": index,
            "file": f"volume{suffix}.npy",
            "shape": list(volume.data.shape),
            "spacing_mm": [round(mm, 6) for mm in volume.geometry.spacing_mm],
            "geometry_known": volume.geometry.is_known,
            **said[lead],
            "classical": {"file": f"classical{suffix}.npy", **said["classical"]},
        }
        if "network" in volumes and lead != "network":
            out["network"] = {"file": beside.name, **said["network"]}
        return out

    def judge_again(self, index: int, verdict: Verdict | None) -> dict[str, Any]:
        """Write a volume that was written before with another verdict; its pixels are read back from disk.

        Returns what the report says of it; raises DeliveryError where it cannot be read or written.
        """
        suffix = f"_{index:03d}" if index else ""
        written = self._written[index]
        try:
            volumes = {
                series: replace(
                    empty, data=np.load(self.folder / f"{'volume' if series == written.lead else series}{suffix}.npy")
                )
                for series, empty in written.series.items()
            }
        except OSError as error:
            raise DeliveryError(f"the results cannot be read: {error.strerror}") from error
        return self.write_volumes(volumes, index, written.contrast, verdict)

    def leading(self) -> Iterator[tuple[int, str, Volume, int]]:
        """Yield index, name of the leading series, its volume without pixels, and contrast, of the first volumes."""
        for index, written in sorted(self._written.items())[:_MAX_LEADING]:
            yield index, written.lead, written.series[written.lead], written.contrast

    def leading_volumes(self) -> Iterator[tuple[int, str, Volume, int]]:
        """Yield index, name of the leading series, its volume read back from disk, and contrast, of the first volumes.

        Raises DeliveryError where one cannot be read.
        """
        for index, lead, empty, contrast in self.leading():
            name = f"volume_{index:03d}.npy" if index else "volume.npy"
            try:
                data = np.load(self.folder / name)
            except OSError as error:
                raise DeliveryError(f"the results cannot be read: {error.strerror}") from error
            yield index, lead, replace(empty, data=data), contrast

    def write_quality_note(self, verdict: Verdict | None) -> None:
        """Write `dicom/quality_note.dcm` where the verdict advises to scan again; raises DeliveryError."""
        path = self.folder / "dicom" / "quality_note.dcm"
        try:
            if verdict is None or not verdict.advice.repeat or not self._written:
                path.unlink(missing_ok=True)
                return
            images = [
                (series, index, volume.geometry.n_slices)
                for index, written in sorted(self._written.items())
                for series, volume in written.series.items()
            ]
            write_atomically(path, quality_note(verdict, images, self.scan, self.exam, self.received_at))
        except OSError as error:
            raise DeliveryError(f"the results cannot be written: {error.strerror}") from error

    def write_series(
        self, volume: Volume, series: str, index: int, contrast: int, verdict: Verdict | None
    ) -> dict[str, Any]:
        """Write one DICOM series of the scan's volume `index` and return what the report says of it. Raises OSError."""
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
            verdict=verdict,
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

    def recall(self, index: int, lead: str, volume: Volume, contrast: int) -> None:
        """Know again of a leading volume that lies in the folder; `volume` is without its pixels."""
        self._written[index] = _Written({lead: volume}, lead, contrast)

    def write_report(self, report: dict[str, Any]) -> None:
        """Write report.json; raises DeliveryError where the disk does not take it."""
        write_report(self.folder, report)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json into `folder`; raises DeliveryError where the disk does not take it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
        sync_folder(folder)  # from here on others rely on all that lies in it
    except OSError as error:
        raise DeliveryError(f"the report cannot be written: {error.strerror}") from error


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report in `folder`; raises DeliveryError where there is none that can be read."""
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DeliveryError("the scan's report cannot be read") from error
    return report


def npy(array: Array) -> bytes:
    """Return the NumPy file that holds `array`."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
