"""Motion between lines: seen, dated and sized; a head that lies still shows none."""

from __future__ import annotations

import numpy as np
import pytest

from recon.motion import MIN_SHIFT, displaced_share, find_motion
from tests.slices import make_slice


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("shift", [(3.0, 0.0), (0.0, 3.0), (-2.0, 2.0)])
def test_a_move_is_seen_dated_and_measured(step: int, shift: tuple[float, float]) -> None:
    rng = np.random.default_rng(step)
    moved = make_slice(rng, step=step, late_shift=shift, onset=0.4)
    still = make_slice(np.random.default_rng(step), step=step)
    found = find_motion(moved.start.kspace, moved.start.maps, moved.order)
    rest = find_motion(still.start.kspace, still.start.maps, still.order)
    assert found is not None
    assert rest is not None
    n_lines = (moved.order >= 0).sum()
    assert found.score > 5 * max(rest.score, 0.002)
    assert abs(found.onset - int(0.4 * n_lines)) <= 0.05 * n_lines
    assert np.hypot(found.shift[0] - shift[0], found.shift[1] - shift[1]) < MIN_SHIFT


def test_the_error_of_a_double_image_is_told_from_its_lines() -> None:
    moved = make_slice(np.random.default_rng(7), late_shift=(0.0, 3.0), step=2)
    found = find_motion(moved.start.kspace, moved.start.maps, moved.order)
    assert found is not None
    error = np.linalg.norm(np.abs(moved.start.image[0]) - moved.truth) / np.linalg.norm(moved.truth)
    told = displaced_share(moved.start.kspace, moved.order, found) ** 0.5
    assert 0.5 < told / error < 2


def test_too_little_to_tell_says_so() -> None:
    made = make_slice(np.random.default_rng(1), n_coils=1, step=1)
    assert find_motion(made.start.kspace, made.start.maps, made.order) is None
    made = make_slice(np.random.default_rng(1))
    few = np.where(made.order < 8, made.order, -1)
    assert find_motion(made.start.kspace, made.start.maps, few) is None
