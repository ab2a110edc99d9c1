"""Half-field ghosts: what lies half a field of view beside the head, next to the head itself."""

from __future__ import annotations

import numpy as np

from recon.arrays import Array
from recon.fourier import resize_centred, to_image
from recon.scan import KSpace

HEAD = 0.3  # of the brightest: the calibration image is coarse, so its edge is taken well inside
AIR = 0.1  # of the brightest: around the head, by so much the edge is blurred
MIN_SHARE = 0.02  # of the field: a smaller region beside the head says nothing


def ghost_ratio(kspace: KSpace) -> float | None:
    """Return the mean brightness half a field beside the head over that of the head, the background taken off.

    It is read in the image of the calibration lines, the only ones without aliases, root-sum-of-squares over coils.
    None without calibration lines, or where the head leaves no room for its ghost.
    Source: Reeder et al., Magn Reson Med 38:429 (1997), of echo-planar scans; its ghost is of even and odd lines.
    """
    if kspace.calibration is None:
        return None
    n_lines = kspace.calibration.shape[2]
    window = np.sin(np.pi * (np.arange(n_lines) + 1) / (n_lines + 1)).astype(np.float32) ** 2  # Hann: no side lobes
    coils = to_image(resize_centred(kspace.calibration[0] * window[:, None], 1, 4 * n_lines), (1,))
    image = np.sqrt((coils.real**2 + coils.imag**2).sum(0))
    peak = float(np.percentile(image, 99.5))
    if peak <= 0:
        return None
    head, near = image > HEAD * peak, image > AIR * peak
    ghost = np.roll(head, len(image) // 2, axis=0)
    free = ~_filled(near) if (~near).any() else np.zeros_like(near)
    there = ghost & ~_filled(head)
    elsewhere = free & ~np.roll(_filled(near), len(image) // 2, axis=0)
    if min(there.mean(), elsewhere.mean()) < MIN_SHARE:
        return None
    return max(0.0, float((np.median(image[there]) - np.median(image[elsewhere])) / image[head].mean()))


def _filled(mask: Array) -> Array:
    """Return the mask between its first and last voxel of each column, widened by one resolution cell (4 voxels)."""
    forward = np.logical_or.accumulate(mask, axis=0)
    backward = np.logical_or.accumulate(mask[::-1], axis=0)[::-1]
    between = forward & backward
    for step in (-4, 4):
        between = between | np.roll(between, step, axis=0)
    return between
