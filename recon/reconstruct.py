"""Assembled k-space to images in the scanner's native units: the classical chain, and the network that goes on from it.

The classical image is always made: it is what the network starts from, the comparison, and what serves where the
network may not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recon.arrays import Array, array_module, closed, to_host
from recon.coils import estimate_maps
from recon.compress import MAX_VIRTUAL, choose_n_virtual, compress, compression_matrix
from recon.errors import AcquisitionError
from recon.fourier import to_image
from recon.network import Network
from recon.placement import to_recon_grid
from recon.scan import CoilMaps, Encoding, KSpace
from recon.sense import add_unexplained, cg_sense, unexplained
from recon.unrolled import noise_level, reconstruct_unrolled, refusal

# Peak given to calibration lines of unknown noise, where the estimator expects units of noise: its own threshold then
# decides what is signal. Measured on real scans: never worse than an estimated level, up to 0.8 dB better.
_FAR_ABOVE_NOISE = np.float32(1e6)
METHODS = ("auto", "network", "sense", "zero-filled")

Stage = Callable[[str], AbstractContextManager[None]]  # marks a step's beginning and end, for whoever owns a clock


def unmarked(_: str) -> AbstractContextManager[None]:
    """Mark nothing."""
    return nullcontext()


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """What calibration lines tell of the receiver: how to compress its coils, and the maps of the virtual ones.

    matrix: complex64 (virtual coil, coil), of the maps' module (NumPy or CuPy). maps: of the virtual coils, or None
    where none could be had; then `reason`, and the matrix leaves the coils as they are.
    """

    matrix: Array
    maps: CoilMaps | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Image:
    """One reconstructed image key: float32 (slice, y, x) magnitude in native units on the host, and how it was made.

    model_sha256 and backend are "" where no network was used.
    """

    data: Array
    method: str
    steps: tuple[str, ...]
    model_sha256: str = ""
    backend: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", closed(self.data, np.float32))


@dataclass(frozen=True, eq=False)
class Start:
    """The problem that was solved classically, for a network to go on from.

    kspace: in virtual coils. maps: of those. image: complex64 (slice, y, x), the classical solution, in units of the
    noise. unexplained: float32 (slice, y, x), power that the maps leave out (`recon.sense.unexplained`), in noise
    variances. native: float32 (slice, y, x), native units per unit of the noise at each place. steps: how it came.
    All arrays are of one module (NumPy or CuPy).
    """

    kspace: KSpace
    maps: CoilMaps
    image: Array
    unexplained: Array
    native: Array
    steps: tuple[str, ...]


class Classical(NamedTuple):
    """The classical image, and what a network needs to go on (None where there are no coil maps)."""

    image: Image
    start: Start | None


class Learned(NamedTuple):
    """The network's image, and its complex solution in units of the noise, complex64 (slice, y, x), to be judged."""

    image: Image
    solution: Array


def sense_coils(
    calibration: Array | None, n_ky: int, n_coils: int, is_whitened: bool, stage: Stage = unmarked
) -> Sensitivities:
    """Return coil compression and maps from calibration lines, complex64 (slice, coil, ky, x), for `n_ky` rows.

    is_whitened: the lines have noise variance 1, which tells how many virtual coils hold signal; otherwise as many as
        there may be are kept.
    Never raises for want of calibration: the reason is in the result, and root-sum-of-squares will serve.
    """
    if calibration is None:
        return Sensitivities(np.eye(n_coils, dtype=np.complex64), None, "no calibration lines at the centre of k-space")
    try:
        with stage("compress"):
            n_virtual = choose_n_virtual(calibration) if is_whitened else min(n_coils, MAX_VIRTUAL)
            matrix = compression_matrix(calibration, n_virtual)
            if not is_whitened:
                calibration = calibration * (_FAR_ABOVE_NOISE / array_module(calibration).abs(calibration).max())
            calibration = compress(calibration, matrix)
        with stage("maps"):
            return Sensitivities(matrix, estimate_maps(calibration, n_ky))
    except AcquisitionError as error:
        return Sensitivities(np.eye(n_coils, dtype=np.complex64), None, str(error))


def reconstruct_classical(
    kspace: KSpace,
    encoding: Encoding,
    method: str = "auto",
    sensitivities: Sensitivities | None = None,
    stage: Stage = unmarked,
) -> Classical:
    """Return the image of `kspace` by `method` as far as no network is needed.

    method: "sense" and "network" insist on coil maps, "auto" takes root-sum-of-squares where there are none,
        "zero-filled" combines the measured lines alone.
    sensitivities: from `sense_coils` of the same calibration lines, if they were worked out while lines still arrived.
    All arrays are of one module (NumPy or CuPy), which the work follows; the image is brought to the host.
    Raises AcquisitionError where `method` cannot serve this k-space.
    """
    n_coils, n_ky = kspace.samples.shape[1:3]
    steps: list[str] = [
        f"noise prewhitened ({'noise readout' if kspace.noise_is_measured else 'level estimated from outer k-space'})"
    ]
    if method == "zero-filled":
        return Classical(Image(_combined(kspace, encoding), "zero-filled", (*steps, "root-sum-of-squares")), None)
    coils = sensitivities or sense_coils(kspace.calibration, n_ky, n_coils, True, stage)
    if coils.maps is None:
        if method != "auto":
            raise AcquisitionError(
                f"{'SENSE' if method == 'sense' else 'the network'} needs coil maps, and there are none: {coils.reason}"
            )
        with stage("classical"):
            combined = _combined(kspace, encoding)
        steps += [f"no coil maps: {coils.reason}", "root-sum-of-squares"]
        return Classical(Image(combined, "root-sum-of-squares", tuple(steps)), None)
    with stage("compress"):
        compressed = KSpace(
            compress(kspace.samples, coils.matrix),
            kspace.averages,
            kspace.noise_scale,
            kspace.noise_is_measured,
            None if kspace.calibration is None else compress(kspace.calibration, coils.matrix),
            kspace.slice_encoded,
        )
    if n_coils > 1:
        steps.append(f"{n_coils} coils compressed to their principal components")
    with stage("classical"):
        image = cg_sense(compressed, coils.maps)
        left_out = unexplained(compressed, coils.maps, image, _levels(compressed))
        native = _native_sensitivity(kspace, coils)
        magnitude = _magnitude(add_unexplained(image, left_out) * native, encoding)
    steps += ["ESPIRiT coil maps", "regularised CG-SENSE", "signal of measured lines that the maps leave out, added"]
    start = Start(compressed, coils.maps, image, left_out, native, tuple(steps))
    return Classical(Image(magnitude, "sense", start.steps), start)


def network_refusal(network: Network, start: Start) -> str:
    """Return why `network` must not reconstruct the scan that `start` is of; "" where it may."""
    return refusal(start.kspace, start.maps.maps.shape[1], network.card.trained_range)


def reconstruct_network(network: Network, start: Start, encoding: Encoding, stage: Stage = unmarked) -> Learned:
    """Return the network's image of the scan that `start` is of, for which `network_refusal` has no objection.

    The image is brought to the host, the solution stays where `start` is. Raises BackendError where the run fails.
    """
    with stage("network"):
        solution = reconstruct_unrolled(network, start.kspace, start.maps, start.image)
        magnitude = _magnitude(add_unexplained(solution, start.unexplained) * start.native, encoding)
    card = network.card
    steps = (*start.steps, f"unrolled network {card.name} {card.version} with data consistency")
    return Learned(Image(magnitude, "network", steps, card.sha256, network.backend), solution)


def _magnitude(image: Array, encoding: Encoding) -> Array:
    """Return the magnitude of `image`, complex (slice, y, x), on the grid that is wanted: float32, on the host."""
    return to_host(array_module(image).abs(to_recon_grid(image, encoding)))


def _combined(kspace: KSpace, encoding: Encoding) -> Array:
    """Root-sum-of-squares in native units, float32 (slice, y, x) on the host, one coil at a time to bound memory."""
    xp = array_module(kspace.samples)
    axes = (0, 1) if kspace.slice_encoded else (1,)
    power: Array = np.float32(0)
    for weights in xp.asarray(_to_native(kspace)):
        samples = xp.tensordot(weights, kspace.samples, axes=(0, 1))
        power = power + xp.abs(to_recon_grid(to_image(samples, axes), encoding)) ** 2
    return to_host(xp.sqrt(power))


def _levels(kspace: KSpace) -> Array:
    """Return the standard deviation of the noise in the samples of each slice, float (slice)."""
    n_x = kspace.samples.shape[-1]
    if kspace.slice_encoded:
        return np.full(len(kspace.samples), noise_level(kspace.samples.reshape(1, -1, n_x), kspace.noise_is_measured))
    return np.array([noise_level(each, kspace.noise_is_measured) for each in kspace.samples])


def _to_native(kspace: KSpace) -> Array:
    """complex64 (coil, whitened coil) on the host: whitened samples to the receiver's own units."""
    if kspace.to_native is not None:
        return kspace.to_native
    return np.eye(kspace.samples.shape[1], dtype=np.complex64) * np.float32(kspace.noise_scale)


def _native_sensitivity(kspace: KSpace, coils: Sensitivities) -> Array:
    """float32 (slice, y, x): what turns the combined image into the root-sum-of-squares of the receiver's own coils.

    The maps describe whitened coils; without this the image would be shaded by how noisy the coils near a place are.
    """
    assert coils.maps is not None
    maps = coils.maps.maps
    xp = array_module(maps)
    back = xp.asarray(_to_native(kspace)) @ coils.matrix.conj().T
    power = xp.einsum("svyx,svyx->syx", maps.conj(), xp.einsum("vw,swyx->svyx", back.conj().T @ back, maps)).real
    return xp.sqrt(xp.maximum(power, 0)).astype(xp.float32)
