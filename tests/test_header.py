"""The XML header: what is read, what is refused, and that no refusal repeats the header's text."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import h5py
import ismrmrd
import pytest

from edge.exam import Equipment
from edge.header import read_header
from recon.errors import AcquisitionError
from recon.scan import Limit, Matrix, Size

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "kspace"

FULL = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <subjectInformation><patientName>Planted^Name</patientName><patientWeight_kg>71.5</patientWeight_kg>
  <patientHeight_m>1.8</patientHeight_m><patientID>P-77</patientID><patientBirthdate>1970-02-03</patientBirthdate>
  <patientGender>F</patientGender></subjectInformation>
 <studyInformation><studyDate>2020-05-06</studyDate><studyTime>11:12:13</studyTime><studyID>4</studyID>
  <accessionNumber>8</accessionNumber><referringPhysicianName>Doc</referringPhysicianName>
  <studyDescription>Head</studyDescription><studyInstanceUID>1.2.3</studyInstanceUID>
  <bodyPartExamined>BRAIN</bodyPartExamined></studyInformation>
 <measurementInformation><measurementID>m1</measurementID><patientPosition>HFS</patientPosition>
  <protocolName>t2_tse</protocolName><seriesDescription>T2</seriesDescription>
  <frameOfReferenceUID>1.2.4</frameOfReferenceUID></measurementInformation>
 <acquisitionSystemInformation><systemVendor>SIEMENS</systemVendor><systemModel>Skyra</systemModel>
  <systemFieldStrength_T>2.89</systemFieldStrength_T><relativeReceiverNoiseBandwidth>0.79</relativeReceiverNoiseBandwidth>
  <receiverChannels>20</receiverChannels><institutionName>Inst</institutionName><stationName>MR1</stationName>
  <deviceID>9</deviceID></acquisitionSystemInformation>
 <experimentalConditions><H1resonanceFrequency_Hz>123200000</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding>
  <encodedSpace><matrixSize><x>512</x><y>140</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>440</x><y>220.5</y><z>5</z></fieldOfView_mm></encodedSpace>
  <reconSpace><matrixSize><x>256</x><y>140</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>220</x><y>220.5</y><z>5</z></fieldOfView_mm></reconSpace>
  <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>83</maximum><center>28</center>
   </kspace_encoding_step_1><slice><minimum>0</minimum><maximum>11</maximum><center>0</center></slice></encodingLimits>
  <trajectory>cartesian</trajectory>
  <parallelImaging><accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1>
   <kspace_encoding_step_2>1</kspace_encoding_step_2></accelerationFactor>
   <calibrationMode>embedded</calibrationMode></parallelImaging>
 </encoding>
 <sequenceParameters><TR>3000</TR><TE>20</TE><TE>80</TE><TI>150</TI><flipAngle_deg>90</flipAngle_deg>
  <sequence_type>TSE</sequence_type></sequenceParameters>
</ismrmrdHeader>
"""


def changed(old: str, new: str) -> bytes:
    assert old in FULL
    return FULL.replace(old, new, 1).encode()


def test_a_full_header_is_read_into_scan_and_exam():
    scan, exam = read_header(FULL.encode() + b"\0\0", "ID")
    assert (scan.scan_id, scan.field_t, scan.n_coils, scan.noise_bandwidth_ratio) == ("ID", 2.89, 20, 0.79)
    assert (scan.te_ms, scan.tr_ms, scan.ti_ms, scan.flip_deg) == ((20.0, 80.0), (3000.0,), (150.0,), (90.0,))
    assert scan.protocol == "t2_tse"
    (encoding,) = scan.encodings
    assert encoding.encoded_matrix == Matrix(512, 140, 1)
    assert encoding.encoded_fov_mm == Size(440, 220.5, 5)
    assert encoding.recon_matrix == Matrix(256, 140, 1)
    assert encoding.recon_fov_mm == Size(220, 220.5, 5)
    assert encoding.limits == {"kspace_encoding_step_1": Limit(0, 83, 28), "slice": Limit(0, 11, 0)}
    assert (encoding.trajectory, encoding.acceleration, encoding.calibration) == ("cartesian", (2, 1), "embedded")
    subject, study = exam.subject, exam.study
    assert (subject.name, subject.identifier, subject.birth_date, subject.sex) == (
        "Planted^Name", "P-77", "19700203", "F",
    )  # fmt: skip
    assert (subject.weight_kg, subject.height_m) == (71.5, 1.8)
    assert (study.date, study.time, study.identifier, study.accession_number) == ("20200506", "111213", "4", "8")
    assert (study.instance_uid, study.description, study.referring_physician) == ("1.2.3", "Head", "Doc")
    assert study.body_part == "BRAIN"
    assert exam.equipment == Equipment("SIEMENS", "Skyra", "Inst", "MR1", "9", 123200000)
    assert (exam.measurement_id, exam.patient_position, exam.series_description) == ("m1", "HFS", "T2")
    assert (exam.frame_of_reference_uid, exam.sequence_type) == ("1.2.4", "TSE")


def test_everything_optional_may_be_missing():
    start, end = FULL.index(" <encoding>"), FULL.index("</encoding>")
    block = FULL[start : end + len("</encoding>")]
    block = block.replace(block[block.index("  <encodingLimits>") : block.index("  <trajectory>")], "")
    block = block.replace(block[block.index("  <parallelImaging>") : block.index(" </encoding>")], "")
    scan, exam = read_header(f"<ismrmrdHeader>{block}</ismrmrdHeader>".encode(), "x")
    assert scan.field_t is None
    assert scan.encodings[0].limits == {}
    assert scan.encodings[0].acceleration == (1, 1)
    assert exam.subject.name == ""


def test_prefixes_and_other_namespaces_make_no_difference():
    prefixed = FULL.replace('xmlns="', 'xmlns:m="').replace("</", "</m:").replace("<?xml", "\0")
    prefixed = prefixed.replace("<", "<m:").replace("<m:/m:", "</m:").replace("\0", "<?xml")
    assert "<m:encoding>" in prefixed
    assert read_header(prefixed.encode(), "x") == read_header(FULL.encode(), "x")


def test_the_field_comes_from_the_resonance_frequency_where_need_be():
    scan, _ = read_header(changed("<systemFieldStrength_T>2.89</systemFieldStrength_T>", ""), "x")
    assert scan.field_t == pytest.approx(2.8935, abs=1e-4)


def test_a_header_of_the_ismrmrd_package_is_read():
    made = ismrmrd.xsd.CreateFromDocument(FULL.encode()).toXML("utf-8")
    made = made if isinstance(made, bytes) else made.encode()
    assert read_header(made, "x")[0] == read_header(FULL.encode(), "x")[0]


@pytest.mark.peer
@pytest.mark.skipif(not shutil.which("ismrmrd_generate_cartesian_shepp_logan"), reason="ismrmrd-tools is not installed")
def test_the_debian_phantoms_header_is_read(tmp_path):
    path = tmp_path / "phantom.h5"
    command = ["ismrmrd_generate_cartesian_shepp_logan", "-o", str(path), "-m", "32", "-a", "2", "-w", "8"]
    subprocess.run(command, check=True, capture_output=True)
    with h5py.File(path, "r", locking=False) as file:
        scan, _ = read_header(file["dataset/xml"][0], "x")
    assert scan.encodings[0].encoded_matrix == Matrix(64, 32, 1)
    assert scan.encodings[0].recon_fov_mm == Size(300, 300, 6)
    assert (scan.n_coils, scan.encodings[0].acceleration) == (8, (2, 1))
    assert scan.field_t == pytest.approx(1.4914, abs=1e-4)


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real scans are not here")
def test_all_real_headers_are_read():
    paths = sorted(DATA.glob("*.h5"))
    assert paths
    for path in paths:
        with h5py.File(path, "r", locking=False) as file:
            scan, _ = read_header(file["dataset/xml"][0], "x")
            head = file["dataset/data"]["head"][0]
        assert scan.encodings[0].encoded_matrix.x == head["number_of_samples"]
        assert scan.n_coils == head["active_channels"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<x>512</x>", "<x>0</x>", "encodedSpace has matrixSize/x 0"),
        ("<x>512</x>", "<x>-3</x>", "matrixSize/x -3"),
        ("<x>512</x>", "<x>1.5</x>", r"1\.5; a whole number"),
        ("<x>512</x>", "<x>99999</x>", "99999; a whole number in 1..16384"),
        ("<x>512</x><y>140</y><z>1</z>", "<x>16384</x><y>16384</y><z>64</z>", "at most 1073741824 points"),
        ("<x>512</x>", "", "lacks x"),
        ("<x>440</x>", "<x>nan</x>", "fieldOfView_mm/x nan"),
        ("<x>440</x>", "<x>0</x>", "fieldOfView_mm/x 0"),
        ("<x>440</x>", "<x>inf</x>", "fieldOfView_mm/x inf"),
        ("<z>5</z></fieldOfView_mm></reconSpace>", "<z>-5</z></fieldOfView_mm></reconSpace>", "reconSpace has field"),
        ("<maximum>83</maximum>", "<maximum>-1</maximum>", "kspace_encoding_step_1 has maximum -1"),
        ("<minimum>0</minimum>", "<minimum>90</minimum>", "limited to 90..83"),
        ("<center>28</center>", "<center>70000</center>", "center 70000"),
        ("<kspace_encoding_step_1>2<", "<kspace_encoding_step_1>0<", "accelerationFactor"),
        ("<receiverChannels>20", "<receiverChannels>5000", "receiverChannels 5000"),
        ("<systemFieldStrength_T>2.89", "<systemFieldStrength_T>-1", "field strength is -1 T"),
        ("<relativeReceiverNoiseBandwidth>0.79", "<relativeReceiverNoiseBandwidth>0", "NoiseBandwidth is 0"),
        ("<TR>3000", "<TR>-1", "TR is -1"),
        ("<TE>20", "<TE>nan", "TE nan"),
        ("<TE>20", "<TE>Planted^Name", "TE that is not a number"),
        ("<H1resonanceFrequency_Hz>123200000", "<H1resonanceFrequency_Hz>1e99", "H1resonanceFrequency_Hz 1e"),
        ("<encodedSpace>", "<encodedSpice>", "not well-formed"),
        ("ismrmrdHeader>\n", "other>\n", "not well-formed"),
        ('<?xml version="1.0"?>', "<!DOCTYPE ismrmrdHeader>", "DOCTYPE"),
        ('<?xml version="1.0"?>', '<!DOCTYPE a [<!ENTITY b "c">]>', "DOCTYPE"),
        ('<?xml version="1.0"?>', '<?xml version="1.0" encoding="no-such-thing"?>', "not well-formed"),
    ],
)
def test_impossible_headers_are_refused_in_one_line_without_the_patient(old, new, reason):
    with pytest.raises(AcquisitionError, match=reason) as caught:
        read_header(changed(old, new), "x")
    assert "\n" not in str(caught.value)
    assert "Planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (b"", "not well-formed"),
        (b"Dummy XML header", "not well-formed"),
        (b"<siemensHeader/>", "root is not ismrmrdHeader"),
        (b"<ismrmrdHeader/>", "holds no encoding"),
        (b"<ismrmrdHeader><encoding/></ismrmrdHeader>", "no encodedSpace"),
        (b"\xff\xfe\x00<", "not well-formed"),
        (b"<a>" * 100_000, "not well-formed"),
        (b"<a>" * 100_000 + b"</a>" * 100_000, "root is not"),
        (b" " * ((4 << 20) + 1), "4194305 bytes"),
    ],
)
def test_what_is_no_header_is_refused(xml, reason):
    with pytest.raises(AcquisitionError, match=reason):
        read_header(xml, "x")


def test_other_trajectories_are_kept_for_the_assembler_to_refuse():
    scan, _ = read_header(changed("<trajectory>cartesian<", "<trajectory>spiral<"), "x")
    assert scan.encodings[0].trajectory == "spiral"


@pytest.mark.parametrize("weight", ["0", "-4", "nan", "heavy", "1e9", "9999"])
def test_an_impossible_patient_does_not_keep_the_scan_from_being_served(weight):
    _, exam = read_header(changed("<patientWeight_kg>71.5", f"<patientWeight_kg>{weight}"), "x")
    assert exam.subject.weight_kg is None


def test_texts_are_bounded_and_printable():
    scan, _ = read_header(changed("t2_tse", "t2\n" + "x" * 1000), "x")
    assert len(scan.protocol) == 256
    assert scan.protocol.startswith("t2 x")
