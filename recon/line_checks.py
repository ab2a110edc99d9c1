"""Every readout looked at as it arrives: what is wrong with it, or with the lines of its image, said at once.

Nothing here needs an image or a reference. What one readout shows (values that are no numbers, clipping, spikes, a
place outside the header, a coil that fails) is found with it; what only an image shows (missing and repeated lines,
the sampling, jumps of gain, interference) when that image is complete.

Cost: 0.7 to 0.8 of the processor time that `recon.assemble` takes for the same readouts (16 coils × 512 samples, in one
run of `tests/test_line_checks.py -k cost -s`): a square of the samples, three sums and a maximum, and for the
outermost quarter of the lines a transform of the readout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from recon.arrays import Array
from recon.coil_watch import CoilFault, CoilWatch
from recon.errors import AcquisitionError
from recon.interference import INNER, OUTER_SHARE, Spectrum, Tone, describe_tones, noise_tones
from recon.lattice import central_run, read_pattern
from recon.line_faults import FaultLog, Kind, LineFault, LineReport
from recon.network import TrainedRange
from recon.outliers import SPIKE, jumps, line_level, spike_columns, strongest_nearby
from recon.placement import place_step
from recon.scan import Acquisition, Encoding, ImageKey, Role, Scan
from recon.unrolled import outside_range

# Samples of a line that share its coil's extreme value to the last bit, and more of them than lie within 20 % below:
# measured numbers share it by chance at most where they are small integers, and then fewer have it than come close.
# The 17 real scans have 1.
MIN_PLATEAU = 4
_NEAR = 0.64  # of the extreme power: 0.8 of the amplitude
MIN_CALIBRATION = 6  # lines: less than a coil-map kernel; as recon.assemble
BROADBAND = 16.0  # of the noise readouts' power: 12 dB, in the quietest line of the scan; simulated scans reach 8.5
_STAMP_S = 2.5e-3  # ISMRMRD leaves the unit to the vendor; Siemens counts 2.5 ms, and converters of others follow
_MIN_NEAR = 2  # lines that a spike is compared with, before all have come
_IMAGING = (Role.IMAGING, Role.CALIBRATION_AND_IMAGING)
_Place = tuple[int, int]


@dataclass
class _Image:
    """What is remembered of an image that is not complete. profiles: power over coils, float32 (kx,), by place."""

    profiles: dict[_Place, Array] = field(default_factory=dict)
    orders: dict[_Place, int] = field(default_factory=dict)
    counts: Counter[_Place] = field(default_factory=Counter)
    calibration: set[_Place] = field(default_factory=set)
    sparks: list[tuple[_Place, int, int]] = field(default_factory=list)  # place, column, order: not yet compared
    last_order: int = 0


class LineChecks:
    """Looks at the readouts of one scan, in their order. It keeps one line of power for each line of an open image."""

    def __init__(self, scan: Scan, trained: TrainedRange | None = None) -> None:
        """Prepare for `scan`; `trained`: what a network was trained for, where one would serve."""
        self._scan = scan
        self._trained = trained
        self._log = FaultLog()
        self._n_readouts = 0
        self._stamps: list[int] = []
        self._n_coils = 0
        self._coils = CoilWatch()
        self._top: Array = np.zeros(0, np.float32)
        self._plateau: list[tuple[int, int]] = []  # by coil: samples at the extreme, and close below it
        self._images: dict[ImageKey, _Image] = {}
        self._measured: dict[ImageKey, Array] = {}
        self._references: dict[int, set[_Place]] = {}  # calibration lines of a slice, whatever image they are for
        self._spectra: dict[int, Spectrum] = {}
        self._of_sampling: dict[ImageKey, list[LineFault]] = {}  # what was said of an image's lines as a whole

    def add(self, acquisition: Acquisition, order: int) -> list[LineFault]:
        """Look at one readout, number `order` of the scan; return the faults that it made known. Never raises."""
        self._n_readouts += 1
        self._note_time(acquisition.time_stamp)
        if acquisition.role is Role.OTHER:
            return []
        parts = np.ascontiguousarray(acquisition.samples).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            power = parts * parts
            energy = power.sum(axis=1)
        key = acquisition.key if acquisition.role is not Role.NOISE else None
        if not np.isfinite(energy).all():
            return self._not_finite(parts, key, acquisition, order)
        n_coils, self._n_coils = self._n_coils, self._n_coils or len(energy)
        if self._n_coils != len(energy):
            words = f"{len(energy)} coils in a readout where the others have {n_coils}"
            return self._log.keep(Kind.SAMPLING, key, None, order, len(energy), n_coils, words)
        if acquisition.role is Role.NOISE:
            return self._noise(acquisition, energy, power.shape[1], order)
        place = self._place(acquisition, order)
        return place if isinstance(place, list) else self._line(acquisition, place, power, energy, order)

    def _line(
        self, acquisition: Acquisition, place: _Place, power: Array, energy: Array, order: int
    ) -> list[LineFault]:
        """Look at a readout that belongs to `place`; power: float32 (coil, 2 · kx); energy: its sum by coil."""
        encoding = self._scan.encodings[acquisition.key.encoding]
        found: list[LineFault] = []
        peak = power.max(axis=1)
        found += self._clipping(power, peak, acquisition.key, place, order)
        if acquisition.role not in _IMAGING:
            self._references.setdefault(acquisition.key.slice, set()).add(place)
            return found
        found += self._dead(self._coils.add(power, energy, peak, order), acquisition.key)
        if acquisition.key in self._measured:
            self._reopen(acquisition.key)
        image = self._images.setdefault(acquisition.key, _Image())
        profile = power.sum(axis=0).reshape(-1, 2).sum(axis=1)
        if acquisition.is_reversed:
            profile = profile[::-1]
        first = image.counts[place] == 0
        image.counts[place] += 1
        image.orders[place] = image.last_order = order
        if acquisition.role is Role.CALIBRATION_AND_IMAGING:
            self._references.setdefault(acquisition.key.slice, set()).add(place)
        found += self._sparks(image, acquisition, encoding, place, profile, order)
        if first:
            image.profiles[place] = profile
        self._outermost(acquisition, encoding, place[1])
        return found

    def complete(self, key: ImageKey) -> list[LineFault]:
        """Say that `key` has all of its lines; return what shows now. The lines are forgotten."""
        image = self._images.pop(key, None)
        if image is None:
            return []
        encoding = self._scan.encodings[key.encoding]
        measured = np.zeros((encoding.encoded_matrix.z, encoding.encoded_matrix.y), bool)
        for place in image.counts:
            measured[place] = True
        self._measured[key] = measured
        found = self._judge_sparks(image, key, is_last=True)
        found += self._repeated(image, key, encoding)
        sampling = self._sampling(image, key, encoding, measured)
        if sampling:
            self._of_sampling[key] = sampling
        found += sampling
        found += self._jumps(image, key, encoding)
        found += self._dead(self._coils.weak(image.last_order), key)
        return found + self._interference(image, key)

    def _reopen(self, key: ImageKey) -> None:
        """Lines of `key` go on after it seemed complete: take back what was said of its lines as a whole."""
        self._log.take_back(self._of_sampling.pop(key, []))
        places = ((int(kz), int(ky)) for kz, ky in np.argwhere(self._measured.pop(key)))
        self._images[key] = _Image(counts=Counter(places))

    def report(self, complete: Iterable[ImageKey] | None = None) -> LineReport:
        """Return what was seen so far. complete: images that have all of their lines now; None for none."""
        for key in complete or ():
            self.complete(key)
        duration = (max(self._stamps) - min(self._stamps)) * _STAMP_S if self._stamps else 0.0
        return LineReport(
            tuple(self._log.faults), dict(+self._log.counts), self._n_readouts, dict(self._measured), duration or None
        )

    @property
    def open_keys(self) -> list[ImageKey]:
        """The images that have lines and are not complete, in order."""
        return sorted(self._images)

    def _note_time(self, stamp: int) -> None:
        if stamp > 0:
            self._stamps = [min(*self._stamps, stamp), max(*self._stamps, stamp)] if self._stamps else [stamp, stamp]

    # What one readout shows

    def _not_finite(self, parts: Array, key: ImageKey | None, acquisition: Acquisition, order: int) -> list[LineFault]:
        n_bad = parts.size - int(np.isfinite(parts).sum())
        what = f"that are not finite numbers ({n_bad})" if n_bad else "too large for single precision"
        words = f"readout {order} holds values {what}; none is allowed"
        return self._log.keep(Kind.NOT_FINITE, key, acquisition.step_1 if key else None, order, n_bad, 0, words)

    def _place(self, acquisition: Acquisition, order: int) -> _Place | list[LineFault]:
        """Where the readout belongs, (kz, ky), or the fault that it belongs nowhere."""
        n = len(self._scan.encodings)
        try:
            if acquisition.key.encoding >= n:
                raise AcquisitionError(f"the readout names encoding {acquisition.key.encoding}; the header has {n}")
            return place_step(acquisition, self._scan.encodings[acquisition.key.encoding])
        except AcquisitionError as error:
            return self._log.keep(Kind.SAMPLING, acquisition.key, None, order, acquisition.step_1, 0, str(error))

    def _clipping(self, power: Array, peak: Array, key: ImageKey, place: _Place, order: int) -> list[LineFault]:
        """A plateau at the extreme value of a coil."""
        if len(self._top) == 0:
            self._top, self._plateau = np.zeros_like(peak), [(0, 0)] * len(peak)
        reached = peak >= self._top
        if not reached.any():
            return []
        worst = 0
        for coil in np.flatnonzero(reached):
            line = power[coil]
            n = int(np.count_nonzero(line == peak[coil]))
            at, near = self._plateau[coil] if peak[coil] == self._top[coil] else (0, 0)
            if n >= 2 and peak[coil] > 0:
                at, near = at + n, near + int(np.count_nonzero(line >= _NEAR * peak[coil])) - n
                worst = max(worst, at if at > near else 0)
            self._plateau[coil] = (at, near)
        self._top = np.maximum(self._top, peak)
        if worst < MIN_PLATEAU:
            return []
        words = (
            f"readout {order} is clipped: {worst} samples share the receiver's extreme value; {MIN_PLATEAU} never do"
        )
        return self._log.keep(Kind.CLIPPED, key, place[1], order, worst, MIN_PLATEAU, words)

    def note_dead(self, coils: Iterable[CoilFault], key: ImageKey) -> list[LineFault]:
        """Take coils that an image showed to be dead (`recon.dead_coils`); return those that were not known."""
        return self._dead([each for each in coils if self._coils.is_new(each.coil)], key)

    def _dead(self, coils: list[CoilFault], key: ImageKey | None) -> list[LineFault]:
        found: list[LineFault] = []
        for coil, order, value, threshold, words, from_start in coils:
            found += self._log.keep(Kind.DEAD_COIL, key, None, order, value, threshold, words, coil, from_start)
        return found

    def _noise(self, acquisition: Acquisition, energy: Array, n: int, order: int) -> list[LineFault]:
        self._coils.add_noise(energy, n)
        if acquisition.samples.shape[1] < 64:  # too few columns to have background between them
            return []
        tones, threshold = noise_tones(acquisition.samples)
        return self._tones("noise", tones, threshold, None, order, "the noise readouts")

    def _sparks(
        self, image: _Image, acquisition: Acquisition, encoding: Encoding, place: _Place, profile: Array, order: int
    ) -> list[LineFault]:
        """Spikes of this readout, and those of earlier ones that it makes certain."""
        columns = spike_columns(profile)
        if len(columns):
            n = len(profile)
            centre = acquisition.center_sample if 0 < acquisition.center_sample < n else n // 2
            is_central = abs(place[1] - encoding.encoded_matrix.y // 2) <= _central_rows(encoding)
            reach = max(8, n // 16)
            image.sparks += [(place, int(x), order) for x in columns if not is_central or abs(x - centre) > reach]
            image.profiles.setdefault(place, profile)
        return self._judge_sparks(image, acquisition.key, is_last=False) if image.sparks else []

    def _judge_sparks(self, image: _Image, key: ImageKey, is_last: bool) -> list[LineFault]:
        found: list[LineFault] = []
        waiting = []
        for place, column, order in image.sparks:
            around = strongest_nearby(image.profiles, place, column)
            if len(around) < (1 if is_last else _MIN_NEAR):
                waiting.append((place, column, order))
                continue
            ratio = float(image.profiles[place][column]) / max(*around, 1e-30)
            if ratio > SPIKE:
                words = (
                    f"readout {order} has a spike at sample {column}: {ratio:.0f} times the power of the lines beside; "
                    f"{SPIKE:g} is the most"
                )
                found += self._log.keep(Kind.SPIKE, key, place[1], order, ratio, SPIKE, words)
        image.sparks = waiting
        return found

    def _outermost(self, acquisition: Acquisition, encoding: Encoding, row: int) -> None:
        """Gather the spectrum of the lines at either end of k-space, and of some nearer to its centre."""
        n = encoding.encoded_matrix.y
        from_end = min(row, n - 1 - row)
        is_outer = from_end < max(4, round(n * OUTER_SHARE / 2))
        is_inner = INNER[0] * n <= from_end < INNER[1] * n
        if not (is_outer or is_inner) or acquisition.samples.shape[1] < 64:
            return
        samples = acquisition.samples[:, ::-1] if acquisition.is_reversed else acquisition.samples
        group = 2 if is_inner else int(row > n // 2)
        self._spectra.setdefault(acquisition.key.encoding, Spectrum()).add(samples, group)

    # What an image shows

    def _repeated(self, image: _Image, key: ImageKey, encoding: Encoding) -> list[LineFault]:
        counts = image.counts
        limit = encoding.limits.get("average")
        usual = int(np.median(list(counts.values())))
        most = max(usual, 1 if limit is None else limit.maximum - limit.minimum + 1)
        found: list[LineFault] = []
        for place in sorted(place for place, n in counts.items() if n > most):
            n, order = counts[place], image.orders.get(place, image.last_order)
            words = f"line {place[1]} was measured {n} times, last by readout {order}; the image's others {most}"
            found += self._log.keep(Kind.DUPLICATE, key, place[1], order, n, most, words)
        return found

    def _sampling(self, image: _Image, key: ImageKey, encoding: Encoding, measured: Array) -> list[LineFault]:
        rows = np.flatnonzero(measured.any(axis=1))
        lines = measured[rows].sum(axis=0) * 2 > len(rows)  # of most partitions; of the one row of a 2-D scan
        pattern = read_pattern(lines)
        found: list[LineFault] = []
        for row in pattern.missing:
            words = f"line {row} is missing: those beside it were measured, every {pattern.acceleration}"
            found += self._log.keep(Kind.MISSING, key, row, image.last_order, 1, 0, words)
        if encoding.is_3d and pattern.acceleration is not None:
            found += self._holes(image, key, measured, rows, lines)
        said = encoding.acceleration[0]
        if pattern.acceleration not in (None, said) and self._log.is_new(
            Kind.SAMPLING, key.encoding, pattern.acceleration
        ):
            words = f"the lines lie {pattern.acceleration} rows apart; the header says acceleration {said}"
            found += self._log.keep(
                Kind.SAMPLING, key, None, image.last_order, float(pattern.acceleration or 0), said, words
            )
        own = {row for kz, row in image.counts}
        calibrated = np.isin(np.arange(len(lines)), list(own | {r for _, r in self._references.get(key.slice, set())}))
        n_calibration = central_run(calibrated)
        is_full = bool(lines.any()) and pattern.share <= 1.0
        if not is_full and n_calibration < MIN_CALIBRATION and self._log.is_new(Kind.CALIBRATION, key):
            words = f"{n_calibration} calibration lines at the centre; at least {MIN_CALIBRATION} are needed"
            found += self._log.keep(
                Kind.CALIBRATION, key, None, image.last_order, n_calibration, MIN_CALIBRATION, words
            )
        why = "" if self._trained is None else outside_range(lines, n_calibration, self._trained)
        if why and self._log.is_new(Kind.SAMPLING, key.encoding, why):
            words = f"the sampling lies outside what the network was trained for: {why}"
            most = 0.0 if self._trained is None else self._trained.acceleration
            found += self._log.keep(Kind.SAMPLING, key, None, image.last_order, pattern.share, most, words)
        return found

    def _holes(self, image: _Image, key: ImageKey, measured: Array, rows: Array, lines: Array) -> list[LineFault]:
        """Places of a 3-D scan that are missing between the first and the last line of their partition."""
        holes = []
        for kz in rows:
            own = np.flatnonzero(measured[kz])
            inside = np.zeros(len(lines), bool)
            inside[own[0] : own[-1] + 1] = True
            holes += [(int(kz), int(row)) for row in np.flatnonzero(lines & inside & ~measured[kz])]
        if len(holes) > 0.05 * measured.sum():  # sampled by another rule, such as a pattern that shifts with kz
            return []
        return [
            fault
            for kz, row in holes
            for fault in self._log.keep(
                Kind.MISSING, key, row, image.last_order, 1, 0, f"line {row} of partition {kz} is missing"
            )
        ]

    def _jumps(self, image: _Image, key: ImageKey, encoding: Encoding) -> list[LineFault]:
        found: list[LineFault] = []
        for kz in sorted({place[0] for place in image.profiles}):
            rows = sorted(row for z, row in image.profiles if z == kz)
            levels = np.array([line_level(image.profiles[kz, row]) for row in rows])
            gap = 0 if len(rows) < 2 else int(np.diff(rows).max())
            is_judged = np.abs(np.array(rows) - encoding.encoded_matrix.y // 2) > max(4 * gap, _central_rows(encoding))
            for jump in jumps(levels, is_judged):
                row = rows[jump.line]
                order = image.orders[kz, row]
                db, most = 4.343 * jump.value, 4.343 * jump.threshold  # 10 / ln 10
                rest = "and is back with the next" if jump.is_single else "and stays there"
                words = (
                    f"the level jumps by {db:+.1f} dB at line {row} (readout {order}) {rest}; {most:.1f} is the most"
                )
                found += self._log.keep(Kind.GAIN_JUMP, key, row, order, abs(db), most, words)
        return found

    def _interference(self, image: _Image, key: ImageKey) -> list[LineFault]:
        found: list[LineFault] = []
        spectrum = self._spectra.get(key.encoding)
        if spectrum is not None:
            tones, threshold = spectrum.tones()
            found += self._tones(
                ("lines", key.encoding), tones, threshold, key, image.last_order, "the outermost lines"
            )
        noise, quiet = self._coils.noise, self._coils.quietest
        if noise is not None and quiet is not None and (noise > 0).all():
            ratio = float(np.median(quiet / noise))
            if np.isfinite(ratio) and ratio > BROADBAND and self._log.is_new(Kind.INTERFERENCE, "broadband"):
                words = f"the quietest line has {ratio:.1f} times the noise readouts' power; {BROADBAND:g} is the most"
                found += self._log.keep(Kind.INTERFERENCE, key, None, image.last_order, ratio, BROADBAND, words)
        return found

    def _tones(
        self, source: object, tones: list[Tone], threshold: float, key: ImageKey | None, order: int, where: str
    ) -> list[LineFault]:
        if not tones or not self._log.is_new(Kind.INTERFERENCE, source):
            return []
        words = f"interference in {where}, {describe_tones(tones)}; {threshold:.1f} times is the most"
        return self._log.keep(Kind.INTERFERENCE, key, None, order, tones[0].ratio, threshold, words)


def _central_rows(encoding: Encoding) -> int:
    """How far from the centre of k-space lines differ by nature."""
    return max(4, encoding.encoded_matrix.y // 16)
