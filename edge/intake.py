"""MRD readout headers to `Acquisition`: which flag means what."""

from __future__ import annotations

import numpy as np

from recon.arrays import Array
from recon.scan import Acquisition, ImageKey, Role


def _bit(number: int) -> int:
    return 1 << (number - 1)  # ISMRMRD numbers its flags from 1


_NOISE, _CALIBRATION, _CALIBRATION_AND_IMAGING, _REVERSED = _bit(19), _bit(20), _bit(21), _bit(22)
_LAST_IN_SLICE, _LAST_IN_REPETITION, _LAST_IN_MEASUREMENT = _bit(8), _bit(14), _bit(25)
# Navigation, phase correction, feedback (two kinds), dummy, surface-coil correction, phase stabilisation (two kinds).
_NEVER_IMAGING = sum(_bit(number) for number in (23, 24, 26, 27, 28, 29, 30, 31))


def role_of(flags: int) -> Role:
    """Return what a readout with these ISMRMRD flags is for."""
    if flags & _NOISE:
        return Role.NOISE
    if flags & _NEVER_IMAGING:
        return Role.OTHER
    if flags & _CALIBRATION_AND_IMAGING:
        return Role.CALIBRATION_AND_IMAGING
    return Role.CALIBRATION if flags & _CALIBRATION else Role.IMAGING


def to_acquisition(header: np.void, samples: Array) -> Acquisition:
    """Return one readout from its 340-byte header (a record of `edge.mrd.ACQUISITION_HEADER`) and complex64 (coil, kx).

    Raises ShapeError for a readout without samples.
    """
    flags = int(header["flags"])
    (step_1, step_2, average, slice_, contrast, phase, repetition, set_, segment, _) = header["idx"].item()
    return Acquisition(
        samples=samples,
        role=role_of(flags),
        key=ImageKey(int(header["encoding_space_ref"]), slice_, contrast, phase, repetition, set_),
        step_1=step_1,
        step_2=step_2,
        average=average,
        segment=segment,
        center_sample=int(header["center_sample"]),
        discard_pre=int(header["discard_pre"]),
        discard_post=int(header["discard_post"]),
        is_reversed=bool(flags & _REVERSED),
        last_in_slice=bool(flags & _LAST_IN_SLICE),
        last_in_repetition=bool(flags & _LAST_IN_REPETITION),
        last_in_measurement=bool(flags & _LAST_IN_MEASUREMENT),
        sample_time_us=float(header["sample_time_us"]),
        time_stamp=int(header["acquisition_time_stamp"]),
        position_mm=tuple(header["position"].tolist()),
        read_dir=tuple(header["read_dir"].tolist()),
        phase_dir=tuple(header["phase_dir"].tolist()),
        slice_dir=tuple(header["slice_dir"].tolist()),
    )
