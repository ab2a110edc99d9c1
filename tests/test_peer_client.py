"""A client built from Gadgetron's own Python readers and writers, and the ismrmrd package, against our daemon."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import ismrmrd
import numpy as np
import pytest

from edge.child import DaemonProcess
from edge.mrd import MessageId

constants = pytest.importorskip("gadgetron.external.constants", reason="the gadgetron package is not installed")


@pytest.mark.filterwarnings("ignore")  # of the peer's own code
def test_gadgetrons_reader_and_writer_get_a_scan_reconstructed(small_scan: Path, tmp_path: Path) -> None:
    from gadgetron.external.connection import Connection
    from gadgetron.external.readers import read, read_byte_string, read_image
    from gadgetron.external.writers import write_acquisition

    dataset = ismrmrd.Dataset(str(small_scan), "dataset", create_if_needed=False)
    images, texts = [], []
    with DaemonProcess(tmp_path / "state", tmp_path / "log") as daemon:
        with socket.create_connection(("127.0.0.1", daemon.port)) as connection:
            wire = Connection.SocketWrapper(connection)
            connection.settimeout(60)
            header = dataset.read_xml_header()
            wire.write(struct.pack("<H", 1) + b"default.xml".ljust(1024, b"\0"))
            wire.write(struct.pack("<HI", 3, len(header)) + header)
            for number in range(dataset.number_of_acquisitions()):
                write_acquisition(wire, dataset.read_acquisition(number))
            wire.write(constants.GadgetMessageIdentifier.pack(constants.GADGET_MESSAGE_CLOSE))
            while (number := read(wire, constants.GadgetMessageIdentifier)) != constants.GADGET_MESSAGE_CLOSE:
                if number == MessageId.IMAGE:
                    images.append(read_image(wire))
                else:
                    assert number == MessageId.TEXT  # nothing that this client lacks
                    texts.append(read_byte_string(wire))
        (path,) = (tmp_path / "state").glob("results/*/volume.npy")
        volume = np.load(path)
    assert sorted(image.slice for image in images) == [0, 1, 2, 3]
    for image in images:
        np.testing.assert_array_equal(image.data[0, 0], volume[image.slice])
        meta = image.meta if hasattr(image, "meta") else ismrmrd.Meta.deserialize(image.attribute_string)
        assert meta["DataRole"] == "Image"
        np.testing.assert_allclose([float(v) for v in meta["ImageRowDir"]], image.read_dir, atol=1e-6)
    assert any(b"4 images sent" in text for text in texts)
