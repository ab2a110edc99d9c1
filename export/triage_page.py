"""A model card to read: CARD.md from card.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = {
    "slices": "slices",
    "exams": "exams",
    "simulated_slices": "simulated slices",
    "simulated_exams": "exams of simulated heads",
}


def write_page(card: dict[str, Any], path: Path) -> None:
    """Write the card's figures as a page."""
    lines = [
        f"# {card['name']} {card['version']}",
        "",
        f"{card['task'][0].upper()}{card['task'][1:]}. **Not for {card['not_for']}.**",
        "",
        "Written by `python -m export.triage_card`; every",
        "figure is measured on cases that were not trained on, with their 95 % interval (Clopper–Pearson; DeLong). "
        "An operating\npoint was chosen on other patients than those it is quoted for: held-out patients are halved 50 "
        "times, each half\nat the point of the other; hits are the mean, rounded down. What ships was chosen on all of "
        "them.",
        "",
        f"sha256 `{card['sha256']}`, {card['network']['parameters']:,} parameters, ONNX opset {card['opset']}.",
        "",
        "| contrast | evidence | cases | n with / without | AUC | sensitivity | specificity | peak inside | Dice |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for contrast, each in card["contrasts"].items():
        for key, name in WORDS.items():
            found = each["metrics"].get(key)
            if found and found["positive"] + found["negative"]:
                lines.append(f"| {contrast} | {each['evidence']} | {name} ({found['of']}) | {_row(found)} |")
    if "cross_validation" in card:
        found = card["cross_validation"]
        title = f"slices (patients), cross-validated over {found['folds']} folds"
        lines.append(f"| flair | real | {title} | {_row(found)} |")
    lines += _by_size(card) + _by_visibility(card) + _by_factor(card) + _checks(card)
    lines += ["", "**Data.**", ""]
    for each in card["data"]:
        held = f", {each['held_out_subjects']} held out"
        lines.append(f"- {each['what']} ({each['licence']}): {each['planes']} planes of {each['subjects']}{held}")
    lines += ["", "**Not like the training data** (share of planes beyond the limit of likeness):", ""]
    for contrast, each in card["contrasts"].items():
        shares = ", ".join(f"{name} {share:.0%}" for name, share in each["ood"]["foreign_beyond"].items())
        lines.append(f"- {contrast}: held-out planes {each['ood']['held_out_beyond']:.1%}; {shares}")
    lines += ["", "**Limits.**", "", *(f"- {each}" for each in card["limits"]), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _by_size(card: dict[str, Any]) -> list[str]:
    lines = ["", "Sensitivity by the finding's area in the slice:", "", "| contrast | cases | mm² | n | sensitivity |"]
    lines.append("|---|---|---|---|---|")
    for contrast, each in card["contrasts"].items():
        for key, name in WORDS.items():
            for size in each["metrics"].get(key, {}).get("by_size", []):
                lines.append(f"| {contrast} | {name} | {_size(size)} |")
    found = card.get("cross_validation", {}).get("by_size", [])
    return lines + [f"| flair | cross-validated | {_size(size)} |" for size in found]


def _by_visibility(card: dict[str, Any]) -> list[str]:
    rows = card.get("cross_validation", {}).get("by_visibility", [])
    if not rows:
        return []
    text = (
        "Cross-validated sensitivity by how far the finding's brightness is from its surroundings' (in their scatter):"
    )
    head = ["| contrast | from | n | sensitivity |", "|---|---|---|---|"]
    return ["", text, "", *head] + [
        f"| flair | {row['from']:g} | {row['cases']} | {_value(row['sensitivity'])} |" for row in rows
    ]


def _by_factor(card: dict[str, Any]) -> list[str]:
    rows = [
        f"| {contrast} | {'–'.join(str(v) for v in dict.fromkeys(row['acceleration']))} | {_row(row)} |"
        for contrast, each in card["contrasts"].items()
        for row in each["metrics"].get("reconstructed", [])
    ]
    if not rows:
        return []
    head = ["| contrast | R | n with / without | AUC | sensitivity | specificity | peak inside | Dice |"]
    text = "Patients' slices as this system reconstructs them (simulated coils, noise and missing lines):"
    return ["", text, "", *head, "|---|---|---|---|---|---|---|---|", *rows]


def _checks(card: dict[str, Any]) -> list[str]:
    lines = []
    for contrast, each in card["contrasts"].items():
        found = each.get("checks")
        if found:
            low, middle, high = found["rim_score_shift"]
            lines += [
                "",
                f"**Does it see the finding ({contrast})?** AUC as published {_value(found['auc_as_published'])}; with "
                f"the finding blanked out {_value(found['auc_blanked'])}; image statistics of the blanked slices "
                f"{found['auc_blanked_of_image_statistics']}. Storing values inside another patient's outline again "
                f"moves the score by {middle} ({low} to {high}).",
            ]
    return lines


def _value(found: list[float]) -> str:
    return f"{found[0]:.3f} ({found[1]:.3f}–{found[2]:.3f})"


def _row(found: dict[str, Any]) -> str:
    names = ("auc", "sensitivity", "specificity", "peak_inside")
    values = [_value(found[name]) if name in found else "–" for name in names]
    dice = f"{found['median_dice']:.2f}" if "median_dice" in found else "–"
    return " | ".join((f"{found['positive']} / {found['negative']}", *values, dice))


def _size(size: dict[str, Any]) -> str:
    return f"{size['from_mm2']}– | {size['cases']} | {_value(size['sensitivity'])}"
