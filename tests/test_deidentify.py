"""What leaves de-identified: nothing of the patient in it, objects that still belong together, and says so."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from edge.audit import TRAIL
from edge.command import main
from edge.deidentify import new_uid
from edge.dicom import encode
from edge.secret import random_secret
from edge.simulate import simulate_file
from recon.protocol import Protocol
from tests.archive import image, instance_of

SECRETS = ("Zebrowski", "PID778899", "ACC5566", "19510307", "19991231", "Okafor", "Tattoo", "SN4711", "Ward 9")
UIDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
FIELDS = {
    "PatientBirthDate": "19510307", "StudyDate": "19991231", "AcquisitionDateTime": "19991231101112",
    "AccessionNumber": "ACC5566", "ReferringPhysicianName": "Okafor^A", "ImageComments": "Tattoo on the left arm",
    "DeviceSerialNumber": "SN4711", "SeriesDescription": "T2 Zebrowski [untrusted]", "PatientSex": "F",
    "PatientWeight": "71", "InstitutionalDepartmentName": "Ward 9", "RescaleSlope": "0.5", "EchoTime": "90",
    "DerivationDescription": "Ward 9. Verdict on the scan: untrusted (motion).",
}  # fmt: skip


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state" / "results" / ("S" * 26) / "dicom" / "classical"
    folder.mkdir(parents=True)
    for number in range(2):
        file = image("S" * 26, number, **FIELDS)
        private = file.private_block(0x0009, "Zebrowski Inc", create=True)
        private.add_new(1, "LO", "PID778899")
        inner = Dataset()
        inner.PatientID, inner.StudyDescription = "PID778899", "Ward 9"
        inner.ReferencedSOPInstanceUID = image("S" * 26, 1 - number).SOPInstanceUID
        file.ReferencedImageSequence = [inner]
        (folder / f"{number + 1:04d}.dcm").write_bytes(encode(file))
    random_secret(tmp_path / "state" / "keys" / "pseudonym.key")
    return tmp_path / "state"


def export(state: Path, out: Path, *how: str) -> list[Path]:
    assert main(["export", "S" * 26, "--state", str(state), "--out", str(out), *how]) == 0
    return sorted(out.rglob("*.dcm"))


def test_nothing_of_the_patient_is_left_and_the_objects_still_belong_together(state: Path, tmp_path: Path) -> None:
    before = [dcmread(path) for path in sorted(state.rglob("*.dcm"))]
    uids = [file[name].value for file in before for name in UIDS]
    paths = export(state, tmp_path / "out", "--deidentify")
    after = [dcmread(path) for path in paths]
    for path in paths:
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content]
        assert not [uid for uid in uids if uid.encode() in content]
    for old, new in zip(before, after, strict=True):
        assert new.PixelData == old.PixelData
        assert (new.RescaleSlope, new.EchoTime, new.SOPClassUID) == (old.RescaleSlope, old.EchoTime, old.SOPClassUID)
        assert new.AnatomicRegionSequence[0].CodeMeaning == "Brain"
        assert (new.PatientIdentityRemoved, new.LongitudinalTemporalInformationModified) == ("YES", "REMOVED")
        assert [code.CodeValue for code in new.DeidentificationMethodCodeSequence] == ["113100", "113105"]
        assert new.DerivationDescription == "Verdict on the scan: untrusted"  # what it may be used for is kept
        assert not any(element.tag.is_private for element in new)
        assert (new.PatientSex, "PatientWeight" in new) == ("", False)
    assert after[0].PatientID == after[1].PatientID
    assert after[0].StudyInstanceUID == after[1].StudyInstanceUID
    assert after[0].ReferencedImageSequence[0].ReferencedSOPInstanceUID == after[1].SOPInstanceUID
    again = export(state, tmp_path / "again", "--deidentify")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    (record, _) = [json.loads(line) for line in (state / TRAIL).read_text().splitlines()]
    assert (record["EventID"]["csd-code"], record["EventOutcomeDescription"]) == ("110106", "de-identified")


def test_another_site_gives_other_numbers() -> None:
    assert new_uid("1.2.3", b"one") != new_uid("1.2.3", b"two")
    assert new_uid("1.2.840.10008.5.1.4.1.1.4", b"one") == "1.2.840.10008.5.1.4.1.1.4"


def test_identified_files_are_copies_and_the_trail_says_so(state: Path, tmp_path: Path) -> None:
    paths = export(state, tmp_path / "out", "--identified")
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in sorted((state / "results").rglob("*.dcm"))]
    assert "identified" in (state / TRAIL).read_text()
    assert main(["export", "../keys", "--state", str(state), "--out", str(tmp_path / "x"), "--identified"]) == 2


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not here (apt install dicom3tools)")
def test_real_results_stay_valid(tmp_path: Path) -> None:
    simulate_file(tmp_path / "scan.h5", Protocol(matrix=(64, 64), n_slices=2, n_coils=2, acceleration=1), "none", 1)
    out = tmp_path / "state" / "results" / ("R" * 26)
    assert main(["recon", str(tmp_path / "scan.h5"), "--out", str(out)]) == 0
    random_secret(tmp_path / "state" / "keys" / "pseudonym.key")
    arguments = ["R" * 26, "--state", str(tmp_path / "state"), "--out", str(tmp_path / "o"), "--deidentify"]
    assert main(["export", *arguments]) == 0
    paths = sorted((tmp_path / "o").rglob("*.dcm"))
    assert {dcmread(path).Modality for path in paths} == {"MR", "SR"}
    for path in paths:
        said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False).stderr
        assert not [line for line in said.splitlines() if line.startswith("Error")], (path, said)
        assert instance_of(path.read_bytes())
