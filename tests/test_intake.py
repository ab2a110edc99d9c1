"""MRD readout headers to readouts: which flag means what, and every field in its place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import ismrmrd
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.intake import role_of, to_acquisition
from edge.mrd import ACQUISITION_HEADER, Readout, flag, next_message, read_acquisition
from edge.mrd_write import encode_acquisition
from recon.errors import ShapeError
from recon.scan import Acquisition, ImageKey, Role
from tests.reference import on_the_wire

SAMPLES = np.arange(24, dtype=np.float32).reshape(2, 12) * (1 + 2j)

# By the numbers of mrd-stream.md §3, which are those of ismrmrd.h
NEVER_IMAGING = {
    "navigation": 23,
    "phase correction": 24,
    "HP feedback": 26,
    "dummy": 27,
    "RT feedback": 28,
    "surface-coil correction": 29,
    "phase stabilisation reference": 30,
    "phase stabilisation": 31,
}


def readout(**changes: Any) -> Readout:
    """Return a readout as read from bytes, with these header fields; idx fields by their own names."""
    head = np.zeros((), ACQUISITION_HEADER)
    for name, value in changes.items():
        (head if name in head.dtype.names else head["idx"])[name] = value  # type: ignore[operator]
    content = encode_acquisition(head, SAMPLES)
    message = next_message(content)
    assert message is not None
    return read_acquisition(content, message)


def taken(**changes: Any) -> Acquisition:
    one = readout(**changes)
    return to_acquisition(one.header, one.samples)


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "role"),
    [
        ((), Role.IMAGING),
        ((19,), Role.NOISE),
        ((20,), Role.CALIBRATION),
        ((21,), Role.CALIBRATION_AND_IMAGING),
        ((20, 21), Role.CALIBRATION_AND_IMAGING),
        ((22,), Role.IMAGING),
        ((19, 20), Role.NOISE),
        ((1, 2, 3, 7, 8, 13, 14, 25), Role.IMAGING),
        (tuple(range(57, 65)), Role.IMAGING),
        *(((number,), Role.OTHER) for number in NEVER_IMAGING.values()),
        *(((number, 21), Role.OTHER) for number in NEVER_IMAGING.values()),
    ],
)
def test_flags_give_the_role(numbers: tuple[int, ...], role: Role) -> None:
    assert role_of(sum(flag(number) for number in numbers)) is role


@given(st.sets(st.integers(1, 64)))
def test_no_navigator_and_no_noise_is_ever_image_data(numbers: set[int]) -> None:
    role = role_of(sum(flag(number) for number in numbers))
    assert isinstance(role, Role)
    if numbers & {19, *NEVER_IMAGING.values()}:
        assert role in (Role.NOISE, Role.OTHER)
    if numbers & {20} and not numbers & {21}:
        assert role is not Role.IMAGING


def test_flags_are_those_of_the_ismrmrd_library() -> None:
    names = {
        "ACQ_IS_NOISE_MEASUREMENT": Role.NOISE,
        "ACQ_IS_PARALLEL_CALIBRATION": Role.CALIBRATION,
        "ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING": Role.CALIBRATION_AND_IMAGING,
        "ACQ_IS_NAVIGATION_DATA": Role.OTHER,
        "ACQ_IS_PHASECORR_DATA": Role.OTHER,
        "ACQ_IS_HPFEEDBACK_DATA": Role.OTHER,
        "ACQ_IS_DUMMYSCAN_DATA": Role.OTHER,
        "ACQ_IS_RTFEEDBACK_DATA": Role.OTHER,
        "ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA": Role.OTHER,
    }
    for name, role in names.items():
        assert role_of(flag(getattr(ismrmrd, name))) is role, name
    for name, field in {
        "ACQ_IS_REVERSE": "is_reversed",
        "ACQ_LAST_IN_SLICE": "last_in_slice",
        "ACQ_LAST_IN_REPETITION": "last_in_repetition",
        "ACQ_LAST_IN_MEASUREMENT": "last_in_measurement",
    }.items():
        one = taken(flags=flag(getattr(ismrmrd, name)))
        assert getattr(one, field) is True
        assert one.role is Role.IMAGING
        others = ["is_reversed", "last_in_slice", "last_in_repetition", "last_in_measurement"]
        assert sum(getattr(one, other) for other in others) == 1


# --- fields -----------------------------------------------------------------------------------------------------------


def test_every_field_is_in_its_place() -> None:
    one = taken(
        encoding_space_ref=1,
        kspace_encode_step_1=2,
        kspace_encode_step_2=3,
        average=4,
        slice=5,
        contrast=6,
        phase=7,
        repetition=8,
        set=9,
        segment=10,
        center_sample=11,
        discard_pre=12,
        discard_post=13,
        acquisition_time_stamp=2**32 - 1,
        sample_time_us=2.5,
        position=(14, 15.5, -16),
        read_dir=(0, 1, 0),
        phase_dir=(0, 0, 1),
        slice_dir=(1, 0, 0),
    )
    assert one.key == ImageKey(1, 5, 6, 7, 8, 9)
    assert (one.step_1, one.step_2, one.average, one.segment) == (2, 3, 4, 10)
    assert (one.center_sample, one.discard_pre, one.discard_post) == (11, 12, 13)
    assert (one.time_stamp, one.sample_time_us) == (2**32 - 1, 2.5)
    assert one.position_mm == (14, 15.5, -16)
    assert (one.read_dir, one.phase_dir, one.slice_dir) == ((0, 1, 0), (0, 0, 1), (1, 0, 0))
    np.testing.assert_array_equal(one.samples, SAMPLES)
    assert one.samples.dtype == np.complex64


def test_values_are_plain_python() -> None:
    """They go into dictionary keys, JSON and arithmetic that must not wrap round at 65535."""
    one = taken(kspace_encode_step_1=65535, slice=65535, center_sample=65535)
    assert one.step_1 - 65536 == -1
    for value in (*one.key, one.step_1, one.step_2, one.average, one.center_sample, one.discard_pre, one.time_stamp):
        assert type(value) is int
    for vector in (one.position_mm, one.read_dir, one.phase_dir, one.slice_dir, (one.sample_time_us,)):
        assert all(type(value) is float for value in vector)


def test_a_readout_of_the_ismrmrd_library_is_understood() -> None:
    theirs = ismrmrd.Acquisition.from_array(SAMPLES.astype(np.complex64))
    theirs.set_flag(ismrmrd.ACQ_IS_REVERSE)
    theirs.set_flag(ismrmrd.ACQ_LAST_IN_SLICE)
    theirs.idx.kspace_encode_step_1, theirs.idx.slice, theirs.idx.set = 17, 3, 2
    theirs.center_sample, theirs.sample_time_us = 6, 5.0
    theirs.position[:] = (1.0, -2.0, 3.0)
    theirs.read_dir[:] = (0.0, 1.0, 0.0)
    content = b"\xf0\x03" + bytes(theirs.getHead()) + theirs.data.tobytes()  # 1008, an ACQUISITION
    message = next_message(content)
    assert message is not None
    ours = read_acquisition(content, message)
    one = to_acquisition(ours.header, ours.samples)
    assert (one.step_1, one.key.slice, one.key.set, one.center_sample) == (17, 3, 2, 6)
    assert (one.is_reversed, one.last_in_slice, one.last_in_repetition) == (True, True, False)
    assert (one.position_mm, one.read_dir) == ((1.0, -2.0, 3.0), (0.0, 1.0, 0.0))
    np.testing.assert_array_equal(one.samples, SAMPLES)


@given(st.data())
def test_there_and_back(data: st.DataObject) -> None:
    drawn = {
        "int": st.integers(0, 65535),
        "bool": st.booleans(),
        "float": st.floats(0, 100, width=32),
        "tuple[float, float, float]": st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 3),
        "Role": st.sampled_from(Role),
        "ImageKey": st.builds(ImageKey, *[st.integers(0, 65535)] * 6),
    }
    values: dict[str, Any] = {
        each.name: data.draw(drawn[str(each.type)]) for each in fields(Acquisition) if each.name != "samples"
    }
    made = Acquisition(SAMPLES, **values)
    sent = on_the_wire(made)
    found = to_acquisition(sent.header, sent.samples)
    for each in fields(Acquisition):
        if each.name != "samples":
            assert getattr(found, each.name) == getattr(made, each.name), each.name
    np.testing.assert_array_equal(found.samples, made.samples)


def test_a_readout_without_samples_is_refused() -> None:
    head = np.zeros((), ACQUISITION_HEADER)
    for shape in ((0, 4), (2, 0)):
        with pytest.raises(ShapeError, match="samples of a readout"):
            to_acquisition(np.atleast_1d(head)[0], np.zeros(shape, np.complex64))


def test_samples_are_not_copied() -> None:
    """A scan's spool is read through a memory map; a copy of each line here would double the work."""
    one = readout()
    assert np.shares_memory(to_acquisition(one.header, one.samples).samples, one.samples)
