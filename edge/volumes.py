"""Slices gathered into volumes, and the volumes written once it is known how far they can be believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from edge.results import Results
from recon.placement import stack_geometry
from recon.quality import Level, Verdict
from recon.reconstruct import Image
from recon.scan import Acquisition, ImageKey, Provenance, Scan, Volume

CLASSICAL = "classical"
NETWORK = "network"


class VolumeKey(NamedTuple):
    """Slices that share these counters make one volume."""

    encoding: int
    contrast: int
    phase: int
    repetition: int
    set: int


def volume_key(key: ImageKey) -> VolumeKey:
    """Return the volume that an image belongs to."""
    return VolumeKey(key.encoding, key.contrast, key.phase, key.repetition, key.set)


@dataclass(frozen=True, eq=False)
class Made:
    """A reconstructed image key that waits for the rest of its volume. reason: why there is no network's image."""

    classical: Image
    network: Image | None
    reason: str
    first: Acquisition


class Volumes:
    """Holds slices until their volume is whole. The latest whole one waits for the next, or for the scan's end, so
    that most are written once, with the verdict in them; those before it are written again where it changed."""

    def __init__(self, results: Results, scan: Scan) -> None:
        self.said: dict[int, dict[str, Any]] = {}  # by index, what the report says of each written volume
        self._results = results
        self._scan = scan
        self._open: dict[VolumeKey, dict[ImageKey, Made]] = {}
        self._indices: dict[VolumeKey, int] = {}
        self._waiting: tuple[int, VolumeKey, dict[str, Volume]] | None = None
        self._levels: dict[int, Level | None] = {}

    @property
    def n_open(self) -> int:
        """How many volumes have slices and are not whole."""
        return len(self._open)

    def index(self, key: ImageKey) -> int:
        """Which volume of the scan, from 0, the image belongs to."""
        return self._indices.setdefault(volume_key(key), len(self._indices))

    def put(self, key: ImageKey, made: Made) -> None:
        """Take one image, in place of an earlier one of its key."""
        self.index(key)
        self._open.setdefault(volume_key(key), {})[key] = made

    def n_slices(self, key: ImageKey) -> int:
        """How many slices the image's volume has, as far as the header and the scan so far tell."""
        encoding = self._scan.encodings[key.encoding]
        if encoding.is_3d:
            return encoding.recon_matrix.z
        limit = encoding.limits.get("slice")
        return max(1 if limit is None else limit.maximum - limit.minimum + 1, len(self._open[volume_key(key)]))

    def is_whole(self, key: ImageKey) -> bool:
        """Whether every slice of the image's volume is there."""
        is_3d = self._scan.encodings[key.encoding].is_3d
        return is_3d or len(self._open[volume_key(key)]) == self.n_slices(key)

    def close(self, volume: VolumeKey, verdict: Callable[[], Verdict | None]) -> None:
        """Put the slices of a volume together, in the order of their numbers; write the one that waited before it."""
        images = self._open.pop(volume)
        made = [images[key] for key in sorted(images)]
        index = self._indices[volume]
        geometry = stack_geometry([each.first for each in made], self._scan.encodings[volume.encoding])
        by_network = [each.network for each in made if each.network is not None]
        whole = {CLASSICAL: [each.classical for each in made]}
        if len(by_network) == len(made):
            whole[NETWORK] = by_network
        reasons = Counter(each.reason for each in made if each.reason)
        volumes = {
            series: Volume(np.concatenate([image.data for image in each]), geometry, _provenance(each, reasons))
            for series, each in whole.items()
        }
        if self._waiting is not None and self._waiting[0] != index:
            self._write(verdict())
        self._waiting = (index, volume, volumes)

    def finish(self, verdict: Callable[[], Verdict | None]) -> None:
        """Write all that is left, with the verdict on the whole scan."""
        for volume in list(self._open):
            self.close(volume, verdict)
        final = verdict()
        self._write(final)
        level = None if final is None else final.level
        for index in sorted(self._levels):
            if self._levels[index] is not level:
                self.said[index] = self._results.judge_again(index, final)

    def _write(self, verdict: Verdict | None) -> None:
        if self._waiting is None:
            return
        index, volume, volumes = self._waiting
        self._waiting = None
        self.said[index] = self._results.write_volumes(volumes, index, volume.contrast, verdict)
        self._levels[index] = None if verdict is None else verdict.level


def software() -> str:
    """Return the name and version that provenance carries."""
    return f"scanside {version('scanside')}"


def _provenance(images: list[Image], reasons: Counter[str]) -> Provenance:
    """How most slices of a volume were made, and in its steps how the others were and why no network was used."""
    ways = Counter((image.method, image.steps, image.model_sha256, image.backend) for image in images)
    (method, steps, sha256, backend), _ = ways.most_common(1)[0]
    for (other, other_steps, _, _), n in ways.most_common()[1:]:
        steps = (*steps, f"{n} of {len(images)} slices otherwise: {other} ({'; '.join(other_steps)})")
    for reason, n in reasons.most_common():
        steps = (*steps, f"network not used for {n} of {len(images)}: {reason}")
    return Provenance(method, software(), steps, model_sha256=sha256, backend=backend)
