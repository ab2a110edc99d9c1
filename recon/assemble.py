"""Readouts to k-space: where each line belongs, what it is for, and when an image has all of its lines.

What can be done as lines arrive is done then: the readout transform, the removal of readout oversampling, averaging and
the statistics of the noise. All of it is on the host: readouts come one at a time and are small, so that sending each
to a device would take longer than the work. What was assembled may go there, slice by slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from recon.arrays import Array
from recon.errors import AcquisitionError, ShapeError
from recon.fourier import resize_centred, to_image, to_kspace
from recon.noise import EdgeLevel, NoiseCovariance, whiten, whitening_matrix
from recon.placement import check_encoding, image_columns, place_readout, place_step
from recon.scan import Acquisition, Encoding, ImageKey, KSpace, Role, Scan

_MIN_CALIBRATION = 6  # lines: less than a coil-map kernel
_MAX_CALIBRATION = 32  # lines: more costs time and no longer betters smooth maps
_EMBEDDED = ("embedded", "interleaved")  # modes whose calibration lines belong to the imaging sequence itself


@dataclass
class _Lines:
    """Lines of one image or reference, each complex64 (coil, x), summed over averages; (kz, ky) is their place.

    numbers: of the readout that first gave each line.
    """

    sums: dict[tuple[int, int], Array] = field(default_factory=dict)
    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, place: tuple[int, int], line: Array, number: int) -> bool:
        """Take one line of readout `number`; return whether its place was empty before."""
        is_new = place not in self.sums
        if is_new:
            self.sums[place] = line
            self.numbers[place] = number
        else:
            self.sums[place] += line
        self.counts[place] = self.counts.get(place, 0) + 1
        return is_new

    def mean(self, place: tuple[int, int]) -> Array:
        count = self.counts[place]
        return self.sums[place] if count == 1 else self.sums[place] / np.float32(count)


class Assembler:
    """Gathers the readouts of one scan and gives k-space for each image key that is complete.

    A readout that cannot be placed raises AcquisitionError or ShapeError from `add` and changes nothing: the caller
    counts it and goes on. The order of readouts alone decides what comes out, never the time at which they came.
    """

    def __init__(self, scan: Scan, max_bytes: int = 8 << 30, early: bool = True) -> None:
        """Prepare for `scan`, holding at most `max_bytes` of lines; raise AcquisitionError if it cannot be served.

        early: whether `add` tells when an image is complete; without it every image stays open.
        """
        for encoding in scan.encodings:
            check_encoding(encoding)
        self.scan = scan
        self.late: set[ImageKey] = set()
        self._max_bytes = max_bytes
        self._early = early
        self._bytes = 0
        self._images: dict[ImageKey, _Lines] = {}
        self._references: dict[ImageKey | tuple[int, int], _Lines] = {}
        self._first: dict[ImageKey, Acquisition] = {}
        self._done: set[ImageKey] = set()
        self._n_coils: int | None = None
        self._noise = NoiseCovariance()
        self._edge = EdgeLevel()

    def add(self, acquisition: Acquisition, number: int = -1) -> list[ImageKey]:
        """Take one readout, `number` in the scan; return the keys of the images that it completes, often none.

        A line for an image that was complete before is noted in `late`; the caller assembles those again at the end.
        """
        role = acquisition.role
        if role is Role.OTHER:
            return self._completed(acquisition)
        if not np.isfinite(acquisition.samples).all():
            raise AcquisitionError("the readout holds values that are not finite numbers; it was left out")
        self._check_coils(acquisition)
        if role is Role.NOISE:
            self._noise.add(acquisition.samples, acquisition.sample_time_us)
            self._n_coils = len(acquisition.samples)
            return []
        if acquisition.key.encoding >= len(self.scan.encodings):
            raise AcquisitionError(
                f"the readout names encoding {acquisition.key.encoding}; the header has {len(self.scan.encodings)}"
            )
        encoding = self.scan.encodings[acquisition.key.encoding]
        place = place_step(acquisition, encoding)
        is_imaging = role is not Role.CALIBRATION
        is_embedded = encoding.calibration in _EMBEDDED
        if acquisition.key in self._done and (is_imaging or is_embedded):
            self.late.add(acquisition.key)
            return self._completed(acquisition)
        line = self._readout_image(place_readout(acquisition, encoding), encoding)
        self._reserve(line.nbytes, encoding)
        self._n_coils = len(line)
        if is_imaging:
            lines = self._images.setdefault(acquisition.key, _Lines())
            if acquisition.key not in self._first:  # its place only: the samples may be a view of a whole stream
                self._first[acquisition.key] = replace(acquisition, samples=acquisition.samples[:1, :1].copy())
            self._edge.add(acquisition.samples, abs(place[1] - encoding.encoded_matrix.y // 2))
        else:
            at = acquisition.key if is_embedded else (acquisition.key.encoding, acquisition.key.slice)
            lines = self._references.setdefault(at, _Lines())
        if lines.add(place, line, number):
            self._bytes += line.nbytes
        return self._completed(acquisition)

    @property
    def n_coils(self) -> int:
        """How many coils the readouts have; 0 before the first."""
        return self._n_coils or 0

    @property
    def has_noise(self) -> bool:
        """Whether noise readouts came that tell the covariance, so that calibration lines are whitened."""
        return self._noise.covariance(0) is not None

    def open_keys(self) -> list[ImageKey]:
        """Return the keys of images that have lines and are not complete, in order."""
        return sorted(self._images)

    def first_readout(self, key: ImageKey) -> Acquisition:
        """Return the first imaging readout of `key`: where its slice lies and which way."""
        return self._first[key]

    def n_lines(self, key: ImageKey) -> int:
        """Return how many distinct lines `key` has."""
        return len(self._images[key].sums)

    def order(self, key: ImageKey) -> Array:
        """Return int (kz, ky): the number of the readout that first gave each imaging line of `key`; -1 for none."""
        encoding = self.scan.encodings[key.encoding]
        numbers = np.full((encoding.encoded_matrix.z, encoding.encoded_matrix.y), -1)
        for place, number in self._images[key].numbers.items():
            numbers[place] = number
        return numbers

    def discard(self, key: ImageKey) -> None:
        """Forget the lines of `key`, which has been served."""
        lines = self._images.pop(key)
        own = self._references.pop(key, None)
        del self._first[key]
        self._done.add(key)
        self._bytes -= sum(line.nbytes for each in (lines, own) if each for line in each.sums.values())

    def kspace(self, key: ImageKey) -> KSpace:
        """Return the whitened k-space of `key` as far as its lines have come.

        A 3-D scan whose second phase encoding is complete comes with its slices resolved.
        """
        encoding = self.scan.encodings[key.encoding]
        n_z, n_y = encoding.encoded_matrix.z, encoding.encoded_matrix.y
        lines = self._images[key]
        whiten, scale, is_measured = self._whitening(self._first[key].sample_time_us)
        samples = np.zeros((n_z, len(whiten), n_y, image_columns(encoding)), np.complex64)
        averages = np.zeros((n_z, n_y), np.uint16)
        sources = [lines]
        if encoding.calibration in _EMBEDDED and key in self._references:
            sources.append(self._references[key])
        for source in sources:
            for (kz, ky), count in source.counts.items():
                if averages[kz, ky] == 0:
                    samples[kz, :, ky] = whiten @ source.mean((kz, ky))
                    averages[kz, ky] = min(count, np.iinfo(np.uint16).max)
        calibration = self.calibration(key)
        if calibration is not None and not is_measured:
            calibration = calibration / np.float32(scale)
        slice_encoded = False
        if n_z > 1:
            slice_encoded = not _resolves_slices(averages > 0)
            if not slice_encoded:
                samples = to_image(samples, axes=(0,))
                averages = np.broadcast_to(averages.max(axis=0), averages.shape).copy()
        to_native = np.linalg.inv(whiten) if is_measured else None
        return KSpace(samples, averages, scale, is_measured, calibration, slice_encoded, to_native)

    def calibration(self, key: ImageKey) -> Array | None:
        """Return the measured block around the centre for `key`, complex64 (slice, coil, ky, x), or None if too small.

        Whitened where noise readouts came, else in native units. It depends on nothing but its own lines, so coil maps
        made of it early are the very maps that would be made of it later; `n_calibrating` tells whether it grew.
        """
        source = self._calibration_source(key)
        if source is None:
            return None
        grid, sources, block = source
        covariance = self._noise.covariance(self._first[key].sample_time_us, self.scan.noise_bandwidth_ratio)
        n_ky = block.ky[1] - block.ky[0]
        out = np.zeros((grid.encoded_matrix.z, self.n_coils, n_ky, image_columns(grid)), np.complex64)
        for kz, ky in block.places():
            out[kz, :, ky - block.ky[0]] = next(each for each in sources if (kz, ky) in each.sums).mean((kz, ky))
        if covariance is not None:
            out = whiten(out, whitening_matrix(covariance))
        if len(out) > 1:
            out = to_image(out, axes=(0,))
        return _match_field_of_view(out, grid, self.scan.encodings[key.encoding])

    def n_calibrating(self, key: ImageKey) -> int:
        """Return how many readouts and noise samples `calibration` rests on; 0 where there is none."""
        source = self._calibration_source(key)
        if source is None:
            return 0
        _, sources, block = source
        readouts = sum(each.counts.get(place, 0) for each in sources for place in block.places())
        return readouts + self._noise.n_samples

    def _readout_image(self, line: Array, encoding: Encoding) -> Array:
        # A copy: a view would keep the oversampled line alive.
        return np.array(resize_centred(to_image(line, axes=(1,)), 1, image_columns(encoding)), np.complex64)

    def _check_coils(self, acquisition: Acquisition) -> None:
        if self._n_coils not in (None, len(acquisition.samples)):
            raise ShapeError("readout", acquisition.samples.shape, (self._n_coils, "sample"))

    def _reserve(self, n_bytes: int, encoding: Encoding) -> None:
        """Raise AcquisitionError where another line of `n_bytes`, or a whole image of such lines, is too much."""
        for what, needed in (
            ("the lines of unfinished images", self._bytes + n_bytes),
            ("one image", n_bytes * encoding.encoded_matrix.y * encoding.encoded_matrix.z),
        ):
            if needed > self._max_bytes:
                raise AcquisitionError(
                    f"{what} would take {needed / 2**20:.1f} MiB; the limit is {self._max_bytes / 2**20:.1f}: "
                    "raise worker.max_scan_mib or send fewer coils"
                )

    def _completed(self, acquisition: Acquisition) -> list[ImageKey]:
        """Which images end with this readout, by its flags; averages and partitions must all have come."""
        if not self._early:
            return []
        if acquisition.last_in_measurement:
            return self.open_keys()
        key = acquisition.key
        if acquisition.last_in_repetition:
            return [k for k in self.open_keys() if k.repetition == key.repetition]
        if not acquisition.last_in_slice or key not in self._images:
            return []
        encoding = self.scan.encodings[key.encoding]
        limit = encoding.limits.get("average")
        if encoding.is_3d or (limit is not None and acquisition.average < limit.maximum):
            return []
        return [key]

    def _whitening(self, sample_time_us: float) -> tuple[Array, float, bool]:
        """The whitening matrix (coil, coil), native units per noise unit, and whether the noise was measured."""
        covariance = self._noise.covariance(sample_time_us, self.scan.noise_bandwidth_ratio)
        if covariance is None:
            level = self._edge.level()
            return np.eye(self.n_coils, dtype=np.complex64) / np.float32(level), level, False
        return whitening_matrix(covariance), float(np.sqrt(np.trace(covariance).real / len(covariance))), True

    def _calibration_source(self, key: ImageKey) -> tuple[Encoding, list[_Lines], _Block] | None:
        """The lines that calibrate `key` and the block they fill: a reference scan of its slice where there is one."""
        encoding = self.scan.encodings[key.encoding]
        for at, lines in self._references.items():
            if not isinstance(at, ImageKey) and at[1] == key.slice:
                grid = self.scan.encodings[at[0]]
                block = _central_block([lines], grid) if grid.is_3d == encoding.is_3d else None
                if block is not None:
                    return grid, [lines], block
        found = [self._images.get(key), self._references.get(key)]
        if not encoding.calibration:  # whose they are is not said: they may lie between the lines of the image
            found.append(self._references.get((key.encoding, key.slice)))
        own = [lines for lines in found if lines]
        block = _central_block(own, encoding)
        return None if block is None else (encoding, own, block)


class _Block(NamedTuple):
    """The measured places [start, stop) around the centre of k-space."""

    kz: tuple[int, int]
    ky: tuple[int, int]

    def places(self) -> list[tuple[int, int]]:
        return [(kz, ky) for kz in range(*self.kz) for ky in range(*self.ky)]


def _resolves_slices(measured: Array) -> bool:
    """Whether the second phase encoding, bool (kz, ky), is complete but for its outer ends, for every ky alike."""
    rows = measured.any(axis=1)
    if not (measured[rows] == measured[rows][0]).all():
        return False
    inside = np.flatnonzero(rows)
    return bool(rows[inside[0] : inside[-1] + 1].all())


def _central_run(is_measured: Callable[[int], bool], n: int) -> tuple[int, int]:
    """The run [start, stop) of measured places around n // 2, at most `_MAX_CALIBRATION` long, n // 2 its centre."""
    centre = n // 2
    if not is_measured(centre):
        return centre, centre
    below, above = 0, 1
    while below < min(centre, _MAX_CALIBRATION // 2) and is_measured(centre - below - 1):
        below += 1
    while above < min(n - centre, _MAX_CALIBRATION // 2) and is_measured(centre + above):
        above += 1
    half = min(below, above)
    return centre - half, centre + half + (1 if above > half else 0)


def _central_block(sources: list[_Lines], grid: Encoding) -> _Block | None:
    """The block around the centre that `sources` fill together; None where it is too small to calibrate on."""

    def has(kz: int, columns: Iterable[int]) -> bool:
        return all(any((kz, ky) in source.sums for source in sources) for ky in columns)

    n_z, n_y = grid.encoded_matrix.z, grid.encoded_matrix.y
    ky = _central_run(lambda row: has(n_z // 2, [row]), n_y)
    found = None
    # The longest run of the central partition may end in lines that the others lack: the largest block is wanted.
    for length in range(ky[1] - ky[0], _MIN_CALIBRATION - 1, -1):
        ky = n_y // 2 - length // 2, n_y // 2 - length // 2 + length
        kz = _central_run(partial(has, columns=range(*ky)), n_z)
        depth = kz[1] - kz[0]
        if depth >= min(_MIN_CALIBRATION, n_z) and (found is None or length * depth > len(found.places())):
            found = _Block(kz, ky)
        if depth >= min(_MAX_CALIBRATION, n_z):
            break
    return found


def _match_field_of_view(block: Array, grid: Encoding, encoding: Encoding) -> Array:
    """Give a reference block, (slice, coil, ky, x), the imaging scan's field of view, columns and slices."""
    n_ky = block.shape[2]
    wanted = round(n_ky * encoding.encoded_fov_mm.y / grid.encoded_fov_mm.y)
    if wanted != n_ky:
        block = to_kspace(resize_centred(to_image(block, axes=(2,)), 2, wanted), axes=(2,))
    n_x = image_columns(encoding)
    field_x = encoding.encoded_fov_mm.x * n_x / encoding.encoded_matrix.x
    field_grid = grid.encoded_fov_mm.x * image_columns(grid) / grid.encoded_matrix.x
    columns = round(block.shape[3] * field_x / field_grid)
    block = resize_centred(block, 3, columns)
    if columns != n_x:
        block = to_image(resize_centred(to_kspace(block, axes=(3,)), 3, n_x), axes=(3,))
    block = resize_centred(block, 2, min(wanted, encoding.encoded_matrix.y))
    slices = max(1, round(len(block) * encoding.encoded_fov_mm.z / grid.encoded_fov_mm.z)) if grid.is_3d else 1
    block = resize_centred(block, 0, slices)
    if slices != encoding.encoded_matrix.z:
        block = to_image(resize_centred(to_kspace(block, axes=(0,)), 0, encoding.encoded_matrix.z), axes=(0,))
    return block.astype(np.complex64, copy=False)
