"""A slow, plain reference: Fourier sums written out in complex128, and a scanner that reads any object on any grid.

Nothing here calls a fast transform or the code under test: an image is the sum of exp(+2πi k r) over the samples, with
k = 0 at sample n // 2 and r = 0 at voxel n // 2. What the scanner sends is what an ideal one would have measured, in
the order and with the header fields that the test asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from edge.mrd import ACQUISITION_HEADER, Readout, flag, next_message, read_acquisition
from edge.mrd_write import encode_acquisition
from recon.assemble import Assembler
from recon.scan import Acquisition, Encoding, ImageKey, Limit, Matrix, Role, Scan, Size

SCAN_ID = "01JD0000000000000000000000"
KEY = ImageKey(0, 0, 0, 0, 0, 0)
JUNK = 1e4  # what is to be discarded, or is no image data, holds this: a single one of it in an image is seen


# --- Fourier sums -----------------------------------------------------------------------------------------------------


def waves(k: Any, r: Any, sign: int) -> Any:
    """Return exp(sign 2πi k r), complex128 (k, r)."""
    return np.exp(sign * 2j * np.pi * np.multiply.outer(np.asarray(k, np.float64), np.asarray(r, np.float64)))


def centred(n: int) -> Any:
    """Return the whole numbers whose 0 is at index n // 2."""
    return np.arange(n) - n // 2


def along(matrix: Any, array: Any, axis: int) -> Any:
    """Return `array` with `matrix` (new, old) applied to `axis`."""
    return np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)


def dft(array: Any, axes: Sequence[int], inverse: bool) -> Any:
    """Return the orthonormal transform of `array` along `axes` with its centres at n // 2, complex128."""
    out = np.asarray(array, np.complex128)
    for axis in axes:
        n = out.shape[axis]
        out = along(waves(centred(n), centred(n) / n, 1 if inverse else -1) / np.sqrt(n), out, axis)
    return out


# --- grids ------------------------------------------------------------------------------------------------------------


def encoding_of(
    matrix: tuple[int, int, int],
    wanted: tuple[int, int, int] | None = None,
    kept: tuple[int, int, int] | None = None,
    voxel_mm: tuple[float, float, float] = (2.0, 2.5, 3.0),
    centers: tuple[int, int] | None = None,
    calibration: str = "",
    limits: dict[str, Limit] | None = None,
) -> Encoding:
    """Return an encoding of `matrix` (x, y, z) voxels of which the middle `kept` make an image of `wanted` ones.

    centers: the counters (step 1, step 2) that stand for the centre of k-space, n // 2 where it is not given.
    """
    kept = kept or matrix
    wanted = wanted or kept
    c1, c2 = centers or (matrix[1] // 2, matrix[2] // 2)
    last_1, last_2 = c1 + matrix[1] - 1 - matrix[1] // 2, c2 + matrix[2] - 1 - matrix[2] // 2
    found = {"kspace_encoding_step_1": Limit(0, last_1, c1), "kspace_encoding_step_2": Limit(0, last_2, c2)}
    return Encoding(
        Matrix(*matrix),
        Size(*(n * mm for n, mm in zip(matrix, voxel_mm, strict=True))),
        Matrix(*wanted),
        Size(*(n * mm for n, mm in zip(kept, voxel_mm, strict=True))),
        found | (limits or {}),
        calibration=calibration,
    )


def scan_of(*encodings: Encoding, ratio: float | None = None) -> Scan:
    """Return a scan of these encodings."""
    return Scan(SCAN_ID, encodings, noise_bandwidth_ratio=ratio)


# --- objects ----------------------------------------------------------------------------------------------------------


class Thing(Protocol):
    """What lies in the scanner, as its coils see it."""

    def kspace(self, encoding: Encoding) -> Any:
        """Return complex128 (coil, kz, ky, kx) on the encoded grid, scaled so that an orthonormal image is native."""


@dataclass(frozen=True)
class Voxels:
    """Points at the voxels of the encoded grid: complex (coil, z, y, x), any values. Its image is itself."""

    values: Any

    def kspace(self, encoding: Encoding) -> Any:
        return dft(self.values, (1, 2, 3), inverse=False)


def random_voxels(encoding: Encoding, n_coils: int = 3, seed: int = 0) -> Voxels:
    """Return a different complex number in every voxel of every coil."""
    m = encoding.encoded_matrix
    rng = np.random.default_rng(seed)
    shape = (n_coils, m.z, m.y, m.x)
    return Voxels(rng.standard_normal(shape) + 1j * rng.standard_normal(shape))


@dataclass(frozen=True)
class Blobs:
    """Gaussians seen by coils with Gaussian sensitivities: image and k-space are known in closed form, in mm.

    Each blob: centre (x, y, z) mm, standard deviation mm, complex amplitude. Each coil: centre mm, complex amplitude;
    its sensitivity has the standard deviation `reach_mm`. Scans in two dimensions see all of them at z = 0.
    """

    blobs: tuple[tuple[tuple[float, float, float], float, complex], ...]
    coils: tuple[tuple[tuple[float, float, float], complex], ...]
    reach_mm: float = 40.0

    def kspace(self, encoding: Encoding) -> Any:
        m, fov = encoding.encoded_matrix, encoding.encoded_fov_mm
        n_axes = 3 if encoding.is_3d else 2
        out = np.zeros((len(self.coils), m.z, m.y, m.x), np.complex128)
        for at, (coil_mm, weight) in enumerate(self.coils):
            for blob_mm, width, amplitude in self.blobs:
                factors = [np.ones(1, np.complex128)] * 3
                scale = weight * amplitude
                for axis in range(n_axes):
                    # A product of two Gaussians is a Gaussian.
                    s = 1 / np.sqrt(width**-2 + self.reach_mm**-2)
                    centre = s**2 * (blob_mm[axis] / width**2 + coil_mm[axis] / self.reach_mm**2)
                    distance = (blob_mm[axis] - coil_mm[axis]) ** 2 / (width**2 + self.reach_mm**2)
                    scale *= np.exp(-distance / 2)
                    k = centred(m[axis]) / fov[axis]
                    wave = np.exp(-2 * (np.pi * s * k) ** 2 - 2j * np.pi * k * centre) * s * np.sqrt(2 * np.pi)
                    factors[axis] = wave * np.sqrt(m[axis]) / fov[axis]
                x, y, z = factors
                out[at] += scale * z[:, None, None] * y[:, None] * x
        return out

    def image(self, encoding: Encoding) -> Any:
        """Return the true root-sum-of-squares, float64 (z, y, x), at the voxels of the image that is wanted."""
        m, fov = encoding.recon_matrix, encoding.recon_fov_mm
        x, y, z = (centred(m[axis]) * fov[axis] / m[axis] for axis in range(3))
        places = (x, y[:, None], z[:, None, None] if encoding.is_3d else np.zeros((1, 1, 1)))

        def gauss(centre: tuple[float, float, float], width: float) -> Any:
            n_axes = 3 if encoding.is_3d else 2
            square = sum((places[axis] - centre[axis]) ** 2 for axis in range(n_axes))
            return np.exp(-square / (2 * width**2)) + np.zeros((len(z) if encoding.is_3d else 1, 1, 1))

        seen = sum(amplitude * gauss(centre, width) for centre, width, amplitude in self.blobs)
        power = sum(np.abs(weight * gauss(centre, self.reach_mm) * seen) ** 2 for centre, weight in self.coils)
        return np.sqrt(power)


def head_of_blobs(n_coils: int = 4) -> Blobs:
    """Return a lopsided group of blobs within ±25 mm, and coils around it."""
    blobs: tuple[tuple[tuple[float, float, float], float, complex], ...] = (
        ((0.0, 0.0, 0.0), 10.0, 1.0),
        ((13.0, -8.0, 4.0), 5.0, 0.8j),
        ((-10.0, 14.0, -6.0), 6.0, -0.6 + 0.3j),
        ((4.0, 15.0, 8.0), 5.0, 0.5),
    )
    angles = 2 * np.pi * np.arange(n_coils) / n_coils
    coils = tuple(((45 * np.cos(a), 45 * np.sin(a), 10 * np.sin(2 * a)), complex(np.exp(1j * a))) for a in angles)
    return Blobs(blobs, coils)


# --- the image that is right ------------------------------------------------------------------------------------------


def reference_image(kspace: Any, encoding: Encoding) -> Any:
    """Return the root-sum-of-squares, float64 (z, y, x), of complex (coil, kz, ky, kx), by sums over all samples.

    Oversampling is cropped around voxel n // 2; another matrix comes by evaluating the image's Fourier series between
    its voxels, without the frequencies that the wanted matrix cannot hold.
    """
    image = dft(kspace, (1, 2, 3), inverse=True)
    for axis, name in ((3, "x"), (2, "y"), (1, "z")):
        if name == "z" and not encoding.is_3d:
            continue
        n, wanted = getattr(encoding.encoded_matrix, name), getattr(encoding.recon_matrix, name)
        kept = round(n * getattr(encoding.recon_fov_mm, name) / getattr(encoding.encoded_fov_mm, name))
        image = np.take(image, np.arange(kept) - kept // 2 + n // 2, axis)
        if kept != wanted:
            low, high = max(-(kept // 2), -(wanted // 2)), min(kept - kept // 2, wanted - wanted // 2)
            k = np.arange(low, high)
            series = along(waves(k, centred(kept) / kept, -1) / kept, image, axis)
            image = along(waves(centred(wanted) / wanted, k, 1), series, axis)
    return np.sqrt((np.abs(image) ** 2).sum(0))


def masked(kspace: Any, places: Iterable[tuple[int, int]], window: slice = slice(None)) -> Any:
    """Return `kspace` (coil, kz, ky, kx) with zeros but at the lines `places` (kz, ky) and the samples `window`."""
    out = np.zeros_like(kspace)
    for kz, ky in places:
        out[:, kz, ky, window] = kspace[:, kz, ky, window]
    return out


# --- the scanner ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sending:
    """How readouts leave the scanner.

    first, stop: the part of the encoded line that is sampled (an asymmetric echo lacks the first ones). pre, post:
    samples of junk before and after, named in the header's discards. is_reversed: which lines (kz, ky) are read from
    the other end. center: what the header says of the centre, None for the truth. dwell_us: the sampling time.
    noise: the receiver whose noise is added, None for none.
    """

    first: int = 0
    stop: int | None = None
    pre: int = 0
    post: int = 0
    is_reversed: Callable[[tuple[int, int]], bool] = lambda place: False
    center: int | None = None
    dwell_us: float = 4.0
    noise: Receiver | None = None

    def send(self, line: Any, place: tuple[int, int], rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
        """Return the samples of `line` (coil, kx) as sent, and the header's fields that say how."""
        n = line.shape[1]
        part = line[:, self.first : self.stop]
        if self.noise is not None:
            part = part + self.noise.draw(rng, part.shape[1], self.dwell_us)
        junk = [np.full((len(line), count), JUNK) for count in (self.pre, self.post)]
        samples = np.concatenate([junk[0], part, junk[1]], axis=1)
        pre, post, center = self.pre, self.post, n // 2 - self.first + self.pre
        if self.is_reversed(place):
            samples, pre, post, center = samples[:, ::-1], post, pre, samples.shape[1] - 1 - center
        fields = {
            "center_sample": center if self.center is None else self.center,
            "discard_pre": pre,
            "discard_post": post,
            "is_reversed": self.is_reversed(place),
            "sample_time_us": self.dwell_us,
        }
        return samples.astype(np.complex64), fields


@dataclass(frozen=True)
class Receiver:
    """Channels whose noise has the covariance complex (coil, coil) at a sampling time of 1 µs."""

    covariance: Any

    def draw(self, rng: np.random.Generator, n_samples: int, dwell_us: float) -> Any:
        """Return complex128 noise (coil, sample): its power falls with the sampling time."""
        root = np.linalg.cholesky(np.asarray(self.covariance)) / np.sqrt(dwell_us)
        shape = (len(root), n_samples)
        return root @ ((rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / np.sqrt(2))

    def readouts(self, rng: np.random.Generator, n: int, n_samples: int, dwell_us: float) -> list[Acquisition]:
        """Return `n` noise readouts."""
        return [
            Acquisition(self.draw(rng, n_samples, dwell_us), Role.NOISE, KEY, 0, sample_time_us=dwell_us)
            for _ in range(n)
        ]


def coloured(n_coils: int, power: float = 1.0, seed: int = 7) -> Receiver:
    """Return channels of unequal, correlated noise, `power` on average at 1 µs."""
    rng = np.random.default_rng(seed)
    shape = (n_coils, n_coils)
    mix = np.diag(np.linspace(0.5, 2.0, n_coils)) + 0.3 * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))
    covariance = mix @ mix.conj().T
    return Receiver(power * covariance / (np.trace(covariance).real / n_coils))


def every_line(encoding: Encoding) -> list[tuple[int, int]]:
    """Return all places (kz, ky) of the encoded grid."""
    m = encoding.encoded_matrix
    return [(kz, ky) for kz in range(m.z) for ky in range(m.y)]


@dataclass(frozen=True)
class Order:
    """What the scanner is asked for: the lines of one image, and what their headers say beside their place."""

    places: Sequence[tuple[int, int]]
    key: ImageKey = KEY
    role: Callable[[tuple[int, int]], Role] = lambda place: Role.IMAGING
    average: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=lambda: {"last_in_slice": True})


def scan_lines(
    thing: Thing, encoding: Encoding, order: Order, sending: Sending | None = None, seed: int = 0
) -> list[Acquisition]:
    """Return the readouts of one image in the order of its places; the last one has the flags `order.last`."""
    sending = sending or Sending()
    rng = np.random.default_rng(seed)
    kspace = thing.kspace(encoding)
    m = encoding.encoded_matrix
    center_1 = encoding.limits["kspace_encoding_step_1"].center
    center_2 = encoding.limits["kspace_encoding_step_2"].center
    out = []
    for place in order.places:
        kz, ky = place
        samples, fields = sending.send(kspace[:, kz, ky], place, rng)
        step_1, step_2 = ky - m.y // 2 + center_1, kz - m.z // 2 + center_2
        role = order.role(place)
        out.append(Acquisition(samples, role, order.key, step_1, step_2, order.average, **{**fields, **order.fields}))
    out[-1] = replace(out[-1], **order.last)
    return out


def assembled(scan: Scan, acquisitions: Iterable[Acquisition], **how: Any) -> Assembler:
    """Return an assembler that took every one of `acquisitions`."""
    assembler = Assembler(scan, **how)
    for acquisition in acquisitions:
        assembler.add(acquisition)
    return assembler


# --- on the wire ------------------------------------------------------------------------------------------------------

_FLAGS = {
    Role.NOISE: flag(19),
    Role.IMAGING: 0,
    Role.CALIBRATION: flag(20),
    Role.CALIBRATION_AND_IMAGING: flag(21),
    Role.OTHER: flag(23),
}


def on_the_wire(acquisition: Acquisition, counter: int = 0) -> Readout:
    """Return a readout as a receiver gets it: written as an MRD message, and read from its bytes."""
    head = np.zeros((), ACQUISITION_HEADER)
    head["version"] = 1
    head["flags"] = (
        _FLAGS[acquisition.role]
        | flag(22) * acquisition.is_reversed
        | flag(8) * acquisition.last_in_slice
        | flag(14) * acquisition.last_in_repetition
        | flag(25) * acquisition.last_in_measurement
    )
    head["scan_counter"] = counter
    head["acquisition_time_stamp"] = acquisition.time_stamp
    head["encoding_space_ref"] = acquisition.key.encoding
    for name in (
        "discard_pre",
        "discard_post",
        "center_sample",
        "sample_time_us",
        "read_dir",
        "phase_dir",
        "slice_dir",
    ):
        head[name] = getattr(acquisition, name)
    head["position"] = acquisition.position_mm
    idx = head["idx"]
    idx["kspace_encode_step_1"], idx["kspace_encode_step_2"] = acquisition.step_1, acquisition.step_2
    for name in ("average", "segment"):
        idx[name] = getattr(acquisition, name)
    for name in ("slice", "contrast", "phase", "repetition", "set"):
        idx[name] = getattr(acquisition.key, name)
    content = encode_acquisition(head, acquisition.samples)
    message = next_message(content)
    assert message is not None
    return read_acquisition(content, message)
