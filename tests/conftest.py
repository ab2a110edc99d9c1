"""A small simulated scan that many tests stream, made once a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

from edge.simulate import simulate_file
from recon.protocol import Protocol

threadpool_limits(limits=1, user_api="blas")  # as the worker runs; two threads are far slower on a busy machine

SMALL = Protocol(matrix=(64, 64), n_slices=4, n_coils=4, acceleration=2, n_calibration=16)


@pytest.fixture(scope="session")
def small_scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ISMRMRD file: 4 interleaved slices of 64×64, 4 coils, R = 2, with a noise readout; its truth beside it."""
    path = tmp_path_factory.mktemp("scans") / "small.h5"
    simulate_file(path, SMALL, "none", 1)
    return path
