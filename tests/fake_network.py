"""A network behind the protocol without runtime or weights, and the normal operator of its inputs, NumPy or CuPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from recon.arrays import array_module
from recon.network import Card, TrainedRange

RANGE = TrainedRange((16, 128), 8, 12, 12, 0.625)


class FakeNetwork:
    """Answers with what `answer` makes of the inputs; by default with the classical image that it was given."""

    def __init__(self, answer: Callable[[Mapping[str, Any]], Any] | None = None, trained: TrainedRange = RANGE) -> None:
        self.card = Card("fake", "1", "0" * 64, trained)
        self.backend = "fake"
        self.seen: list[dict[str, Any]] = []
        self._answer = answer or (lambda inputs: inputs["classical"].copy())

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Note the inputs and answer."""
        self.seen.append(dict(inputs))
        return {"image": self._answer(inputs)}

    def close(self) -> None:
        """Nothing is held."""


def normal(inputs: Mapping[str, Any], image: Any) -> Any:
    """Return Aᴴ W A image, complex (plane, y, x), as a network's inputs describe it: written out, without a network."""
    pairs = lambda name: inputs[name][:, 0] + 1j * inputs[name][:, 1]  # noqa: E731
    support = inputs["support"][:, 0]
    aliases, coarse = pairs("aliases"), pairs("coarse").transpose(0, 2, 1, 3)  # coarse: (plane, coil, y, x)
    n_planes, n_aliases = aliases.shape[:2]
    folded = image.reshape(n_planes, n_aliases, -1)
    lattice = array_module(image).einsum("pabl,pbl->pal", aliases, folded).reshape(image.shape)
    seen = coarse * (inputs["resample"] @ (image * support))[:, None]
    lines = _complex(inputs["rows"]) @ seen
    missing = _complex(inputs["missing"])
    lines = lines - (lines @ missing.T) @ missing.conj()
    back = (coarse.conj() * (_complex(inputs["rows"]).conj().T @ lines)).sum(1)
    return lattice + (inputs["resample"].T @ back) * support


def _complex(real_form: Any) -> Any:
    rows, columns = (n // 2 for n in real_form.shape)
    return real_form[:rows, :columns] + 1j * real_form[rows:, :columns]
