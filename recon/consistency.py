"""What a slice's own k-space says of its image: the measures that a verdict is made of.

Nothing here needs a reference image, and nothing decides: `recon.quality` holds the measures against thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from recon.arrays import Array, closed, to_host
from recon.g_factor import g_factor
from recon.g_factor import snr_map as _snr_map
from recon.ghost import ghost_ratio
from recon.held_out import HeldOut, hold_out
from recon.motion import displaced_share, find_motion
from recon.network import Network
from recon.novelty import FOREGROUND, features
from recon.reconstruct import Start
from recon.residual import chi_squared, line_excess, map_residual, misfit
from recon.scan import CoilMaps, KSpace
from recon.unrolled import PEAK_PERCENTILE, noise_level

# What makes an estimate of the image's error of the parts that are measured: see `relative_error`.
UNMEASURED_PART = 0.3  # lines are hidden from fewer others than are left, so they are predicted worse
UNEXPLAINED_PART = 0.2
SURE_MOTION = 0.01  # score at which half of the displaced energy is believed
NEAR_VOXELS = 5  # side of the square over which the invented share is averaged


@dataclass(frozen=True, eq=False)
class SliceMeasures:
    """The measures of one slice.

    values: name to number, only those that could be measured, all finite. onset: rank in acquisition order (0 = the
    first line of this image) at which inconsistency begins, None where none stands out. invented: float32 (y, x) in
    [0, 1], the share of the network's image that measured lines do not determine; None without a network.
    """

    values: Mapping[str, float]
    onset: int | None
    invented: Array | None

    def __post_init__(self) -> None:
        if self.invented is not None:
            object.__setattr__(self, "invented", closed(self.invented, np.float32))


def measure_slice(
    start: Start, order: Array | None, network: Network | None, network_image: Array | None, *, thorough: bool
) -> SliceMeasures:
    """Return the measures of a 2-D slice; of a 3-D scan those that cost little.

    start: of one slice (of all of them for a scan that is `slice_encoded`). order: int (ky), the rank of each measured
    line in acquisition order, -1 where not measured; None where it is not known. network, network_image: complex64
    (1, y, x) as `reconstruct_unrolled` returned it; None where the classical image is all there is.
    thorough: False leaves out what costs a good part of a reconstruction: held-out lines, motion and g-factor.
    Raises BackendError from the network.
    """
    start = _on_host(start)
    kspace, maps = start.kspace, start.maps
    level = _level(kspace)
    values = _of_every_scan(start, level)
    if kspace.slice_encoded or len(start.image) != 1:
        return SliceMeasures(_finite(values), None, None)
    n_coils = maps.maps.shape[1]
    image = to_host(network_image)[0] if network_image is not None else start.image[0]
    excess = line_excess(kspace, maps, image, level)
    if n_coils > 1:
        values["chi2"] = chi_squared(kspace, maps, excess, level)
        values["misfit"] = misfit(kspace, maps, image, excess)
    values["map_residual"] = map_residual(kspace, maps, level)
    values["ghost"] = ghost_ratio(kspace)
    values |= {f"feature_{i}": float(each) for i, each in enumerate(features(start, level))}
    invented = None
    if network_image is not None:
        invented, values["invented"] = _invented(start.image[0], image)
        values["disagreement"] = float(np.linalg.norm(image - start.image[0])) / max(
            float(np.linalg.norm(image)), 1e-20
        )
    onset = None
    if thorough:
        values |= _noise(start, level)
        displaced = 0.0
        motion = find_motion(kspace, maps, order) if order is not None else None
        if motion is not None and order is not None:
            onset = motion.onset if motion.score > SURE_MOTION else None
            values["inconsistency"] = max(motion.score, 0.0)
            displaced = displaced_share(kspace, order, motion) * _belief(motion.score)
        held = hold_out(start, network if network_image is not None else None, level)
        if held is not None:
            values["held_out_chi2"] = held.chi2
            values["hidden"] = float(np.sqrt(held.excess))
            values["held_out"] = relative_error(start, image, held, excess, level, displaced)
    return SliceMeasures(_finite(values), onset, invented)


def ranked(numbers: Array) -> tuple[Array, Array]:
    """Return the rank in which each line of an image came, int (ky), -1 for none, and the numbers in ascending order.

    numbers: int (ky), of the readout that gave each line, -1 where not measured.
    """
    lines = np.flatnonzero(numbers >= 0)
    in_order = lines[np.argsort(numbers[lines], kind="stable")]
    ranks = np.full(len(numbers), -1)
    ranks[in_order] = np.arange(len(lines))
    return ranks, numbers[in_order]


def relative_error(
    start: Start, image: Array, held: HeldOut, excess: Array, level: float, displaced: float = 0.0
) -> float:
    """Return an estimate of the image's error, root mean square over that of the image.

    It sums the energies of what can be wrong: lines that were not measured, as wrong as the hidden ones; the noise of
    those that were, of which a magnitude image shows half; what they hold beyond what maps explain; and a head in two
    places, `displaced` of the image's energy.
    """
    kspace = start.kspace
    averages = kspace.averages[0]
    measured = averages > 0
    energy = max(float((image.real**2 + image.imag**2).sum()) / image.shape[1], 1e-20)
    noise = 0.5 * level**2 * float((1 / averages[measured]).sum())
    unexplained = UNEXPLAINED_PART * float(np.maximum(excess, 0).sum())
    return float(np.sqrt(UNMEASURED_PART * held.excess * held.missing + (noise + unexplained) / energy + displaced))


def snr_map(start: Start) -> Array:
    """Return the classical image of a 2-D slice in units of its own noise, float32 (y, x); see `recon.g_factor`."""
    start = _on_host(start)
    return _snr_map(start, _level(start.kspace))


def _belief(score: float) -> float:
    return score**2 / (score**2 + SURE_MOTION**2) if score > 0 else 0.0


def _level(kspace: KSpace) -> float:
    """Return the standard deviation of the noise in a sample of all slices together."""
    return noise_level(kspace.samples.reshape(-1, *kspace.samples.shape[2:]), kspace.noise_is_measured)


def _of_every_scan(start: Start, level: float) -> dict[str, float | None]:
    kspace = start.kspace
    peak = float(np.percentile(np.abs(start.image), PEAK_PERCENTILE))
    return {
        "coverage": float(kspace.measured.mean()),
        "noise": level / peak if peak > 0 else None,
        "noise_known": float(kspace.noise_is_measured),
        "noise_level": level,
    }


def _noise(start: Start, level: float) -> dict[str, float | None]:
    """g-factor and SNR in the columns that they are worked out in, as far as they lie in the head."""
    g, noise, columns = g_factor(start)
    bright = np.abs(start.image[0])
    head = (bright > FOREGROUND * np.percentile(bright, PEAK_PERCENTILE))[:, columns] & (noise > 0)
    if not head.any():
        return {}
    snr = bright[:, columns][head] / (level * noise[head])
    return {"g_mean": float(g[head].mean()), "g_max": float(g[head].max()), "snr": float(np.median(snr))}


def _invented(classical: Array, image: Array) -> tuple[Array, float]:
    """Return the share of the network's image that measured lines do not determine, (y, x), and its mean in the head.

    The classical solution is what the measured lines, with their noise, determine of an image: the network's own data
    put through the same least-squares problem would give it again. What differs is the network's own. Amplitudes are
    averaged over a neighbourhood, root mean square.
    """
    apart, whole = (_neighbourhood(np.abs(each) ** 2) for each in (image - classical, image))
    floor = 1e-4 * float(whole.max()) + 1e-20
    share = np.minimum(np.sqrt(apart / (whole + floor)), 1).astype(np.float32)
    bright = np.abs(image)
    head = bright > FOREGROUND * np.percentile(bright, PEAK_PERCENTILE)
    return share, float(share[head].mean()) if head.any() else 0.0


def _neighbourhood(power: Array) -> Array:
    """Return the mean of (y, x) over `NEAR_VOXELS` each way."""
    reach = NEAR_VOXELS // 2
    for axis in (0, 1):
        power = np.mean([np.roll(power, step, axis) for step in range(-reach, reach + 1)], axis=0)
    return power


def _on_host(start: Start) -> Start:
    kspace = start.kspace
    calibration = None if kspace.calibration is None else to_host(kspace.calibration)
    return Start(
        replace(kspace, samples=to_host(kspace.samples), calibration=calibration),
        CoilMaps(to_host(start.maps.maps)),
        to_host(start.image),
        to_host(start.unexplained),
        to_host(start.native),
        start.steps,
    )


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and np.isfinite(value)}
