"""`scanside simulate`: files that others can read, truth beside them, and refusals in one line."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest

from edge.simulate import configure, run, simulate_file
from recon.contrast import CONTRASTS
from recon.protocol import Protocol, lines

SCHEMA = Path("/usr/share/ismrmrd/schema/ismrmrd.xsd")
SMALL = Protocol(matrix=(64, 64), n_slices=5, n_coils=4, acceleration=2, n_calibration=12, contrast=CONTRASTS["dwi"])


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    configure(parser)
    return run(parser.parse_args(words))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "head.h5"
    simulate_file(path, SMALL, "infarct", 1, with_maps=True)
    return path


def test_ismrmrd_reads_the_readouts_back(scan: Path) -> None:
    data = ismrmrd.Dataset(str(scan), create_if_needed=False)
    n_lines = len(lines(SMALL))
    assert data.number_of_acquisitions() == 4 + 5 * n_lines
    noise, first, last = (data.read_acquisition(n) for n in (0, 4, 3 + 5 * n_lines))
    assert noise.isFlagSet(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    assert first.data.shape == (4, 128)
    assert first.center_sample == 64
    assert first.active_channels == 4
    assert first.channel_mask[0] == 0b1111
    assert last.isFlagSet(ismrmrd.ACQ_LAST_IN_SLICE)
    assert last.isFlagSet(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
    assert [data.read_acquisition(n).scan_counter for n in (0, 7)] == [0, 7]
    roles = [data.read_acquisition(n) for n in range(4, 4 + n_lines)]
    only = [a.idx.kspace_encode_step_1 for a in roles if a.isFlagSet(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)]
    both = [a.idx.kspace_encode_step_1 for a in roles if a.isFlagSet(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)]
    assert sorted(only + both) == list(range(26, 38))
    assert all(step % 2 for step in only)
    assert not any(step % 2 for step in both)
    assert tuple(first.read_dir) == (1, 0, 0)
    assert tuple(first.phase_dir) == (0, 1, 0)


def test_the_header_says_how_it_was_scanned(scan: Path) -> None:
    data = ismrmrd.Dataset(str(scan), create_if_needed=False)
    header = ismrmrd.xsd.CreateFromDocument(data.read_xml_header())
    encoding = header.encoding[0]
    assert (encoding.encodedSpace.matrixSize.x, encoding.encodedSpace.matrixSize.y) == (128, 64)
    assert encoding.encodedSpace.fieldOfView_mm.x == 2 * encoding.reconSpace.fieldOfView_mm.x
    assert encoding.encodingLimits.kspace_encoding_step_1.center == 32
    assert encoding.encodingLimits.slice.maximum == 4
    assert encoding.parallelImaging.accelerationFactor.kspace_encoding_step_1 == 2
    assert header.subjectInformation.patientName == "Simulated^Head"
    assert header.acquisitionSystemInformation.relativeReceiverNoiseBandwidth is None
    assert header.sequenceParameters.TE == [80]


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("xmllint") is None or not SCHEMA.exists(), reason="needs xmllint and ismrmrd-schema")
def test_the_header_is_valid(scan: Path, tmp_path: Path) -> None:
    with h5py.File(scan) as file:
        (tmp_path / "header.xml").write_bytes(file["dataset/xml"][0])
    subprocess.run(["xmllint", "--noout", "--schema", SCHEMA, tmp_path / "header.xml"], check=True, capture_output=True)


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("ismrmrd_recon_cartesian_2d") is None, reason="needs ismrmrd-tools")
def test_another_reconstruction_gives_the_head(tmp_path: Path) -> None:
    path = tmp_path / "full.h5"
    protocol = Protocol(matrix=(96, 96), n_slices=1, n_coils=4, acceleration=1, snr=100)
    simulate_file(path, protocol)
    subprocess.run(["ismrmrd_recon_cartesian_2d", path], check=True, capture_output=True)
    with h5py.File(path) as file:
        image = np.squeeze(file["dataset/cpp/data"][...])
    truth = np.load(tmp_path / "full.truth.npz")["image"][0]
    assert np.corrcoef(image.ravel(), truth.ravel())[0, 1] > 0.99


def test_the_truth_lies_beside_it(scan: Path) -> None:
    truth = json.loads(scan.with_name("head.truth.json").read_text(encoding="utf-8"))
    arrays = np.load(scan.with_name("head.truth.npz"))
    assert arrays["image"].shape == arrays["lesion"].shape == (5, 64, 64)
    assert arrays["image"].dtype == np.float32
    assert arrays["lesion"].dtype == np.bool_
    assert arrays["coil_maps"].shape == (5, 4, 64, 64)
    assert truth["finding"] == "infarct"
    assert truth["lesion"]["volume_ml"] > 0
    assert truth["lesion"]["voxels_in_slice"] == arrays["lesion"].sum(axis=(1, 2)).tolist()
    assert arrays["lesion"].any()
    assert (truth["lesion"]["side"] == "left") == (truth["lesion"]["centre_mm"][0] > 0)
    assert "simulated" in truth["notice"]
    inside = arrays["image"][arrays["lesion"]]
    assert inside.mean() > 1.5 * np.median(arrays["image"][arrays["image"] > 0.1 * arrays["image"].max()])


def test_the_lesion_in_the_truth_has_the_volume_it_says(tmp_path: Path) -> None:
    protocol = Protocol(matrix=(96, 96), n_slices=24, thickness_mm=3, gap_mm=0, n_coils=1, acceleration=8)
    truth = simulate_file(tmp_path / "mass.h5", protocol, "mass", 2)
    arrays = np.load(tmp_path / "mass.truth.npz")
    voxel_ml = np.prod(arrays["spacing_mm"]) / 1000
    assert arrays["lesion"].sum() * voxel_ml == pytest.approx(truth["lesion"]["volume_ml"], rel=0.06)


def test_the_same_arguments_give_the_same_scan(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        simulate_file(tmp_path / f"{name}.h5", SMALL, "bleed", 3)
        with h5py.File(tmp_path / f"{name}.h5") as file:
            found.append((file["dataset/xml"][0], [row.tobytes() for row in file["dataset/data"]["data"]]))
    assert found[0] == found[1]


def test_the_command_writes_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.h5"
    code = command("--out", str(path), "--matrix", "48", "--slices", "2", "--coils", "2", "--acs", "8", "--full")
    assert code == 0
    assert "no finding" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.h5", "x.truth.json", "x.truth.npz"]
    with h5py.File(path) as file:
        assert len(file["dataset/data"]) == 4 + 2 * 48


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--coils", "40"], "1 to 32"), (["--snr", "0"], "signal-to-noise"), (["--partial-fourier", "0.2"], "0.6 to 1")],
)
def test_impossible_values_are_refused(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--out", str(tmp_path / "x.h5"), *words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_and_one_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--matrix", "32", "--slices", "1", "--acs", "4")
    assert command("--out", str(tmp_path / "new" / "x.h5"), *small) == 0
    assert (tmp_path / "new" / "x.truth.json").is_file()
    (tmp_path / "file").touch()
    assert command("--out", str(tmp_path / "file" / "x.h5"), *small) == 2
    assert "cannot be written" in capsys.readouterr().err
