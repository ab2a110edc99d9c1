"""The folder that ships: `python -m export.superres_card --checkpoint FILE --data DIR --out DIR [--record FILE]`.

Writes model.onnx (checked against PyTorch), likeness.npz, card.json, and from a record of `benchmarks.super_resolution`
that was made with these very weights CARD.md, the same for people.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.onnx import OPSET
from export.slices import SETS
from export.superres_data import NOISE, load_heads, load_patients
from export.superres_likeness import describe_heads, describe_simulated, fit, write_likeness
from export.superres_onnx import check_superres, write_superres
from export.superres_page import card_page
from export.superres_train import load_detail

NAME, VERSION = "scanside-super-resolution", "1"
CONTRASTS = ("t1", "t1ce", "t2", "flair", "pd")
MATRIX = (48, 640)  # convolutions know no size; below it hardly any of a head is resolved, above it memory grows
MOST_NOISE = 0.12  # as `recon.superres.noise_level` sees it, fine detail included
LEAST_SLICES = 5
N_SIMULATED = 4
LIMITS = (
    "What held-out subjects gained was watched while network and loss were chosen, so their figures are a little "
    "optimistic. Training on a GPU is not repeatable to the bit: a fresh run will differ a little.",
    "Resolution recovery, learned from 3 T and 1.5 T images: nothing in it comes from a 7 T scanner.",
    "Detail beyond the measured k-space is a guess, the likeliest by the training images; a structure finer than the "
    "measured voxel may be missing or misshapen. Not for diagnosis, measurement or triage.",
    "No real proton-density volume was at hand: that contrast rests on simulated heads and bent contrasts alone. The "
    "simulated heads that measure have other seeds than the simulated proton-density heads that were trained on, but "
    "are deformed from the same average head by the same simulator: gains on simulated heads, of any contrast, are "
    "far above those on real ones and say little about real proton-density scans.",
    "Few held-out subjects; pathology among them: multiple sclerosis and one old stroke. Other stroke and tumour "
    "patients of the two sets that are measured here were learned from, and both sets were resampled by their makers: "
    "gains on them say less about scans of elsewhere.",
    "Thinner slices were learned from isotropic volumes of which most are T1w, and assume touching slices.",
    "Below 3 T and with strong noise, motion or metal nothing was evaluated; such scans are mostly refused, not all.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(prog="python -m export.superres_card", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="of export.superres_train")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="brain/, stroke_flair/, tumour_t1c/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--record", type=Path, metavar="FILE", help="of benchmarks.super_resolution, for CARD.md")
    parser.add_argument("--keep-likeness", action="store_true", help="keep the likeness.npz that is there")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    card = write_folder(args.checkpoint, args.data, args.out, args.keep_likeness)
    if args.record is not None:
        record = json.loads(args.record.read_bytes())
        (args.out / "CARD.md").write_text(card_page(card, record), "utf-8")


def write_folder(checkpoint: Path, data: Path, out: Path, keep_likeness: bool = False) -> dict[str, Any]:
    """Write model, likeness and card into `out`; return the card. Raises ValueError where the export is unsound."""
    detail, content = load_detail(checkpoint)
    write_superres(detail, out / "model.onnx")
    difference = check_superres(detail, out / "model.onnx")
    heads = load_heads(data, "train")
    if not keep_likeness:
        write_likeness(fit(describe_heads(heads), describe_simulated(N_SIMULATED)), out / "likeness.npz")
    subjects = {each.subject for each in heads}
    by_contrast = {
        contrast: sorted({each.subject for each in heads if each.contrast == contrast})
        for contrast in sorted({each.contrast for each in heads})
    }
    card: dict[str, Any] = {
        "name": NAME,
        "version": VERSION,
        "sha256": _sha256(out / "model.onnx"),
        "likeness_sha256": _sha256(out / "likeness.npz"),
        "task": "twice finer voxels within the plane, two to four times thinner slices; measured content put back",
        "synthetic": True,
        "trained_range": {
            "contrasts": list(CONTRASTS),
            "matrix": list(MATRIX),
            "most_noise": MOST_NOISE,
            "least_slices": LEAST_SLICES,
            "noise_in_training": list(NOISE),
        },
        "training": {
            "steps": content["step"],
            "minutes": round(content["seconds"] / 60, 1),
            "seed": content["seed"],
            "subjects": len(subjects),
            "volumes": len(heads),
            "subjects_by_contrast": by_contrast,
            "single_slices": {each.subject: len(each.voxels) for each in load_patients(data)},
            "sets": {name: {"what": what, "licence": licence} for name, (what, licence) in SETS.items()},
        },
        "parameters": sum(each.numel() for each in detail.parameters()),
        "shape": content["shape"],
        "opset": OPSET,
        "onnx_difference": difference,
        "limits": list(LIMITS),
    }
    (out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return card


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
