"""The audit trail: every bit counts, and so does every line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge.audit import EVENTS, TRAIL, AuditTrail, Head, verify
from edge.command import main
from edge.exam import Exam, Study, Subject
from edge.ledger import Ledger
from edge.pseudonym import exam_keys
from edge.secret import SecretError, random_secret, read_secret, write_secret


def write_trail(path: Path, n: int = 5) -> Head:
    trail = AuditTrail(path)
    for number in range(n):
        trail.record("acknowledged", user="désk", role="responder", objects={"alert": str(number)}, reason="Dr Who")
    trail.close()
    return trail.head


def test_what_was_written_holds_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_trail(path, 3)
    head = write_trail(path, 3)
    assert verify(path, head) == (6, "")
    assert verify(path, Head()) == (6, "")
    record = json.loads(path.read_text().splitlines()[-1])
    assert record["EventID"] == {"csd-code": "110111", "codeSystemName": "DCM", "originalText": "Procedure Record"}
    assert record["ActiveParticipants"][0]["UserID"] == "désk"
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_chain_goes_on_over_full_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / TRAIL
    one, other = AuditTrail(path, 1500), AuditTrail(path, 1500)  # as a daemon and a command
    for number in range(10):
        (one, other)[number % 2].record("export", objects={"scan": str(number)})
    one.close()
    other.close()
    parts = sorted(path.parent.glob("audit-*.jsonl"))
    assert len(parts) >= 3
    assert json.loads(parts[0].read_text().splitlines()[-1])["n"] == int(parts[0].stem.partition("-")[2])
    again = AuditTrail(path, 1500)
    again.record("stop")
    assert verify(path, again.head) == (11, "")
    assert main(["audit", "verify", "--state", str(tmp_path)]) == 0
    assert "11 records" in capsys.readouterr().out
    path.rename(path.with_name(f"audit-{again.head.n:012d}.jsonl"))  # killed before it began another
    again.record("start")
    assert verify(path, again.head) == (12, "")
    again.close()
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole.replace(b'"n":', b'"n": ', 1))
    assert verify(path)[1]
    parts[1].unlink()
    assert verify(path)[1]
    parts[1].write_bytes(whole)
    assert verify(path) == (12, "")
    parts[0].unlink()
    assert verify(path) == (0, "record 1 does not follow the one before it: one was changed, removed or moved")


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_trail(path, 1)
    good = path.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            changed = bytearray(good)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            assert verify(path)[1], (place, bit)


@pytest.mark.parametrize("change", ["removed", "moved", "doubled", "cut", "emptied", "anew"])
def test_lines_that_are_missing_or_moved_are_found(tmp_path: Path, change: str) -> None:
    path = tmp_path / "audit.jsonl"
    head = write_trail(path)
    lines = path.read_bytes().splitlines(keepends=True)
    if change == "anew":
        path.unlink()
        write_trail(path)
        assert verify(path, head)[1]
        return
    new = {
        "removed": lines[:2] + lines[3:],
        "moved": [lines[0], lines[2], lines[1], *lines[3:]],
        "doubled": [*lines, lines[-1]],
        "cut": lines[:-1],
        "emptied": [],
    }[change]
    path.write_bytes(b"".join(new))
    assert verify(path, head)[1]


def test_a_record_that_a_crash_cut_short_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_trail(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    write_trail(path, 1)
    assert verify(path) == (4, "")
    assert path.with_suffix(".torn").read_bytes() == whole.splitlines(keepends=True)[2][:-20]
    assert "cut short" in path.read_text().splitlines()[2]


def test_two_writers_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    one, two = AuditTrail(path), AuditTrail(path)
    for number in range(6):
        (one, two)[number % 2].record("login")
    one.close()
    two.close()
    assert verify(path) == (6, "")


def test_a_full_disk_is_told_and_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trail = AuditTrail(tmp_path / "audit.jsonl")
    trail.record("start")
    trail.close()
    trail.record("stop")
    assert trail.is_broken
    assert "audit record not written" in caplog.text
    assert verify(tmp_path / "audit.jsonl") == (1, "")


def test_the_command_compares_with_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", "--state", str(tmp_path)]) == 1
    assert "cannot be read" in capsys.readouterr().err
    head = write_trail(tmp_path / TRAIL)
    assert main(["audit", "verify", "--state", str(tmp_path)]) == 0
    assert "5 records" in capsys.readouterr().out
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.write_note("audit", Head(head.n + 1, head.sha256).to_text())
    ledger.close()
    assert main(["audit", "verify", "--state", str(tmp_path)]) == 1
    assert "its end was removed" in capsys.readouterr().err


def test_codes_are_those_of_dicom() -> None:
    meanings = pytest.importorskip("pydicom.sr._concepts_dict").concepts["DCM"]
    known = {code: meaning for each in meanings.values() for code, (meaning, _) in each.items()}
    for event, kind in EVENTS.values():
        for code, meaning in [event, *([kind] if kind else [])]:
            assert known[code] == meaning


def test_secrets_that_others_may_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "secret"
    assert len(random_secret(path)) == 32
    assert random_secret(path) == read_secret(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SecretError, match="File exists"):
        write_secret(path, b"another")
    for mode in (0o640, 0o604, 0o660, 0o644):
        path.chmod(mode)
        with pytest.raises(SecretError, match="chmod 600"):
            read_secret(path)
    with pytest.raises(SecretError, match="No such file"):
        read_secret(tmp_path / "none")


def test_keys_of_exams_tell_them_apart_and_name_nobody() -> None:
    exam = Exam(Subject(name="Zebrowski", identifier="PID1"), Study(instance_uid="1.2.3", accession_number="A7"))
    same = Exam(Subject(name="Zebrowski", identifier="PID1"), Study(instance_uid="1.2.4"))
    keys, others = (exam_keys(each, "S", b"secret") for each in (exam, same))
    assert keys["patient_key"] == others["patient_key"]
    assert keys["exam_key"] != others["exam_key"]
    assert exam_keys(exam, "S", b"another")["patient_key"] != keys["patient_key"]
    assert not any(secret in str(keys) for secret in ("Zebrowski", "PID1", "1.2.3", "A7"))
    full = exam_keys(exam, "S", b"secret", "study")
    assert (full["study_uid"], full["accession"]) == ("1.2.3", "A7")
    assert "Zebrowski" not in str(full)
    assert set(exam_keys(Exam(), "S", b"secret")) == {"exam_key"}
