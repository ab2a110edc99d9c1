"""The one engine of super-resolution: planes of many sizes, and whether another way of running the network is as good.

Matrices come in as inputs, so sizes may change from run to run: an engine takes all between two, and is tuned for one.
Slices made thinner have a side that is as short as the stack; those planes are not the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recon.arrays import Array
from recon.engine import Shape
from recon.errors import BackendError
from recon.fine_grid import UNIT, band_axis
from recon.parity import Parity, compare_planes, picture
from recon.superres import network_inputs
from recon.superres_card import Session

PROFILE = "super-resolution"  # in place of a reconstruction profile's name
LEAST, USUAL, MOST = 48, 256, 512  # measured voxels a side; 512 is 1024 fine ones, some 100 MB a layer
OUTPUTS = ("placed", "added")
MOST_IN_BAND = 1e-5  # of the measured content, that may change
_CHECKED = (96, 117)  # an even and an odd side


def input_shapes(n: int) -> dict[str, Shape]:
    """Return the shape of each of the graph's inputs for one plane of n × n measured voxels."""
    fine, known = -(-2 * n // UNIT) * UNIT, n + 1 - n % 2
    return {
        "image": (1, 1, n, n),
        **{f"place_{side}": (fine, n) for side in "yx"},
        **{f"basis_{side}": (fine, known) for side in "yx"},
        **{f"phase_{side}": (fine,) for side in "yx"},
        "noise": (1, 1, 1, 1),
    }


def fits(inputs: Mapping[str, Array]) -> bool:
    """Whether every side of every input lies between those of the least and the largest plane."""
    least, most = input_shapes(LEAST), input_shapes(MOST)
    return inputs.keys() == least.keys() and all(
        len(each.shape) == len(least[name])
        and all(a <= n <= b for a, n, b in zip(least[name], each.shape, most[name], strict=True))
        for name, each in inputs.items()
    )


def run_on_zeros(session: Session) -> None:
    """Run the network once on an empty plane; raises BackendError where it fails or its answer has another form."""
    y, x = (band_axis(n) for n in _CHECKED)
    found = session.run(network_inputs(np.zeros((1, *_CHECKED), np.float32), y, x, 0.01))
    shape = (1, 1, len(y.place), len(x.place))
    if any(name not in found or found[name].shape != shape for name in OUTPUTS):
        raise BackendError("the network's outputs are not a super-resolution network's")


def check_refiner(candidate: Session, reference: Session) -> tuple[Parity, str]:
    """Return how far `candidate` is from `reference` on a fixed plane, and why it must not serve; "" where it may.

    Beside the images, the projection is looked at: products in fewer bits (TF32) would change what was measured.
    BackendError as they raise it.
    """
    y, x = (band_axis(n) for n in _CHECKED)
    rng = np.random.default_rng(0)
    image = np.abs(picture(*_CHECKED, rng) + 0.01 * rng.standard_normal(_CHECKED)).astype(np.float32)
    inputs = network_inputs(image[None], y, x, 0.01)
    wanted, found = reference.run(inputs), candidate.run(inputs)
    parity = compare_planes(
        *(np.concatenate([out["placed"] + out["added"], out["added"]], 1) for out in (wanted, found))
    )
    if not parity.is_passed:
        return parity, f"its images differ from the reference: {parity}"
    added = found["added"][0, 0].astype(np.float64)
    kept = float(np.linalg.norm(y.basis.T @ added @ x.basis) + np.linalg.norm(found["placed"] - wanted["placed"]))
    share = kept / float(np.linalg.norm(wanted["placed"]))
    if share > MOST_IN_BAND:
        return parity, f"it changes what was measured by {share:.1e} (at most {MOST_IN_BAND:g})"
    return parity, ""
