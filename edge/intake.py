"""MRD readout headers to `Acquisition`: which flag means what."""

from __future__ import annotations

import numpy as np

from edge.mrd import (
    CALIBRATION,
    CALIBRATION_AND_IMAGING,
    LAST_IN_MEASUREMENT,
    LAST_IN_REPETITION,
    LAST_IN_SLICE,
    NOISE,
    REVERSED,
    flag,
)
from recon.arrays import Array
from recon.scan import Acquisition, ImageKey, Role

# Navigation, phase correction, feedback (two kinds), dummy, surface-coil correction, phase stabilisation (two kinds).
_NEVER_IMAGING = sum(flag(number) for number in (23, 24, 26, 27, 28, 29, 30, 31))


def role_of(flags: int) -> Role:
    """Return what a readout with these ISMRMRD flags is for."""
    if flags & NOISE:
        return Role.NOISE
    if flags & _NEVER_IMAGING:
        return Role.OTHER
    if flags & CALIBRATION_AND_IMAGING:
        return Role.CALIBRATION_AND_IMAGING
    return Role.CALIBRATION if flags & CALIBRATION else Role.IMAGING


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
        is_reversed=bool(flags & REVERSED),
        last_in_slice=bool(flags & LAST_IN_SLICE),
        last_in_repetition=bool(flags & LAST_IN_REPETITION),
        last_in_measurement=bool(flags & LAST_IN_MEASUREMENT),
        sample_time_us=float(header["sample_time_us"]),
        time_stamp=int(header["acquisition_time_stamp"]),
        position_mm=tuple(header["position"].tolist()),
        read_dir=tuple(header["read_dir"].tolist()),
        phase_dir=tuple(header["phase_dir"].tolist()),
        slice_dir=tuple(header["slice_dir"].tolist()),
    )
