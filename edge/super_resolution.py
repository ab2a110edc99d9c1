"""A scan's super-resolved volumes: made from the leading ones, written beside them, marked as what they are.

`super_resolved.npy` (float32 (slice, y, x), native units) and `super_resolved_estimated.npy`, the part of it that no
measurement stands behind; DICOM series of their own; `super_resolved.png`, always beside the measured image. Nothing
reads them back: triage refuses them by type and by tag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge.atomic import write_atomically
from edge.exam_triage import contrast_of_scan
from edge.preview import Panel, slice_panel, write_preview
from edge.results import Results, npy
from edge.window import display_window
from recon.errors import BackendError, DeliveryError, ModelError
from recon.fine_grid import profile_weights
from recon.fourier import resize_centred, to_kspace
from recon.quality import Level
from recon.scan import Volume
from recon.style import render
from recon.superres import Steps, SuperResolved, image_scale, refusal
from recon.superres_card import Refiner

SERIES, STYLED = "super-resolved", "super-resolved-style"
MOST_SHOWN = 3
NOTICE = "synthetic: detail beyond the measured resolution is estimated; not for diagnostic use"


@dataclass(frozen=True)
class Choice:
    """What is asked for: slices `n_thin` times thinner (1: as they are), and a style of `style`, 0 for none."""

    n_thin: int = 1
    style: float = 0.0


def super_resolve_scan(
    results: Results,
    refiner: Refiner | ModelError | BackendError,
    choice: Choice,
    verdict: str,
    on_step: Callable[[int, int], None] = lambda done, of: None,
    on_volume: Callable[[int, int, Volume], None] = lambda index, contrast, volume: None,
) -> list[dict[str, Any]]:
    """Super-resolve the leading volumes of a scan; return what the report says of each, made or refused with why.

    refiner: the network, or why there is none. verdict: its level, "" where there is none.
    on_step: called with the steps done and all of them, after each plane. on_volume: called with index, contrast and
    the volume once it is on disk.
    Raises DeliveryError where the disk does not take it.
    """
    said = []
    for index, lead, volume, contrast in results.leading_volumes():
        name = contrast_of_scan(results, contrast)
        about: dict[str, Any] = {"volume": index, "of": lead, "contrast": name or None}
        why = ""
        made: SuperResolved | None = None
        if verdict == Level.UNTRUSTED.value:
            why = "the scan is untrusted"
        elif isinstance(refiner, Exception):
            why = str(refiner)
        else:
            why = refusal(volume, refiner, name, choice.n_thin)
            if not why:
                judged = _with_step(volume, f"verdict on the scan: {verdict}") if verdict else volume
                made, why = _made(judged, refiner, choice.n_thin, on_step)
        if made is None:
            said.append({**about, "state": "refused", "why": why})
            continue
        said.append({**about, "state": "made", **_write(results, index, lead, contrast, volume, made, choice.style)})
        on_volume(index, contrast, made.volume)
    return said


def _with_step(volume: Volume, words: str) -> Volume:
    made = volume.provenance
    return replace(volume, provenance=replace(made, steps=(*made.steps, words)))


def _made(
    volume: Volume, refiner: Refiner, n_thin: int, on_step: Callable[[int, int], None]
) -> tuple[SuperResolved | None, str]:
    steps = Steps(volume, refiner, n_thin)
    try:
        for done in steps:
            on_step(done, steps.n_steps)
    except BackendError as error:
        return None, str(error)
    return steps.result(), ""


def _write(
    results: Results, index: int, lead: str, contrast: int, measured: Volume, made: SuperResolved, style: float
) -> dict[str, Any]:
    """Write all files of one super-resolved volume and return what the report says of it."""
    suffix = f"_{index:03d}" if index else ""
    folder = results.folder
    names = {
        "file": f"super_resolved{suffix}.npy",
        "estimated": f"super_resolved_estimated{suffix}.npy",
        "preview": f"super_resolved{suffix}.png",
    }
    styled = None
    try:
        write_atomically(folder / names["file"], npy(made.volume.data))
        write_atomically(folder / names["estimated"], npy(made.estimated))
        said = results.write_series(made.volume, SERIES, index, contrast, None)
        if style > 0:
            scale = image_scale(measured.data)
            rendered = render(made.volume, style, scale)
            file = f"super_resolved_style{suffix}.npy"
            write_atomically(folder / file, npy(rendered.data))
            dicom = results.write_series(rendered, STYLED, index, contrast, None)
            styled = {"strength": style, "scale": scale, "file": file, "dicom": dicom["dicom"]}
        draw(folder / names["preview"], measured, made, None if styled is None else rendered)
    except OSError as error:
        raise DeliveryError(f"the super-resolved volume cannot be written: {error.strerror}") from error
    return {
        "notice": NOTICE,
        "file": names["file"],
        "shape": list(made.volume.data.shape),
        "spacing_mm": [round(mm, 6) for mm in made.volume.geometry.spacing_mm],
        "factors": list(made.factors),
        "estimated": {"file": names["estimated"], "share_of_energy": made.share},
        "in_band_difference": in_band_difference(measured, made),
        "noise": round(made.noise, 6),
        "style": styled,
        "preview": names["preview"],
        **said,
    }


def in_band_difference(measured: Volume, made: SuperResolved) -> float:
    """Return ‖k − m‖ / ‖m‖ over the measured frequencies, the largest of any slice.

    k: the result's k-space; m: the measured volume's. Of a result with thinner slices the mean of each slice's parts is
    compared, after the slice profile; see `recon.superres`.
    """
    fine = made.volume.data.astype(np.float64)
    n_thin = made.factors[0]
    if n_thin > 1:
        fine = np.tensordot(profile_weights(len(measured.data), n_thin), fine, 1)
    worst = 0.0
    for before, after in zip(measured.data, fine, strict=True):
        wanted = to_kspace(before.astype(np.complex128), (0, 1))
        found = to_kspace(after.astype(np.complex128), (0, 1)) / 2
        found = resize_centred(resize_centred(found, 0, before.shape[0]), 1, before.shape[1])
        size = float(np.linalg.norm(wanted))
        worst = max(worst, float(np.linalg.norm(found - wanted)) / size if size else 0.0)
    return worst


def draw(path: Path, measured: Volume, made: SuperResolved, styled: Volume | None) -> None:
    """Draw some slices: measured, super-resolved, styled where there is one, and what of it is estimated."""
    n = measured.geometry.n_slices
    shown = sorted({int((k + 0.5) * n / min(n, MOST_SHOWN)) for k in range(min(n, MOST_SHOWN))})
    window = display_window(measured.data)
    high = float(np.percentile(np.abs(made.estimated), 99.8)) or 1.0
    rows: list[list[Panel]] = []
    for index in shown:
        fine = min(made.factors[0] * index + made.factors[0] // 2, len(made.estimated) - 1)
        row = [
            slice_panel(measured, index, f"Measured · {index + 1} / {n}", window),
            slice_panel(made.volume, fine, "AI-SR: synthetic", window),
        ]
        if styled is not None:
            row.append(slice_panel(styled, fine, "AI-SR, 7 T style: synthetic", window))
        map_of = Volume(np.abs(made.estimated), made.volume.geometry, made.volume.provenance)
        panel = slice_panel(map_of, fine, "Estimated part")
        percent = 100 * panel.image / (window[1] or 1.0)
        row.append(
            Panel(
                panel.label, percent, panel.spacing_mm, (0, 100 * high / (window[1] or 1.0)), "error", "of white", " %"
            )
        )
        rows.append(row)
    subtitle = f"{100 * made.share:.2g} % of the energy is estimated; all measured k-space is the measured one"
    write_preview(
        path, rows, "Super-resolved beside measured", NOTICE, subtitle, panel_px=480 if len(shown) == 1 else 400
    )
