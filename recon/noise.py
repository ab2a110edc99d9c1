"""Receiver noise: its covariance, the matrix that whitens it, and an estimate of its level where none was measured."""

from __future__ import annotations

import numpy as np

from recon.arrays import Array, array_module
from recon.errors import AcquisitionError, ShapeError

_EIGENVALUE_FLOOR = 1e-3  # of the median: a dead channel is left quiet, not blown up
_DEAD = 1e-9  # of the strongest: a channel's noise is no weaker than the rounding of single precision


class NoiseCovariance:
    """The covariance of the receiver channels, gathered from noise readouts as they arrive.

    Each noise readout counts with its own sampling time, so that lines of several bandwidths may be mixed.
    """

    def __init__(self) -> None:
        self._sums: dict[float, Array] = {}  # of the outer products, by sampling time
        self._n_samples = 0

    @property
    def n_samples(self) -> int:
        """How many samples per channel were gathered."""
        return self._n_samples

    def add(self, samples: Array, sample_time_us: float) -> None:
        """Gather one noise readout, complex64 (coil, sample), taken with a dwell time of `sample_time_us` (0: unknown).

        The samples are on the host.
        Raises ShapeError when the number of channels changes.
        """
        samples = np.asarray(samples, np.complex128)
        before = next(iter(self._sums.values()), None)
        if before is not None and len(before) != len(samples):
            raise ShapeError("noise readout", samples.shape, (len(before), "sample"))
        dwell = _known(sample_time_us)
        self._sums[dwell] = self._sums.get(dwell, 0) + samples @ samples.conj().T
        self._n_samples += samples.shape[1]

    def covariance(self, sample_time_us: float, bandwidth_ratio: float | None = None) -> Array | None:
        """Return complex128 (coil, coil) for readouts of the given dwell time (0: unknown), or None without a measure.

        There is none where too few samples came, or most channels are silent or copies of others.
        bandwidth_ratio: ISMRMRD's relativeReceiverNoiseBandwidth: equivalent noise bandwidth of the noise readout over
            its nominal bandwidth (Kellman & McVeigh, MRM 54:1439 (2005)); 1 where the header is silent.
        """
        if not self._sums or self._n_samples < 2 * len(next(iter(self._sums.values()))):
            return None
        wanted = _known(sample_time_us)
        total: Array = 0
        for dwell, outer in self._sums.items():
            # White noise has a variance in proportion to bandwidth; one dwell time alone tells nothing of it.
            total = total + outer * (dwell / wanted if dwell and wanted else 1.0)
        total = total / self._n_samples / (bandwidth_ratio or 1.0)
        powers = np.linalg.eigvalsh(total)
        return total if np.median(powers) > _DEAD * powers[-1] else None


def _known(sample_time_us: float) -> float:
    """The sampling time, 0 where it is none."""
    return sample_time_us if 0 < sample_time_us < float("inf") else 0.0


def whitening_matrix(covariance: Array) -> Array:
    """Return complex64 (coil, coil) W with W C Wᴴ = 1, lower triangular where C is well conditioned.

    covariance: complex (coil, coil) on the host, Hermitian. Eigenvalues below 0.1 % of their median are raised to it.
    Raises AcquisitionError where it holds no finite positive variance.
    Source: Pruessmann et al., MRM 46:638 (2001), §"noise decorrelation".
    """
    values, vectors = np.linalg.eigh(covariance) if np.isfinite(covariance).all() else (np.zeros(1), np.zeros((1, 1)))
    median = float(np.median(values))
    if not median > 0:
        raise AcquisitionError("the noise readouts hold no finite positive noise power on most channels")
    floor = _EIGENVALUE_FLOOR * median
    if values[0] < floor:
        covariance = (vectors * np.maximum(values, floor)) @ vectors.conj().T
    return np.linalg.inv(np.linalg.cholesky(covariance)).astype(np.complex64)


def whiten(samples: Array, matrix: Array) -> Array:
    """Return `samples`, complex64 (slice, coil, ky, x), with white noise: complex64, a new array of their module.

    matrix: complex64 (coil, coil) from `whitening_matrix`, on the host; it is moved to where the samples are.
    """
    xp = array_module(samples)
    return xp.einsum("vc,scyx->svyx", xp.asarray(matrix), samples, optimize=True)


class EdgeLevel:
    """The noise level estimated from the two ends of each readout, where k-space holds least signal.

    A stand-in for a missing noise readout: one number for all channels, so that their weights stay as they are.
    """

    _SHARE = 16  # of the readout, at either end
    _FLOOR = 1e-6  # of the largest sample: below any receiver's noise, above the rounding of noise-free phantoms

    def __init__(self) -> None:
        self._powers: dict[int, list[float]] = {}
        self._peak = 0.0

    def add(self, samples: Array, distance: int) -> None:
        """Note one imaging readout, complex64 (coil, kx), lying `distance` lines from the centre of k-space."""
        n = max(1, samples.shape[1] // self._SHARE)
        ends = np.concatenate([samples[:, :n], samples[:, -n:]], axis=1)
        power = float(np.vdot(ends, ends).real) / ends.size
        self._peak = max(self._peak, float(np.abs(samples).max()))
        total = self._powers.setdefault(distance, [0.0, 0.0])
        total[0] += power
        total[1] += 1

    def level(self) -> float:
        """Return the standard deviation of a complex sample in native units; 1 where nothing was received."""
        outer = sorted(self._powers)[len(self._powers) // 2 :]
        powers = np.array([self._powers[d][0] / self._powers[d][1] for d in outer])
        powers = powers[powers > 0]
        found = float(np.sqrt(np.median(powers))) if len(powers) else 0.0
        return max(found, self._FLOOR * self._peak) or 1.0
