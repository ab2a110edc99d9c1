"""Our side of a comparison: the chain that serves a scanner, run on a file, and the k-space that peers are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge.chain import Chain
from edge.header import read_header
from edge.intake import to_acquisition
from edge.model import RECONSTRUCTION
from edge.rawfile import RawFile
from edge.recon_file import readouts
from edge.results import Results
from edge.spool import new_scan_id
from edge.supply import Supply
from recon.arrays import Array
from recon.errors import ModelError
from recon.fourier import resize_centred, to_image, to_kspace
from recon.network import Network
from recon.quality import Verdict
from recon.scan import Role, Volume

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "kspace"


class _Kept(Results):
    """Results that are kept in memory."""

    kept: list[dict[str, Volume]]

    def write_volumes(
        self, volumes: Mapping[str, Volume], index: int, contrast: int, verdict: Verdict | None = None
    ) -> dict[str, Any]:
        self.kept.append(dict(volumes))
        return {"method": volumes["classical"].provenance.method}

    def judge_again(self, index: int, verdict: Verdict | None) -> dict[str, Any]:
        """What was kept stays as it is."""
        return {"method": self.kept[index]["classical"].provenance.method}

    def write_quality_note(self, verdict: Verdict | None) -> None:
        """Nothing is written."""

    def write_report(self, report: dict[str, Any]) -> None:
        """Nothing is written."""


def reconstruct(raw: RawFile, network: Network | None = None) -> list[dict[str, Volume]]:
    """Return each volume of a scan by series: "classical", and "network" where one is given and may serve."""
    return run_chain(raw, network)[0]


def run_chain(raw: RawFile, network: Network | None) -> tuple[list[dict[str, Volume]], dict[str, Any]]:
    """Return the volumes of a scan and the report on it, in memory. Raises ScanError where nothing came of it."""
    scan, exam = read_header(raw.header, new_scan_id())
    results = _Kept(Path(), scan, exam)
    object.__setattr__(results, "kept", [])
    chain = Chain(results, method="auto", network=network)
    for readout in readouts(raw):
        chain.feed(readout)
    report = chain.finish("complete", "", lambda: readouts(raw))
    return results.kept, report


def shipped_network() -> Network | None:
    """Return the network that comes with this version, or None where there is none."""
    try:
        return Supply(RECONSTRUCTION, "cpu").network()
    except ModelError:
        return None


def kspaces(raw: RawFile) -> list[Array]:
    """Return complex64 (slice, coil, ky, kx) of each repetition by plain placement, 0 where not measured."""
    scan, _ = read_header(raw.header, "")
    encoding = scan.encodings[0]
    acquisitions = (to_acquisition(r.header, r.samples) for r in readouts(raw) if r.samples is not None)
    lines = [a for a in acquisitions if a.role is not Role.NOISE]
    shape = (1 + max(a.key.slice for a in lines), len(lines[0].samples), encoding.encoded_matrix.y)
    n_x = encoding.recon_matrix.x
    out = np.zeros((1 + max(a.key.repetition for a in lines), *shape, n_x), np.complex64)
    for a in lines:
        line = to_kspace(resize_centred(to_image(a.samples, axes=(1,)), 1, n_x), axes=(1,))
        out[a.key.repetition, a.key.slice, :, a.step_1] = line
    return list(out)
