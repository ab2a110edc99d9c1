"""Faults put into a scan's readouts on purpose, each in three severities, to see whether the verdict finds them.

They change nothing but what a receiver or a sequence could change: samples, and which readouts there are. Motion, a
wrong sampling and calibration lines of another pose belong to the head and the sequence: `export.trials` makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from recon.arrays import Array
from recon.scan import Acquisition, Role

Readouts = list[Acquisition]


def _imaging(readouts: Readouts) -> Array:
    """Which readouts are not noise."""
    return np.flatnonzero([each.role is not Role.NOISE for each in readouts])


def _with(readouts: Readouts, change: Callable[[Array, int], Array], chosen: Array) -> Readouts:
    """Return readouts with `change(samples, number)` in place of the samples of those `chosen`."""
    out = list(readouts)
    for number in chosen:
        samples = change(readouts[number].samples, int(number))
        out[number] = replace(readouts[number], samples=samples.astype(np.complex64))
    return out


def _peak(readouts: Readouts) -> float:
    """The largest magnitude of a sample that is not noise."""
    return max(float(np.abs(readouts[number].samples).max()) for number in _imaging(readouts))


def _spikes(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """Sparks: one sample of all coils, 0.1 to 0.6 of the peak, in 1, 3 or 8 readouts."""
    peak = _peak(readouts)

    def spark(samples: Array, _: int) -> Array:
        out = samples.copy()
        coils = rng.uniform(0.3, 1, len(out)) * np.exp(2j * np.pi * rng.random(len(out)))
        out[:, rng.integers(out.shape[1])] += peak * rng.uniform(0.1, 0.6) * coils
        return out

    return _with(readouts, spark, rng.choice(_imaging(readouts), (1, 3, 8)[severity], replace=False))


def _dead_coil(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """One coil, a quarter or half of them give noise alone, from the start or from some readout on."""
    n_coils = len(readouts[0].samples)
    n_dead = (1, max(1, n_coils // 4), max(1, n_coils // 2))[severity]
    dead = rng.choice(n_coils, n_dead, replace=False)
    level = _quietest(readouts)
    imaging = _imaging(readouts)
    onset = 0 if rng.random() < 0.3 else int(rng.uniform(0.1, 0.7) * len(imaging))

    def silence(samples: Array, _: int) -> Array:
        out = samples.copy()
        noise = rng.standard_normal((2, n_dead, out.shape[1])) * level * 0.5**0.5
        out[dead] = noise[0] + 1j * noise[1]
        return out

    return _with(readouts, silence, imaging[onset:])


def _quietest(readouts: Readouts) -> float:
    """About the standard deviation of the noise: that of the weakest readout."""
    return min(float(np.sqrt((np.abs(each.samples) ** 2).mean())) for each in readouts)


def _missing(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """1, 3 or one in eight of the readouts never arrive, in one run or here and there."""
    imaging = _imaging(readouts)
    n = (1, 3, max(4, len(imaging) // 8))[severity]
    if rng.random() < 0.5:
        start = int(rng.integers(len(imaging) - n))
        gone = set(imaging[start : start + n].tolist())
    else:
        gone = set(rng.choice(imaging, n, replace=False).tolist())
    return [each for number, each in enumerate(readouts) if number not in gone]


def _mislabelled(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """1, 3 or one in eight of the readouts carry the number of the one before them."""
    imaging = _imaging(readouts)
    n = (1, 3, max(4, len(imaging) // 8))[severity]
    out = list(readouts)
    for number in rng.choice(imaging[1:], n, replace=False):
        out[number] = replace(readouts[number], step_1=readouts[number - 1].step_1)
    return out


def _not_finite(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """NaN or Inf in a few samples of 1, 3 or one in eight of the readouts."""
    imaging = _imaging(readouts)

    def spoil(samples: Array, _: int) -> Array:
        out = samples.copy()
        out[rng.integers(len(out)), rng.integers(out.shape[1], size=3)] = rng.choice((np.nan, np.inf))
        return out

    return _with(readouts, spoil, rng.choice(imaging, (1, 3, max(4, len(imaging) // 8))[severity], replace=False))


def _clipping(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """A converter that ends at 0.6, 0.35 or 0.15 of the peak of real and imaginary part."""
    most = _peak(readouts) * (0.6, 0.35, 0.15)[severity]
    return _with(
        readouts,
        lambda samples, _: np.clip(samples.real, -most, most) + 1j * np.clip(samples.imag, -most, most),
        _imaging(readouts),
    )


def _interference(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """A carrier of one frequency, of any phase in each readout: 4, 12 or 40 times the noise in its column.

    Half of them are steady, the others vary from readout to readout as noise does.
    """
    amplitude = (4, 12, 40)[severity] * _quietest(readouts) / np.sqrt(readouts[0].samples.shape[1])
    frequency = rng.uniform(-0.5, 0.5)
    coils = rng.uniform(0.3, 1, len(readouts[0].samples)) * np.exp(2j * np.pi * rng.random(len(readouts[0].samples)))

    is_steady = rng.random() < 0.5

    def add(samples: Array, _: int) -> Array:
        strength = 1.0 if is_steady else rng.rayleigh(0.5**0.5)
        phase = 2 * np.pi * (frequency * np.arange(samples.shape[1]) + rng.random())
        return samples + strength * amplitude * coils[:, None] * np.exp(1j * phase)

    return _with(readouts, add, np.arange(len(readouts)))


def _gain(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """The receiver's gain rises or falls by 2, 5 or 10 dB from some readout on."""
    imaging = _imaging(readouts)
    factor = 10 ** (float(rng.choice((-1, 1))) * (2, 5, 10)[severity] / 20)
    return _with(readouts, lambda samples, _: samples * factor, imaging[int(rng.uniform(0.15, 0.85) * len(imaging)) :])


def _noisy(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """2, 4 or 8 times the noise that was there before, after any noise readouts."""
    level = _quietest(readouts) * np.sqrt((2, 4, 8)[severity] ** 2 - 1) * 0.5**0.5

    def add(samples: Array, _: int) -> Array:
        parts = rng.standard_normal((2, *samples.shape)) * level
        return samples + parts[0] + 1j * parts[1]

    return _with(readouts, add, _imaging(readouts))


def _ghost(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """Every other readout, as it came, has another phase (0.2, 0.5 or 1 rad) and is shifted by as many samples."""
    by = (0.2, 0.5, 1.0)[severity]

    def turn(samples: Array, _: int) -> Array:
        n = samples.shape[1]
        ramp = 2 * np.pi * by * (np.arange(n) - n // 2) / n
        line = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(samples, axes=1), axis=1), axes=1) * np.exp(1j * ramp)
        return np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(line, axes=1), axis=1), axes=1) * np.exp(1j * by)

    return _with(readouts, turn, _imaging(readouts)[::2])


def _no_calibration(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """The calibration lines are lost: all, or all but 2 or 4."""
    calibrating = [
        number for number, each in enumerate(readouts) if each.role in (Role.CALIBRATION, Role.CALIBRATION_AND_IMAGING)
    ]
    kept = set(calibrating[: (4, 2, 0)[severity]])
    return [each for number, each in enumerate(readouts) if number in kept or number not in calibrating]


def _swapped_coils(readouts: Readouts, severity: int, rng: np.random.Generator) -> Readouts:
    """Separate calibration lines come with their coils in another order: 2, half or all of them change places."""
    n_coils = len(readouts[0].samples)
    n = (2, max(2, n_coils // 2), n_coils)[severity]
    chosen = rng.choice(n_coils, n, replace=False)
    order = np.arange(n_coils)
    order[chosen] = np.roll(chosen, 1)
    calibrating = np.flatnonzero([each.role is Role.CALIBRATION for each in readouts])
    return _with(readouts, lambda samples, _: samples[order], calibrating)


INJECTED: dict[str, Callable[[Readouts, int, np.random.Generator], Readouts]] = {
    "spikes": _spikes,
    "dead coil": _dead_coil,
    "missing lines": _missing,
    "wrong line numbers": _mislabelled,
    "not finite": _not_finite,
    "clipping": _clipping,
    "interference": _interference,
    "gain jump": _gain,
    "noise": _noisy,
    "ghost": _ghost,
    "no calibration": _no_calibration,
    "swapped coils": _swapped_coils,
}


def inject(fault: str, severity: int, readouts: Readouts, rng: np.random.Generator) -> Readouts:
    """Return the readouts of a scan with one of `INJECTED` in them, severity 0 (mild) to 2; raise KeyError else."""
    return INJECTED[fault](readouts, severity, rng)
