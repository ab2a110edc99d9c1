"""The MRD v1 bytes: sizes and offsets of the standard, limits, and what the ismrmrd package makes of ours."""

from __future__ import annotations

import io
import struct
import tracemalloc

import ismrmrd
import numpy as np
import pytest
from ismrmrd.acquisition import AcquisitionHeader
from ismrmrd.image import ImageHeader
from ismrmrd.waveform import WaveformHeader

from edge import mrd, mrd_write
from edge.mrd import MessageId
from recon.errors import ShapeError, StreamError

RNG = np.random.default_rng(7)


def complex_samples(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) + 1j * RNG.standard_normal(shape)).astype(np.complex64)


def acquisition_header(**values: object) -> np.ndarray:
    head = np.zeros((), mrd.ACQUISITION_HEADER)
    for name, value in values.items():
        head[name] = value
    return head


def image_info(**values: object) -> mrd_write.ImageInfo:
    default: dict[str, object] = {
        "position_mm": (1.0, 2.0, 3.0), "row_dir": (0.0, 1.0, 0.0), "col_dir": (0.0, 0.0, -1.0),
        "slice_dir": (-1.0, 0.0, 0.0), "fov_mm": (240.0, 220.0, 5.0), "series": 3, "index": 4,
        "series_description": "T2 <network> & more",
    }  # fmt: skip
    return mrd_write.ImageInfo(**{**default, **values})


@pytest.mark.parametrize(
    ("dtype", "structure"),
    [
        (mrd.ACQUISITION_HEADER, AcquisitionHeader),
        (mrd.IMAGE_HEADER, ImageHeader),
        (mrd.WAVEFORM_HEADER, WaveformHeader),
    ],
)
def test_every_field_lies_where_the_ismrmrd_package_has_it(dtype, structure):
    import ctypes

    assert dtype.itemsize == ctypes.sizeof(structure)
    for name in dtype.names:
        assert dtype.fields[name][1] == getattr(structure, name).offset, name
        assert dtype.fields[name][0].itemsize == getattr(structure, name).size, name


def test_sizes_and_offsets_of_the_standard():
    assert (mrd.ACQUISITION_HEADER.itemsize, mrd.IMAGE_HEADER.itemsize, mrd.WAVEFORM_HEADER.itemsize) == (340, 198, 40)
    offsets = {name: mrd.ACQUISITION_HEADER.fields[name][1] for name in ("flags", "number_of_samples", "idx")}
    assert offsets == {"flags": 2, "number_of_samples": 34, "idx": 242}
    assert mrd.IMAGE_HEADER.fields["image_series_index"][1] == 128
    assert mrd.flag(1) == 1
    assert mrd.LAST_IN_SLICE == 1 << 7


def test_our_acquisition_is_read_by_the_ismrmrd_package():
    samples, path = complex_samples(3, 17), RNG.standard_normal((17, 2)).astype(np.float32)
    head = acquisition_header(flags=mrd.LAST_IN_SLICE, scan_counter=9, center_sample=8, position=(1, 2, 3))
    head["idx"]["kspace_encode_step_1"] = 5
    data = mrd_write.encode_acquisition(head, samples, path)
    assert struct.unpack_from("<H", data)[0] == 1008
    found = ismrmrd.Acquisition.deserialize_from(io.BytesIO(data[2:]).read)
    np.testing.assert_array_equal(found.data, samples)
    np.testing.assert_array_equal(found.traj, path)
    assert (found.idx.kspace_encode_step_1, found.scan_counter, found.center_sample) == (5, 9, 8)
    assert found.is_flag_set(ismrmrd.ACQ_LAST_IN_SLICE)


def test_an_acquisition_of_the_ismrmrd_package_is_read_without_a_copy():
    theirs = ismrmrd.Acquisition.from_array(complex_samples(2, 9), RNG.standard_normal((9, 3)).astype(np.float32))
    theirs.set_flag(ismrmrd.ACQ_IS_REVERSE)
    theirs.idx.slice = 6
    stream = io.BytesIO(b"\x04\x00\xf0\x03")
    stream.seek(0, io.SEEK_END)
    theirs.serialize_into(stream.write)
    data = stream.getvalue()
    message = mrd.next_message(data, 2)
    assert message == (MessageId.ACQUISITION, 2, 4, len(data))
    readout = mrd.read_acquisition(data, message)
    np.testing.assert_array_equal(readout.samples, theirs.data)
    np.testing.assert_array_equal(readout.trajectory, theirs.traj)
    assert int(readout.header["flags"]) == mrd.REVERSED
    assert int(readout.header["idx"]["slice"]) == 6
    assert not readout.samples.flags.owndata


def test_our_image_is_read_by_the_ismrmrd_package_as_float32_with_its_attributes():
    pixels = (RNG.random((5, 7)) * 3e4).astype(np.float32)
    data = mrd_write.encode_image(pixels, image_info(slice=2, window=(100.0, 250.5), more={"EchoTime": 0.1}))
    image = ismrmrd.Image.deserialize_from(io.BytesIO(data[2:]).read)
    assert image.data.dtype == np.float32
    np.testing.assert_array_equal(image.data[0, 0], pixels)  # nothing is scaled
    assert (image.data_type, image.image_type, image.image_series_index, image.image_index) == (5, 1, 3, 4)
    assert tuple(image.matrix_size) == (7, 5, 1)
    assert tuple(image.field_of_view) == (240, 220, 5)
    assert tuple(image.position) == (1, 2, 3)
    assert tuple(image.slice_dir) == (-1, 0, 0)
    assert image.slice == 2
    meta = ismrmrd.Meta.deserialize(image.attribute_string)
    assert meta["DataRole"] == "Image"
    assert meta["SeriesDescription"] == "T2 <network> & more"
    assert meta["ImageRowDir"] == ["0.000000000000000000", "1.000000000000000000", "0.000000000000000000"]
    assert [float(v) for v in meta["ImageColumnDir"] + meta["ImageSliceDir"]] == [0, 0, -1, -1, 0, 0]
    assert (meta["Keep_image_geometry"], meta["WindowCenter"], meta["WindowWidth"]) == ("1", "100", "250.5")
    assert meta["EchoTime"] == "0.100000000000000006"
    assert image.getHead().attribute_string_len == struct.unpack_from("<Q", data, 200)[0]


def test_int32_is_never_sent_whatever_the_pixels_are():
    for dtype in (np.int32, np.int64, np.float64, np.uint16):
        data = mrd_write.encode_image(np.arange(6, dtype=dtype).reshape(2, 3), image_info())
        message = mrd.next_message(data)
        image = mrd.read_image(data, message)
        assert int(image.header["data_type"]) == 5
        np.testing.assert_array_equal(image.pixels, np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3))
    with pytest.raises(ShapeError):
        mrd_write.encode_image(np.ones((2, 3), np.complex64), image_info())
    with pytest.raises(ShapeError):
        mrd_write.encode_image(np.ones(3), image_info())


def test_acquisition_directions_stay_in_the_header_where_pixels_were_turned():
    turned = image_info(acquisition_dirs=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    data = mrd_write.encode_image(np.ones((2, 2)), turned)
    image = mrd.read_image(data, mrd.next_message(data))
    assert image.header["read_dir"].tolist() == [1, 0, 0]
    assert [float(v) for v in ismrmrd.Meta.deserialize(image.attributes)["ImageRowDir"]] == [0, 1, 0]


def test_waveforms_both_ways():
    theirs = ismrmrd.Waveform.from_array(np.arange(10, dtype=np.uint32).reshape(2, 5))
    stream = io.BytesIO()
    theirs.serialize_into(stream.write)
    data = struct.pack("<H", 1026) + stream.getvalue()
    waveform = mrd.read_waveform(data, mrd.next_message(data))
    np.testing.assert_array_equal(waveform.samples, theirs.data)
    ours = mrd_write.encode_waveform(np.zeros((), mrd.WAVEFORM_HEADER), theirs.data)
    np.testing.assert_array_equal(ismrmrd.Waveform.deserialize_from(io.BytesIO(ours[2:]).read).data, theirs.data)


@pytest.mark.parametrize("ending", [b"", b"\0", b"\0\0\0"])
@pytest.mark.parametrize("kind", [2, 3, 5])
def test_texts_with_and_without_nuls_are_the_same(kind, ending):
    body = "Grüße".encode() + ending
    data = struct.pack("<HI", kind, len(body)) + body
    message = mrd.next_message(data)
    assert message.end == len(data)
    assert mrd.read_text(data, message) == "Grüße"
    assert mrd.read_bytes(data, message) == "Grüße".encode()


def test_config_file_is_1024_bytes_and_our_senders_end_texts_with_a_nul():
    data = mrd_write.encode_config_file("simplefft")
    assert len(data) == 2 + 1024
    assert mrd.read_text(data, mrd.next_message(data)) == "simplefft"
    assert mrd_write.encode_text("hello", "INFO") == b"\x05\0" + struct.pack("<I", 14) + b"INFO    hello\0"
    assert mrd_write.encode_header(b"<a/>") == b"\x03\0" + struct.pack("<I", 5) + b"<a/>\0"
    with pytest.raises(StreamError):
        mrd_write.encode_config_file("x" * 1024)


def test_query_and_response():
    data = mrd_write.encode_query(2**63, "status")
    assert mrd.read_query(data, mrd.next_message(data)) == (2**63, "status")
    assert mrd_write.encode_response(5, "{}") == struct.pack("<HQQ", 7, 5, 2) + b"{}"


@pytest.mark.parametrize("bit", [53, 54, 55, 56])
def test_compressed_samples_are_stepped_over(bit):
    head = acquisition_header(
        flags=mrd.flag(bit), number_of_samples=100, active_channels=4, trajectory_dimensions=2, version=1
    )
    data = b"\xf0\x03" + head.tobytes() + bytes(800) + struct.pack("<I", 33) + bytes(33) + mrd_write.encode_close()
    first, second = mrd.messages(data)
    assert first.end == 2 + 340 + 800 + 4 + 33
    assert second.id is MessageId.CLOSE
    readout = mrd.read_acquisition(data, first)
    assert readout.samples is None
    assert readout.trajectory.shape == (100, 2)


def test_a_message_is_none_until_its_last_byte():
    pieces = [
        mrd_write.encode_config_file("a"), mrd_write.encode_header(b"<a/>"), mrd_write.encode_query(1, "x"),
        mrd_write.encode_acquisition(acquisition_header(), complex_samples(2, 3), np.ones((3, 2))),
        mrd_write.encode_image(np.ones((2, 2)), image_info()),
        mrd_write.encode_waveform(np.zeros((), mrd.WAVEFORM_HEADER), np.ones((1, 4))), mrd_write.encode_close(),
    ]  # fmt: skip
    for piece in pieces:
        assert all(mrd.next_message(piece[:n]) is None for n in range(len(piece)))
        assert mrd.next_message(piece).end == len(piece)
    stream = b"".join(pieces)
    assert [stream[m.start : m.end] for m in mrd.messages(stream)] == pieces


@pytest.mark.parametrize(
    ("number", "name"), [(0, "0"), (8, "error"), (1001, "retired"), (1023, "reconstruction"), (1030, "n-d array")]
)
def test_an_id_of_unknown_length_ends_the_stream_with_a_reason(number, name):
    with pytest.raises(StreamError, match=rf"id {number}.*{name}|id {number} .*ids understood"):
        mrd.next_message(struct.pack("<H", number) + bytes(2000))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (struct.pack("<HI", 3, 2**32 - 1), "HEADER claims 4294967295 bytes"),
        (struct.pack("<HI", 5, 2**32 - 1), "TEXT claims"),
        (struct.pack("<HQQQ", 6, 0, 1, 2**64 - 1), "QUERY claims"),
        (
            b"\xf0\x03" + acquisition_header(number_of_samples=65535, active_channels=1024).tobytes(),
            "ACQUISITION claims 536862720 bytes",
        ),
        (b"\xf0\x03" + acquisition_header(number_of_samples=1, active_channels=1025).tobytes(), "1025 channels"),
        (
            b"\xf0\x03" + acquisition_header(number_of_samples=65535, trajectory_dimensions=65535).tobytes(),
            "ACQUISITION claims",
        ),
        (
            b"\xf0\x03"
            + acquisition_header(number_of_samples=1, active_channels=1, flags=mrd.flag(53)).tobytes()
            + b"\xff\xff\xff\xff",
            "compressed",
        ),
    ],
)
def test_a_size_that_is_only_claimed_is_refused_before_anything_is_allocated(head, reason):
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match=reason):
            mrd.next_message(head)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("values", "n_attributes", "reason"),
    [
        ({"data_type": 5, "matrix_size": (65535, 65535, 65535), "channels": 65535}, 0, "IMAGE claims"),
        ({"data_type": 9, "matrix_size": (1, 1, 1), "channels": 1}, 0, "data type 9"),
        ({"data_type": 5, "matrix_size": (1, 1, 1), "channels": 1}, 2**64 - 1, "attributes"),
    ],
)
def test_impossible_images_are_refused(values, n_attributes, reason):
    head = np.zeros((), mrd.IMAGE_HEADER)
    for name, value in values.items():
        head[name] = value
    with pytest.raises(StreamError, match=reason):
        mrd.next_message(struct.pack("<H", 1022) + head.tobytes() + struct.pack("<Q", n_attributes))


def test_counts_that_do_not_fit_are_not_encoded():
    with pytest.raises(StreamError, match="do not make an ACQUISITION"):
        mrd_write.encode_acquisition(acquisition_header(), complex_samples(2, 3), np.ones((4, 2)))
