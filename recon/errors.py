"""Everything that can keep one scan from being served.

ScanError                    one scan cannot be served
├── AcquisitionError         what the scanner sent cannot be used
│   └── StreamError          the stream itself cannot be read on
├── ShapeError               an array does not have the shape that its name promises
├── ModelError               a trained network or its card cannot be used
├── BackendError             a backend failed to run a network
└── DeliveryError            a result could not be handed on

A message says what was found and what would have been right. `code` is short, stable and safe to publish.
"""

from __future__ import annotations

from collections.abc import Sequence


class ScanError(Exception):
    """One scan cannot be served; the daemon says why and goes on with the others."""

    code = "scan"


class AcquisitionError(ScanError):
    """The scanner's data cannot be used: what was found, and what would be right."""

    code = "acquisition"


class StreamError(AcquisitionError):
    """The stream of messages cannot be read any further."""

    code = "stream"


class ShapeError(ScanError):
    """An array does not have the promised shape."""

    code = "shape"

    def __init__(self, name: str, found: Sequence[int], expected: Sequence[int | str]) -> None:
        """Say that `name` came with shape `found` where `expected` was promised."""
        super().__init__(f"{name}: found shape {tuple(found)}, expected {tuple(expected)}")


class ModelError(ScanError):
    """A trained network cannot be used."""

    code = "model"


class BackendError(ScanError):
    """A backend failed to run a network."""

    code = "backend"


class DeliveryError(ScanError):
    """A result could not be handed on."""

    code = "delivery"
