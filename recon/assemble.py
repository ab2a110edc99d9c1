"""Readouts to k-space: where each line belongs, what it is for, and when an image has all of its lines.

What can be done as lines arrive is done then: the readout transform, the removal of readout oversampling, averaging and
the statistics of the noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from recon.arrays import Array
from recon.errors import AcquisitionError, ShapeError
from recon.fourier import resize_centred, to_image, to_kspace
from recon.noise import EdgeLevel, NoiseCovariance, whitening_matrix
from recon.placement import check_encoding, image_columns, place_readout, place_step
from recon.scan import Acquisition, Encoding, ImageKey, KSpace, Role, Scan

_MIN_CALIBRATION = 6  # lines: less than a coil-map kernel
_MAX_CALIBRATION = 32  # lines: more costs time and no longer betters smooth maps
_EMBEDDED = ("embedded", "interleaved")  # modes whose calibration lines belong to the imaging sequence itself


@dataclass
class _Lines:
    """Lines of one image or reference, each complex64 (coil, x), summed over averages; (kz, ky) is their place."""

    sums: dict[tuple[int, int], Array] = field(default_factory=dict)
    counts: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, place: tuple[int, int], line: Array) -> None:
        if place in self.sums:
            if self.sums[place].shape != line.shape:
                raise ShapeError("readout", line.shape, self.sums[place].shape)
            self.sums[place] += line
            self.counts[place] += 1
        else:
            self.sums[place] = line
            self.counts[place] = 1

    def mean(self, place: tuple[int, int]) -> Array:
        count = self.counts[place]
        return self.sums[place] if count == 1 else self.sums[place] / np.float32(count)


class Assembler:
    """Gathers the readouts of one scan and gives k-space for each image key that is complete.

    A readout that cannot be placed raises AcquisitionError or ShapeError from `add` and changes nothing: the caller
    counts it and goes on. The order of readouts alone decides what comes out, never the time at which they came.
    """

    def __init__(self, scan: Scan, max_bytes: int = 8 << 30) -> None:
        """Prepare for `scan`; raise AcquisitionError if no image could be made of it within `max_bytes` of lines."""
        for encoding in scan.encodings:
            check_encoding(encoding)
        self.scan = scan
        self.late: set[ImageKey] = set()
        self._max_bytes = max_bytes
        self._bytes = 0
        self._images: dict[ImageKey, _Lines] = {}
        self._references: dict[ImageKey | tuple[int, int], _Lines] = {}
        self._first: dict[ImageKey, Acquisition] = {}
        self._done: set[ImageKey] = set()
        self._n_coils: int | None = None
        self._noise = NoiseCovariance()
        self._edge = EdgeLevel()

    def add(self, acquisition: Acquisition) -> list[ImageKey]:
        """Take one readout; return the keys of the images that it completes (often none, in the order of slices).

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
            return []
        if acquisition.key.encoding >= len(self.scan.encodings):
            raise AcquisitionError(
                f"the readout names encoding {acquisition.key.encoding}; the header has {len(self.scan.encodings)}"
            )
        encoding = self.scan.encodings[acquisition.key.encoding]
        place = place_step(acquisition, encoding)
        if acquisition.key in self._done and role is not Role.CALIBRATION:
            self.late.add(acquisition.key)
            return []
        kspace_line = place_readout(acquisition, encoding)
        line = self._readout_image(kspace_line, encoding)
        if role is not Role.CALIBRATION:
            lines = self._images.setdefault(acquisition.key, _Lines())
            self._first.setdefault(acquisition.key, acquisition)
            self._edge.add(acquisition.samples, abs(place[1] - encoding.encoded_matrix.y // 2))
        elif encoding.calibration in _EMBEDDED:
            lines = self._references.setdefault(acquisition.key, _Lines())
        else:
            lines = self._references.setdefault((acquisition.key.encoding, acquisition.key.slice), _Lines())
        self._reserve(line.nbytes if place not in lines.sums else 0)
        lines.add(place, line)
        return self._completed(acquisition)

    def open_keys(self) -> list[ImageKey]:
        """Return the keys of images that have lines and are not complete, in order."""
        return sorted(self._images)

    def first_readout(self, key: ImageKey) -> Acquisition:
        """Return the first imaging readout of `key`: where its slice lies and which way."""
        return self._first[key]

    def n_lines(self, key: ImageKey) -> int:
        """Return how many distinct lines `key` has."""
        return len(self._images[key].sums)

    def discard(self, key: ImageKey) -> None:
        """Forget the lines of `key`, which has been served."""
        lines = self._images.pop(key)
        own = self._references.pop(key, None)
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
        calibration = self._calibration(key, encoding, samples, averages, whiten)
        slice_encoded = False
        if n_z > 1:
            slice_encoded = not _resolves_slices(averages > 0)
            if not slice_encoded:
                samples = to_image(samples, axes=(0,))
                averages = np.broadcast_to(averages.max(axis=0), averages.shape).copy()
        return KSpace(samples, averages, scale, is_measured, calibration, slice_encoded)

    def _readout_image(self, line: Array, encoding: Encoding) -> Array:
        return resize_centred(to_image(line, axes=(1,)), 1, image_columns(encoding)).astype(np.complex64, copy=False)

    def _check_coils(self, acquisition: Acquisition) -> None:
        n_coils = len(acquisition.samples)
        if self._n_coils is None:
            self._n_coils = n_coils
        elif self._n_coils != n_coils:
            raise ShapeError("readout", acquisition.samples.shape, (self._n_coils, "sample"))

    def _reserve(self, n_bytes: int) -> None:
        if self._bytes + n_bytes > self._max_bytes:
            raise AcquisitionError(
                f"the lines of unfinished images exceed the limit of {self._max_bytes / 2**20:.0f} MiB; "
                "raise worker.max_scan_mib or send fewer coils"
            )
        self._bytes += n_bytes

    def _completed(self, acquisition: Acquisition) -> list[ImageKey]:
        """Which images end with this readout, by its flags; averages and partitions must all have come."""
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
        assert self._n_coils is not None
        covariance = self._noise.covariance(sample_time_us, self.scan.noise_bandwidth_ratio)
        if covariance is None:
            level = self._edge.level()
            return np.eye(self._n_coils, dtype=np.complex64) / np.float32(level), level, False
        return whitening_matrix(covariance), float(np.sqrt(np.trace(covariance).real / len(covariance))), True

    def _calibration(
        self, key: ImageKey, encoding: Encoding, samples: Array, averages: Array, whiten: Array
    ) -> Array | None:
        """The measured block around the centre, (slice, coil, ky, x): of a reference scan where there is one."""
        for source, grid in self._reference_lines(key):
            n_z, n_y = grid.encoded_matrix.z, grid.encoded_matrix.y
            reference = np.zeros((n_z, len(whiten), n_y, image_columns(grid)), np.complex64)
            measured = np.zeros((n_z, n_y), bool)
            for place in source.sums:
                reference[place[0], :, place[1]] = whiten @ source.mean(place)
                measured[place] = True
            block = _central_block(reference, measured)
            if block is not None:
                return _match_field_of_view(block, grid, encoding)
        return _central_block(samples, averages > 0)

    def _reference_lines(self, key: ImageKey) -> Iterator[tuple[_Lines, Encoding]]:
        for (number, of_slice), lines in (
            (at, lines) for at, lines in self._references.items() if not isinstance(at, ImageKey)
        ):
            if of_slice == key.slice:
                yield lines, self.scan.encodings[number]


def _resolves_slices(measured: Array) -> bool:
    """Whether the second phase encoding, bool (kz, ky), is complete but for its outer ends, for every ky alike."""
    rows = measured.any(axis=1)
    if not (measured[rows] == measured[rows][0]).all():
        return False
    inside = np.flatnonzero(rows)
    return bool(rows[inside[0] : inside[-1] + 1].all())


def _central_run(measured: Array) -> tuple[int, int]:
    """The run [start, stop) of measured places around n // 2, at most `_MAX_CALIBRATION` long, n // 2 its centre."""
    centre = len(measured) // 2
    if not measured[centre]:
        return centre, centre
    start, stop = centre, centre + 1
    while start > 0 and measured[start - 1] and centre - start < _MAX_CALIBRATION // 2:
        start -= 1
    while stop < len(measured) and measured[stop] and stop - centre < _MAX_CALIBRATION // 2:
        stop += 1
    below, above = centre - start, stop - centre  # an even block has one more line below its centre than above
    half = min(below, above)
    return centre - half, centre + half + (1 if above > half and below == half else 0)


def _central_block(samples: Array, measured: Array) -> Array | None:
    """Cut the measured block around the centre out of (kz, coil, ky, x) and resolve its slices; None if too small."""
    n_z = len(samples)
    centre = n_z // 2
    ky_start, ky_stop = _central_run(measured[centre])
    if ky_stop - ky_start < _MIN_CALIBRATION:
        return None
    block = samples[:, :, ky_start:ky_stop]
    if n_z == 1:
        return block
    kz_start, kz_stop = _central_run(measured[:, ky_start:ky_stop].all(axis=1))
    if kz_stop - kz_start < min(_MIN_CALIBRATION, n_z):
        return None
    low = np.zeros_like(block)
    low[kz_start:kz_stop] = block[kz_start:kz_stop]
    return to_image(low, axes=(0,))


def _match_field_of_view(block: Array, grid: Encoding, encoding: Encoding) -> Array:
    """Give a reference block, (slice, coil, ky, x), the imaging scan's field of view and columns."""
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
    if len(block) != encoding.encoded_matrix.z:
        block = to_image(resize_centred(to_kspace(block, axes=(0,)), 0, encoding.encoded_matrix.z), axes=(0,))
    return block.astype(np.complex64, copy=False)
