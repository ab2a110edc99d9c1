"""Make the tissue map that the simulated scanner images: `python -m export.anatomy`, run by hand.

The brain is the ICBM 152 2009a symmetric average (grey and white matter maps, from nilearn's wheel). That file ends at
the brain's surface, so skull, scalp, orbits, sinuses, face and neck are modelled around it, with adult thicknesses:
skull 6-7 mm with a diploe of about 3 mm (Lillie et al., J Bone Miner Res 31:299, 2016), scalp 5-7 mm (Hori et al.,
J Invest Dermatol 58:396, 1972). They look like a head and are nobody's. Coordinates: LPS mm around the atlas' origin.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from recon.arrays import Array
from recon.head import STORED_TISSUES

Field = Array  # float32 (z, y, x)
Point = tuple[float, float, float]

ASSET = Path(__file__).resolve().parents[1] / "edge" / "assets" / "icbm152_tissue.npz"
ORIGIN_MM = (0.0, -118.0, -100.0)  # LPS of the first stored voxel; x starts in the mid-sagittal plane
SHAPE = (204, 245, 98)  # (z, y, x) of the stored half, 1 mm
LEVELS = 15  # four bits a voxel: finer steps only store the average's noise
COARSE = 3  # two bits for the modelled tissues, which only need soft edges
CLOSING_MM = 8.0  # sulci and cisterns narrower than twice this belong to the space inside the skull
SKULL_MM = (1.2, 2.9, 6.0, 7.8)  # from the brain's hull: inner table, diploe, outer table, scalp begin
SCALP_END_MM = 14.0
SKIN_MM = 1.7


class Paint:
    """Tissue fractions under construction: later layers cover earlier ones."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Start with air everywhere."""
        self.fractions = {name: np.zeros(shape, np.float32) for name in STORED_TISSUES}

    def over(self, tissue: str, alpha: Field) -> None:
        """Cover with `tissue` ("air" too), `alpha` (0 to 1) of each voxel."""
        for name in self.fractions:
            self.fractions[name] *= 1 - alpha
        if tissue != "air":
            self.fractions[tissue] += alpha


class Grid(NamedTuple):
    """LPS mm of each voxel, broadcastable float32; x runs over both halves."""

    x: Field
    y: Field
    z: Field

    def ellipsoid(self, centre: Point, semi: Point) -> Field:
        """Coverage (0 to 1) of an ellipsoid; one at |x| stands for a pair."""
        q = ((np.abs(self.x) - centre[0]) / semi[0]) ** 2
        q = q + ((self.y - centre[1]) / semi[1]) ** 2 + ((self.z - centre[2]) / semi[2]) ** 2
        return below(np.sqrt(q) * np.float32(min(semi)), min(semi))


def below(field: Field, edge: float) -> Field:
    """Return how much of each 1 mm voxel lies where `field` (mm) is under `edge`, as float32."""
    return np.clip(edge - field + 0.5, 0, 1).astype(np.float32)


def between(field: Field, low: float, high: float) -> Field:
    """Return the coverage of low < field < high."""
    return below(field, high) - below(field, low)


def signed_distance(mask: Array) -> Field:
    """Return the distance to a mask's surface in mm, negative inside, float32."""
    outside = ndimage.distance_transform_edt(~mask)
    return (outside - ndimage.distance_transform_edt(mask)).astype(np.float32)


def load_icbm() -> tuple[Field, Field, Array]:
    """Return grey matter, white matter (0 to 1) and the brain mask on the full LPS grid (z, y, x)."""
    import nibabel
    import nilearn.datasets

    folder = Path(nilearn.datasets.__file__).parent / "data"
    maps = []
    for name in ("gm", "wm", "t1"):
        image: Any = nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
        data = np.asarray(image.dataobj, np.float32) / 255
        volume = data[1:196, ::-1, :].transpose(2, 1, 0)  # RAS (x, y, z) to (z, y, x) with y to posterior; x = 0 at 97
        pad_y = round(-98 - ORIGIN_MM[1])  # the atlas' most anterior voxel is at y = -98
        pad_z = round(-72 - ORIGIN_MM[2])
        volume = np.pad(volume, ((pad_z, 0), (pad_y, 0), (0, 0)))[: SHAPE[0], : SHAPE[1]]
        full = np.zeros((SHAPE[0], SHAPE[1], 2 * SHAPE[2] - 1), np.float32)
        full[: volume.shape[0], : volume.shape[1]] = volume
        maps.append(full)
    return maps[0], maps[1], maps[2] > 0


def build() -> dict[str, Field]:
    """Return the tissue fractions (0 to 1) of the whole head, each float32 (z, y, x), both halves."""
    grey, white, mask = load_icbm()
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in mask.shape), indexing="ij", sparse=True)
    grid = Grid(x - (SHAPE[2] - 1), y + np.float32(ORIGIN_MM[1]), z + np.float32(ORIGIN_MM[2]))

    closed = ndimage.distance_transform_edt(~mask) <= CLOSING_MM
    hull = ndimage.gaussian_filter(signed_distance(ndimage.distance_transform_edt(closed) > CLOSING_MM), 2.0)
    temple = 7 * np.exp(-(((np.abs(grid.x) - 66) / 26) ** 2 + ((grid.y + 22) / 24) ** 2 + ((grid.z + 18) / 22) ** 2))
    face = np.maximum(grid.ellipsoid((0, -40, -62), (66, 57, 62)), grid.ellipsoid((0, -97, -52), (14, 15, 20)))
    neck = below(np.sqrt((grid.x / 56) ** 2 + ((grid.y - 22) / 62) ** 2) * 56, 56) * below(grid.z, -38)
    outline = np.maximum(np.maximum(below(hull - temple, SCALP_END_MM), face), neck)
    depth = -ndimage.gaussian_filter(signed_distance(ndimage.gaussian_filter(outline, 3.0) > 0.5), 1.0)

    paint = Paint(mask.shape)
    paint.over("muscle", below(-depth, 0))
    _soft_tissue(paint, grid, hull, depth)
    _face(paint, grid, below(-depth, -SKIN_MM - 1))
    variation = _noise(mask.shape, 9.0, 7)
    inner, diploe, outer, scalp = SKULL_MM
    paint.over("bone", between(hull, inner, scalp))
    vault = below(-grid.z, 30)  # the base and the squama below it have little marrow
    paint.over(
        "marrow", between(hull + 0.5 * variation, diploe, outer) * vault * (0.75 + 0.1 * np.clip(variation, -2, 2))
    )
    paint.over("fluid", below(hull, inner) * below(-grid.z, 74))
    paint.over("fluid", mask.astype(np.float32))
    paint.over("gm", np.minimum(grey / np.maximum(1 - white, 1e-3), 1))  # white comes over it and leaves `grey`
    paint.over("wm", white)
    _spine(paint, grid)
    return paint.fractions


def _noise(shape: tuple[int, ...], width: float, seed: int) -> Field:
    """Return smooth noise of unit variance, the same in both halves."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), width)
    noise = noise + noise[..., ::-1]
    return (noise / noise.std()).astype(np.float32)


def _soft_tissue(paint: Paint, grid: Grid, hull: Field, depth: Field) -> None:
    """Lay the fat under the skin, thicker in cheeks and nape, and the fat planes between muscles."""
    thickness = 3.6 + 3 * below(grid.z / 10, -4) + 5 * below(grid.z / 20, -2.5) * below(-grid.y / 20, -2)
    paint.over("fat", between(depth - thickness + 3.6, SKIN_MM, SKIN_MM + 3.6) * (depth > SKIN_MM))
    paint.over("fat", between(depth, SKIN_MM, SKIN_MM + 3.2))
    planes = np.abs(_noise(hull.shape, 4.5, 3))
    paint.over("fat", below(planes * 9, 2.0) * below(-depth, -6) * below(-hull, -9) * below(grid.z, -25))


def _face(paint: Paint, grid: Grid, below_skin: Field) -> None:
    """Carve orbits and sinuses under the skin: a bony rim, then fat, eye or air."""
    apex_to_eye = np.clip((-20 - grid.y) / 46, 0, 1)
    axis_x = 13 + 19 * apex_to_eye
    radius = np.sqrt((np.abs(grid.x) - axis_x) ** 2 + (grid.z + 36) ** 2)
    inside = below(grid.y, -20) * below(-grid.y, 72) * below_skin
    paint.over("bone", below(radius - 3 - 15 * apex_to_eye, 2.0) * inside)
    paint.over("fat", below(radius - 2 - 15 * apex_to_eye, 0) * inside)
    paint.over("muscle", between(radius - 5 - 8 * apex_to_eye, -1.3, 1.3) * inside * below(-grid.y, 62))
    paint.over("wm", below(radius, 1.8) * inside * below(-grid.y, 57))
    paint.over("muscle", grid.ellipsoid((32, -67, -36), (13, 13, 13)))
    paint.over("fluid", grid.ellipsoid((32, -67, -36), (11.8, 11.8, 11.8)))
    paint.over("muscle", grid.ellipsoid((32, -76, -36), (4.5, 2.2, 4.5)))  # lens
    cavities = (
        ((27, -44, -69), (14, 17, 16)),  # maxillary sinus
        ((6, -42, -40), (8, 19, 11)),  # ethmoid cells
        ((5, -12, -44), (9, 11, 9)),  # sphenoid sinus
        ((7, -79, -20), (10, 4, 8)),  # frontal sinus
        ((57, 28, -52), (7, 9, 12)),  # mastoid cells
        ((62, 10, -44), (16, 3.5, 3.5)),  # ear canal
        ((0, -2, -86), (9, 8, 22)),  # pharynx
        ((6, -58, -64), (5, 30, 15)),  # nasal cavity
    )
    for centre, semi in cavities:
        rim = (semi[0] + 2, semi[1] + 2, semi[2] + 2)
        paint.over("bone", grid.ellipsoid(centre, rim) * below_skin)
    for centre, semi in cavities:
        canal = centre[0] > 60  # the only one that opens to the outside through the skin
        paint.over("air", grid.ellipsoid(centre, semi) * (1 if canal else below_skin))
    for height in (-60.0, -70.0):
        paint.over("muscle", grid.ellipsoid((7, -54, height), (2.5, 20, 3.0)))  # turbinates
    paint.over("muscle", grid.ellipsoid((0, -44, -94), (24, 34, 14)))  # tongue
    paint.over("marrow", grid.ellipsoid((0, 2, -60), (9, 6, 14)))  # clivus


def _spine(paint: Paint, grid: Grid) -> None:
    """Continue the brainstem below the atlas' last slice as cord, canal and vertebra."""
    under = below(grid.z, -72.5)
    radius = np.sqrt(grid.x**2 + (grid.y - 39 - 0.15 * (-72 - grid.z)) ** 2)
    paint.over("bone", between(radius, 12, 15) * under)
    paint.over("marrow", grid.ellipsoid((0, 18, -92), (14, 8, 17)) * under)
    paint.over("fluid", below(radius, 12) * under)
    paint.over("gm", below(radius, 6) * under)
    paint.over("wm", between(radius, 2.2, 6) * under)


def main(path: Path = ASSET) -> None:
    """Write the stored half: uint8 (tissue, z, y, x), 0 to LEVELS, with its origin and spacing."""
    fractions = build()
    half = np.stack([fractions[name][..., SHAPE[2] - 1 :] for name in STORED_TISSUES])
    stored = np.round(half * LEVELS).astype(np.uint8)
    modelled = [i for i, name in enumerate(STORED_TISSUES) if name not in ("gm", "wm", "fluid")]
    stored[modelled] = np.round(half[modelled] * COARSE) * (LEVELS // COARSE)
    np.savez_compressed(
        path,
        fractions=stored,
        tissues=np.array(STORED_TISSUES),
        levels=np.int64(LEVELS),
        origin_mm=np.array(ORIGIN_MM),
        spacing_mm=np.float64(1.0),
    )
    sys.stdout.write(f"{path}: {path.stat().st_size} bytes, {stored.shape}\n")


if __name__ == "__main__":
    main()
