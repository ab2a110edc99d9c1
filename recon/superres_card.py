"""What is known of a super-resolution network: what it was trained for, and the heads it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from recon.arrays import Array
from recon.errors import ModelError
from recon.head_likeness import Likeness


@dataclass(frozen=True)
class SuperCard:
    """A model card, as far as it matters at run time.

    contrasts: names that were trained for. matrix: least and most measured voxels a side. most_noise: standard
    deviation over the image's scale. least_slices: to make thinner ones. sha256 and likeness_sha256: of the two files.
    """

    name: str
    version: str
    sha256: str
    likeness_sha256: str
    contrasts: tuple[str, ...]
    matrix: tuple[int, int]
    most_noise: float
    least_slices: int


class Session(Protocol):
    """A network, loaded and ready. backend: what runs it, in words."""

    backend: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return fresh arrays by name for inputs by name; raise BackendError."""

    def close(self) -> None:
        """Give back the memory; a second call does nothing."""


@dataclass(frozen=True, eq=False)
class Refiner:
    """A super-resolution network with its card and what it may be used on."""

    card: SuperCard
    network: Session
    likeness: Likeness


def read_super_card(content: Mapping[str, Any]) -> SuperCard:
    """Return the card in the JSON of `card.json`; raise ModelError that names what is missing or wrong."""
    try:
        trained = content["trained_range"]
        low, high = trained["matrix"]
        return SuperCard(
            str(content["name"]),
            str(content["version"]),
            str(content["sha256"]),
            str(content["likeness_sha256"]),
            tuple(str(each) for each in trained["contrasts"]),
            (int(low), int(high)),
            float(trained["most_noise"]),
            int(trained["least_slices"]),
        )
    except KeyError as error:
        raise ModelError(f"the super-resolution card lacks {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"the super-resolution card cannot be read: {error}") from error
