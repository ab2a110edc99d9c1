"""What one process tells another of a scan's volumes, so that it can go on: pixels stay in the results folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from edge.header import read_header
from edge.mrd import MessageId, read_bytes
from edge.results import Results
from edge.spool import SpoolReader
from recon.errors import AcquisitionError
from recon.scan import Geometry, Provenance, Volume


def describe(results: Results) -> list[dict[str, Any]]:
    """Return where each leading volume lies and how it was made, as JSON values."""
    return [
        {"index": index, "lead": lead, "contrast": contrast, **_place(volume)}
        for index, lead, volume, contrast in results.leading()
    ]


def recall(scan_id: str, folder: Path, spool: Path, received_at: str, volumes: Iterable[Mapping[str, Any]]) -> Results:
    """Return a scan's results as they were when its volumes were described.

    spool: its stream, for the header. received_at: RFC 3339, "" where nobody knows.
    Raises AcquisitionError where the header is gone or cannot be read, DeliveryError where the stream is.
    """
    reader = SpoolReader(spool)
    try:
        for message in reader.messages():
            if message.id is MessageId.HEADER:
                scan, exam = read_header(read_bytes(reader.buffer, message), scan_id)
                break
        else:
            raise AcquisitionError("the spool holds no header of this scan any more")
    finally:
        reader.close()
    out = Results(folder, scan, exam, datetime.fromisoformat(received_at) if received_at else None)
    for each in volumes:
        out.recall(each["index"], each["lead"], _volume(each), each["contrast"])
    return out


def _place(volume: Volume) -> dict[str, Any]:
    geometry, made = volume.geometry, volume.provenance
    return {
        "geometry": {**asdict(geometry), "origin_mm": geometry.origin_mm.tolist()},
        "provenance": asdict(made),
    }


def _volume(content: Mapping[str, Any]) -> Volume:
    """Return the volume without its pixels."""
    place = dict(content["geometry"])
    for name in ("row_dir", "col_dir", "spacing_mm"):
        place[name] = tuple(place[name])
    geometry = Geometry(**{**place, "origin_mm": np.array(place["origin_mm"])})
    made = dict(content["provenance"])
    provenance = Provenance(**{**made, "steps": tuple(made["steps"])})
    return Volume(np.zeros((geometry.n_slices, 0, 0), np.float32), geometry, provenance)
