"""A scan's readouts to its images and to all that the verdict is made of, as the scan chain does it, in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from recon.arrays import Array
from recon.assemble import Assembler
from recon.consistency import SliceMeasures, measure_slice, ranked
from recon.dead_coils import find_dead
from recon.errors import AcquisitionError, BackendError, ShapeError
from recon.line_checks import LineChecks
from recon.line_faults import LineReport
from recon.network import Card, Network
from recon.reconstruct import network_refusal, reconstruct_classical, reconstruct_network, sense_coils
from recon.scan import Acquisition, ImageKey, Scan

HEAD = 0.1  # of the bright level: what is darker is no head


class HostNetwork:
    """A reconstruction network on the CPU; see `recon.network.Network`."""

    backend = "onnxruntime CPU"

    def __init__(self, model: Path, card: Card) -> None:
        """Open the ONNX file that `card` describes."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.card = card
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return fresh arrays by name."""
        names = [each.name for each in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def close(self) -> None:
        """Nothing is held but memory."""


@dataclass(frozen=True, eq=False)
class Assessed:
    """What came of a scan. images: the leading one of each key, float32 (slice, y, x); methods: how it was made.

    lines: what was wrong with its readouts; left_out: why some could not be used. measures: of each 2-D image; numbers:
    of the readouts that gave its lines, ascending.
    """

    images: Mapping[ImageKey, Array]
    methods: Mapping[ImageKey, str]
    lines: LineReport
    left_out: Mapping[str, int]
    measures: Mapping[ImageKey, SliceMeasures]
    numbers: Mapping[ImageKey, Array]


def assess(scan: Scan, readouts: Iterable[Acquisition], network: Network, *, every: int = 1) -> Assessed:
    """Reconstruct and measure a whole scan; every: of how many slices one is measured thoroughly.

    Raises AcquisitionError where not one image came of it.
    """
    checks, assembler = LineChecks(scan, network.card.trained_range), Assembler(scan, early=False)
    left_out: Counter[str] = Counter()
    for number, readout in enumerate(readouts):
        checks.add(readout, number)
        try:
            assembler.add(readout, number)
        except (AcquisitionError, ShapeError) as error:
            left_out[str(error)] += 1
    images: dict[ImageKey, Array] = {}
    methods: dict[ImageKey, str] = {}
    measures: dict[ImageKey, SliceMeasures] = {}
    numbers: dict[ImageKey, Array] = {}
    for number, key in enumerate(assembler.open_keys()):
        encoding = scan.encodings[key.encoding]
        coils = sense_coils(
            assembler.calibration(key), encoding.encoded_matrix.y, assembler.n_coils, assembler.has_noise
        )
        kspace = assembler.kspace(key)
        image, start = reconstruct_classical(kspace, encoding, "auto", coils)
        learned = None
        if start is not None and not network_refusal(network, start):
            try:
                learned = reconstruct_network(network, start, encoding)
            except BackendError as error:
                left_out[str(error)] += 1
        if start is not None and not encoding.is_3d:
            order = assembler.order(key)[0]
            ranks, numbers[key] = ranked(order)
            checks.note_dead(find_dead(kspace, coils, start.image, order), key)
            measures[key] = measure_slice(
                start,
                ranks,
                None if learned is None else network,
                None if learned is None else learned.solution,
                thorough=number % every == 0,
            )
        lead = image if learned is None else learned.image
        images[key], methods[key] = lead.data, lead.method
        checks.complete(key)
    if not images:
        raise AcquisitionError(f"no image came of the scan: {next(iter(left_out), 'it has no imaging readouts')}")
    return Assessed(images, methods, checks.report(), dict(left_out), measures, numbers)


def error_in_head(image: Array, truths: Iterable[Array]) -> float:
    """Return the error of a magnitude image (y, x) relative to the truth, inside the head; of several truths the least.

    The image is scaled to fit best: receivers have no absolute unit. What a head that moved looks like is what it
    looked like in one of its poses: a scan whose head moved before its centre of k-space was read is not wrong.
    """
    errors = []
    for truth in truths:
        inside = truth > HEAD * np.percentile(truth, 99)
        right, found = truth[inside].astype(np.float64), image[inside].astype(np.float64)
        scale = float(found @ right) / max(float(found @ found), 1e-30)
        errors.append(float(np.linalg.norm(scale * found - right) / np.linalg.norm(right)))
    return min(errors)
