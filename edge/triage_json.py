"""Findings as JSON: the same fields in events, reports and `findings.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from triage.findings import Finding, Findings, Measurement, State


def findings_json(findings: Findings) -> list[dict[str, Any]]:
    """Return each finding as JSON values; what was not looked at is null."""
    return [_finding(each) for each in findings.findings]


def findings_from_json(said: Sequence[Mapping[str, Any]]) -> Findings:
    """Return what `findings_json` made of findings, as far as `fuse` needs it; without measurements and places."""
    return Findings(
        tuple(
            Finding(
                each["finding"],
                State(each["state"]),
                each["why"],
                each["probability"],
                tuple(each["conformal"]),
                contrast=each["contrast"] or "",
            )
            for each in said
        )
    )


def measurements_json(measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    """Return each measurement, by name: value, interval (95 %), why where there is none, and side where it has one."""
    return {
        name: {
            "value": _number(each.value),
            "interval": None if each.interval is None else [_number(v) for v in each.interval],
            "why": each.reason,
            **({"side": each.side} if each.side else {}),
        }
        for name, each in measurements.items()
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "finding": finding.label,
        "state": finding.state.value,
        "probability": _number(finding.probability),
        "conformal": list(finding.conformal),
        "alpha": finding.alpha,
        "why": finding.reason,
        "evidence": finding.evidence or None,
        "contrast": finding.contrast or None,
        "volume_ml": _number(finding.volume_ml),
        "box_mm": None if finding.box_mm is None else [[round(v, 2) for v in corner] for corner in finding.box_mm],
        "key_slice": finding.key_slice,
        "volume": finding.volume,
        "model": finding.model or None,
        "model_sha256": finding.model_sha256 or None,
        "operating_point": finding.operating_point or None,
    }


def _number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
