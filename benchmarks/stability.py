"""Is the network stable? `python -m benchmarks.stability`: a table, and the same checks that the tests make.

More lines must not make an image worse; a small disturbance must not move it far; a small structure must keep its
contrast; and where nothing was, nothing may appear. All on the simulated head, whose truth is known.
Source of the questions: Antun et al., PNAS 117:30088 (2020).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.ours import shipped_network
from benchmarks.record import make_record, write_record
from benchmarks.scores import compare, retention
from edge.header import read_header
from edge.intake import to_acquisition
from edge.rawfile import open_raw
from edge.recon_file import readouts
from edge.simulate import simulate_file
from recon.arrays import Array
from recon.assemble import Assembler
from recon.fourier import to_kspace
from recon.network import Network
from recon.protocol import Protocol
from recon.reconstruct import network_refusal, reconstruct_classical, reconstruct_network
from recon.scan import Encoding, KSpace

ACCELERATIONS = (8, 6, 5, 4, 3, 2, 1)  # fewest lines first
DISTURBANCE = 0.01  # of the measured samples' norm
MAX_LOSS_DB = 0.2
MAX_MOVE = 0.03


class Head(NamedTuple):
    """A fully sampled simulated scan: k-space, its encoding, the truth (slice, y, x), and where the finding is."""

    kspace: KSpace
    encoding: Encoding
    truth: Array
    structure: Array


def simulated_head(
    folder: Path, matrix: int = 160, n_coils: int = 8, seed: int = 4, finding: str = "mass", snr: float = 40.0
) -> Head:
    """Return a scan of the simulated head with a finding, written into `folder`."""
    path = folder / f"head_{matrix}_{n_coils}_{seed}.h5"
    protocol = Protocol(matrix=(matrix, matrix), n_slices=1, n_coils=n_coils, acceleration=1, snr=snr)
    simulate_file(path, protocol, finding, seed)
    raw = open_raw(path)
    scan, _ = read_header(raw.header, "0" * 26)
    assembler = Assembler(scan, early=False)
    for readout in readouts(raw):
        assembler.add(to_acquisition(readout.header, readout.samples))
    (key,) = assembler.open_keys()
    with np.load(path.with_name(f"{path.stem}.truth.npz")) as arrays:
        return Head(assembler.kspace(key), scan.encodings[0], arrays["image"], arrays["lesion"])


def dropped(full: KSpace, acceleration: int, acs: int = 24) -> KSpace:
    """Return `full` with every `acceleration`-th line from row 0 on and `acs` central ones kept."""
    n = full.samples.shape[2]
    first = n // 2 - acs // 2
    kept = np.arange(n) % acceleration == 0
    kept[first : first + acs] = True
    calibration = full.samples[:, :, first : first + acs]
    return replace(full, samples=full.samples * kept[:, None], averages=full.averages * kept, calibration=calibration)


def images(network: Network, kspace: KSpace, encoding: Encoding) -> tuple[Array, Array]:
    """Return the classical and the network's image, float32 (slice, y, x). Raises ValueError where it is refused."""
    classical = reconstruct_classical(kspace, encoding)
    assert classical.start is not None
    if reason := network_refusal(network, classical.start):
        raise ValueError(reason)
    return classical.image.data, reconstruct_network(network, classical.start, encoding).image.data


def by_acceleration(network: Network, head: Head) -> list[dict[str, Any]]:
    """Return PSNR of both images at each of `ACCELERATIONS`, and what the step before lost to fewer lines."""
    rows: list[dict[str, Any]] = []
    for acceleration in ACCELERATIONS:
        classical, made = images(network, dropped(head.kspace, acceleration), head.encoding)
        psnr = compare(head.truth, made).psnr
        gain = psnr - rows[-1]["network_db"] if rows else 0.0
        row = {"acceleration": acceleration, "classical_db": compare(head.truth, classical).psnr, "network_db": psnr}
        rows.append({**row, "gain_by_more_lines_db": gain})
    return rows


def disturbed(network: Network, head: Head, acceleration: int, seed: int = 0) -> dict[str, float]:
    """Return by how much an image moves, of its norm, when its samples are disturbed by `DISTURBANCE` of theirs.

    Three kinds: white, a smooth pattern that looks like anatomy, and one that sits on a single line.
    """
    rng = np.random.default_rng(seed)
    kspace = dropped(head.kspace, acceleration)
    _, before = images(network, kspace, head.encoding)
    shape = kspace.samples.shape
    white = (rng.standard_normal((*shape, 2)) @ [1, 1j]).astype(np.complex64)
    shifted = to_kspace(np.roll(np.asarray(head.truth, np.complex64), 9, 1)[:, None], (2,)) * np.ones(
        (1, shape[1], 1, 1)
    )
    line = white * (np.arange(shape[2]) == np.flatnonzero(kspace.averages[0])[3])[:, None]
    found = {}
    for name, pattern in {"white": white, "anatomy": shifted, "one line": line}.items():
        inside = pattern * (kspace.averages[0] > 0)[:, None]
        size = DISTURBANCE * np.linalg.norm(kspace.samples) / np.linalg.norm(inside)
        moved = (kspace.samples + size * inside).astype(np.complex64)
        rows = slice(shape[2] // 2 - 12, shape[2] // 2 + 12)
        _, after = images(network, replace(kspace, samples=moved, calibration=moved[:, :, rows]), head.encoding)
        found[name] = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    return found


def kept_structure(network: Network, head: Head, acceleration: int) -> dict[str, float | None]:
    """Return which part of the finding's contrast each image keeps."""
    classical, made = images(network, dropped(head.kspace, acceleration), head.encoding)
    return {
        "classical": retention(head.truth, classical, head.structure),
        "network": retention(head.truth, made, head.structure),
    }


def nothing(network: Network, head: Head, acceleration: int, seed: int = 0) -> dict[str, float]:
    """Return what the network makes of no signal: of zeros, the largest value; of noise alone, its size and likeness.

    Size is the root mean square against the classical image's; likeness the correlation with the head's outline.
    """
    rng = np.random.default_rng(seed)
    kspace = dropped(head.kspace, acceleration)
    white = (rng.standard_normal((*kspace.samples.shape, 2)) @ [1, 1j] / 2**0.5).astype(np.complex64)
    noise = dropped(replace(head.kspace, samples=white), acceleration)
    classical, made = images(network, noise, head.encoding)
    start = reconstruct_classical(kspace, head.encoding).start
    assert start is not None
    zeros = np.zeros_like(start.kspace.samples)
    empty = replace(
        start,
        kspace=replace(start.kspace, samples=zeros),
        image=np.zeros_like(start.image),
        unexplained=np.zeros_like(start.unexplained),
    )
    inside = head.truth > 0.1 * head.truth.max()
    return {
        "largest_of_zeros": float(np.abs(reconstruct_network(network, empty, head.encoding).image.data).max()),
        "noise_size": float(np.sqrt((made**2).mean() / (classical**2).mean())),
        "noise_likeness": float(np.corrcoef(made.ravel(), inside.ravel())[0, 1]),
    }


def main() -> None:
    """Run all checks; print a table and one JSON record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="heads (%(default)s)")
    parser.add_argument(
        "--json", "--out", dest="out", type=Path, metavar="FILE", help="write the record here rather than print it"
    )
    args = parser.parse_args()
    network = shipped_network()
    if network is None:
        raise SystemExit("benchmarks.stability needs the network that comes with the package")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in track(range(args.seeds), "heads", console=Console(stderr=True)):
            head = simulated_head(Path(folder), seed=4 + seed)
            results.append(
                {
                    "seed": 4 + seed,
                    "by_acceleration": by_acceleration(network, head),
                    "moved_by_1_percent": {str(r): disturbed(network, head, r) for r in (2, 4, 6, 8)},
                    "kept_contrast": {str(r): kept_structure(network, head, r) for r in (2, 4, 6, 8)},
                    "of_nothing": nothing(network, head, 4),
                }
            )
    _show(results)
    write_record(make_record("stability", {"seeds": args.seeds, "model": network.card.sha256}, results), args.out)


def _show(results: list[dict[str, Any]]) -> None:
    table = Table(title="stability on simulated heads")
    for heading in ("head", "question", "answer", "wanted", ""):
        table.add_column(heading)
    for each in results:
        rows = each["by_acceleration"]
        worst = min(row["gain_by_more_lines_db"] for row in rows[1:])
        curve = " ".join(f"{row['network_db']:.1f}" for row in rows)
        moved = max(max(kinds.values()) for kinds in each["moved_by_1_percent"].values())
        kept = [(r, pair["classical"], pair["network"]) for r, pair in each["kept_contrast"].items()]
        words = ", ".join(f"R {r}: {b:.2f} (classical {a:.2f})" for r, a, b in kept if a is not None)
        lines = (
            (
                "PSNR, R = 8 6 5 4 3 2 1",
                f"{curve}; worst step {worst:+.2f} dB",
                f"≥ -{MAX_LOSS_DB}",
                worst >= -MAX_LOSS_DB,
            ),
            ("moved by 1 % of disturbance", f"{moved:.2%}", f"≤ {MAX_MOVE:.0%}", moved <= MAX_MOVE),
            ("contrast kept", words, "≥ classical", all(b >= a for _, a, b in kept if a is not None)),
            (
                "zeros",
                f"{each['of_nothing']['largest_of_zeros']:.2g}",
                "0",
                each["of_nothing"]["largest_of_zeros"] < 1e-3,
            ),
            (
                "noise alone: size, likeness",
                "{noise_size:.2f}, {noise_likeness:+.2f}".format(**each["of_nothing"]),
                "≤ 1, ~0",
                each["of_nothing"]["noise_size"] <= 1,
            ),
        )
        for question, answer, wanted, is_met in lines:
            table.add_row(str(each["seed"]), question, answer, wanted, "[green]yes[/]" if is_met else "[red]no[/]")
    Console(stderr=True, width=150).print(table)


if __name__ == "__main__":
    main()
