"""Super-resolution: a second volume with finer voxels, in which everything measured is kept and the rest is estimated.

Within the plane, k-space of the image as reconstructed is what was measured: the result's k-space equals it at every
frequency that the image holds, and only frequencies beyond are estimated. Through the plane, the mean of the fine
slices over each thick slice's profile is what was measured. The network's graph takes away all that its estimate says
about either, so that this holds for any weights. What the result gains is resolution recovered by a learned prior: it
is no measurement, its provenance says so, and nothing that decides anything may read it.

Sources: Bahat & Michaeli, CVPR 2020 (consistency by projection); Bhadra et al., IEEE TMI 40:3249 (2021) (an image split
into what was measured and what a prior added).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from recon.arrays import Array, closed
from recon.errors import AcquisitionError, BackendError, ShapeError
from recon.fine_grid import FineAxis, band_axis, kept_axis, profile_axis
from recon.head_likeness import describe_volume
from recon.scan import Geometry, Provenance, Volume
from recon.superres_card import Refiner

FACTOR = 2  # within the plane
FOREGROUND = 0.1  # of the image's scale
SCALE_PERCENTILE = 99.5
NORMAL_MAD = 0.6745  # median of |x| of a standard normal
METHOD = "super-resolution"
MOST_GAP = 1.35  # distance over thickness of slices


@dataclass(frozen=True, eq=False)
class SuperResolved:
    """A volume with finer voxels and how much of it is estimated.

    volume: not measured, as its provenance says. estimated: float32 (slice, y, x), what was added beyond the
    measurement, in native units; `volume.data - estimated` is the measured content alone, on the fine grid.
    share: of the energy of `volume` that is estimated, 0 to 1. noise: standard deviation that the network was told,
    over the image's scale. factors: fine voxels for each measured one along (slice, y, x).
    """

    volume: Volume
    estimated: Array
    share: float
    noise: float
    factors: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.estimated.shape != self.volume.data.shape:
            raise ShapeError("estimated", self.estimated.shape, self.volume.data.shape)
        object.__setattr__(self, "estimated", closed(self.estimated, np.float32))


def super_resolve(volume: Volume, refiner: Refiner, contrast: str = "", n_thin: int = 1) -> SuperResolved:
    """Return `volume` with voxels half as long and wide, and slices `n_thin` times thinner (1: as they are).

    contrast: as `refusal` takes it. Raises AcquisitionError with the reason where the volume is refused, BackendError.
    """
    why = refusal(volume, refiner, contrast, n_thin)
    if why:
        raise AcquisitionError(f"super-resolution is refused: {why}")
    steps = Steps(volume, refiner, n_thin)
    for _ in steps:
        pass
    return steps.result()


def refusal(volume: Volume, refiner: Refiner, contrast: str = "", n_thin: int = 1) -> str:
    """Return why `volume` cannot be super-resolved by this network; "" where it can.

    contrast: "t1", "t1ce", "t2", "flair", "pd" or another name; "" where it is not known, and the image alone decides.
    """
    why = _unfit(volume, refiner, contrast, n_thin)
    if why:
        return why
    scale = image_scale(volume.data)
    if scale <= 0:
        return "the volume is empty"
    noise, most = noise_level(volume.data) / scale, refiner.card.most_noise
    if noise > most:
        return f"the noise is {100 * noise:.1f} % of the signal; at most {100 * most:.1f} % was trained for"
    away = refiner.likeness.distance(describe_volume(volume.data, volume.geometry.spacing_mm[1:], noise))
    if away > refiner.likeness.limit:
        far = f"distance {away:.2f}, limit {refiner.likeness.limit:.2f}"
        return f"the images are unlike the heads that it was trained on ({far})"
    return ""


def _unfit(volume: Volume, refiner: Refiner, contrast: str, n_thin: int) -> str:
    """Return why a volume cannot be served whatever it shows; "" where nothing stands against it."""
    card, geometry = refiner.card, volume.geometry
    low, high = card.matrix
    shape = "×".join(map(str, volume.data.shape[1:]))
    checks = (
        (not volume.provenance.is_measured, "the volume is synthetic already"),
        (
            contrast != "" and contrast not in card.contrasts,
            f"the contrast is {contrast}; the network was trained for {', '.join(card.contrasts)}",
        ),
        (not np.isfinite(volume.data).all(), "some voxels are not finite numbers"),
        (
            not all(low <= n <= high for n in volume.data.shape[1:]),
            f"the matrix is {shape}; {low} to {high} a side are served",
        ),
        (
            n_thin > 1 and geometry.n_slices < card.least_slices,
            f"there are {geometry.n_slices} slices; {card.least_slices} are needed to make thinner ones",
        ),
        (
            n_thin > 1 and geometry.spacing_mm[0] > MOST_GAP * geometry.thickness_mm,
            "the slices do not touch: what lies in the gaps was not measured",
        ),
    )
    return next((words for is_so, words in checks if is_so), "")


class Steps:
    """The work plane by plane, so that it can be laid aside between any two: iterate, then ask for the `result`."""

    def __init__(self, volume: Volume, refiner: Refiner, n_thin: int = 1) -> None:
        """Prepare; raises ShapeError for an `n_thin` that is not 1 to 4."""
        n, ny, nx = volume.data.shape
        self.n_steps = n * n_thin + (nx if n_thin > 1 else 0)
        self._volume, self._refiner, self._n_thin = volume, refiner, n_thin
        self._scale = image_scale(volume.data)
        self._noise = noise_level(volume.data) / self._scale
        self._placed = np.empty((n * n_thin, 2 * ny, 2 * nx), np.float32)
        self._added = np.empty_like(self._placed)
        self._z = profile_axis(n, n_thin) if n_thin > 1 else None
        self._y, self._x = band_axis(ny), band_axis(nx)

    def __iter__(self) -> Iterator[int]:
        """Do the steps; yields how many are done. Raises BackendError."""
        data = np.asarray(self._volume.data, np.float32) / np.float32(self._scale)
        done = 0
        thin_placed, thin = data, data
        if self._z is not None:
            kept = kept_axis(data.shape[1])
            thin_placed, thin = (np.empty((self._z.size, *data.shape[1:]), np.float32) for _ in range(2))
            for column in range(data.shape[2]):
                placed, added = self._run(data[:, :, column], self._z, kept)
                thin_placed[:, :, column], thin[:, :, column] = placed, placed + added
                done += 1
                yield done
        for index in range(len(thin)):
            placed, added = self._run(thin[index], self._y, self._x)
            if self._z is not None:  # of the thin slice only what `place` makes of the measured ones is measured
                measured = place(thin_placed[index], self._y, self._x)
                added += placed - measured
                placed = measured
            self._placed[index], self._added[index] = placed, added
            done += 1
            yield done

    def result(self) -> SuperResolved:
        """Return what was made, once all steps are done."""
        made = self._volume.provenance
        added = self._added * np.float32(self._scale)
        data = self._placed * np.float32(self._scale) + added
        energy = float((data.astype(np.float64) ** 2).sum())
        share = float((added.astype(np.float64) ** 2).sum()) / energy if energy else 0.0
        thinner = f", slices {self._n_thin} times thinner" if self._n_thin > 1 else ""
        card = self._refiner.card
        steps = (
            *made.steps,
            f"super-resolved by {card.name} {card.version}: {FACTOR} × {FACTOR} in the plane{thinner}; "
            "measured content put back, the rest estimated",
        )
        provenance = Provenance(METHOD, made.software, steps, False, card.sha256, self._refiner.network.backend)
        geometry = fine_geometry(self._volume.geometry, self._volume.data.shape[1:], self._n_thin)
        factors = (self._n_thin, FACTOR, FACTOR)
        return SuperResolved(Volume(data, geometry, provenance), added, share, self._noise, factors)

    def _run(self, image: Array, y: FineAxis, x: FineAxis) -> tuple[Array, Array]:
        """Return the placed image and what is added, float32 (fine y, fine x), of `image` (y, x) at scale 1."""
        out = self._refiner.network.run(network_inputs(image[None], y, x, self._noise))
        try:
            placed, added = out["placed"], out["added"]
        except KeyError as error:
            raise BackendError("the network's outputs are not a super-resolution network's") from error
        return placed[0, 0, : y.size, : x.size], added[0, 0, : y.size, : x.size].copy()


def network_inputs(images: Array, y: FineAxis, x: FineAxis, noise: float) -> dict[str, Array]:
    """Return the graph's inputs for float32 `images` (slice, y, x) at scale 1, with noise in its unit."""
    return {
        "image": np.ascontiguousarray(images[:, None], np.float32),
        "place_y": y.place,
        "place_x": x.place,
        "basis_y": y.basis,
        "basis_x": x.basis,
        "phase_y": y.phase,
        "phase_x": x.phase,
        "noise": np.full((len(images), 1, 1, 1), noise, np.float32),
    }


def place(image: Array, y: FineAxis, x: FineAxis) -> Array:
    """Return `image` (…, y, x) on the fine grid with nothing estimated: for band axes, its sinc interpolation."""
    return y.place[: y.size] @ image @ x.place[: x.size].T


def fine_geometry(geometry: Geometry, shape: tuple[int, int], n_thin: int = 1) -> Geometry:
    """Return where the fine voxels of slices (y, x) = `shape` lie; the field is the same.

    Fine voxel 2 i lies on measured voxel i where a side is even, 2 i + 1 where it is odd: the centre of both grids is
    at n // 2. Thin slices divide the thick one evenly.
    """
    distance, dy, dx = geometry.spacing_mm
    row, col = np.asarray(geometry.row_dir), np.asarray(geometry.col_dir)
    corner = -0.5 * (col * dy * (shape[0] % 2) + row * dx * (shape[1] % 2))
    origin = geometry.origin_mm + corner
    if n_thin > 1:
        step = (origin[-1] - origin[0]) / (len(origin) - 1)
        parts = (np.arange(n_thin) - (n_thin - 1) / 2) / n_thin
        origin = (origin[:, None] + parts[None, :, None] * step).reshape(-1, 3)
    thickness = geometry.thickness_mm if n_thin == 1 else distance / n_thin
    spacing = (distance / n_thin, dy / FACTOR, dx / FACTOR)
    return replace(geometry, origin_mm=origin, spacing_mm=spacing, thickness_mm=thickness)


def image_scale(image: Array) -> float:
    """Return what counts as 1 in `image`: its 99.5th percentile, or its peak where that is 0."""
    return float(np.percentile(image, SCALE_PERCENTILE)) or float(image.max())


def noise_level(image: Array) -> float:
    """Return the standard deviation of the noise in `image` (slice, y, x), in its own units.

    From the finest diagonal differences where there is signal, of which tissue has next to none.
    Source: Donoho & Johnstone, Biometrika 81:425 (1994), the median of the finest wavelet coefficients.
    """
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
    a, b, c, d = (even[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    diagonal, mean = np.abs(a - b - c + d) / 2, (a + b + c + d) / 4
    inside = mean > FOREGROUND * image_scale(image)
    if not inside.any():
        return 0.0
    return float(np.median(diagonal[inside])) / NORMAL_MAD
