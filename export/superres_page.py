"""CARD.md: what is known of a super-resolution network, from its card and the record of its benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LEAST_GAIN_DB, LEAST_FURTHER = 1.0, 0.2  # on zero-filling


def card_page(card: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the page; raises ValueError where the record was made with other weights."""
    results = record["results"]
    if results["model_sha256"] != card["sha256"]:
        raise ValueError("the record was made with other weights; run benchmarks.super_resolution again")
    trained, cost = card["training"], results["cost"]
    counts = ", ".join(f"{n} of {name}" for name, n in trained["single_slices"].items())
    slices = f" and single slices of patients ({counts})" if counts else ""
    sets = "; ".join(f"{each['what']}, {each['licence']}" for each in trained["sets"].values())
    lines = [
        f"# {card['name']} {card['version']}",
        "",
        "A second, synthetic volume with finer voxels beside the measured one. **Not for diagnostic use.** What was",
        "measured is put back by projection in the graph; only frequencies beyond the measured ones are estimated.",
        "",
        f"sha256 `{card['sha256']}`, {card['parameters']:,} parameters, ONNX opset {card['opset']}, float32.",
        f"Trained for {trained['minutes']:g} minutes ({trained['steps']:,} steps) on {trained['volumes']} volumes of "
        f"{trained['subjects']} subjects{slices}. Sets: {sets}.",
        "",
        f"Figures: `python -m benchmarks.super_resolution`, {record['at'][:10]}, commit {record['commit']}, on",
        "subjects that no training saw. Intervals are 95 %, by bootstrap over slices: there are too few subjects.",
        "",
        "## Within the plane, × 2",
        "",
        *_table(
            (
                *("contrast", "subjects", "slices", "PSNR gain on sinc (dB)", "SSIM", "HFEN"),
                *("cut-off, rings", "at 1/7", "along axes", "in-band"),
            ),
            (
                (
                    row["contrast"],
                    row["subjects"],
                    row["slices"],
                    f"{row['psnr_gain']:+.2f} ({_interval(row['psnr_gain_95'])})",
                    f"{row['sinc']['ssim']:.4f} → {row['network']['ssim']:.4f}",
                    f"{row['sinc']['hfen']:.3f} → {row['network']['hfen']:.3f}",
                    *(
                        f"{row['sinc'][name]:.2f} → {row['network'][name]:.2f} ({100 * row['further'][name]:+.0f} %)"
                        for name in ("cut_off", "cut_off_seventh", "cut_off_axes")
                    ),
                    f"{row['in_band']:.1e}",
                )
                for row in results["summary"]
            ),
        ),
        "",
        "Cut-offs: where Fourier ring correlation with the truth falls below 0.5 (and 1/7), in units of the highest",
        "measured frequency along an axis; the corners of the measured square reach to 1.41, so beside rings there is",
        "the correlation within 15° of the axes. HFEN is an error: less is better. In-band: the largest relative",
        "difference of measured k-space of any slice.",
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
        "## Cost",
        "",
        f"{cost['slice']} with projection, {cost['backend']}, two threads: median {cost['median_ms']:g} ms, p95 "
        f"{cost['p95_ms']:g} ms, least {cost['min_ms']:g} ms of {cost['n']}, on a machine of two cores with a load of",
        f"{cost['load'][0]:g} from other programs.",
        "",
        "## What falls short",
        "",
        *(_short(results["summary"]) or ["- nothing of what was asked for"]),
        "",
        "## Limits",
        "",
        *(f"- {each}" for each in card["limits"]),
        "",
    ]
    return "\n".join(lines)


def _short(summary: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return in words where what was asked for is not reached."""
    said = []
    for row in summary:
        if row["psnr_gain"] < LEAST_GAIN_DB:
            said.append(f"- {row['contrast']}: {row['psnr_gain']:+.2f} dB; {LEAST_GAIN_DB:+.1f} was asked for")
        if row["further"]["cut_off"] < LEAST_FURTHER:
            words = f"the ring cut-off at 0.5 is {100 * row['further']['cut_off']:.0f} % further"
            said.append(f"- {row['contrast']}: {words}; {100 * LEAST_FURTHER:.0f} % was asked for")
    return said


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
        f"False structures: {false['found']} in {false['volumes']} heads, two of eight slices, the others single "
        f"slices of patients ({_interval(false['per_100_95'])} per 100, 95 %); sinc interpolation: {false['sinc']}."
    )
    return [*rows, "", words]


def _interval(values: Iterable[float], digits: int = 2) -> str:
    low, high = values
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    heads = list(heads)
    body = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *body]
