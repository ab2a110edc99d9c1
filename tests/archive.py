"""Archives for tests: Orthanc as Debian has it, dcmtk's storescp, and objects to send them."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from edge.dicom import encode
from edge.uids import derive_uid

ORTHANC = shutil.which("Orthanc")
WEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
needs_orthanc = pytest.mark.skipif(ORTHANC is None, reason="Orthanc is not here (apt install orthanc)")
needs_web = pytest.mark.skipif(not WEB.exists(), reason="its DICOMweb is not here (apt install orthanc-dicomweb)")
needs_dcmtk = pytest.mark.skipif(shutil.which("storescp") is None, reason="storescp is not here (apt install dcmtk)")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert process.poll() is None, "the archive ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the archive did not start")


class Orthanc:
    """One Orthanc on the loopback; killed and started again, it keeps its folder."""

    def __init__(self, folder: Path, reports_to: int = 0) -> None:
        """reports_to: the port of SCANSIDE, for storage commitment."""
        folder.mkdir()
        self.dicom, self.http = free_port(), free_port()
        config = {
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "DicomPort": self.dicom,
            "HttpPort": self.http,
            "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": True,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomModalities": {"scanside": ["SCANSIDE", "127.0.0.1", reports_to or 1]},
            "Plugins": [str(WEB)] if WEB.exists() else [],
            "SaveJobs": False,
        }
        self._config, self._log = folder / "orthanc.json", folder / "log"
        self._config.write_text(json.dumps(config))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Orthanc:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([str(ORTHANC), str(self._config)], stdout=log, stderr=log)
        wait_for_port(self.dicom, self._process)
        wait_for_port(self.http, self._process)
        return self

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=60) as answer:
            content: bytes = answer.read()
        return content

    def files(self) -> list[bytes]:
        """Every object that it holds, as it would give it out."""
        return [self.get(f"/instances/{name}/file") for name in json.loads(self.get("/instances"))]

    def jobs(self) -> list[str]:
        return [str(job["Type"]) for job in json.loads(self.get("/jobs?expand"))]

    def count(self) -> int:
        return int(json.loads(self.get("/statistics"))["CountInstances"])


def data_set(file: bytes) -> bytes:
    """Return the bytes of a DICOM file behind its meta information."""
    meta = dcmread(io.BytesIO(file), stop_before_pixels=True).file_meta
    return file[132 + 12 + meta.FileMetaInformationGroupLength :]


def instance_of(file: bytes) -> str:
    return str(dcmread(io.BytesIO(file), stop_before_pixels=True).SOPInstanceUID)


def make_objects(results: Path, scan_id: str, n: int, **fields: Any) -> list[str]:
    """Write the objects of a scan and return their places in its results folder."""
    folder = results / scan_id / "dicom" / "classical"
    folder.mkdir(parents=True)
    for number in range(n):
        (folder / f"{number:04d}.dcm").write_bytes(encode(image(scan_id, number, **fields)))
    return [f"dicom/classical/{number:04d}.dcm" for number in range(n)]


def image(scan_id: str, number: int, **fields: Any) -> Dataset:
    """A small MR image with a sequence in it."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "12738006", "SCT", "Brain"
    out = Dataset()
    out.SOPClassUID, out.SOPInstanceUID = MRImageStorage, derive_uid("test", scan_id, number)
    out.StudyInstanceUID, out.SeriesInstanceUID = derive_uid("study", scan_id), derive_uid("series", scan_id)
    out.PatientName, out.PatientID = "Planted^Zebrowski", "PID778899"
    out.Modality, out.InstanceNumber, out.SeriesNumber = "MR", number + 1, 1
    out.AnatomicRegionSequence = [code]
    out.SamplesPerPixel, out.PhotometricInterpretation = 1, "MONOCHROME2"
    out.Rows = out.Columns = 64
    out.BitsAllocated, out.BitsStored, out.HighBit, out.PixelRepresentation = 16, 16, 15, 0
    out.PixelData = bytes([number % 251, scan_id.encode()[-1]]) * (64 * 64)
    for name, value in fields.items():
        setattr(out, name, value)
    return out


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Return a new key for 127.0.0.1 and its certificate."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert
