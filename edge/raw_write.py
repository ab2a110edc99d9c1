"""A simulated scan as an ISMRMRD HDF5 file: the XML header that describes a protocol, and its readouts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import h5py
import ismrmrd
import numpy as np
from ismrmrd import xsd
from ismrmrd.hdf5 import acquisition_dtype, acquisition_header_dtype

from edge.uids import derive_uid
from recon.contrast import Sequence
from recon.protocol import OVERSAMPLING, Protocol
from recon.scan import Acquisition, Role

FIELD_T = 3.0
LARMOR_HZ = 127_740_000  # of protons at 3 T
DATASET = "dataset"

_ROLE_FLAGS = {
    Role.NOISE: (ismrmrd.ACQ_IS_NOISE_MEASUREMENT,),
    Role.IMAGING: (),
    Role.CALIBRATION: (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION,),
    Role.CALIBRATION_AND_IMAGING: (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING,),
}


def header_xml(protocol: Protocol, protocol_name: str, seed: int) -> bytes:
    """Return the ISMRMRD header of a simulated scan of person `seed`, valid against ismrmrd.xsd.

    The person is called Simulated^Head, has no dates, and keeps one study over all scans of the same seed.
    """
    (ny, nx), (fov_y, fov_x) = protocol.matrix, protocol.fov_mm
    n_steps, center = ny - protocol.first_row, ny // 2 - protocol.first_row
    contrast = protocol.contrast
    limits = {name: xsd.limitType(minimum=0, maximum=0, center=0) for name in _SINGLE}
    limits["kspace_encoding_step_1"] = xsd.limitType(minimum=0, maximum=n_steps - 1, center=center)
    limits["slice"] = xsd.limitType(minimum=0, maximum=protocol.n_slices - 1, center=protocol.n_slices // 2)
    limits["average"] = xsd.limitType(minimum=0, maximum=protocol.n_averages - 1, center=0)
    parallel = xsd.parallelImagingType(
        accelerationFactor=xsd.accelerationFactorType(
            kspace_encoding_step_1=protocol.acceleration, kspace_encoding_step_2=1
        ),
        calibrationMode=xsd.calibrationModeType.EMBEDDED if protocol.acceleration > 1 else None,
    )
    header = xsd.ismrmrdHeader(
        subjectInformation=xsd.subjectInformationType(patientName="Simulated^Head", patientID=f"SIMULATED-{seed}"),
        studyInformation=xsd.studyInformationType(
            studyID="1",
            studyDescription="Simulated scan, nobody's head",
            studyInstanceUID=derive_uid("simulated study", seed),
        ),
        measurementInformation=xsd.measurementInformationType(
            measurementID=f"simulated-{seed}-{contrast.name}",
            patientPosition=xsd.patientPositionType.HFS,
            protocolName=protocol_name,
            frameOfReferenceUID=derive_uid("simulated frame", seed),
        ),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            systemVendor="Scanside",
            systemModel="Simulated scanner",
            systemFieldStrength_T=FIELD_T,
            receiverChannels=protocol.n_coils,
            coilLabel=[xsd.coilLabelType(coilNumber=n, coilName=f"Helmet{n + 1}") for n in range(protocol.n_coils)],
        ),
        experimentalConditions=xsd.experimentalConditionsType(H1resonanceFrequency_Hz=LARMOR_HZ),
        encoding=[
            xsd.encodingType(
                encodedSpace=_space((OVERSAMPLING * nx, ny), (OVERSAMPLING * fov_x, fov_y), protocol.thickness_mm),
                reconSpace=_space((nx, ny), (fov_x, fov_y), protocol.thickness_mm),
                encodingLimits=xsd.encodingLimitsType(**limits),
                trajectory=xsd.trajectoryType.CARTESIAN,
                parallelImaging=parallel,
            )
        ],
        sequenceParameters=xsd.sequenceParametersType(
            TR=[contrast.tr_ms],
            TE=[contrast.te_ms],
            TI=[contrast.ti_ms] if contrast.sequence is Sequence.INVERSION_RECOVERY else [],
            flipAngle_deg=[contrast.flip_deg],
            sequence_type=contrast.sequence.value,
        ),
    )
    text: str = xsd.ToXML(header)
    return text.encode()


_SINGLE = ("kspace_encoding_step_2", "contrast", "phase", "repetition", "set", "segment")


def _space(matrix: tuple[int, int], fov_mm: tuple[float, float], thickness_mm: float) -> xsd.encodingSpaceType:
    return xsd.encodingSpaceType(
        matrixSize=xsd.matrixSizeType(x=matrix[0], y=matrix[1], z=1),
        fieldOfView_mm=xsd.fieldOfViewMm(x=fov_mm[0], y=fov_mm[1], z=thickness_mm),
    )


class RawWriter:
    """An ISMRMRD file being written; use it in a `with` block."""

    def __init__(self, path: Path, header: bytes) -> None:
        """Create `path`, replacing what was there. Raises OSError where that cannot be done."""
        self._file = h5py.File(path, "w")
        group = self._file.create_group(DATASET)
        group.create_dataset("xml", data=[header], dtype=h5py.special_dtype(vlen=bytes))
        self._data = group.create_dataset("data", (0,), maxshape=(None,), dtype=acquisition_dtype, chunks=(64,))
        self._n_written = 0

    def append(self, readouts: Iterable[Acquisition]) -> None:
        """Write readouts after those already there."""
        block = list(readouts)
        rows = np.empty(len(block), acquisition_dtype)
        for row, readout in zip(rows, block, strict=True):
            row["head"] = acquisition_head(readout, self._n_written)
            row["traj"] = np.zeros(0, np.float32)
            row["data"] = np.ascontiguousarray(readout.samples).view(np.float32).ravel()
            self._n_written += 1
        self._data.resize(self._n_written, axis=0)
        self._data[self._n_written - len(block) :] = rows

    def __enter__(self) -> RawWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def acquisition_head(readout: Acquisition, counter: int) -> np.ndarray[tuple[()], np.dtype[np.void]]:
    """Return the ISMRMRD acquisition header of a readout, as one element of h5py's compound type."""
    n_coils, n_samples = readout.samples.shape
    head = ismrmrd.AcquisitionHeader()
    head.version = 1
    for flag in _flags(readout):
        head.setFlag(flag)
    head.scan_counter = counter
    head.acquisition_time_stamp = readout.time_stamp
    head.number_of_samples = n_samples
    head.available_channels = head.active_channels = n_coils
    for coil in range(n_coils):
        head.channel_mask[coil // 64] |= 1 << (coil % 64)
    head.center_sample = readout.center_sample
    head.discard_pre, head.discard_post = readout.discard_pre, readout.discard_post
    head.encoding_space_ref = readout.key.encoding
    head.sample_time_us = readout.sample_time_us
    head.position[:] = readout.position_mm
    head.read_dir[:], head.phase_dir[:] = readout.read_dir, readout.phase_dir
    head.slice_dir[:] = readout.slice_dir
    index = head.idx
    index.kspace_encode_step_1, index.kspace_encode_step_2 = readout.step_1, readout.step_2
    index.average, index.slice, index.segment = readout.average, readout.key.slice, readout.segment
    index.contrast, index.phase = readout.key.contrast, readout.key.phase
    index.repetition, index.set = readout.key.repetition, readout.key.set
    return np.frombuffer(head, acquisition_header_dtype)[0]  # type: ignore[no-any-return]


def _flags(readout: Acquisition) -> list[int]:
    flags = list(_ROLE_FLAGS[readout.role])
    if readout.is_reversed:
        flags.append(ismrmrd.ACQ_IS_REVERSE)
    if readout.last_in_slice:
        flags.append(ismrmrd.ACQ_LAST_IN_SLICE)
    if readout.last_in_repetition:
        flags.append(ismrmrd.ACQ_LAST_IN_REPETITION)
    if readout.last_in_measurement:
        flags.append(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
    return flags
