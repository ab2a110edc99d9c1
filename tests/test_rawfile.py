"""Raw files as messages, and the lines that an accelerated scan would not have measured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from shutil import which

import h5py
import ismrmrd
import numpy as np
import pytest

from edge import mrd, mrd_write
from edge.header import read_header
from edge.mrd import MessageId
from edge.rawfile import open_raw
from edge.undersample import undersample
from recon.errors import AcquisitionError, ScanError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "kspace"

XML = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <experimentalConditions><H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding>
  <encodedSpace><matrixSize><x>16</x><y>{n}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>32</x><y>20</y><z>5</z></fieldOfView_mm></encodedSpace>
  <reconSpace><matrixSize><x>8</x><y>{n}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>16</x><y>20</y><z>5</z></fieldOfView_mm></reconSpace>
  <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{center}</center>
   </kspace_encoding_step_1></encodingLimits>
  <trajectory>cartesian</trajectory>{parallel}<echoTrainLength>1</echoTrainLength>
 </encoding>
 <sequenceParameters><TR>20</TR></sequenceParameters>
</ismrmrdHeader>"""


def xml(n=20, last=19, center=10, parallel=""):
    return XML.format(n=n, last=last, center=center, parallel=parallel).encode()


def write_file(path, n_lines=20, n_slices=2, header=None, dataset="dataset", noise=True, stamp=1):
    """A file as the ismrmrd package writes it: noise, then slices interleaved line by line; returns the readouts."""
    rng = np.random.default_rng(3)
    made = []

    def readout(flags, line, at):
        samples = (rng.standard_normal((3, 16)) + 1j * rng.standard_normal((3, 16))).astype(np.complex64)
        acquisition = ismrmrd.Acquisition.from_array(samples, rng.standard_normal((16, 2)).astype(np.float32))
        for flag in flags:
            acquisition.set_flag(flag)
        acquisition.idx.kspace_encode_step_1, acquisition.idx.slice = line, at
        acquisition.scan_counter = len(made)
        acquisition.acquisition_time_stamp = len(made) * stamp
        made.append(acquisition)

    if noise:
        readout([ismrmrd.ACQ_IS_NOISE_MEASUREMENT], 0, 0)
    for line in range(n_lines):
        for at in range(n_slices):
            flags = [ismrmrd.ACQ_FIRST_IN_SLICE] * (line == 0) + [ismrmrd.ACQ_LAST_IN_SLICE] * (line == n_lines - 1)
            flags += [ismrmrd.ACQ_LAST_IN_MEASUREMENT] * (line == n_lines - 1 and at == n_slices - 1)
            readout(flags, line, at)
    with ismrmrd.Dataset(str(path), dataset, mode="w") as file:
        file.write_xml_header(xml() if header is None else header)
        for acquisition in made:
            file.append_acquisition(acquisition)
        file.append_waveform(ismrmrd.Waveform.from_array(np.arange(12, dtype=np.uint32).reshape(2, 6)))
        file.append_array("phantom", np.ones((4, 4), np.float32))
    return made


def readouts(raw):
    return [mrd.read_acquisition(data, mrd.next_message(data)) for data in raw.acquisitions()]


@pytest.mark.parametrize("dataset", ["dataset", "scan_17"])
def test_a_file_of_the_ismrmrd_package_becomes_the_same_readouts(tmp_path, dataset):
    made = write_file(tmp_path / "a.h5", dataset=dataset)
    raw = open_raw(tmp_path / "a.h5")
    assert raw.header == xml()
    found = readouts(raw)
    assert len(found) == len(made)
    for ours, theirs in zip(found, made, strict=True):
        np.testing.assert_array_equal(ours.samples, theirs.data)
        np.testing.assert_array_equal(ours.trajectory, theirs.traj)
        assert ours.header.tobytes() == bytes(theirs.getHead())
    (wave,) = raw.waveforms()
    np.testing.assert_array_equal(mrd.read_waveform(wave, mrd.next_message(wave)).samples, np.arange(12).reshape(2, 6))


def test_readouts_come_in_small_blocks_alike(tmp_path, monkeypatch):
    write_file(tmp_path / "a.h5")
    whole = list(open_raw(tmp_path / "a.h5").acquisitions())
    monkeypatch.setattr("edge.rawfile._BLOCK_BYTES", 1000)
    assert list(open_raw(tmp_path / "a.h5").acquisitions()) == whole
    assert len(list(undersample(open_raw(tmp_path / "a.h5"), 3, 4).acquisitions())) > 10


def test_a_recorded_stream_is_read_as_far_as_it_is_whole(tmp_path):
    write_file(tmp_path / "a.h5")
    raw = open_raw(tmp_path / "a.h5")
    sent = list(raw.acquisitions())
    path = tmp_path / "raw.mrd"
    path.write_bytes(
        mrd_write.encode_config_file("x") + mrd_write.encode_header(raw.header) + b"".join(raw.waveforms())
        + b"".join(sent)[:-5]
    )  # fmt: skip
    again = open_raw(path)
    assert again.header == raw.header
    assert list(again.acquisitions()) == sent[:-1]
    assert list(again.waveforms()) == list(raw.waveforms())
    assert undersample(again, 1, 0) is again


@pytest.mark.parametrize("content", [b"", b"hello there", mrd_write.encode_header(xml()), b"\x89HDF\r\n\x1a\nxxxx"])
def test_what_is_no_raw_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ScanError):
        open_raw(tmp_path / "x")
    with pytest.raises(ScanError, match="No such file"):
        open_raw(tmp_path / "not there")


def test_hdf5_files_without_a_scan_are_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["dataset/images"] = [1, 2]
    with pytest.raises(AcquisitionError, match="0 groups with 'xml' and 'data'"):
        open_raw(tmp_path / "x.h5")
    write_file(tmp_path / "y.h5", n_lines=0, noise=False, header=xml())
    with pytest.raises(AcquisitionError):
        open_raw(tmp_path / "y.h5")
    for name in ("a", "b"):
        with h5py.File(tmp_path / "z.h5", "a") as file:
            file[f"{name}/xml"], file[f"{name}/data"] = [1], [1]
    with pytest.raises(AcquisitionError, match="2 groups"):
        open_raw(tmp_path / "z.h5")


def test_samples_that_do_not_fit_their_header_are_refused(tmp_path):
    write_file(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        row = file["dataset/data"][3]
        row["data"] = row["data"][:-2]
        file["dataset/data"][3] = row
    with pytest.raises(AcquisitionError, match="acquisition 3 of the file has"):
        list(open_raw(tmp_path / "a.h5").acquisitions())


# Undersampling


def lines(found, at):
    return [
        int(r.header["idx"]["kspace_encode_step_1"])
        for r in found
        if r.header["idx"]["slice"] == at and not int(r.header["flags"]) & mrd.NOISE
    ]


@pytest.mark.parametrize(("acceleration", "acs"), [(2, 4), (3, 6), (4, 5), (4, 0), (20, 20), (5, 1)])
def test_every_rth_line_and_the_central_ones_are_kept(tmp_path, acceleration, acs):
    made = write_file(tmp_path / "a.h5")
    raw = undersample(open_raw(tmp_path / "a.h5"), acceleration, acs)
    found = readouts(raw)
    low = 20 // 2 - acs // 2
    expected = [n for n in range(20) if n % acceleration == 0 or low <= n < low + acs]
    assert lines(found, 0) == lines(found, 1) == expected
    assert int(found[0].header["flags"]) == mrd.NOISE
    by_counter = {a.scan_counter: a for a in made}
    for readout in found:
        np.testing.assert_array_equal(readout.samples, by_counter[int(readout.header["scan_counter"])].data)
        line, flags = int(readout.header["idx"]["kspace_encode_step_1"]), int(readout.header["flags"])
        if not flags & mrd.NOISE:
            assert bool(flags & mrd.CALIBRATION_AND_IMAGING) == (low <= line < low + acs)
            assert not flags & mrd.CALIBRATION
            assert bool(flags & mrd.FIRST_IN_SLICE) == (line == expected[0])
            assert bool(flags & mrd.LAST_IN_SLICE) == (line == expected[-1])
            is_last = line == expected[-1] and readout.header["idx"]["slice"] == 1
            assert bool(flags & mrd.LAST_IN_MEASUREMENT) == is_last
    scan, _ = read_header(raw.header, "x")
    assert (scan.encodings[0].acceleration, scan.encodings[0].calibration) == ((acceleration, 1), "embedded")
    parsed = ismrmrd.xsd.CreateFromDocument(raw.header)  # the order of the schema, and its namespace
    assert parsed.encoding[0].parallelImaging.accelerationFactor.kspace_encoding_step_1 == acceleration
    assert parsed.encoding[0].echoTrainLength == 1
    assert raw.header.count(b"ns0") == 0


def test_rows_are_counted_on_the_encoded_matrix(tmp_path):
    """Partial Fourier: 14 steps with their centre at 4 lie on rows 6 to 19 of 20."""
    write_file(tmp_path / "a.h5", n_lines=14, header=xml(last=13, center=4))
    found = readouts(undersample(open_raw(tmp_path / "a.h5"), 4, 4))
    rows = [n + 6 for n in lines(found, 0)]
    assert rows == [8, 9, 10, 11, 12, 16]


@pytest.mark.parametrize(("acceleration", "acs"), [(21, 4), (2, 21), (0, 4), (2, -1)])
def test_impossible_accelerations_are_refused(tmp_path, acceleration, acs):
    write_file(tmp_path / "a.h5")
    with pytest.raises(AcquisitionError, match="must lie in the matrix of 20 lines"):
        undersample(open_raw(tmp_path / "a.h5"), acceleration, acs)


def test_what_is_undersampled_already_is_refused_unless_nothing_is_dropped(tmp_path):
    parallel = (
        "<parallelImaging><accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1>"
        "<kspace_encoding_step_2>1</kspace_encoding_step_2></accelerationFactor></parallelImaging>"
    )
    write_file(tmp_path / "a.h5", header=xml(parallel=parallel))
    with pytest.raises(AcquisitionError, match="undersampled already"):
        undersample(open_raw(tmp_path / "a.h5"), 2, 4)
    write_file(tmp_path / "b.h5")
    once = undersample(open_raw(tmp_path / "b.h5"), 2, 4)
    with pytest.raises(AcquisitionError, match="undersampled already"):
        undersample(once, 2, 4)
    assert undersample(once, 1, 99) is once
    write_file(tmp_path / "c.h5")
    raw = open_raw(tmp_path / "c.h5")
    raw.heads["idx"]["kspace_encode_step_1"][5:7] = 0  # line 2 of both slices
    with pytest.raises(AcquisitionError, match="1 of the file's lines are missing"):
        undersample(raw, 2, 4)


@pytest.mark.peer
@pytest.mark.skipif(not which("ismrmrd_generate_cartesian_shepp_logan"), reason="ismrmrd-tools is not installed")
def test_the_debian_phantom_is_read_and_its_truth_left_alone(tmp_path):
    path = tmp_path / "phantom.h5"
    command = ["ismrmrd_generate_cartesian_shepp_logan", "-o", str(path), "-m", "32", "-c", "3", "-C", "-k"]
    subprocess.run(command, check=True, capture_output=True)
    raw = open_raw(path)
    found = readouts(undersample(raw, 2, 8))
    assert len(raw.heads) == 33
    assert int(found[0].header["flags"]) & mrd.NOISE
    assert len(found) == 1 + 16 + 4
    with h5py.File(path, "r", locking=False) as file:
        np.testing.assert_array_equal(found[1].samples.reshape(-1).view(np.float32), file["dataset/data"][1]["data"])


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real scans are not here")
def test_real_scans_are_read_and_undersampled():
    for path in sorted(DATA.glob("*.h5")):
        raw = open_raw(path)
        data = next(raw.acquisitions())
        message = mrd.next_message(data)
        assert message.id is MessageId.ACQUISITION
        scan, _ = read_header(raw.header, "x")
        n = scan.encodings[0].encoded_matrix.y
        kept = undersample(raw, 4, 24)
        n_slices = len(np.unique(raw.heads["idx"]["slice"]))
        mask = np.zeros(n, bool)
        mask[::4] = True
        mask[n // 2 - 12 : n // 2 + 12] = True
        assert len(kept.heads) == n_slices * mask.sum()
        assert (kept.heads["flags"] & mrd.LAST_IN_SLICE > 0).sum() == n_slices
