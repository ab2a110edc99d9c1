"""Did the head move while lines were acquired, and when: each line against what the others say of it, in time.

Every measured line is predicted twice without itself: from the nearest measured lines on either side through the coils,
and from those on the other side of k-space, which hold the conjugate of the same image but for a smooth phase. If the
head moves at some moment, a line and one that it is predicted from are shifted against each other where one came before
that moment and the other after, and nowhere else. So each line is correlated with each of its predictions over shifts
along and across the lines, and for each moment and shift the likelihood that all of this happened is compared with that
of nothing having happened. How well lines predict each other is taken from the data themselves, in bands of distance
from the centre: what lines say nothing about each other counts for nothing.

The shift is rigid and in the plane; a turn of a few degrees is seen by the shifts that it comes near to.

Source: lines that predict each other through coils, Griswold et al., Magn Reson Med 47:1202 (2002) and Bydder et al.,
47:677 (2002); conjugate symmetry with coils, Blaimer et al., Magn Reson Med 61:93 (2009); correlation of shifted lines,
Ehman and Felmlee, Radiology 173:255 (1989). The predictor is the linear least-squares estimate under the coil maps and
the brightness of the calibration image, which needs no fit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recon.arrays import Array
from recon.fourier import resize_centred, to_image, to_kspace
from recon.scan import CoilMaps, KSpace
from recon.sense import calibration_image

REACH = 8  # voxels: shifts looked for, either way, in steps of one
MIN_SHIFT = 1.5  # voxels: less spoils little, and is what wrong phases look like
BAND = 64  # samples of a line around its centre that are compared; beyond lies mostly noise
MIN_LINES = 12
MIN_CONJUGATE = 6  # lines from the centre: nearer ones are their own conjugates through the coils
N_BANDS = 5  # of distance from the centre
EVERY = 2  # columns of the reduced grid that share a predictor
N_STARTS = 16  # moments at which a head that comes back may go
AWHILE = (0.12, 0.2, 0.3)  # of the lines: for how long
CAP = 0.995  # of a coherence, so that its logarithm is finite


class Motion(NamedTuple):
    """The most likely motion: `score`, mean log likelihood ratio a sample; `onset`, the rank of the first line after.

    shift: (y, x) in voxels, of lines from `onset` on against those before. end: the rank of the first line for which
    the head is back; None where it is not.
    """

    score: float
    onset: int
    shift: tuple[float, float]
    end: int | None = None


class Prediction(NamedTuple):
    """What some lines say of others: complex64 (line, coil, x) by the line predicted, and where it comes from.

    total: of all sources. parts: by source. sources: int (source, line), -1 where there is none. expected: (line), the
    share of its power that the model says they explain.
    """

    total: Array
    parts: Array
    sources: Array
    expected: Array


def find_motion(kspace: KSpace, maps: CoilMaps, order: Array) -> Motion | None:
    """Return the most likely moment of motion in a slice; None where too little was measured to tell.

    kspace, maps: of one slice, on the host. order: int (ky), the rank of each measured line in time, -1 elsewhere.
    """
    lines = np.flatnonzero((order >= 0) & kspace.measured[0])
    if len(lines) < MIN_LINES or maps.maps.shape[1] < 2 or kspace.calibration is None:
        return None
    n_y, n_x = maps.maps.shape[2:]
    samples, model = _reduced(kspace, maps)
    own = _along_kx(samples[:, :, lines].transpose(2, 1, 0))
    ranks = np.argsort(np.argsort(order[lines], kind="stable"), kind="stable")
    spans = _spans(len(lines))
    late = (ranks[None] >= spans[:, :1]) & (ranks[None] < spans[:, 1:])  # (span, line)
    bands = np.argsort(np.argsort(np.abs(lines - n_y // 2), kind="stable")) * N_BANDS // len(lines)
    shifts = _Shifts(lines - n_y // 2, own.shape[2], (n_y, n_x))
    likelihood: Array = np.float32(0)
    n_samples = 0
    for found in (_neighbours(samples, model, lines, n_y), _conjugates(samples, model, lines, n_y)):
        sums = _compare(own, found, late, bands, shifts)
        used = found.sources.max(0) >= 0
        for band in range(N_BANDS):
            n = int((bands[used] == band).sum()) * own.shape[2]
            if n:
                likelihood = likelihood + n * sums.gain(band)
                n_samples += n
    if not n_samples:
        return None
    likelihood = np.where(shifts.is_far, likelihood, -np.inf)
    span, place = np.unravel_index(int(likelihood.argmax()), likelihood.shape)
    first, end = (int(each) for each in spans[span])
    in_order = np.sort(order[lines])
    back = int(in_order[end]) if end < len(lines) else None
    return Motion(float(likelihood.max()) / n_samples, int(in_order[first]), shifts.at(int(place)), back)


def _spans(n: int) -> Array:
    """Return when a head may lie elsewhere, int (span, 2), ranks [from, to) of `n` lines: for good or for a while."""
    to_end = [(first, n) for first in range(1, n)]
    step = max(1, n // N_STARTS)
    awhile = [
        (first, first + length)
        for length in sorted({max(4, round(share * n)) for share in AWHILE})
        for first in range(step, n - length, step)
    ]
    return np.array([*to_end, *awhile])


class _Shifts:
    """The phases of all shifts, flat (y · x), at lines `ky` and `n_kx` samples around their centre."""

    def __init__(self, ky: Array, n_kx: int, shape: tuple[int, int]) -> None:
        steps = np.arange(-REACH, REACH + 1)
        kx = np.arange(n_kx) - n_kx // 2
        self._steps = steps
        self._y = np.exp(2j * np.pi / shape[0] * np.outer(ky, steps)).astype(np.complex64)
        self._x = np.exp(2j * np.pi / shape[1] * np.outer(kx, steps)).astype(np.complex64)
        self.is_far = np.hypot(steps[:, None], steps).ravel() >= MIN_SHIFT

    def rise(self, cross: Array) -> Array:
        """Return the correlation of cross-power (line, kx) at each shift, less that at none: float32 (line, shift)."""
        product = (self._y[:, :, None] * (cross @ self._x)[:, None]).real.reshape(len(cross), -1)
        middle = product.shape[1] // 2
        return product - product[:, middle : middle + 1]

    def at(self, place: int) -> tuple[float, float]:
        """Return the shift (y, x) at a place."""
        y, x = divmod(place, len(self._steps))
        return float(self._steps[y]), float(self._steps[x])


class _Powers(NamedTuple):
    """Sums over the samples of each band: of a line with what predicts it, and of their own powers.

    product, predicted: float32 (span, band, shift). own: float (band). Those at rest end in `_0`, (band).
    """

    product: Array
    predicted: Array
    product_0: Array
    predicted_0: Array
    own: Array

    def gain(self, band: int) -> Array:
        """Return the information gained over rest, (span, shift), in nats a sample."""
        own = max(float(self.own[band]), 1e-20)
        rest = _information(self.product_0[band], own * self.predicted_0[band])
        product = self.product_0[band] + self.product[:, band]
        return _information(product, own * (self.predicted_0[band] + self.predicted[:, band])) - rest


def _information(product: Array, powers: Array) -> Array:
    """Return the information in a coherence, in nats a sample: -log(1 - coherence²), 0 below 0."""
    coherence = np.maximum(product, 0) ** 2 / np.maximum(powers, 1e-20)
    return -np.log(1 - np.minimum(coherence, CAP))


def _compare(own: Array, found: Prediction, late: Array, bands: Array, shifts: _Shifts) -> _Powers:
    """Return how lines and their predictions go together if the lines that are `late` (span, line) lie elsewhere.

    A prediction of two sources that are shifted against each other has another power than at rest.
    """
    parts = [_along_kx(each) for each in found.parts]
    total = parts[0] + parts[1]
    weight = _whitening(own, total) * found.expected[:, None]
    shape = (len(late), N_BANDS, len(shifts.is_far))
    sums = _Powers(np.zeros(shape, np.float32), np.zeros(shape, np.float32), *np.zeros((3, N_BANDS)))
    used = found.sources.max(0) >= 0
    np.add.at(sums.own, bands[used], ((np.abs(own) ** 2).sum(1) * weight).sum(1)[used])
    np.add.at(sums.predicted_0, bands[used], ((np.abs(total) ** 2).sum(1) * weight).sum(1)[used])
    np.add.at(sums.product_0, bands[used], ((own * total.conj()).sum(1).real * weight).sum(1)[used])
    whole = late.astype(np.int8)
    first, second = found.sources
    for part, sources in zip(parts, found.sources, strict=True):
        rise = shifts.rise((own * part.conj()).sum(1) * weight)
        _gather(sums.product, rise, whole - whole[:, sources], bands, sources >= 0)
    rise = 2 * shifts.rise((parts[0] * parts[1].conj()).sum(1) * weight)
    _gather(sums.predicted, rise, whole[:, first] - whole[:, second], bands, (first >= 0) & (second >= 0))
    return sums


def _gather(sums: Array, rise: Array, relative: Array, bands: Array, used: Array) -> None:
    """Add `rise` (line, shift) where a line lies elsewhere than what it is compared with: `relative` is 1 or -1."""
    for band in range(N_BANDS):
        chosen = used & (bands == band)
        if chosen.any():
            signs = relative[:, chosen]
            sums[:, band] += (signs > 0).astype(np.float32) @ rise[chosen]
            sums[:, band] += (signs < 0).astype(np.float32) @ rise[chosen, ::-1]


def _whitening(own: Array, predicted: Array) -> Array:
    """Return the weight of each sample (line, kx): halfway between equal weights for lines and for their samples."""
    power = np.sqrt((np.abs(own) ** 2).sum(1) * (np.abs(predicted) ** 2).sum(1))
    line = np.sqrt((np.abs(own) ** 2).sum(1).mean(1) * (np.abs(predicted) ** 2).sum(1).mean(1))
    tiny = 1e-20
    return 1 / np.sqrt(np.maximum(power, tiny) * np.maximum(line, tiny)[:, None])


def _along_kx(lines: Array) -> Array:
    """Return (line, coil, x) as (line, coil, kx), at most `BAND` samples around the centre."""
    return resize_centred(to_kspace(lines, (2,)), 2, min(BAND, lines.shape[2]))


class _Model:
    """How lines of one image go together, by column: covariances of the coils at a distance of lines."""

    def __init__(self, maps: Array, image: Array) -> None:
        """maps: complex64 (x, coil, y). image: complex64 (x, y), coarse, for brightness and phase."""
        power = np.abs(image) ** 2
        self._power = (power + 1e-3 * power.max())[:, None].astype(np.float32) / image.shape[1]
        self._maps = maps
        self._turned = maps * (image / np.maximum(np.abs(image), 1e-20))[:, None]
        self._places = np.arange(image.shape[1]) - image.shape[1] // 2
        self._kept: dict[tuple[bool, int], Array] = {}

    def covariance(self, distance: int, is_conjugate: bool = False) -> Array:
        """Return E[D(k + distance) D(k)ᴴ], or E[D(k) D(j)ᵀ] where k + j = distance: complex64 (x, coil, coil)."""
        key = (is_conjugate, distance)
        if key not in self._kept:
            wave = np.exp(-2j * np.pi / len(self._places) * distance * self._places).astype(np.complex64)
            maps = self._turned if is_conjugate else self._maps
            other = maps if is_conjugate else maps.conj()
            self._kept[key] = (maps * (self._power * wave)) @ other.transpose(0, 2, 1)
        return self._kept[key]

    def predictor(self, offsets: tuple[int, ...], is_conjugate: bool) -> tuple[Array, float]:
        """Return complex64 (x, coil, source · coil) that predicts a line from those at `offsets`, and how much of it.

        is_conjugate: from conjugates of lines that with it add up to `offsets`. The share is of the line's power.
        """
        covariance = [[self.covariance(a - b) for b in offsets] for a in offsets]
        known = np.concatenate([np.concatenate(row, 2) for row in covariance], 1)
        if is_conjugate:
            known = known.conj()
        wanted = np.concatenate(
            [self.covariance(each, True) if is_conjugate else self.covariance(-each) for each in offsets], 2
        )
        level = 1 + 1e-3 * np.trace(known, axis1=1, axis2=2).real / known.shape[1]
        known = known + level[:, None, None] * np.eye(known.shape[1], dtype=np.float32)
        solved = np.linalg.solve(known.transpose(0, 2, 1), wanted.transpose(0, 2, 1)).transpose(0, 2, 1)
        whole = np.trace(self.covariance(0), axis1=1, axis2=2).real.sum()
        return solved, float((solved * wanted.conj()).sum().real / max(float(whole), 1e-20))


def _reduced(kspace: KSpace, maps: CoilMaps) -> tuple[Array, _Model]:
    """Return the samples (x, coil, ky) on a grid of columns only as fine as is compared, and the model on every few."""
    n_x = maps.maps.shape[3]
    step = max(1, n_x // BAND)
    image = calibration_image(kspace, maps)[0]
    n_kept = n_x // step
    samples = kspace.samples[0]
    if step > 1:
        samples = to_image(resize_centred(to_kspace(samples, (2,)), 2, n_kept), (2,))
    places = (np.arange(0, n_kept, EVERY) * step + n_x // 2 - n_kept // 2 * step) % n_x
    model = _Model(np.ascontiguousarray(maps.maps[0][:, :, places].transpose(2, 0, 1)), image[:, places].T)
    return np.ascontiguousarray(samples.transpose(2, 0, 1)), model


def _neighbours(samples: Array, model: _Model, lines: Array, n_y: int) -> Prediction:
    """Predict each measured line from the nearest measured one on either side, through the coils."""
    sources = np.stack((np.arange(-1, len(lines) - 1), np.append(np.arange(1, len(lines)), -1)))
    return _predicted(samples, model, lines, sources, is_conjugate=False, n_y=n_y)


def _conjugates(samples: Array, model: _Model, lines: Array, n_y: int) -> Prediction:
    """Predict each measured line from the two nearest to its mirror image, as far as they lie near it."""
    ky = lines - n_y // 2
    reach = int(np.diff(lines).max())
    distance = np.abs(ky[:, None] + ky[None])
    nearest = np.sort(np.argsort(distance, axis=1, kind="stable")[:, :2], axis=1)
    is_far = np.take_along_axis(distance, nearest, axis=1) > reach
    sources = np.where(is_far | (np.abs(ky) < MIN_CONJUGATE)[:, None], -1, nearest).T
    return _predicted(samples, model, lines, sources, is_conjugate=True, n_y=n_y)


def _predicted(samples: Array, model: _Model, lines: Array, sources: Array, is_conjugate: bool, n_y: int) -> Prediction:
    """Return lines as predicted from `sources`, int (source, line), -1 for none; alike ones share their predictor."""
    n_x, n_coils, _ = samples.shape
    ky = lines - n_y // 2
    parts = np.zeros((len(sources), len(lines), n_coils, n_x), np.complex64)
    offsets = np.where(sources >= 0, ky[sources] + (ky if is_conjugate else -ky), 0)
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    expected = np.zeros(len(lines), np.float32)
    for line in range(len(lines)):
        kept = tuple((slot, int(offsets[slot, line])) for slot in range(len(sources)) if sources[slot, line] >= 0)
        if kept:
            alike.setdefault(kept, []).append(line)
    for kept, those in alike.items():
        predictor, share = model.predictor(tuple(offset for _, offset in kept), is_conjugate)
        expected[those] = share
        predictor = np.repeat(predictor, EVERY, axis=0)[:n_x]
        for number, (slot, _) in enumerate(kept):
            given = samples[:, :, lines[sources[slot, those]]]
            own = predictor[:, :, number * n_coils : (number + 1) * n_coils]
            parts[slot][those] = (own @ (given.conj() if is_conjugate else given)).transpose(2, 1, 0)
    return Prediction(parts.sum(0), parts, sources, expected)


def displaced_share(kspace: KSpace, order: Array, motion: Motion) -> float:
    """Return the relative error, squared, of an image that shows a head in two places as `motion` says.

    The pose that costs less is taken for the true one. Lines that were not measured count as the nearest measured do.
    """
    lines = np.flatnonzero((order >= 0) & kspace.measured[0])
    n_coils, n_y, n_x = kspace.samples.shape[1:]
    energy = (np.abs(to_kspace(kspace.samples[0][:, lines], (2,))) ** 2).sum(0) - n_coils  # less the noise
    edges = np.concatenate(([0], (lines[1:] + lines[:-1] + 1) / 2, [n_y]))
    energy = energy * np.diff(edges)[:, None]
    ky, kx = lines - n_y // 2, np.arange(n_x) - n_x // 2
    turn = 2 * np.pi * (ky[:, None] * motion.shift[0] / n_y + kx * motion.shift[1] / n_x)
    wrong = (energy * (2 - 2 * np.cos(turn))).sum(1)
    late = (order[lines] >= motion.onset) & (motion.end is None or order[lines] < motion.end)
    return max(0.0, float(min(wrong[late].sum(), wrong[~late].sum())) / max(float(energy.sum()), 1e-20))
