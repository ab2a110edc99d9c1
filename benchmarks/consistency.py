"""Do the measures of each slice say how wrong its image is, and does the motion score see motion?

`python -m benchmarks.consistency` simulates scans of subjects that no training saw, at several accelerations, noise
levels and orders of acquisition, clean and with a fault, reconstructs them with the shipped network and measures each
as the chain does. It prints the rank correlation of the measures with the true error, the area under the ROC curve of
the motion score, how near the onset is, and what the measures cost next to the reconstruction.

The truth is the noise-free root-sum-of-squares of the coils; of a head that moved, the pose that is nearer to the
image. Scans come from the generator of the training samples: other heads, the same physics.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage, stats

from benchmarks.cases import held_out
from benchmarks.ours import REAL, shipped_network
from benchmarks.record import make_record, write_record
from export.simulated import FINENESS, draw_coils, draw_image, see
from export.slices import Slice
from recon.arrays import Array
from recon.consistency import measure_slice
from recon.errors import AcquisitionError
from recon.fourier import to_kspace
from recon.network import Network
from recon.reconstruct import Start, reconstruct_classical, sense_coils
from recon.scan import Encoding, KSpace, Matrix, Size
from recon.unrolled import reconstruct_unrolled

SHAPE = (160, 144)  # lines, columns
FIELD_MM = 240.0  # along the lines
N_COILS = 8
ACS = 24
SIGMA = (0.003, 0.06)  # of the peak
ACCELERATIONS = (2, 4, 6, 8)
ORDERS = ("two passes", "shots", "sequential", "centre out")
FAULTS = ("none", "motion", "motion", "none", "wrong maps", "motion", "spikes", "noise", "motion", "interference")


class Scan(NamedTuple):
    """A simulated scan: what was solved, when each line came, the truths (one a pose) and what is wrong with it.

    truths: float (pose, y, x). about: R, sigma, order and fault; of motion its mm, angle and onset, a rank.
    """

    start: Start
    order: Array
    truths: Array
    about: dict[str, Any]
    seconds: float


def acquisition_order(measured: Array, kind: str) -> Array:
    """Return the rank of each measured line, -1 of the others: int (ky)."""
    lines = np.flatnonzero(measured)
    if kind == "two passes":
        lines = np.concatenate((lines[::2], lines[1::2]))
    elif kind == "shots":  # of 8 lines each, spread over all of k-space
        n = -(-len(lines) // 8)
        lines = np.concatenate([lines[shot::n] for shot in range(n)])
    elif kind == "centre out":
        lines = lines[np.argsort(np.abs(lines - len(measured) // 2), kind="stable")]
    order = np.full(len(measured), -1)
    order[lines] = np.arange(len(lines))
    return order


def move(image: Array, shift: tuple[float, float], degrees: float) -> Array:
    """Return a fine image (y, x) moved by `shift` (y, x), in its voxels, and turned about its centre."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s], [s, c]])
    centre = np.array(image.shape) // 2
    offset = centre - turn @ (centre + np.array(shift))
    parts = [ndimage.affine_transform(part, turn, offset, order=1) for part in (image.real, image.imag)]
    return (parts[0] + 1j * parts[1]).astype(np.complex64)


def simulate(rng: np.random.Generator, source: Slice, acceleration: int, order: str, fault: str) -> Scan:
    """Return one scan of `source`; draws again where its calibration lines give no maps."""
    n_y, n_x = SHAPE
    measured = np.zeros(n_y, bool)
    measured[int(rng.integers(acceleration)) :: acceleration] = True
    measured[n_y // 2 - ACS // 2 : n_y // 2 + ACS // 2] = True
    ranks = acquisition_order(measured, order)
    image, _ = draw_image(rng, source, SHAPE)
    coils = draw_coils(rng, N_COILS, image.shape)
    seen = see(image, coils)
    sigma = float(np.exp(rng.uniform(*np.log(SIGMA))))
    about: dict[str, Any] = {"R": acceleration, "sigma": sigma, "order": order, "fault": fault}
    peak = float(np.percentile(np.sqrt((np.abs(seen) ** 2).sum(0)), 99.5)) or 1.0
    poses = [seen / np.float32(sigma * peak)]
    clean = to_kspace(poses[0], (1,))
    if fault == "motion":
        mm, onset, angle = rng.uniform(3, 6), rng.uniform(0.1, 0.9), rng.uniform(0, 2 * np.pi)
        shift = mm / FIELD_MM * FINENESS * n_y
        moved = move(image, (shift * np.sin(angle), shift * np.cos(angle)), mm / 2 * rng.choice([-1, 1]))
        poses.append(see(moved, coils) / np.float32(sigma * peak))
        first = int(onset * measured.sum())
        clean = np.where((ranks >= first)[:, None], to_kspace(poses[1], (1,)), clean)
        about |= {"mm": float(mm), "onset": first, "angle": float(angle)}
    noise = rng.standard_normal((2, *clean.shape), np.float32) * np.float32(0.5**0.5)
    samples = clean + noise[0] + 1j * noise[1]
    _spoil(rng, fault, samples, measured, about)
    samples = np.where(measured[:, None], samples, 0).astype(np.complex64)[None]
    calibration = samples[:, :, n_y // 2 - ACS // 2 : n_y // 2 + ACS // 2]
    kspace = KSpace(samples, measured[None].astype(np.uint16), 1.0, True, calibration)
    encoding = Encoding(Matrix(n_x, n_y, 1), Size(216, 240, 5), Matrix(n_x, n_y, 1), Size(216, 240, 5))
    other = None
    try:
        if fault == "wrong maps":  # of a coil array that was put elsewhere
            other_seen = to_kspace(see(image, draw_coils(rng, N_COILS, image.shape)), (1,)) / np.float32(sigma * peak)
            lines = slice(n_y // 2 - ACS // 2, n_y // 2 + ACS // 2)
            other = sense_coils(other_seen[None, :, lines].astype(np.complex64), n_y, N_COILS, True)
        began = time.perf_counter()
        start = reconstruct_classical(kspace, encoding, "sense", other).start
        seconds = time.perf_counter() - began
    except AcquisitionError:
        return simulate(rng, source, acceleration, order, fault)
    assert start is not None
    truths = np.stack([np.sqrt((np.abs(each) ** 2).sum(0)) for each in poses])
    return Scan(start, ranks, truths, about, seconds)


def _spoil(rng: np.random.Generator, fault: str, samples: Array, measured: Array, about: dict[str, Any]) -> None:
    """Put a fault of the receiver into samples (coil, ky, x), in place."""
    lines = np.flatnonzero(measured)
    n_coils, n_y, n_x = samples.shape
    size = float(np.exp(rng.uniform(np.log(0.2), np.log(2)))) * float(np.abs(samples).max())
    if fault == "spikes":
        for line in rng.choice(lines, max(2, len(lines) // 12), replace=False):
            wave = np.exp(2j * np.pi * rng.integers(n_x) / n_x * np.arange(n_x)) / n_x**0.5
            samples[:, line] += size * wave * np.exp(2j * np.pi * rng.random((n_coils, 1)))
    elif fault == "noise":  # of some coils, in the later lines
        about["factor"] = float(rng.uniform(2, 8))
        extra = rng.standard_normal((2, *samples.shape)) * about["factor"] * 0.5**0.5
        samples[:, lines[len(lines) // 2 :]] += (extra[0] + 1j * extra[1])[:, lines[len(lines) // 2 :]]
    elif fault == "interference":  # a few columns, in every line
        columns = rng.integers(n_x) + np.arange(3)
        extra = rng.standard_normal((2, n_coils, n_y, 3)) * size * 0.15
        samples[:, :, columns % n_x] += extra[0] + 1j * extra[1]


def scans(sources: list[Slice], n: int, seed: int = 0) -> Iterator[Scan]:
    """Yield `n` scans that go through the accelerations, orders and faults in turns."""
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        fault = FAULTS[number % len(FAULTS)]
        acceleration = ACCELERATIONS[int(rng.integers(len(ACCELERATIONS)))]
        order = ORDERS[int(rng.integers(len(ORDERS)))]
        yield simulate(rng, sources[number % len(sources)], acceleration, order, fault)


def true_error(image: Array, truths: Array) -> float:
    """Return the NRMSE in the head of a magnitude image (y, x) against the nearest of `truths` (pose, y, x)."""
    errors = []
    for truth in truths:
        head = truth > 0.1 * np.percentile(truth, 99.5)
        errors.append(float(np.linalg.norm((image - truth)[head]) / np.linalg.norm(truth[head])))
    return min(errors)


class Row(NamedTuple):
    """One scan measured: what was done, the true error, that of the same scan without the fault, and the measures."""

    about: dict[str, Any]
    error: float
    clean_error: float
    values: dict[str, float]
    onset: int | None
    n_lines: int
    seconds: tuple[float, float, float]  # reconstruction, thorough measures, quick ones


def evaluate(network: Network, sources: list[Slice], n: int, seed: int = 0) -> list[Row]:
    """Return the measures of `n` scans, beside the errors that only a reference tells."""
    rows = []
    for number, scan in enumerate(scans(sources, n, seed)):
        image, seconds = _reconstruct(network, scan)
        began = time.perf_counter()
        measured = measure_slice(scan.start, scan.order, network, image, thorough=True)
        thorough = time.perf_counter() - began
        began = time.perf_counter()
        measure_slice(scan.start, scan.order, network, image, thorough=False)
        quick = time.perf_counter() - began
        error = clean_error = true_error(np.abs(image[0]), scan.truths)
        if scan.about["fault"] != "none":
            rng = np.random.default_rng([seed, number])
            rng.integers(len(ACCELERATIONS)), rng.integers(len(ORDERS))
            source = sources[number % len(sources)]
            twin = simulate(rng, source, scan.about["R"], scan.about["order"], "none")
            clean_error = true_error(np.abs(_reconstruct(network, twin)[0][0]), twin.truths)
        n_lines = int((scan.order >= 0).sum())
        times = (scan.seconds + seconds, thorough, quick)
        rows.append(Row(scan.about, error, clean_error, dict(measured.values), measured.onset, n_lines, times))
    return rows


def _reconstruct(network: Network, scan: Scan) -> tuple[Array, float]:
    began = time.perf_counter()
    image = reconstruct_unrolled(network, scan.start.kspace, scan.start.maps, scan.start.image)
    return image, time.perf_counter() - began


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return the figures: rank correlations with the true error, motion by order, cost."""
    errors = np.array([row.error for row in rows])
    out: dict[str, Any] = {"scans": len(rows), "spearman": {}, "motion": {}}
    is_moved = np.array([row.about["fault"] == "motion" for row in rows])
    for name in ("held_out", "disagreement", "invented", "map_residual", "chi2"):
        values = np.array([row.values.get(name, np.nan) for row in rows])
        known = np.isfinite(values)
        out["spearman"][name] = {
            "all": _rank(values[known], errors[known]),
            "without motion": _rank(values[known & ~is_moved], errors[known & ~is_moved]),
        }
    clean = [row.values["inconsistency"] for row in rows if row.about["fault"] == "none"]
    others = [row.values["inconsistency"] for row in rows if row.about["fault"] != "motion"]
    for order in (*ORDERS, "all"):
        risen = [
            row
            for row in rows
            if row.about["fault"] == "motion"
            and order in ("all", row.about["order"])
            and row.error > 1.2 * row.clean_error
        ]
        if not risen:
            continue
        scores = [row.values["inconsistency"] for row in risen]
        near = [row.onset is not None and abs(row.onset - row.about["onset"]) <= 0.05 * row.n_lines for row in risen]
        told = [hit for hit, row in zip(near, risen, strict=True) if row.onset is not None]
        out["motion"][order] = {
            "scans": len(risen),
            "auroc against clean": _auroc(scores, clean),
            "auroc against clean and other faults": _auroc(scores, others),
            "onset told": len(told) / len(risen),
            "onset within 5 % of the lines, of those told": float(np.mean(told)) if told else None,
        }
    times = np.array([row.seconds for row in rows])
    whole, thorough, quick = (float(each) for each in np.median(times, 0))
    out["seconds"] = {"reconstruction": whole, "thorough": thorough, "quick": quick}
    out["share of the reconstruction, every second slice thorough"] = float(
        np.median(times[:, 1:].mean(1) / times[:, 0])
    )
    return out


def _rank(values: Array, errors: Array) -> float | None:
    return float(stats.spearmanr(values, errors)[0]) if len(values) > 2 and np.ptp(values) > 0 else None


def _auroc(faulty: list[float], clean: list[float]) -> float | None:
    if not faulty or not clean:
        return None
    high, low = np.array(faulty)[:, None], np.array(clean)[None]
    return float((high > low).mean() + 0.5 * (high == low).mean())


def main() -> None:
    """Run the measurement; print one JSON record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.consistency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=REAL.parent, help="holds the held-out images")
    parser.add_argument("--scans", type=int, default=150, metavar="N", help="simulated ones (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the simulation (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here instead of printing it")
    arguments = parser.parse_args()
    network = shipped_network()
    if network is None:
        parser.error("there is no trained network to judge")
    rows = evaluate(network, held_out(arguments.data, 60), arguments.scans, arguments.seed)
    settings = {"scans": arguments.scans, "seed": arguments.seed, "shape": SHAPE, "coils": N_COILS, "acs": ACS}
    write_record(make_record("consistency", settings, summarise(rows)), arguments.json)


if __name__ == "__main__":
    main()
