"""Where a readout and its samples belong on the encoded grid, and which grid the image has: header arithmetic.

Source: ISMRMRD's fields, read as Gadgetron reads them: row = step − center + n // 2, kx start = n // 2 − center.
"""

from __future__ import annotations

import numpy as np

from recon.arrays import Array
from recon.errors import AcquisitionError
from recon.fourier import resize_centred, to_image, to_kspace
from recon.scan import AXIAL, Acquisition, Encoding, Geometry, Limit, Size

_MAX_MATRIX = 2048


def check_encoding(encoding: Encoding) -> None:
    """Raise AcquisitionError unless images can be made of `encoding`: Cartesian, with a possible matrix and field."""
    if encoding.trajectory.lower() != "cartesian":
        raise AcquisitionError(f"the trajectory is {encoding.trajectory!r}; only 'cartesian' can be reconstructed")
    for name, matrix in (("encoded", encoding.encoded_matrix), ("recon", encoding.recon_matrix)):
        if not all(1 <= n <= 2 * _MAX_MATRIX for n in matrix):
            raise AcquisitionError(
                f"the {name} matrix is {tuple(matrix)}; each number must lie in 1..{2 * _MAX_MATRIX}"
            )
    for name, fov in (("encoded", encoding.encoded_fov_mm), ("recon", encoding.recon_fov_mm)):
        if not all(np.isfinite(mm) and mm > 0 for mm in fov):
            raise AcquisitionError(f"the {name} field of view is {tuple(fov)} mm; each number must be above 0")
    if encoding.encoded_matrix.x < 4 or encoding.encoded_matrix.y < 4:
        raise AcquisitionError(f"the encoded matrix is {tuple(encoding.encoded_matrix)}; at least 4×4 is needed")


def image_columns(encoding: Encoding) -> int:
    """Return how many columns x keeps after the removal of readout oversampling."""
    n, share = encoding.encoded_matrix.x, encoding.recon_fov_mm.x / encoding.encoded_fov_mm.x
    return min(n, max(1, round(n * share)))


def place_step(acquisition: Acquisition, encoding: Encoding) -> tuple[int, int]:
    """Return (kz, ky), the rows of the encoded grid that the readout's counters stand for.

    Raises AcquisitionError where a counter lies outside the header's limits or off the matrix.
    """
    return (
        _row("kspace_encode_step_2", acquisition.step_2, encoding, encoding.encoded_matrix.z),
        _row("kspace_encode_step_1", acquisition.step_1, encoding, encoding.encoded_matrix.y),
    )


def _row(name: str, step: int, encoding: Encoding, n: int) -> int:
    limit = encoding.limits.get(name.replace("encode", "encoding")) or Limit(0, n - 1, n // 2)
    if not limit.minimum <= step <= max(limit.maximum, limit.minimum):
        raise AcquisitionError(f"{name} is {step}; the header limits it to {limit.minimum}..{limit.maximum}")
    row = step - limit.center + n // 2
    if not 0 <= row < n:
        raise AcquisitionError(f"{name} {step} with centre {limit.center} falls on row {row} of a matrix of {n}")
    return row


def place_readout(acquisition: Acquisition, encoding: Encoding) -> Array:
    """Return the readout on the encoded grid: complex64 (coil, kx), zeros where it was not measured.

    Discards, reversal and asymmetric echoes are undone. A readout of the image's own width is taken as one whose
    oversampling was removed before it was sent. Raises AcquisitionError where the samples do not fit.
    """
    n = encoding.encoded_matrix.x
    samples = acquisition.samples
    sent = samples.shape[1]
    pre, post, centre = acquisition.discard_pre, acquisition.discard_post, acquisition.center_sample
    if pre + post >= sent:
        raise AcquisitionError(f"{pre} + {post} samples are to be discarded of a readout of {sent}")
    is_said = centre < sent  # senders that do not know the centre name one beyond the samples
    if acquisition.is_reversed:
        samples = samples[:, ::-1]
        pre, post, centre = post, pre, sent - 1 - centre
    kept = samples[:, pre : sent - post]
    width = kept.shape[1]
    centre = centre - pre if is_said else width // 2
    # Senders differ in which of the two middle samples of a reversed line they call its centre.
    is_middle = centre in (width // 2, (width - 1) // 2 if acquisition.is_reversed else width // 2)
    if sent == n:
        start = pre  # a full-size readout is centred whatever its centre says
    elif width == image_columns(encoding) and is_middle:
        return to_kspace(resize_centred(to_image(kept, axes=(1,)), 1, n), axes=(1,))
    else:
        start = n // 2 - centre
    if start < 0 or start + width > n:
        raise AcquisitionError(f"{width} samples with their centre at {centre} do not fit an encoded matrix of {n}")
    if width == n:
        return kept
    line = np.zeros((len(kept), n), np.complex64)
    line[:, start : start + width] = kept
    return line


def to_recon_grid(image: Array, encoding: Encoding) -> Array:
    """Return `image`, complex (…, z, y, x) on the encoded grid, cropped and interpolated to the image that is wanted.

    Phase and slice oversampling are cropped in image space; a finer or coarser matrix comes by zero-filling or cropping
    k-space, which keeps the centre at n // 2 and scales amplitudes so that intensities stay.
    """
    wanted = encoding.recon_matrix
    axes = {-1: wanted.x, -2: wanted.y}
    if encoding.is_3d:
        axes[-3] = wanted.z
    for axis, n in axes.items():
        image = resize_centred(image, axis, _kept(encoding, axis))
        found = image.shape[axis]
        if found != n:
            image = to_image(resize_centred(to_kspace(image, axes=(axis,)), axis, n), axes=(axis,))
            image = image * np.float32(np.sqrt(n / found))
    return image


def _kept(encoding: Encoding, axis: int) -> int:
    """How many voxels of the encoded grid the wanted field of view covers along `axis`."""
    if axis == -1:
        return image_columns(encoding)
    name = {-2: "y", -3: "z"}[axis]
    n: int = getattr(encoding.encoded_matrix, name)
    share: float = getattr(encoding.recon_fov_mm, name) / getattr(encoding.encoded_fov_mm, name)
    return max(1, round(n * share))


def voxel_size(encoding: Encoding) -> Size:
    """Return the voxel of the reconstructed image in mm; z is the slice's thickness."""
    enc, fov, wanted = encoding.encoded_matrix, encoding.encoded_fov_mm, encoding.recon_matrix
    x = fov.x * _kept(encoding, -1) / enc.x / wanted.x
    y = fov.y * _kept(encoding, -2) / enc.y / wanted.y
    z = fov.z * _kept(encoding, -3) / enc.z / wanted.z if encoding.is_3d else encoding.recon_fov_mm.z
    return Size(x, y, z)


def directions(acquisition: Acquisition) -> tuple[Array, Array, Array, bool]:
    """Return unit read, phase and slice directions, and whether the scanner gave them (else axial ones)."""
    read, phase, along = (
        np.asarray(v, np.float64) for v in (acquisition.read_dir, acquisition.phase_dir, acquisition.slice_dir)
    )
    lengths = [np.linalg.norm(v) for v in (read, phase)]
    if not all(np.isfinite(n) and abs(n - 1) < 0.02 for n in lengths) or abs(read @ phase) > 0.02:
        read, phase, along = (np.asarray(v) for v in AXIAL)
        return read, phase, along, False
    read = read / lengths[0]
    phase = phase - (phase @ read) * read
    phase = phase / np.linalg.norm(phase)
    normal = np.cross(read, phase)
    towards = -1.0 if np.isfinite(along).all() and along @ normal < 0 else 1.0
    return read, phase, towards * normal, True


def stack_geometry(firsts: list[Acquisition], encoding: Encoding) -> Geometry:
    """Return where the images of one volume lie, from the first readout of each slice (of the one slab for 3-D).

    Slices without a usable position or direction become an axial stack around the isocentre, `is_known` False.
    """
    size = voxel_size(encoding)
    read, phase, along, is_known = directions(firsts[0])
    centres = np.array([a.position_mm for a in firsts], np.float64)
    if not np.isfinite(centres).all():
        centres, is_known = np.zeros_like(centres), False
    n_z = encoding.recon_matrix.z
    if encoding.is_3d:
        steps = np.arange(n_z) - n_z // 2
        centres = centres[0] + steps[:, None] * size.z * along
    elif len(firsts) > 1 and not np.diff(centres, axis=0).any(axis=1).all():
        # Slices on top of each other cannot be a stack: lay them out by their number.
        numbers = np.array([a.key.slice for a in firsts], np.float64)
        centres = (numbers - numbers.mean())[:, None] * size.z * along
        is_known = False
    distance = size.z
    if not encoding.is_3d and len(firsts) > 1:
        gaps = np.abs(np.diff(np.sort(centres @ along)))
        distance = float(np.median(gaps)) if np.median(gaps) > 0 else size.z
    shape = (encoding.recon_matrix.y, encoding.recon_matrix.x)
    return Geometry.from_centres(centres, read, phase, shape, (distance, size.y, size.x), size.z, is_known)
