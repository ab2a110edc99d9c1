"""Fully sampled scans to compare reconstructions on: real ones, and simulated ones of subjects that no training saw."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ours import kspaces
from edge.raw_write import RawWriter, header_xml
from edge.rawfile import RawFile, open_raw
from edge.simulate import simulate_file
from export.simulated import FIELD_MM, draw_coils, draw_image, see
from export.slices import Slice, load_slices
from recon.arrays import Array
from recon.fourier import resize_centred, to_image, to_kspace
from recon.protocol import OVERSAMPLING, Protocol, geometry
from recon.scan import Acquisition, ImageKey, Role

SEED = 0
SHAPES = ((256, 256), (256, 224), (288, 256), (240, 240))  # of the simulated scans, in turns
N_COILS = 8
SIGMA = (0.003, 0.03)  # of the peak, the noise's standard deviation
# Lesions of real scans that stand out in the reference: centre line, centre column and radius in voxels, by slice;
# outlined at half of the contrast between their centre and what is around it.
LESIONS = {
    "hku_6A_FSE": ((77, 44, 9.7), (78, 43, 10.0), (79, 42, 9.2), (80, 41, 8.4)),
    "hku_6A_GRE": ((45, 121, 11.3), (44, 123, 11.1), (43, 124, 9.5), (42, 125, 8.5)),
}


class Case(NamedTuple):
    """A fully sampled scan and what is right.

    reference: float (slice, y, x). structures: bool, same shape, the small ones that should keep their contrast, or
    None. about: what the record says of it.
    """

    name: str
    raw: RawFile
    reference: Array
    structures: Array | None
    about: dict[str, Any]


def real_case(path: Path) -> Case:
    """Return a fully sampled ISMRMRD file; its reference is the root-sum-of-squares of all lines."""
    raw = open_raw(path)
    kspace = kspaces(raw)[0]
    reference = root_sum_of_squares(to_image(kspace, axes=(2, 3)), 1)
    return Case(path.stem, raw, reference, lesions(path.stem, reference.shape), {"kind": "real", "shape": kspace.shape})


def lesions(name: str, shape: tuple[int, ...]) -> Array | None:
    """Return where a real scan's lesions are, bool (slice, y, x), their edge left out; None where none is known."""
    if name not in LESIONS:
        return None
    y, x = np.arange(shape[1])[:, None], np.arange(shape[2])
    return np.stack([np.hypot(y - y_0, x - x_0) < 0.8 * radius for y_0, x_0, radius in LESIONS[name]])


def head_case(folder: Path) -> Case:
    """Return a small scan of the simulated head with a bleed, written into `folder`."""
    path = folder / "simulated_head.h5"
    simulate_file(path, Protocol(matrix=(96, 96), n_slices=1, n_coils=4, acceleration=1), "bleed", SEED)
    with np.load(path.with_name("simulated_head.truth.npz")) as truth:
        reference, structures = truth["image"], truth["lesion"]
    return Case(path.stem, open_raw(path), reference, structures, {"kind": "simulated", "source": "simulated head"})


def held_out(data: Path, n: int) -> list[Slice]:
    """Return `n` slices of subjects that no training saw: contrasts in turns, and of each another subject every time.

    The first ones stay the same when `n` grows. Raises FileNotFoundError where `data` holds no held-out images.
    """
    slices = load_slices(data, "val", every=4)
    by_contrast: dict[str, dict[str, Slice]] = {}
    for index in np.random.default_rng(SEED).permutation(len(slices)):
        by_contrast.setdefault(slices[index].contrast, {}).setdefault(slices[index].subject, slices[index])
    turns = zip_longest(*(by_contrast[contrast].values() for contrast in sorted(by_contrast)))
    return [each for turn in turns for each in turn if each is not None][:n]


def subject_case(source: Slice, number: int, folder: Path) -> Case:
    """Return a scan of `source` with small structures, written into `folder`; the same `number` gives the same scan."""
    rng = np.random.default_rng([SEED, number])
    shape = SHAPES[number % len(SHAPES)]
    image, structures = draw_image(rng, source, shape)
    while not structures.any():
        image, structures = draw_image(rng, source, shape)
    seen = see(image, draw_coils(rng, N_COILS, image.shape))
    reference = root_sum_of_squares(seen, 0)
    sigma = float(np.exp(rng.uniform(*np.log(SIGMA))))
    path = folder / f"simulated_{number:02}.h5"
    write_scan(path, seen, sigma * float(np.percentile(reference, 99.5)), rng)
    about = {"source": source.source, "subject": source.subject, "contrast": source.contrast, "sigma": round(sigma, 5)}
    about = {"kind": "simulated", "shape": (1, N_COILS, *shape), **about}
    return Case(path.stem, open_raw(path), reference[None], structures[None], about)


def write_scan(path: Path, seen: Array, level: float = 0.0, rng: np.random.Generator | None = None) -> None:
    """Write every line of coil images, complex64 (coil, y, x), with noise of standard deviation `level` a sample.

    With an `rng` four readouts without signal come first, from which the noise can be measured; without one they and
    the noise are left out.
    """
    n_coils, n_y, n_x = seen.shape
    voxel_mm = FIELD_MM / max(n_y, n_x)
    protocol = Protocol(
        matrix=(n_y, n_x), fov_mm=(n_y * voxel_mm, n_x * voxel_mm), n_slices=1, n_coils=n_coils, acceleration=1
    )
    stack = geometry(protocol)
    lines = to_kspace(resize_centred(seen, 2, OVERSAMPLING * n_x), (1, 2))
    n_noise = 0 if rng is None else 4
    if rng is not None:
        lines = np.concatenate([np.zeros_like(lines[:, :n_noise]), lines], 1)
        parts = rng.standard_normal((2, *lines.shape), np.float32) * np.float32(level * 0.5**0.5)
        lines = lines + parts[0] + 1j * parts[1]
    with RawWriter(path, header_xml(protocol, "held-out subject", SEED)) as writer:
        writer.append(
            Acquisition(
                lines[:, row],
                Role.NOISE if row < n_noise else Role.IMAGING,
                ImageKey(0, 0, 0, 0, 0, 0),
                max(row - n_noise, 0),
                center_sample=n_x * OVERSAMPLING // 2,
                last_in_slice=row == n_y + n_noise - 1,
                last_in_repetition=row == n_y + n_noise - 1,
                last_in_measurement=row == n_y + n_noise - 1,
                read_dir=stack.row_dir,
                phase_dir=stack.col_dir,
                slice_dir=stack.normal,
            )
            for row in range(n_y + n_noise)
        )


def root_sum_of_squares(images: Array, axis: int) -> Array:
    """Return the root of the sum of abs² along `axis`."""
    return np.sqrt((np.abs(images) ** 2).sum(axis))
