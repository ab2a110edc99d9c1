"""What an engine is built for: the sizes of a reconstruction network's inputs, fixed but for the number of slices.

A runtime that plans ahead (TensorRT) is fastest where sizes are known, so each protocol of a site has an engine of its
own. Lines, coarse grid and coils are rounded up and filled with zeros, which add nothing to a least-squares problem:
scans that differ a little share an engine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from recon.arrays import Array, array_module
from recon.errors import ModelError, ShapeError
from recon.sampling import describe_sampling, padded
from recon.unrolled import BATCH_VOXELS, SHARED

LINES = 8  # lines beside the lattice are rounded up to multiples of this,
COARSE = 16  # voxels of the coarse grid to these,
COILS = 4  # virtual coils to these,
MISSING = 16  # and partitions that are missing along z to these
_NAME = re.compile(r"(\d+)x(\d+)-r(\d+)-l(\d+)-g(\d+)-c(\d+)-m(\d+)")

Shape = tuple[int, ...]


@dataclass(frozen=True, order=True)
class Profile:
    """Sizes of the graph's inputs.

    y, x: voxels, padded. aliases: voxels that fold onto each other (1: no lattice). lines: measured beside the
    lattice. coarse: voxels of the grid on which those are seen. coils: virtual ones. missing: partitions along z.
    """

    y: int
    x: int
    aliases: int
    lines: int
    coarse: int
    coils: int
    missing: int

    @property
    def name(self) -> str:
        """The profile as a short word, for file names and people: "320x320-r4-l24-g80-c8-m1"."""
        return f"{self.y}x{self.x}-r{self.aliases}-l{self.lines}-g{self.coarse}-c{self.coils}-m{self.missing}"

    @property
    def most_slices(self) -> int:
        """How many slices go through the network at a time, as `recon.unrolled` batches them."""
        return max(1, BATCH_VOXELS // (self.y * self.x))

    def shapes(self, n_slices: int) -> dict[str, Shape]:
        """Return the shape of each input for `n_slices` slices."""
        n = n_slices
        plane = (self.y, self.x)
        return {
            "adjoint": (n, 2, *plane),
            "classical": (n, 2, *plane),
            "aliases": (n, 2, self.aliases, self.aliases, self.y // self.aliases * self.x),
            "support": (n, 1, *plane),
            "coarse": (n, 2, self.coarse, self.coils, self.x),
            "rows": (2 * self.lines, 2 * self.coarse),
            "resample": (self.coarse, self.y),
            "missing": (2 * self.missing, 2 * self.x),
            "variance": (n, 1, *plane),
            "sigma": (n, 1, 1, 1),
            "measured": (n, 1, 1, 1),
        }


@dataclass(frozen=True)
class Identity:
    """What an engine was built for and by; it runs nowhere else.

    gpu: its name and compute capability. runtime: name and version of the library. model_sha256: of the ONNX file that
    was built. profile: `Profile.name`. precision: of the convolutions.
    """

    gpu: str
    runtime: str
    model_sha256: str
    profile: str
    precision: str

    @property
    def key(self) -> str:
        """24 hexadecimal digits that differ wherever anything else does."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


def read_profile(name: str) -> Profile:
    """Return the profile that `Profile.name` wrote; raises ModelError for another text."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ModelError(f"{name!r} is no engine profile; one looks like 320x320-r4-l24-g80-c8-m1")
    return Profile(*map(int, found.groups()))


def profile_of(inputs: Mapping[str, Array]) -> Profile:
    """Return the profile whose engine runs `inputs` (see `recon.unrolled.Prepared`)."""
    _, _, n_coarse, n_coils, n_x = inputs["coarse"].shape
    n_missing = inputs["missing"].shape[0] // 2
    return Profile(
        inputs["adjoint"].shape[2],
        n_x,
        inputs["aliases"].shape[2],
        _up(inputs["rows"].shape[0] // 2, LINES),
        _up(n_coarse, COARSE),
        _up(n_coils, COILS),
        1 if n_missing == 1 else _up(n_missing, MISSING),
    )


def profile_for(matrix: tuple[int, int], acceleration: int, n_calibration: int, n_coils: int) -> Profile:
    """Return the profile of a 2-D protocol: every R-th line and the `n_calibration` central ones of `matrix` (y, x)."""
    n_y, n_x = matrix
    averages = np.zeros(n_y, np.uint16)
    averages[::acceleration] = 1
    averages[n_y // 2 - n_calibration // 2 :][:n_calibration] = 1
    sampling = describe_sampling(averages)
    return Profile(
        padded(n_y),
        padded(n_x),
        len(sampling.lattice),
        _up(len(sampling.rows) // 2, LINES),
        _up(len(sampling.resample), COARSE),
        _up(n_coils, COILS),
        1,
    )


def fit(inputs: Mapping[str, Array], profile: Profile) -> dict[str, Array]:
    """Return `inputs` filled with zeros to the sizes of `profile`; what has the right size already is not copied.

    Raises ShapeError for inputs that do not fit.
    """
    out = dict(inputs)
    # a real form (2 lines, 2 coarse) has its halves filled each on its own
    out["rows"] = _halves(inputs["rows"], profile.lines, profile.coarse)
    out["missing"] = _halves(inputs["missing"], profile.missing, profile.x)
    out["resample"] = _fill(inputs["resample"], (profile.coarse, profile.y))
    coarse = inputs["coarse"]
    out["coarse"] = _fill(coarse, (*coarse.shape[:2], profile.coarse, profile.coils, profile.x))
    for name, shape in profile.shapes(inputs["adjoint"].shape[0]).items():
        if out[name].shape != shape:
            raise ShapeError(f"the network's input {name}", out[name].shape, shape)
    assert set(SHARED) <= set(out)
    return out


def _halves(real_form: Array, rows: int, columns: int) -> Array:
    """Return a real form of a complex matrix, filled with zeros to one of (rows, columns)."""
    if real_form.shape == (2 * rows, 2 * columns):
        return real_form
    n, m = (size // 2 for size in real_form.shape)
    whole = _fill(real_form.reshape(2, n, 2, m), (2, rows, 2, columns))
    return whole.reshape(2 * rows, 2 * columns)


def _fill(array: Array, shape: Shape) -> Array:
    if array.shape == shape:
        return array
    if len(array.shape) != len(shape) or any(a > b for a, b in zip(array.shape, shape, strict=True)):
        raise ShapeError("a network's input", array.shape, shape)
    out = array_module(array).zeros(shape, array.dtype)
    out[tuple(slice(n) for n in array.shape)] = array
    return out


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
