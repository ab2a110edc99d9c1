"""The chain that worker and `recon` share: what it makes early, late, partly and not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

from edge.chain import Chain, SliceImage
from edge.header import read_header
from edge.mrd import LAST_IN_SLICE, Readout
from edge.rawfile import RawFile, open_raw
from edge.recon_file import readouts
from edge.results import Results
from recon.errors import AcquisitionError, BackendError
from tests.fake_network import RANGE, FakeNetwork


@pytest.fixture
def raw(small_scan: Path) -> RawFile:
    return open_raw(small_scan)


def chain_for(raw: RawFile, folder: Path, **options: object) -> Chain:
    scan, exam = read_header(raw.header, "0" * 26)
    return Chain(Results(folder, scan, exam), **options)


def altered(raw: RawFile, **fields: object) -> Iterator[Readout]:
    """The readouts with header fields set to what `fields` says, per readout where it is a list."""
    for number, readout in enumerate(readouts(raw)):
        header = readout.header.copy()
        for name, value in fields.items():
            header[name] = value[number] if isinstance(value, (list, np.ndarray)) else value
        yield readout._replace(header=header)


def run(raw: RawFile, folder: Path, stream: list[Readout], ending: str = "complete", **options: object) -> Chain:
    chain = chain_for(raw, folder, **options)
    for readout in stream:
        chain.feed(readout)
    chain.finish(ending, "", lambda: stream)
    return chain


def test_images_come_slice_by_slice_and_make_one_volume(raw: RawFile, tmp_path: Path) -> None:
    images: list[SliceImage] = []
    chain = run(raw, tmp_path, list(readouts(raw)), on_image=images.append)
    volume = np.load(tmp_path / "volume.npy")
    assert len(images) == chain.n_images == 4
    for image in images:
        np.testing.assert_array_equal(image.data[0], volume[image.key.slice])
        assert image.n_slices == 4
    np.testing.assert_array_equal(np.load(tmp_path / "classical.npy"), volume)


def test_maps_made_ahead_change_no_bit(raw: RawFile, tmp_path: Path) -> None:
    run(raw, tmp_path / "a", list(readouts(raw)))
    chain = chain_for(raw, tmp_path / "b")
    ahead = 0
    for readout in readouts(raw):
        chain.feed(readout)
        ahead += chain.work_ahead()
    chain.finish("complete", "", lambda: readouts(raw))
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "volume.npy"), np.load(tmp_path / "b" / "volume.npy"))
    assert ahead > 4  # more often than once a slice: the block grew, and its maps were made again


def test_lines_after_the_last_in_slice_are_not_lost(raw: RawFile, tmp_path: Path) -> None:
    run(raw, tmp_path / "a", list(readouts(raw)))
    flags = raw.heads["flags"].copy()
    flags[len(flags) // 2] |= np.uint64(LAST_IN_SLICE)  # a segment's end that some sequences mark as the slice's
    run(raw, tmp_path / "b", list(altered(raw, flags=flags)))
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "volume.npy"), np.load(tmp_path / "b" / "volume.npy"))


def test_without_any_flag_the_end_of_the_stream_completes_all(raw: RawFile, tmp_path: Path) -> None:
    run(raw, tmp_path / "a", list(readouts(raw)))
    ends = np.uint64(LAST_IN_SLICE | 1 << 13 | 1 << 24)
    run(raw, tmp_path / "b", list(altered(raw, flags=raw.heads["flags"] & ~ends)))
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "volume.npy"), np.load(tmp_path / "b" / "volume.npy"))


def test_an_interrupted_scan_gives_its_whole_slices_only(raw: RawFile, tmp_path: Path) -> None:
    run(raw, tmp_path / "a", list(readouts(raw)))
    stream = list(readouts(raw))
    chain = run(raw, tmp_path / "b", stream[: int(0.8 * len(stream))], ending="interrupted")
    assert 0 < chain.n_images < 4
    whole = np.load(tmp_path / "a" / "volume.npy")
    for plane in np.load(tmp_path / "b" / "volume.npy"):
        assert any(np.array_equal(plane, each) for each in whole)
    assert chain.quality("interrupted")["verdict"] == "degraded"


def test_a_slice_that_was_made_otherwise_is_named(raw: RawFile, tmp_path: Path) -> None:
    # Slice 2 loses the centre of its k-space: without calibration lines it falls back.
    lost = [r for r in readouts(raw) if not (r.header["idx"]["slice"] == 2 and abs(row_of(r) - 32) < 6)]
    chain = chain_for(raw, tmp_path)
    for readout in lost:
        chain.feed(readout)
    (volume,) = chain.finish("complete", "", lambda: lost)["volumes"]
    assert volume["method"] == "sense"
    assert any("1 of 4 slices otherwise: root-sum-of-squares" in step for step in volume["steps"])


def row_of(readout: Readout) -> int:
    return int(readout.header["idx"]["kspace_encode_step_1"])


def test_contrasts_become_volumes_of_their_own(raw: RawFile, tmp_path: Path) -> None:
    stream = list(readouts(raw))
    chain = chain_for(raw, tmp_path)
    second = list(altered(raw))
    for readout in second:
        readout.header["idx"]["contrast"] = 1
    for readout in [*stream, *second]:
        chain.feed(readout)
    report = chain.finish("complete", "", lambda: [*stream, *second])
    assert [volume["file"] for volume in report["volumes"]] == ["volume.npy", "volume_001.npy"]
    assert len(list((tmp_path / "dicom").iterdir())) == 2


def test_nothing_is_kept_of_repetitions_that_were_served(raw: RawFile, tmp_path: Path) -> None:
    chain = chain_for(raw, tmp_path)
    held = []
    for repetition in range(5):
        for readout in altered(raw):
            readout.header["idx"]["repetition"] = repetition
            chain.feed(readout)
            chain.work_ahead()
        assembler = chain._assembler
        held.append([len(each) for each in (assembler._images, assembler._references, assembler._first, chain._coils)])
        assert assembler._bytes == 0
        assert chain._volumes.n_open == 0
    assert held == [[0, 0, 0, 0]] * 5
    assert chain.n_images == 20


def test_a_scan_without_one_image_says_why(raw: RawFile, tmp_path: Path) -> None:
    chain = chain_for(raw, tmp_path)
    for readout in readouts(raw):
        chain.feed(readout._replace(samples=readout.samples * np.float32(np.nan)))
    with pytest.raises(AcquisitionError, match=r"no image could be made of .* not finite numbers"):
        chain.finish("complete", "", lambda: [])


def test_compressed_readouts_are_counted_once_each(raw: RawFile, tmp_path: Path) -> None:
    chain = chain_for(raw, tmp_path)
    for readout in readouts(raw):
        chain.feed(readout._replace(samples=None))
    assert list(chain.left_out.values()) == [len(raw.heads)]
    with pytest.raises(AcquisitionError, match="compressed samples are not supported"):
        chain.finish("complete", "", lambda: [])


def test_too_large_a_scan_is_refused_with_the_number(raw: RawFile, tmp_path: Path) -> None:
    chain = chain_for(raw, tmp_path, max_scan_mib=1)
    chain._assembler._max_bytes = 10_000
    for readout in readouts(raw):
        chain.feed(readout)
    assert any("worker.max_scan_mib" in why for why in chain.left_out)


def test_zero_filled_and_sense_are_what_they_say(raw: RawFile, tmp_path: Path) -> None:
    for method, expected in (("auto", "sense"), ("sense", "sense"), ("zero-filled", "zero-filled")):
        chain = chain_for(raw, tmp_path / method, method=method)
        for readout in readouts(raw):
            chain.feed(readout)
        assert chain.finish("complete", "", lambda: [])["method"] == expected


class Halving(FakeNetwork):
    """A network that makes half of the classical image, so that the two are told apart; fails where it is told to."""

    def __init__(self, fail_at: tuple[int, ...] = ()) -> None:
        super().__init__(lambda inputs: inputs["classical"] / 2)
        self._fail_at = fail_at

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        made = super().run(inputs)
        if len(self.seen) - 1 in self._fail_at:
            raise BackendError("the device is gone")
        return made


def test_the_network_leads_and_the_classical_image_is_kept_beside_it(raw: RawFile, tmp_path: Path) -> None:
    images: list[SliceImage] = []
    chain = run(raw, tmp_path, list(readouts(raw)), network=Halving(), on_image=images.append)
    assert chain.n_images == len(images) == 8
    assert [image.series for image in images] == ["classical", "network"] * 4  # a first look, then the better one
    assert [image.method for image in images] == ["sense", "network"] * 4
    classical, led = np.load(tmp_path / "classical.npy"), np.load(tmp_path / "volume.npy")
    for number in range(4):
        np.testing.assert_array_equal(images[2 * number].data[0], classical[images[2 * number].key.slice])
        np.testing.assert_array_equal(images[2 * number + 1].data[0], led[images[2 * number + 1].key.slice])
    difference = np.linalg.norm(led - classical) / np.linalg.norm(classical)
    assert 0.02 < difference < 0.3  # what was measured stays, the rest is halved
    (volume,) = json.loads((tmp_path / "report.json").read_text())["volumes"]
    assert (volume["series"], volume["method"], volume["file"]) == ("network", "network", "volume.npy")
    assert (volume["model_sha256"], volume["backend"]) == ("0" * 64, "fake")
    assert volume["classical"]["method"] == "sense"
    assert volume["classical"]["model_sha256"] == ""
    assert {path.name for path in (tmp_path / "dicom").iterdir()} == {"classical", "network"}
    header = dcmread(next((tmp_path / "dicom" / "network").iterdir()))
    assert "0" * 64 in header.DerivationDescription
    assert "neural network" in header.DerivationDescription


def test_a_scan_outside_the_trained_range_is_served_classically_and_says_why(raw: RawFile, tmp_path: Path) -> None:
    images: list[SliceImage] = []
    network = FakeNetwork(trained=replace(RANGE, matrix=(96, 512)))
    run(raw, tmp_path, list(readouts(raw)), network=network, on_image=images.append)
    assert [image.series for image in images] == ["classical"] * 4
    assert all("64 lines" in image.reason for image in images)
    (volume,) = json.loads((tmp_path / "report.json").read_text())["volumes"]
    assert volume["series"] == "classical"
    assert "network not used for 4 of 4: the matrix has 64 lines" in volume["steps"][-1]
    assert not network.seen
    with pytest.raises(AcquisitionError, match="64 lines"):
        run(raw, tmp_path, list(readouts(raw)), network=network, method="network")


def test_a_network_that_fails_once_leaves_a_classical_volume_that_says_so(raw: RawFile, tmp_path: Path) -> None:
    run(raw, tmp_path, list(readouts(raw)), network=Halving(fail_at=(2,)))
    (volume,) = json.loads((tmp_path / "report.json").read_text())["volumes"]
    assert volume["method"] == "sense"
    assert volume["steps"][-1] == "network not used for 1 of 4: the device is gone"
    np.testing.assert_array_equal(np.load(tmp_path / "volume.npy"), np.load(tmp_path / "classical.npy"))
    with pytest.raises(BackendError):
        run(raw, tmp_path, list(readouts(raw)), network=Halving(fail_at=(2,)), method="network")


def test_without_a_network_the_reason_is_passed_on(raw: RawFile, tmp_path: Path) -> None:
    run(raw, tmp_path, list(readouts(raw)), no_network="nobody trained one")
    (volume,) = json.loads((tmp_path / "report.json").read_text())["volumes"]
    assert "nobody trained one" in volume["steps"][-1]
    with pytest.raises(AcquisitionError, match="nobody trained one"):
        run(raw, tmp_path, list(readouts(raw)), no_network="nobody trained one", method="network")
    run(raw, tmp_path, list(readouts(raw)), network=Halving(), method="sense")
    (volume,) = json.loads((tmp_path / "report.json").read_text())["volumes"]
    assert not any("network" in step for step in volume["steps"])
