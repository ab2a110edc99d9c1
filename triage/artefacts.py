"""What no head shows: itself again beside itself, stripes, brightness cut off, and front and back exchanged.

Each is one number of a series, the larger the worse. Ghosts and wrapping put the same edges elsewhere again: the edges'
correlation with themselves peaks away from the middle. A spark in k-space is one point of an image's spectrum far above
its surroundings. Clipped brightness lies at one value. Which way up a head lies is told by a weighted sum of what is
different at the front and at the back, on a coarse grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from recon.arrays import Array, closed
from recon.errors import ModelError, ShapeError
from triage.score import middle_of

REPEATS, STRIPES, CLIPPED, REVERSED = "repeats", "stripes", "clipped", "reversed"
WORDS: Mapping[str, str] = {
    REPEATS: "the same edges appear twice, as with ghosts or wrapping",
    STRIPES: "stripes cross the images",
    CLIPPED: "brightness is cut off",
    REVERSED: "front and back seem exchanged",
}
EDGES = (0.8, 3.0)  # pixels: widths between which edges lie
NEAR_MM = 12.0  # edges are like their neighbours up to here
COARSE_MM = 2  # of edges
CELL_MM = 8  # of the grid on which front and back are compared
LOW = 0.03  # of the spectrum, in cycles a pixel: what heads themselves are made of
AROUND = 9  # points of a spectrum, a point's surroundings
TOP, NEAR_TOP = 99.5, 0.985  # percentile of brightness in the brain, and the share of it that counts as cut off
BRIGHT = 2.0  # of the brain's median; brighter says nothing of front and back


@dataclass(frozen=True, eq=False)
class Artefacts:
    """The most of each number that is let through. weights: float (number,), of `front_and_back`.

    most: by name, of a series of many planes. most_of_few: by contrast and name, of fewer planes.
    """

    weights: Array
    most: Mapping[str, float]
    most_of_few: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", closed(self.weights, np.float64))

    def refusal(self, images: Array, brain: Array, contrast: str, is_exam: bool) -> str:
        """Return in words what is wrong with planes of one series, "" for nothing."""
        most = self.most if is_exam else self.most_of_few.get(contrast, {})
        found = measure_artefacts(images, brain, self.weights)
        for name, limit in most.items():
            if found[name] > limit:
                return f"{WORDS[name]} ({found[name]:.2f}, {limit:.2f} is the most)"
        return ""


def measure_artefacts(images: Array, brain: Array, weights: Array) -> dict[str, float]:
    """Return by name the numbers of a series of planes, float32 (plane, y, x) of 1 mm, and its brain, bool."""
    pairs = list(zip(images, brain, strict=True))
    return {
        REPEATS: repeats(images),
        STRIPES: stripes(images),
        CLIPPED: float(np.mean([clipped(*each) for each in pairs])),
        REVERSED: -float(np.mean([front_and_back(*each) @ weights for each in pairs])),
    }


def repeats(images: Array) -> float:
    """Return the highest correlation of a series' edges with themselves further than NEAR_MM away, 0 to 1."""
    n_y, n_x = (n // COARSE_MM for n in images.shape[1:])
    small = images[:, : n_y * COARSE_MM, : n_x * COARSE_MM].reshape(-1, n_y, COARSE_MM, n_x, COARSE_MM).mean((2, 4))
    low, high = EDGES
    edges = ndimage.gaussian_filter(small, (0, low, low)) - ndimage.gaussian_filter(small, (0, high, high))
    power = np.abs(np.fft.rfft2(edges, (2 * n_y, 2 * n_x))) ** 2
    alike = np.fft.irfft2(power, (2 * n_y, 2 * n_x))
    mean = np.mean(alike / np.maximum(alike[:, :1, :1], 1e-9), axis=0)
    y, x = (np.minimum(np.arange(2 * n), 2 * n - np.arange(2 * n)) * COARSE_MM for n in (n_y, n_x))
    return float(mean[np.hypot(y[:, None], x) >= NEAR_MM].max(initial=0.0))


def stripes(images: Array) -> float:
    """Return how far the highest point of a series' spectrum is above its surroundings, in decades of power."""
    power = np.fft.rfft2(images)
    power = (power.real**2 + power.imag**2).mean(axis=0)
    y, x = np.abs(np.fft.fftfreq(images.shape[1])), np.fft.rfftfreq(images.shape[2])
    around = ndimage.median_filter(np.fft.fftshift(power, 0), AROUND, mode="nearest")
    above = np.log10(np.maximum(np.fft.fftshift(power, 0), 1e-12) / np.maximum(around, 1e-12))
    return float(above[np.hypot(np.fft.fftshift(y)[:, None], x) > LOW].max(initial=0.0))


def clipped(image: Array, brain: Array) -> float:
    """Return the share of the brain whose brightness is next to the highest."""
    values = image[brain]
    return float((values > NEAR_TOP * np.percentile(values, TOP)).mean()) if values.size else 1.0


def front_and_back(image: Array, brain: Array) -> Array:
    """Return float64 (number,): what is at the front and not at the back, on a coarse grid, of brain and brightness.

    All of them change sign where a plane is turned upside down, and stay where it is mirrored.
    """
    y, x = middle_of(image.shape)
    inside, seen = brain[y, x].astype(np.float32), np.minimum(image[y, x], BRIGHT)
    rows = np.flatnonzero(inside.any(axis=1))
    shift = 0 if not rows.size else round((inside.shape[0] - 1) / 2 - (rows[0] + rows[-1]) / 2)
    out = []
    for each in (inside, seen * inside):
        n_y, n_x = (n // CELL_MM for n in each.shape)
        cells = np.roll(each, shift, axis=0)[: n_y * CELL_MM, : n_x * CELL_MM]
        cells = cells.reshape(n_y, CELL_MM, n_x, CELL_MM).mean((1, 3))
        cells = (cells + cells[:, ::-1])[:, : n_x // 2]
        out.append((cells - cells[::-1])[: n_y // 2].ravel())
    return np.concatenate(out).astype(np.float64)


def fit_weights(numbers: Sequence[Array], ridge: float = 0.3) -> Array:
    """Return the weights with which upright planes' numbers add up to about 1; each group of planes counts alike."""
    design = np.concatenate(list(numbers))
    weight = np.concatenate([np.full(len(each), 1 / len(each)) for each in numbers])
    weighted = design * weight[:, None]
    return np.asarray(np.linalg.solve(design.T @ weighted + ridge * np.eye(design.shape[1]), weighted.sum(axis=0)))


def read_artefacts(content: Mapping[str, Any]) -> Artefacts:
    """Return what `artefacts_json` wrote; raise ModelError where it cannot be read."""
    try:
        weights = np.array(content["weights"], np.float64)
        most = {str(name): float(value) for name, value in content["most"].items()}
        of_few = {
            str(contrast): {str(name): float(value) for name, value in of.items()}
            for contrast, of in content["most_of_few"].items()
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"the limits of artefacts cannot be read: {type(error).__name__}") from error
    if not {*most, *(name for of in of_few.values() for name in of)} <= set(WORDS):
        raise ModelError(f"the limits of artefacts are of other numbers; {', '.join(WORDS)} are right")
    if weights.ndim != 1:
        raise ShapeError("weights", weights.shape, ("number",))
    return Artefacts(weights, most, of_few)


def artefacts_json(artefacts: Artefacts) -> dict[str, Any]:
    """Return what `read_artefacts` reads."""
    return {
        "weights": [float(f"{v:.4g}") for v in artefacts.weights],
        "most": {name: float(f"{v:.4g}") for name, v in artefacts.most.items()},
        "most_of_few": {
            contrast: {name: float(f"{v:.4g}") for name, v in of.items()}
            for contrast, of in artefacts.most_of_few.items()
        },
    }
