"""The planes that triage networks learn from, made once: `python -m export.triage_images --data DIR --out DIR SET...`.

SET is one of
  stroke         stroke patients' FLAIR slices as published, with their outlines
  stroke-chain   the same, seen by coils, undersampled and reconstructed by the shipped network
  tumour, tumour-chain   post-contrast T1w slices, likewise
  brain          axial planes of brain volumes, nothing outlined
  brain-chain    a share of them, reconstructed
  volumes        the same volumes as they are read at run time, upright and regrouped as a whole, to try networks on
  shapes         axial outlines of the training patients' infarcts at any height, to draw others after
  heads-CONTRAST simulated whole heads (`recon.scanner`) with and without findings, most of them reconstructed
  exams-CONTRAST all slices of such heads, of other seeds: exams to calibrate on
Files of a few dozen planes appear in the folder one by one, so that training may begin while others are being made.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.slices import MIN_FILLED, STROKE_SPACING_MM, TUMOUR_FIELD_MM, tumour_splits
from export.triage_chain import FIELD_MM, MATRIX, SPACING_MM, fine_shape, open_session, place, reconstruct
from recon.arrays import Array
from recon.contrast import CONTRASTS
from recon.errors import ScanError
from recon.head import STORED_TISSUES, Anatomy, make_head
from recon.lesions import FINDINGS, place_lesion
from recon.protocol import Protocol, geometry
from recon.scan import Geometry
from recon.scanner import scan_slice
from triage.preprocess import SIZE, prepare

PER_FILE = 24
HEAD_SEEDS = 10_000  # of training heads; demonstrations and tests use small ones, held-out heads HELD_OUT_SEEDS
HELD_OUT_SEEDS = 50_000
CHAIN_SHARE = 0.7  # of simulated heads
BRAIN_CHAIN_SHARE = 0.35
MIN_SHAPE = 30  # mm²
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@dataclass(frozen=True)
class Label:
    """What a plane is. group: its patient. split: "train" or "val". factor: R of the reconstruction, 0 without one."""

    source: str
    group: str
    split: str
    contrast: str
    finding: str
    row: int = -1
    factor: int = 0
    sigma: float = 0.0


@dataclass(frozen=True, eq=False)
class Plane:
    """image: float16 (y, x), as the network's first channel. mask: bool (y, x), the finding."""

    image: Array
    mask: Array
    label: Label


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and make the sets."""
    parser = argparse.ArgumentParser(prog="python -m export.triage_images", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("sets", nargs="+", metavar="SET")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="brain/, stroke_flair/, tumour_t1c/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder outside of the repository")
    assets = Path("edge/assets")
    parser.add_argument("--network", type=Path, default=assets / "reconstruction" / "model.onnx", metavar="FILE")
    parser.add_argument("--anatomy", type=Path, default=assets / "icbm152_tissue.npz", metavar="FILE")
    parser.add_argument("--heads", type=int, default=48, help="simulated heads a contrast (default %(default)s)")
    parser.add_argument("--first", type=int, default=HEAD_SEEDS, help="seed of the first head (default %(default)s)")
    parser.add_argument("--finding", choices=FINDINGS, help="of all simulated exams (default: each in turn)")
    parser.add_argument("--split", choices=("train", "val"), help="of patients' slices (default: both)")
    parser.add_argument("--limit", type=int, default=1 << 30, help="planes a set")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        write(args.out, f"{name}-{args.seed}-{args.first}", make(name, args), args.limit)


def make(name: str, args: argparse.Namespace) -> Iterator[Plane]:
    """Yield the planes of one set."""
    rng = np.random.default_rng([args.seed, sum(name.encode()), args.first])
    kind, _, detail = name.partition("-")
    session = open_session(args.network) if detail == "chain" or kind in ("heads", "exams") else None
    if kind == "stroke":
        yield from _through(rng, session, _of(args.split, _stroke(args.data / "stroke_flair")))
    elif kind == "tumour":
        yield from _through(rng, session, _of(args.split, _tumours(args.data / "tumour_t1c")))
    elif kind == "brain":
        yield from _brains(rng, session, args.data / "brain")
    elif kind == "volumes":
        yield from _volumes(args.data / "brain")
    elif kind == "shapes":
        yield from _shapes(rng, args.data / "stroke_flair")
    elif kind == "heads":
        yield from _heads(rng, session, args.anatomy, detail, args.first, args.heads)
    elif kind == "exams":
        first = max(args.first, HELD_OUT_SEEDS)
        yield from _exams(rng, session, args.anatomy, detail, first, args.heads, args.finding)
    else:
        raise SystemExit(f"no set called {name!r}")


def write(folder: Path, name: str, planes: Iterator[Plane], limit: int) -> None:
    """Write planes to numbered files, each complete when it appears."""
    kept: list[Plane] = []
    number = total = 0
    for each in planes:
        kept.append(each)
        total += 1
        if len(kept) == PER_FILE or total >= limit:
            _save(folder / f"{name}.{number:04d}.npz", kept)
            kept, number = [], number + 1
        if total >= limit:
            break
    if kept:
        _save(folder / f"{name}.{number:04d}.npz", kept)
    print(f"{name}: {total} planes", flush=True)


def _save(path: Path, planes: list[Plane]) -> None:
    part = path.with_suffix(".part.npz")
    labels = json.dumps([asdict(each.label) for each in planes])
    images = np.stack([each.image for each in planes])
    np.savez_compressed(part, image=images, mask=np.packbits([each.mask for each in planes], axis=-1), labels=labels)
    os.replace(part, path)


def load(paths: Sequence[Path]) -> list[Plane]:
    """Return the planes in files of `write`."""
    found = []
    for path in paths:
        with np.load(path) as content:
            images = content["image"]
            masks = np.unpackbits(content["mask"], axis=-1)[..., : SIZE[1]].astype(bool)
            labels = json.loads(str(content["labels"]))
        found += [Plane(i, m, Label(**each)) for i, m, each in zip(images, masks, labels, strict=True)]
    return found


def to_plane(image: Array, mask: Array | None, spacing_mm: tuple[float, float], label: Label) -> Plane | None:
    """Return one axial slice, anterior up and the patient's right on the left, as a plane; None without enough head."""
    stack = Geometry.from_centres(np.zeros((1, 3)), *AXIAL, image.shape, (5.0, *spacing_mm), 5.0)
    planes = prepare(image[None], stack)
    if not planes.is_usable[0]:
        return None
    shown = np.zeros(planes.inputs.shape[2:], bool)
    if mask is not None and mask.any():
        shown = planes.to_planes(mask[None].astype(np.float32))[0] > 0.5
    return Plane(planes.inputs[0, 0].astype(np.float16), shown, label)


Sliced = tuple[Array, Array, tuple[float, float], Label]


def _of(split: str | None, slices: Iterator[Sliced]) -> Iterator[Sliced]:
    return (each for each in slices if split in (None, each[3].split))


def _through(rng: np.random.Generator, session: Any, slices: Iterator[Sliced]) -> Iterator[Plane]:
    """Yield slices as planes, reconstructed where there is a session."""
    for image, mask, spacing_mm, label in slices:
        if session is None:
            plane = to_plane(image, mask, spacing_mm, label)
        else:
            plane = chained(rng, session, image, mask, spacing_mm, label)
        if plane is not None:
            yield plane


def chained(
    rng: np.random.Generator,
    session: Any,
    image: Array,
    mask: Array,
    spacing_mm: tuple[float, float],
    label: Label,
    acceleration: int | None = None,
    sigma: float | None = None,
) -> Plane | None:
    """Return a slice as it is reconstructed from a simulated scan, as a plane."""
    longest = max(n * mm for n, mm in zip(image.shape, spacing_mm, strict=True))
    field = max(FIELD_MM, 1.02 * longest)
    fine = place(image, spacing_mm, fine_shape(), field)
    found, factor, noise = reconstruct(rng, session, fine, acceleration, sigma)
    seen = place(mask.astype(np.float32), spacing_mm, MATRIX, field) > 0.5
    made = Label(**{**asdict(label), "factor": factor, "sigma": noise})
    scale = field / FIELD_MM * SPACING_MM
    return to_plane(found, seen, (scale, scale), made)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _stroke(folder: Path) -> Iterator[Sliced]:
    with np.load(folder / "axial.npz") as content:
        images = content["image"]
        masks = np.unpackbits(content["lesion"], axis=-1)[..., : images.shape[-1]].astype(bool)
    for row in _rows(folder / "index.csv"):
        number = int(row["row"])
        finding = "infarct" if masks[number].any() else "none"
        group = f"stroke-{row['patient_group']}"
        label = Label("stroke_flair", group, row["suggested_split"], "flair", finding, number)
        yield images[number], masks[number], STROKE_SPACING_MM, label


def _tumours(folder: Path) -> Iterator[Sliced]:
    from PIL import Image

    rows = _rows(folder / "index.csv")
    for number, (row, split) in enumerate(zip(rows, tumour_splits(rows), strict=True)):
        if not split:
            continue
        with Image.open(folder / row["file"]) as image:
            pixels = np.asarray(image.convert("L"))
        with Image.open(folder / row["mask_file"]) as image:
            mask = np.asarray(image.convert("L").resize(pixels.shape[::-1], Image.Resampling.NEAREST)) > 0
        label = Label("tumour_t1c", f"tumour-{row['pseudo_group']}", split, "t1ce", row["label"], number)
        spacing = (TUMOUR_FIELD_MM / pixels.shape[0], TUMOUR_FIELD_MM / pixels.shape[1])
        yield pixels, mask, spacing, label


def _brains(rng: np.random.Generator, session: Any, folder: Path) -> Iterator[Plane]:
    """Yield axial planes of the brain volumes, about 5 mm apart, upright."""
    for row, contrast, volume, spacing in _brain_volumes(folder):
        step = max(1, round(4.0 / spacing[2]))
        for number in range(0, len(volume), step):
            pixels = volume[number : number + step].mean(0)
            if (pixels > 12).mean() < MIN_FILLED:
                continue
            label = Label("brain", row["subject"], row["split"], contrast, "none", number)
            mm, empty = (spacing[1], spacing[0]), np.zeros(pixels.shape, bool)
            if session is None:
                plane = to_plane(pixels, None, mm, label)
            elif rng.random() < BRAIN_CHAIN_SHARE:
                plane = chained(rng, session, pixels, empty, mm, label)
            else:
                continue
            if plane is not None:
                yield plane


def _brain_volumes(folder: Path) -> Iterator[tuple[dict[str, str], str, Array, list[float]]]:
    """Yield index rows, contrasts, volumes (z, P, L) and voxels in mm (R, A, S, as the files' axes are)."""
    import nibabel

    names = {"T1w": "t1", "T1w-Gd": "t1ce", "T2w": "t2", "FLAIR": "flair"}
    for row in _rows(folder / "index.csv"):
        contrast = names.get(row["contrast"].removesuffix("-s1").removesuffix("-s2"))
        if contrast is None or row["split"] not in ("train", "val"):
            continue
        image = nibabel.load(folder / row["file"])
        volume = np.asarray(image.dataobj, np.float32)[::-1, ::-1].transpose(2, 1, 0)
        yield row, contrast, volume, [float(v) for v in image.header.get_zooms()[:3]]


def _volumes(folder: Path) -> Iterator[Plane]:
    """Yield the planes of each brain volume that a network is shown at run time."""
    for row, contrast, volume, spacing in _brain_volumes(folder):
        centres = np.arange(len(volume))[:, None] * np.array((0.0, 0.0, spacing[2]))
        mm = (spacing[2], spacing[1], spacing[0])
        stack = Geometry.from_centres(centres, *AXIAL, volume.shape[1:], mm, spacing[2])
        planes = prepare(volume, stack)
        label = Label("volumes", row["subject"], row["split"], contrast, "none")
        for image in planes.inputs[planes.is_usable, 0]:
            yield Plane(image.astype(np.float16), np.zeros(image.shape, bool), label)


def _shapes(rng: np.random.Generator, folder: Path) -> Iterator[Plane]:
    """Yield one or two outlines of each training patient's infarct, upright and centred, with no image."""
    import nibabel

    centre = (np.array(SIZE) - 1) / 2
    for row in _rows(folder / "index.csv"):
        path = folder / "lesion_masks_mni" / f"{row['subject_id']}.nii.gz"
        if row["suggested_split"] != "train" or not path.is_file():
            continue
        volume = np.asarray(nibabel.load(path).dataobj) > 0  # (x, y from posterior to anterior, z), 1 mm
        filled = np.flatnonzero(volume.sum((0, 1)) >= MIN_SHAPE)
        for number in rng.choice(filled, min(2, len(filled)), replace=False):
            outline = volume[:, ::-1, number].T
            corner = np.round(centre - (np.array(outline.shape) - 1) / 2).astype(int)
            shown = np.zeros(SIZE, bool)
            shown[corner[0] : corner[0] + outline.shape[0], corner[1] : corner[1] + outline.shape[1]] = outline
            label = Label("shapes", f"stroke-{row['patient_group']}", "train", "none", "infarct", int(number))
            yield Plane(np.zeros((1, 1), np.float16), shown, label)


def load_anatomy(path: Path) -> Anatomy:
    """Return the anatomy that `export.anatomy` wrote."""
    with np.load(path, allow_pickle=False) as asset:
        half, levels = asset["fractions"], int(asset["levels"])
        origin, spacing = [float(v) for v in asset["origin_mm"]], float(asset["spacing_mm"])
        if tuple(str(name) for name in asset["tissues"]) != STORED_TISSUES:
            raise ValueError(f"{path.name} holds other tissues")
    whole = np.concatenate([half[..., :0:-1], half], axis=-1)
    whole *= 255 // levels
    return Anatomy(whole, (origin[0] - spacing * (half.shape[-1] - 1), origin[1], origin[2]), spacing)


def _heads(
    rng: np.random.Generator, session: Any, anatomy_file: Path, contrast: str, first: int, n_heads: int
) -> Iterator[Plane]:
    """Yield four planes of each simulated head, those with most of the finding among them."""
    anatomy = load_anatomy(anatomy_file)
    for seed in range(first, first + n_heads):
        finding = FINDINGS[seed % len(FINDINGS)]
        head = make_head(anatomy, seed)
        try:
            lesion = place_lesion(head, finding, seed)
        except ScanError:
            continue
        orientation = "oblique" if rng.random() < 0.25 else "axial"
        protocol = Protocol(contrast=CONTRASTS[contrast], matrix=(160, 160), n_coils=int(rng.choice([2, 4, 8])),
                            orientation=orientation, seed=seed, shift_mm=float(rng.uniform(-3, 3)))  # fmt: skip
        heights = geometry(protocol).origin_mm[:, 2]
        if lesion is not None:
            near = np.argsort(np.abs(heights - lesion.core().shape.centre_mm[2]))
            chosen = [int(near[0]), int(near[1 + seed // 4 % 2]), *rng.choice(protocol.n_slices, 1)]
        else:
            chosen = [int(each) for each in rng.choice(protocol.n_slices, 3, replace=False)]
        for index in dict.fromkeys(chosen):
            made = scan_slice(head, protocol, int(index), lesion)
            split = "train" if seed < HELD_OUT_SEEDS else "val"
            label = Label("heads", f"head-{seed}", split, contrast, finding, int(index))
            spacing = (protocol.fov_mm[0] / protocol.matrix[0], protocol.fov_mm[1] / protocol.matrix[1])
            if rng.random() < CHAIN_SHARE:
                plane = chained(rng, session, made.image, made.lesion, spacing, label)
            else:
                plane = to_plane(made.image, made.lesion, spacing, label)
            if plane is not None:
                yield plane


def _exams(
    rng: np.random.Generator,
    session: Any,
    anatomy_file: Path,
    contrast: str,
    first: int,
    n_heads: int,
    wanted: str | None,
) -> Iterator[Plane]:
    """Yield every slice of simulated exams, each reconstructed at one acceleration and noise level."""
    anatomy = load_anatomy(anatomy_file)
    for seed in range(first, first + n_heads):
        finding = wanted or FINDINGS[seed % len(FINDINGS)]
        head = make_head(anatomy, seed)
        try:
            lesion = place_lesion(head, finding, seed)
        except ScanError:
            continue
        protocol = Protocol(contrast=CONTRASTS[contrast], matrix=(128, 128), n_coils=4, seed=seed)
        factor, sigma = int(rng.choice([1, 2, 4, 4, 6])), float(np.exp(rng.uniform(*np.log((0.005, 0.03)))))
        spacing = (protocol.fov_mm[0] / protocol.matrix[0], protocol.fov_mm[1] / protocol.matrix[1])
        for index in range(protocol.n_slices):
            made = scan_slice(head, protocol, index, lesion)
            label = Label("exams", f"head-{seed}", "val", contrast, finding, index)
            plane = chained(rng, session, made.image, made.lesion, spacing, label, factor, sigma)
            if plane is not None:
                yield plane


if __name__ == "__main__":
    main()
