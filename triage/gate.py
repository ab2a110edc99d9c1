"""Whether a series is what it is said to be: a head, clean enough, and of the contrast on its label.

Numbers of a plane are compared with those of real and simulated heads of each contrast. A series is let through where
it is near to its own contrast and not clearly nearer to another. What networks have learned plays no part here: that is
`triage.likeness`, which comes second.
Source: Lee et al., NeurIPS 31:7167 (2018), class-conditional Gaussians and their distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from recon.arrays import Array, closed
from recon.errors import ModelError, ShapeError
from triage.artefacts import Artefacts, artefacts_json, read_artefacts
from triage.brain import brain_masks
from triage.preprocess import Planes

LEVELS = (1, 5, 20, 35, 65, 80, 95, 99)  # percentiles of brightness in the brain, whose median is 1
NAMES = (
    *(f"level {p}" for p in LEVELS),
    "area", "length", "width", "fill", "halves", "upside down", "noise", "fine", "middle", "coarse", "shell", "outside",
)  # fmt: skip
MIN_SHARE = 0.5  # of the largest plane's brain: the planes that are looked at
MIN_AREA_MM2 = 2500.0
MOST = 12  # planes
MANY = 5  # planes whose mean scatters little
SHARE_OF_MANY = 0.6  # of a plane's limit: real exams keep within 0.5 of it
SIMILAR = ({"t1", "t1ce"},)  # labels that cannot be told apart by these numbers


@dataclass(frozen=True, eq=False)
class Kind:
    """Planes of one contrast: mean (number,), inverse covariance (number, number), the distance most of them keep."""

    mean: Array
    precision: Array
    log_volume: float
    limit: float

    def __post_init__(self) -> None:
        if self.precision.shape != (len(self.mean), len(self.mean)):
            raise ShapeError("precision", self.precision.shape, (len(self.mean), len(self.mean)))
        for name in ("mean", "precision"):
            object.__setattr__(self, name, closed(getattr(self, name), np.float64))

    def distance(self, numbers: Array) -> float:
        """Return how far a plane's numbers are from this contrast's: 1 is usual."""
        off = numbers - self.mean
        return float(np.sqrt(max(off @ self.precision @ off, 0) / len(off)))

    def unlikeliness(self, numbers: Array) -> float:
        """Return minus twice the log likelihood, up to a constant that all kinds share."""
        return self.distance(numbers) ** 2 * len(numbers) + self.log_volume


@dataclass(frozen=True)
class Gate:
    """Kinds by contrast (with and without skull, real and simulated), and how much likelier another contrast must be
    before the label is doubted, in log odds: of an exam of MANY planes and more, and of fewer.

    sure: by contrast, how much likelier than every other it must be, in log odds, for an exam of which something may be
    ruled out; `margin` where none is given. artefacts: what no head shows; None looks for none.
    """

    kinds: Mapping[str, tuple[Kind, ...]]
    margin: float
    margin_of_few: float
    artefacts: Artefacts | None = None
    sure: Mapping[str, float] = field(default_factory=dict)

    def refusal(self, planes: Planes, contrast: str) -> str:
        """Return why the series must not be assessed as `contrast`; "" where it may."""
        return self.look(planes, contrast)[0]

    def look(self, planes: Planes, contrast: str) -> tuple[str, str]:
        """Return why the series must not be assessed as `contrast`, and why nothing may be ruled out by it; "" for no.

        Between a label that is let through and one that is beyond doubt lie series of many planes whose contrast is
        not likelier than every other by what `sure` asks for.
        """
        if not planes.is_usable.any():
            return "no head was found in the images", ""
        kinds = self.kinds.get(contrast, ())
        if not kinds:
            return f"images of contrast {contrast} cannot be checked", ""
        shown = most_of_brain(planes.inputs[:, 0])
        if shown is None:
            return "no brain was found in the images", ""
        numbers = describe_exam(*shown)
        nearest = min(kinds, key=lambda kind: kind.distance(numbers) / kind.limit)
        away = nearest.distance(numbers)
        is_exam = int(planes.is_usable.sum()) >= MANY
        limit = nearest.limit * (SHARE_OF_MANY if is_exam else 1.0)
        if away > limit:
            worst = _most_unusual(numbers, nearest)
            return f"unlike {contrast} images of heads (distance {away:.1f}, {limit:.1f} is the most; {worst})", ""
        margin = self.margin if is_exam else self.margin_of_few
        lead, rival = self.lead(contrast, numbers)
        if lead < -margin:
            return f"labelled {contrast}, and looks like {rival}", ""
        doubt = ""
        if is_exam and lead < self.sure.get(contrast, margin):
            doubt = f"labelled {contrast}, and looks nearly as much like {rival}"
        return "" if self.artefacts is None else self.artefacts.refusal(*shown, contrast, is_exam), doubt

    def lead(self, contrast: str, numbers: Array) -> tuple[float, str]:
        """Return by how much, in log odds, `contrast` is likelier than every other that can be told apart, and which
        comes nearest; infinity and "" where there is no other."""
        rivals = [(self._unlikeliness(name, numbers), name) for name in self.kinds if not _are_similar(name, contrast)]
        if not rivals:
            return np.inf, ""
        least, rival = min(rivals)
        return (least - self._unlikeliness(contrast, numbers)) / 2, rival

    def _unlikeliness(self, contrast: str, numbers: Array) -> float:
        return min(kind.unlikeliness(numbers) for kind in self.kinds[contrast])


def _are_similar(name: str, other: str) -> bool:
    return name == other or any({name, other} <= group for group in SIMILAR)


def most_of_brain(images: Array) -> tuple[Array, Array] | None:
    """Return the planes with most brain, MOST at most, and their brain, bool; None where there is hardly any.

    images: float32 (plane, y, x) of 1 mm, as `triage.preprocess` makes them.
    """
    brain = brain_masks(images)
    area = brain.sum(axis=(1, 2))
    if area.max(initial=0) < MIN_AREA_MM2:
        return None
    chosen = np.flatnonzero(area >= max(MIN_SHARE * area.max(), MIN_AREA_MM2))
    if len(chosen) > MOST:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MOST).astype(int)]
    return images[chosen], brain[chosen]


def describe_exam(images: Array, brain: Array) -> Array:
    """Return the mean of the planes' numbers, float64 (number,)."""
    return np.mean([describe_plane(*each) for each in zip(images, brain, strict=True)], axis=0)


def describe_plane(image: Array, brain: Array) -> Array:
    """Return float64 (number,), in the order of NAMES: brightness, size, halves, edges by width, and what is around."""
    values = image[brain].astype(np.float64)
    middle = max(float(np.median(values)), 1e-6)
    levels = np.log(np.percentile(values, LEVELS) / middle + 0.1)
    rows, columns = np.flatnonzero(brain.any(axis=1)), np.flatnonzero(brain.any(axis=0))
    length, width = float(np.ptp(rows)) + 1, float(np.ptp(columns)) + 1
    area = float(brain.sum())
    relative = image.astype(np.float32) / np.float32(middle)
    smooth = [ndimage.gaussian_filter(relative, s) for s in (0.8, 1.6, 3.2, 6.4)]
    inner = ndimage.binary_erosion(brain, iterations=4)
    inner = inner if inner.sum() > 200 else brain
    bands = [np.log(float((a - b)[inner].std()) + 0.003) for a, b in zip([relative, *smooth], smooth, strict=False)]
    away = ndimage.distance_transform_edt(~brain)
    around, far = (away > 2) & (away <= 14), away > 26
    shell = float(relative[around].mean()) if around.any() else 0.0
    outside = float(relative[far].mean()) if far.any() else 0.0
    return np.array([
        *levels, np.log(area / 1e4), np.log(length / 150), np.log(width / 130), area / (length * width),
        _alike(smooth[1], smooth[1][:, ::-1], brain | brain[:, ::-1]), _alike(smooth[1], smooth[1][::-1], brain),
        *bands, np.log(shell + 0.1), np.log(outside + 0.05),
    ])  # fmt: skip


def is_stripped(numbers: Array) -> bool:
    """Whether a plane's numbers say that nothing is around the brain: its skull was taken off."""
    return bool(numbers[NAMES.index("shell")] < np.log(0.14))


def _alike(image: Array, other: Array, where: Array) -> float:
    """Return the correlation of two images (y, x) where `where`."""
    a, b = image[where] - image[where].mean(), other[where] - other[where].mean()
    return float((a * b).sum() / max(float(np.sqrt((a * a).sum() * (b * b).sum())), 1e-6))


def _most_unusual(numbers: Array, kind: Kind) -> str:
    """Return in words the number that is furthest off by itself."""
    spread = np.sqrt(np.diag(np.linalg.inv(kind.precision)))
    off = (numbers - kind.mean) / spread
    worst = int(np.abs(off).argmax())
    return f"{NAMES[worst]} is {abs(off[worst]):.1f} standard deviations too {'high' if off[worst] > 0 else 'low'}"


def fit_kind(numbers: Array, share: float = 0.995, shrink: float = 0.05) -> Kind:
    """Return the kind of planes described by `numbers` (plane, number); its limit holds `share` of them.

    The covariance is drawn a little towards its diagonal, so that few planes give one that can be inverted.
    """
    mean = numbers.mean(axis=0)
    covariance = np.cov(numbers, rowvar=False)
    covariance = (1 - shrink) * covariance + shrink * np.diag(np.diag(covariance)) + 1e-4 * np.eye(len(mean))
    precision = np.linalg.inv(covariance)
    kind = Kind(mean, precision, float(np.linalg.slogdet(covariance)[1]), 1.0)
    limit = float(np.quantile([kind.distance(each) for each in numbers], share))
    return Kind(mean, precision, kind.log_volume, limit)


def read_gate(content: Mapping[str, Any]) -> Gate:
    """Return the gate in the JSON of `gate.json`; raise ModelError where it cannot be read or is of other numbers."""
    try:
        if tuple(content["names"]) != NAMES:
            raise ModelError("gate.json describes planes by other numbers; it belongs to another version")
        kinds = {
            name: tuple(
                Kind(np.array(of["mean"]), np.array(of["precision"]), float(of["log_volume"]), float(of["limit"]))
                for of in each
            )
            for name, each in content["kinds"].items()
        }
        artefacts = read_artefacts(content["artefacts"]) if "artefacts" in content else None
        sure = {name: float(lead) for name, lead in content["sure"].items()}
        return Gate(kinds, float(content["margin"]), float(content["margin_of_few"]), artefacts, sure)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"gate.json cannot be read: {type(error).__name__}") from error


def gate_json(gate: Gate) -> dict[str, Any]:
    """Return what `read_gate` reads."""
    found = {} if gate.artefacts is None else {"artefacts": artefacts_json(gate.artefacts)}
    return {
        **found,
        "names": list(NAMES),
        "margin": gate.margin,
        "margin_of_few": gate.margin_of_few,
        "sure": {name: round(lead, 3) for name, lead in gate.sure.items()},
        "kinds": {
            name: [
                {
                    "mean": [float(f"{v:.5g}") for v in kind.mean],
                    "precision": [[float(f"{v:.5g}") for v in row] for row in kind.precision],
                    "log_volume": kind.log_volume,
                    "limit": kind.limit,
                }
                for kind in kinds
            ]
            for name, kinds in gate.kinds.items()
        },
    }
