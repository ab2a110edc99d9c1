"""CARD.md: what is known of a super-resolution network, from its card and the record of its benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

METHODS = ("sinc", "cubic", "self-taught", "network")


def card_page(card: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the page; raises ValueError where the record was made with other weights."""
    results = record["results"]
    if results["model_sha256"] != card["sha256"]:
        raise ValueError("the record was made with other weights; run benchmarks.super_resolution again")
    trained = card["training"]
    lines = [
        f"# {card['name']} {card['version']}",
        "",
        "A second, synthetic volume with finer voxels beside the measured one. **Not for diagnostic use.** What was",
        "measured is put back by projection in the graph; only frequencies beyond the measured ones are estimated.",
        "",
        f"sha256 `{card['sha256']}`, {card['parameters']:,} parameters, ONNX opset {card['opset']}, float32.",
        f"Trained for {trained['minutes']:g} minutes ({trained['steps']:,} steps) on {trained['volumes']} volumes of "
        f"{trained['subjects']} subjects; {trained['set']}.",
        "",
        f"Figures: `python -m benchmarks.super_resolution`, {record['at'][:10]}, commit {record['commit']}, on",
        "subjects that no training saw. Intervals are 95 %, by bootstrap over slices: there are too few subjects.",
        "",
        "## Within the plane, × 2",
        "",
        *_table(
            ("contrast", "subjects", "slices", "PSNR gain on sinc (dB)", "SSIM", "HFEN", "ring cut-off", "in-band"),
            (
                (
                    row["contrast"],
                    row["subjects"],
                    row["slices"],
                    f"{row['psnr_gain']:+.2f} ({_interval(row['psnr_gain_95'])})",
                    f"{row['sinc']['ssim']:.4f} → {row['network']['ssim']:.4f}",
                    f"{row['sinc']['hfen']:.3f} → {row['network']['hfen']:.3f}",
                    f"{row['sinc']['cut_off']:.2f} → {row['network']['cut_off']:.2f}",
                    f"{row['in_band']:.1e}",
                )
                for row in results["summary"]
            ),
        ),
        "",
        "The ring cut-off is where Fourier ring correlation with the truth falls below 0.5, in units of the highest",
        "measured frequency along an axis.",
        "",
        "## Thinner slices",
        "",
        *_table(
            ("volume", "thinner", "PSNR gain on interpolation (dB)", "SSIM", "HFEN"),
            (
                (
                    row["name"],
                    f"× {row['n_thin']}",
                    f"{row['psnr_gain']:+.2f}",
                    f"{row['interpolated']['ssim']:.4f} → {row['network']['ssim']:.4f}",
                    f"{row['interpolated']['hfen']:.3f} → {row['network']['hfen']:.3f}",
                )
                for row in results["through_plane"]
            ),
        ),
        "",
        "## Lesions",
        "",
        *_lesions(results["lesions"]),
        "",
        "## What is no head",
        "",
        *_table(
            ("image", "refused", "estimated share of energy if forced"),
            (
                (row["name"], "yes" if row["refused"] else "no", f"{100 * row['share']:.3g} %")
                for row in results["null_tests"]
            ),
        ),
        "",
        "## Limits",
        "",
        *(f"- {each}" for each in card["limits"]),
        "",
    ]
    return "\n".join(lines)


def _lesions(found: Mapping[str, Any]) -> list[str]:
    rows = _table(
        ("kind", "mm", "n", "detectability in the input (AUC)", "super-resolved", "difference"),
        (
            (
                row["kind"],
                f"{row['diameter_mm']:g}",
                row["n"],
                f"{row['input']:.3f}",
                f"{row['network']:.3f}",
                f"{row['difference']:+.3f} ({_interval(row['difference_95'], 3)})",
            )
            for row in found["detectability"]
        ),
    )
    false = found["false_structures"]
    words = (
        f"False structures: {false['found']} in {false['volumes']} lesion-free volumes "
        f"({_interval(false['per_100_95'])} per 100, 95 %); sinc interpolation: {false['sinc']}."
    )
    return [*rows, "", words]


def _interval(values: Iterable[float], digits: int = 2) -> str:
    low, high = values
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    heads = list(heads)
    body = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *body]
