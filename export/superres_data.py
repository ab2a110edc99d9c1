"""Pairs to learn super-resolution from: real volumes, degraded as a scanner degrades.

Within the plane, k-space is cut to its centre half, with the receiver's complex noise and a phase that varies
smoothly; the magnitude is what a scanner hands over. Through the plane, thick slices average fine ones with their
profile, and the noise is Rician. Contrast is bent a little, small bright and dark lesions are put in, and now and then
there is nothing but noise, from which there is nothing to learn.
"""

from __future__ import annotations

import csv
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from export.heads import load_anatomy
from export.slices import SETS, Slice, stroke_slices, tumour_slices
from recon.arrays import Array
from recon.contrast import Contrast, Sequence
from recon.fine_grid import profile_weights
from recon.fourier import resize_centred, to_image, to_kspace
from recon.head import make_head
from recon.protocol import Protocol
from recon.scanner import scan_slice
from recon.superres import noise_level

ISOTROPIC = 1.5  # longest over shortest side of a voxel, below which a volume can be cut in any direction
FILLED = 0.12  # of a plane: less shows hardly any brain
DARK = 12  # of 255: below is air
NOISE = (0.002, 0.05)  # standard deviation over the image's scale, log-uniform
NOISE_LEANS = 1.4  # towards little noise, where there is most to recover
PATCH = 96
CONTRAST_SHARES = {"T1w": 2.2, "T1w-Gd": 0.8, "T2w": 1.0, "FLAIR": 1.2}  # of planes, relative to each other
PATIENTS_COUNT = 3.0  # a set of single slices is drawn as often as so many volumes of its contrast
SHARE_SIMULATED = 0.08  # of planes: proton density, of which no real volume is at hand
FIRST_SIMULATED = 50_000_000  # seed of the first simulated head; those that measure and describe have lower ones


@dataclass(frozen=True, eq=False)
class Head:
    """One real volume: uint8 (i, j, k), voxel in mm along the same axes, and whose and what it is."""

    voxels: Array
    spacing_mm: tuple[float, float, float]
    subject: str
    contrast: str
    is_whole: bool

    @property
    def is_isotropic(self) -> bool:
        """True where planes can be cut in any direction."""
        return max(self.spacing_mm) < ISOTROPIC * min(self.spacing_mm)

    @property
    def slice_axis(self) -> int:
        """The axis of the thickest voxels."""
        return int(np.argmax(self.spacing_mm))


@dataclass(frozen=True, eq=False)
class Pair:
    """One plane as measured and as it is: what the network is given and what it should add.

    image: float32 (y, x) as measured, scaled to about 1. axes: of the two sides. truth: float32 (fine y, fine x).
    """

    image: Array
    axes: tuple[str, int, str, int]
    truth: Array
    noise: float


def load_heads(folder: Path, split: str) -> list[Head]:
    """Return the volumes of `split` of `folder`/brain; raise FileNotFoundError where there are none."""
    import nibabel

    index = folder / "brain" / "index.csv"
    heads = []
    with index.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["split"] == split:
                image = nibabel.load(index.parent / row["file"])
                dx, dy, dz = (float(v) for v in image.header.get_zooms()[:3])
                contrast, is_whole = plain_contrast(row["contrast"]), row["coverage"] == "whole_head"
                voxels = np.asarray(image.dataobj, np.uint8)
                heads.append(Head(voxels, (dx, dy, dz), row["subject"], contrast, is_whole))
    if not heads:
        raise FileNotFoundError(f"{index} has no volume of the {split} split")
    return heads


def load_patients(folder: Path) -> list[Head]:
    """Return single slices to learn from, each set as a stack that is only cut slice by slice; empty without the sets.

    Every second stroke patient of the training split, and the tumour patients of triage's training split.
    """
    stroke = [each for each in stroke_slices(folder / "stroke_flair", "train") if _is_learned(each)]
    return [_stack(each) for each in (stroke, list(tumour_slices(folder / "tumour_t1c", "train"))) if each]


def held_out_patients(folder: Path) -> list[Slice]:
    """Return the slices of patients that `load_patients` does not learn from, nor from their neighbours."""
    train = [each for each in stroke_slices(folder / "stroke_flair", "train") if not _is_learned(each)]
    return [
        *stroke_slices(folder / "stroke_flair", "val"), *train, *tumour_slices(folder / "tumour_t1c", "val")
    ]  # fmt: skip


def _is_learned(stroke: Slice) -> bool:
    return int(stroke.subject.split("-")[1]) % 2 == 0


def _stack(slices: list[Slice]) -> Head:
    voxels = np.stack([each.pixels for each in slices])
    return Head(voxels, (5.0, *slices[0].spacing_mm), slices[0].source, slices[0].contrast, is_whole=False)


def plain_contrast(name: str) -> str:
    """Return T1w, T1w-Gd, T2w or FLAIR for the index's names, which may say which study it was."""
    return name.rsplit("-s", 1)[0] if name.rsplit("-s", 1)[-1].isdigit() else name


def draw_plane(rng: np.random.Generator, head: Head) -> Array:
    """Return one plane of `head` as float32 (y, x), about 1 at its brightest, in any orientation and flip."""
    axis = int(rng.integers(3)) if head.is_isotropic else head.slice_axis
    for _ in range(20):
        at = int(rng.integers(head.voxels.shape[axis]))
        n_thick = int(rng.integers(1, 5)) if head.is_isotropic and rng.random() < 0.5 else 1
        slab = np.take(head.voxels, range(at, min(at + n_thick, head.voxels.shape[axis])), axis)
        plane = slab.astype(np.float32).mean(axis)
        if (plane > DARK).mean() > FILLED:
            break
    return turned(rng, altered(rng, plane))


def turned(rng: np.random.Generator, plane: Array) -> Array:
    """Return `plane` turned by a quarter or flipped, by chance."""
    if rng.random() < 0.5:
        plane = plane.T
    return np.ascontiguousarray(plane[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))])


def altered(rng: np.random.Generator, plane: Array) -> Array:
    """Return `plane` scaled to about 1, its contrast bent, small lesions put in."""
    out = plane / max(float(np.percentile(plane, 99.5)), 1.0) * float(rng.uniform(0.8, 1.15))
    if rng.random() < 0.35:
        out = np.clip(out, 0, None) ** float(np.exp(rng.uniform(-0.7, 0.35)))  # below 1: towards proton density
    if rng.random() < 0.25:
        out = with_lesions(rng, out)
    return np.asarray(out, np.float32)


def with_lesions(rng: np.random.Generator, plane: Array) -> Array:
    """Return `plane` with some small blobs, bright or dark, 0.6 to 6 voxels in radius, where there is signal."""
    out = plane.copy()
    inside = np.argwhere(plane > 0.25)
    if not len(inside):
        return out
    for _ in range(int(rng.integers(2, 10))):
        y, x = inside[rng.integers(len(inside))] + rng.uniform(-0.5, 0.5, 2)
        radius = float(np.exp(rng.uniform(np.log(0.6), np.log(6))))
        reach = int(np.ceil(radius + 3))
        y0, y1 = max(0, int(y) - reach), min(len(out), int(y) + reach + 1)
        x0, x1 = max(0, int(x) - reach), min(out.shape[1], int(x) + reach + 1)
        yy, xx = np.mgrid[y0:y1, x0:x1]
        stretch = float(np.exp(rng.uniform(-0.4, 0.4)))
        far = np.sqrt(((yy - y) * stretch) ** 2 + ((xx - x) / stretch) ** 2)
        share = 1 / (1 + np.exp((far - radius) / 0.3))
        level = float(rng.choice((0.05, 1.3))) if rng.random() < 0.4 else float(rng.uniform(0.05, 1.3))
        out[y0:y1, x0:x1] += share * (level - out[y0:y1, x0:x1])
    return out


def nothing(rng: np.random.Generator, size: int) -> Array:
    """Return a plane without any detail: flat, or changing slowly, float32 (size, size)."""
    smooth = ndimage.zoom(rng.standard_normal((4, 4)), size / 4, order=3, mode="nearest", grid_mode=True)
    return np.asarray(np.clip(rng.uniform(0, 1) + rng.choice((0, 0.2)) * smooth, 0, None), np.float32)


def cut_k_space(rng: np.random.Generator, truth: Array, sigma: float) -> Array:
    """Return the magnitude image of half of `truth`'s k-space, (fine y / 2, fine x / 2), with complex noise `sigma`."""
    ny, nx = truth.shape[0] // 2, truth.shape[1] // 2
    y, x = np.mgrid[-1 : 1 : truth.shape[0] * 1j, -1 : 1 : truth.shape[1] * 1j]
    terms = rng.normal(0, 1.2, 5)
    turn = terms[0] * y + terms[1] * x + 0.5 * (terms[2] * y * x + terms[3] * y**2 + terms[4] * x**2)
    kspace = to_kspace((truth * np.exp(1j * turn)).astype(np.complex64), (0, 1))
    kspace = resize_centred(resize_centred(kspace, 0, ny), 1, nx)
    image = to_image(kspace, (0, 1)) / 2  # a quarter of the samples of an orthonormal transform: values keep their size
    noise = rng.standard_normal((2, ny, nx), np.float32) * sigma
    return np.abs(image + noise[0] + 1j * noise[1]).astype(np.float32)


def make_thick(rng: np.random.Generator, truth: Array, factor: int, sigma: float, width: float | None = None) -> Array:
    """Return slices of `factor` fine rows of `truth` (fine z, x) each, with Rician noise.

    width: of the profile, in slices; None: a little unlike the nominal.
    """
    width = float(rng.uniform(0.85, 1.15)) if width is None else width
    weights = profile_weights(len(truth) // factor, factor, width)
    mean = weights @ truth
    noise = rng.standard_normal((2, *mean.shape)) * sigma
    return np.hypot(mean + noise[0], noise[1]).astype(np.float32)


def draw_sigma(rng: np.random.Generator) -> float:
    """Return a standard deviation of noise; 0 now and then."""
    low, high = np.log(NOISE)
    return 0.0 if rng.random() < 0.1 else float(np.exp(low + (high - low) * rng.random() ** NOISE_LEANS))


class SimulatedHeads:
    """Proton-density planes of simulated heads. A plane costs as much as ten degraded ones, so each is used often."""

    def __init__(self, n_kept: int = 200, again: float = 0.85) -> None:
        self._anatomy, self._again = load_anatomy(), again
        self._kept: deque[Array] = deque(maxlen=n_kept)

    def draw(self, rng: np.random.Generator) -> Array:
        """Return a plane (y, x) as a scanner draws it, up to about 255, with some noise of its own."""
        if not self._kept or rng.random() > self._again:
            self._kept.append(self._new(rng))
        return self._kept[int(rng.integers(len(self._kept)))]

    def _new(self, rng: np.random.Generator) -> Array:
        head = make_head(self._anatomy, FIRST_SIMULATED + int(rng.integers(10_000_000)))
        contrast = Contrast("pd", Sequence.SPIN_ECHO, float(rng.uniform(2000, 4500)), float(rng.uniform(8, 30)))
        matrix = int(rng.choice((192, 224, 256, 288)))
        protocol = Protocol(contrast=contrast, matrix=(matrix, matrix), n_coils=4, seed=int(rng.integers(1000)))
        image = scan_slice(head, protocol, int(rng.uniform(0.25, 0.75) * protocol.n_slices)).image
        image = np.abs(image) * (200 / float(np.percentile(np.abs(image), 99.5)))
        noise = rng.standard_normal((2, *image.shape)) * 200 * float(np.exp(rng.uniform(-6.5, -4)))
        return np.hypot(image + noise[0], noise[1]).astype(np.float32)


def draw_pair(
    rng: np.random.Generator, heads: list[Head], share_through: float, simulated: SimulatedHeads | None = None
) -> Pair:
    """Return one pair of the training set; `share_through` of them through the plane."""
    is_through, is_empty = rng.random() < share_through, rng.random() < 0.04
    sigma = draw_sigma(rng)
    if is_empty:
        truth, sigma = nothing(rng, 160), max(sigma, 0.01)
    elif simulated is not None and not is_through and rng.random() < SHARE_SIMULATED:
        truth = turned(rng, altered(rng, simulated.draw(rng)))
    else:
        truth = draw_plane(rng, pick(rng, [head for head in heads if head.is_isotropic] if is_through else heads))
    if is_through:
        factor = int(rng.integers(2, 5))
        truth = truth[: len(truth) // factor * factor]
        image = make_thick(rng, truth, factor, sigma)
        return Pair(image, ("profile", factor, "kept", 1), truth, noise_level(image[None]))
    truth = truth[: len(truth) // 2 * 2, : truth.shape[1] // 2 * 2]
    image = cut_k_space(rng, truth, sigma)
    return Pair(image, ("band", 2, "band", 2), truth, noise_level(image[None]))


def pick(rng: np.random.Generator, heads: list[Head]) -> Head:
    """Return one volume: some contrasts more often than others, whole heads more often than skull-stripped ones."""
    contrasts = sorted({head.contrast for head in heads})
    weights = np.array([CONTRAST_SHARES[contrast] for contrast in contrasts])
    wanted = contrasts[int(rng.choice(len(contrasts), p=weights / weights.sum()))]
    alike = [head for head in heads if head.contrast == wanted]
    share = np.array([PATIENTS_COUNT if head.subject in SETS else 1.3 if head.is_whole else 1.0 for head in alike])
    return alike[int(rng.choice(len(alike), p=share / share.sum()))]
