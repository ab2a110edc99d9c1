"""What a trained network is to its users: a card that says what it was trained for, and something that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from recon.arrays import Array
from recon.errors import ModelError
from recon.limits import Limits, read_limits


@dataclass(frozen=True)
class TrainedRange:
    """What a reconstruction network was trained for; outside of it the classical reconstruction serves.

    matrix: least and most voxels along y and x. acceleration: most. calibration_lines: least. coils: most virtual ones.
    measured_extent: least share of k-space between the first and the last measured line (partial Fourier).
    """

    matrix: tuple[int, int]
    acceleration: float
    calibration_lines: int
    coils: int
    measured_extent: float


@dataclass(frozen=True)
class Variant:
    """The same network in another precision. file: its name. sha256: of it. why_not: "" where it may be used."""

    file: str
    sha256: str
    why_not: str = ""


@dataclass(frozen=True)
class Card:
    """A model card, as far as it matters at run time. sha256: of the float32 model file, 64 hexadecimal digits.

    precisions: other files of the same weights, by the precision of their convolutions ("float16", "int8").
    limits: of the measures that its scans are judged by; None where no calibration was run.
    """

    name: str
    version: str
    sha256: str
    trained_range: TrainedRange
    precisions: Mapping[str, Variant] = field(default_factory=dict)
    limits: Limits | None = None


class Network(Protocol):
    """A trained network, loaded and ready."""

    card: Card
    backend: str  # what runs it, in words: "onnxruntime 1.23 CPU"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return fresh arrays by name for inputs by name, of the inputs' module (NumPy or CuPy); raise BackendError."""

    def close(self) -> None:
        """Give back the memory; a second call does nothing."""


def read_card(content: Mapping[str, Any]) -> Card:
    """Return the card in the JSON of `card.json`; raise ModelError that names what is missing or wrong."""
    try:
        values = content["trained_range"]
        found = {field.name: values[field.name] for field in fields(TrainedRange)}
        low, high = found.pop("matrix")
        trained = TrainedRange((int(low), int(high)), **{name: float(value) for name, value in found.items()})  # type: ignore[arg-type]
        others = {
            precision: Variant(str(each["file"]), str(each["sha256"]), str(each.get("why_not", "")))
            for precision, each in content.get("precisions", {}).items()
        }
        quality = content.get("quality")
        limits = None if quality is None else read_limits(quality)
        return Card(str(content["name"]), str(content["version"]), str(content["sha256"]), trained, others, limits)
    except KeyError as error:
        raise ModelError(f"the model card has no {error.args[0]!r}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"the model card's trained_range or precisions cannot be read: {error}") from error
