"""Simulated scans through reconstruction and triage, by contrast, acceleration and noise; what undersampling changes.

Every head is scanned once at each SNR, fully sampled, and lines of that scan are left out: the scans of a head at one
SNR share head, finding, noise and what was read. Sensitivity is of heads with the finding, specificity and the area
under the curve are against heads without any. A flip is a flag of the undersampled image, trusted, that is *not
flagged* on the fully sampled one, or the other way round.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.diagnostic import area_under_curve, proportion
from edge.rawfile import open_raw
from edge.recon_file import reconstruct_file
from edge.simulate import simulate_file
from edge.undersample import undersample
from recon.contrast import CONTRASTS
from recon.protocol import Protocol
from recon.quality import Level
from triage.findings import State

ACCELERATIONS = (1, 2, 4, 6, 8)
SNRS = (60.0, 25.0, 12.0)
SCANNED = (
    ("infarct", "flair"),
    ("none", "flair"),
    ("bleed", "flair"),
    ("mass", "flair"),
    ("bleed", "t2star"),
    ("none", "t2star"),
    ("infarct", "dwi"),
    ("none", "dwi"),
)
LABEL = {"infarct": "infarct", "bleed": "haemorrhage", "mass": "mass", "none": ""}
FIRST_SEED = 700
N_HEADS = 3  # of each kind and contrast
SIZE: dict[str, Any] = {"matrix": (128, 128), "n_slices": 12}
QUICK: dict[str, Any] = {"matrix": (96, 96), "n_slices": 9}
N_CALIBRATION = 24  # as `scanside recon` has it

Row = dict[str, Any]


def scan_heads(
    n_heads: int, accelerations: Sequence[int], snrs: Sequence[float], is_quick: bool, path: Path | None
) -> dict[str, Any]:
    """Return what triage says of `n_heads` heads of each kind at each acceleration and SNR.

    path: rows so far, JSON lines; those in it are not scanned again, new ones are added.
    """
    known: dict[str, Row] = {}
    if path is not None and path.is_file():
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        known = {_key(row): row for row in rows}
    wanted: list[str] = []
    for seed in range(FIRST_SEED, FIRST_SEED + n_heads):
        for kind, contrast in SCANNED[: 2 if is_quick else None]:
            for snr in snrs:
                head = {"seed": seed, "kind": kind, "contrast": contrast, "snr": snr}
                keys = {each: _key({**head, "acceleration": each}) for each in accelerations}
                missing = [each for each, key in keys.items() if key not in known]
                for row in _scans(head, missing, QUICK if is_quick else SIZE) if missing else ():
                    known[_key(row)] = row
                    if path is not None:
                        with path.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
                wanted += keys.values()
    return {"evidence": "simulated", **summary([known[key] for key in wanted])}


def _key(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("seed", "kind", "contrast", "snr", "acceleration"))


def _scans(head: Row, accelerations: Sequence[int], size: dict[str, Any]) -> Iterator[Row]:
    """Yield what triage says of one head at one SNR, by acceleration."""
    protocol = Protocol(contrast=CONTRASTS[head["contrast"]], acceleration=1, snr=head["snr"], **size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.h5"
        simulate_file(path, protocol, head["kind"], head["seed"])
        for acceleration in accelerations:
            raw = undersample(open_raw(path), acceleration, N_CALIBRATION)
            report = reconstruct_file(raw, Path(folder) / "out", "auto", is_shown=False)
            found = report["findings"]
            yield {
                **head,
                "acceleration": acceleration,
                "verdict": report["quality"]["verdict"],
                "states": {each["finding"]: each["state"] for each in found},
                "probability": {each["finding"]: each["probability"] for each in found},
                "triage_s": report["stage_ms"].get("triage", 0.0) / 1e3,
            }


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return figures of each finding on each contrast by acceleration and SNR, flips, and the rows that were wrong."""
    factors, levels = sorted({row["acceleration"] for row in rows}), sorted({row["snr"] for row in rows})
    cells: dict[str, Any] = {}
    for kind, contrast in dict.fromkeys((row["kind"], row["contrast"]) for row in rows):
        label = LABEL[kind]
        if not label:
            continue
        some = [row for row in rows if row["contrast"] == contrast]
        by_factor = [(f"R {r}", [row for row in some if row["acceleration"] == r]) for r in factors]
        by_level = [(f"SNR {snr:g}", [row for row in some if row["snr"] == snr]) for snr in levels]
        both = [
            (f"{name}, SNR {snr:g}", [row for row in of if row["snr"] == snr])
            for name, of in by_factor
            for snr in levels
        ]
        cells[f"{label} on {contrast}"] = {name: _figures(of, label) for name, of in (*by_factor, *by_level, *both)}
    times = [row["triage_s"] for row in rows]
    return {
        "heads": len({(row["seed"], row["kind"], row["contrast"]) for row in rows}),
        "scans": len(rows),
        "by_finding": cells,
        "flips": _flips(rows, factors, levels),
        "wrong": [
            _short(row, label) for row in rows for label, state in row["states"].items() if _is_wrong(row, label, state)
        ],
        "triage_s": {"median": float(np.median(times)), "most": max(times)},
    }


def _figures(rows: list[Row], label: str) -> dict[str, Any]:
    """Return sensitivity, specificity and area under the curve of a finding; what was not assessed counts as missed."""
    ill = [row for row in rows if LABEL[row["kind"]] == label]
    well = [row for row in rows if row["kind"] == "none"]
    other = [row for row in rows if row not in ill and row not in well]
    scored = [row for row in (*ill, *well) if row["probability"][label] is not None]
    score = np.array([row["probability"][label] for row in scored])
    return {
        "sensitivity": proportion(_count(ill, label, State.FLAGGED), len(ill)),
        "specificity": proportion(len(well) - _count(well, label, State.FLAGGED), len(well)),
        "not_flagged": proportion(_count(well, label, State.NOT_FLAGGED), len(well)),
        "auc": area_under_curve(score, np.array([row["kind"] != "none" for row in scored], bool)),
        "flagged_where_another_is": proportion(_count(other, label, State.FLAGGED), len(other)),
        "not_assessed": proportion(_count([*ill, *well], label, State.NOT_ASSESSED), len(ill) + len(well)),
        "trusted": proportion(sum(row["verdict"] == Level.TRUSTED.value for row in rows), len(rows)),
    }


def _count(rows: list[Row], label: str, state: State) -> int:
    return sum(row["states"][label] == state.value for row in rows)


def _flips(rows: list[Row], factors: list[int], levels: list[float]) -> dict[str, Any]:
    """Return how many answers of trusted scans turned round against the fully sampled one, and which."""
    full = {(row["seed"], row["kind"], row["contrast"], row["snr"]): row for row in rows if row["acceleration"] == 1}
    assessed = {State.FLAGGED.value, State.NOT_FLAGGED.value}
    out: dict[str, Any] = {}
    turned = []
    for factor in [each for each in factors if each > 1]:
        for snr in levels:
            pairs = []
            for row in rows:
                if (row["acceleration"], row["snr"], row["verdict"]) == (factor, snr, Level.TRUSTED.value):
                    reference = full[row["seed"], row["kind"], row["contrast"], row["snr"]]["states"]
                    for label, state in row["states"].items():
                        if {state, reference[label]} <= assessed:
                            pairs.append(state != reference[label])
                            turned += [{**_short(row, label), "fully_sampled": reference[label]}] if pairs[-1] else []
            out[f"R {factor}, SNR {snr:g}"] = proportion(sum(pairs), len(pairs))
    hits, n = (sum(each[name] for each in out.values()) for name in ("hits", "n"))
    return {"all": proportion(hits, n), **out, "rows": turned}


def _is_wrong(row: Row, label: str, state: str) -> bool:
    """Return whether a finding is *not flagged* where it is, or flagged where nothing or something else is."""
    wrong = State.NOT_FLAGGED if LABEL[row["kind"]] == label else State.FLAGGED
    return state == wrong.value


def _short(row: Row, label: str) -> Row:
    names = ("seed", "kind", "contrast", "snr", "acceleration", "verdict")
    return {**{name: row[name] for name in names}, "finding": label, "state": row["states"][label],
            "probability": row["probability"][label]}  # fmt: skip
