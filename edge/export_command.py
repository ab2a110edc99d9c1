"""`scanside export`: the DICOM objects of scans for use elsewhere, de-identified unless somebody insists."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from edge.atomic import sync_folder, write_atomically
from edge.audit import TRAIL, AuditTrail
from edge.deidentify import deidentified_file
from edge.secret import SecretError, read_secret
from edge.settings import Settings
from recon.errors import DeliveryError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside export`."""
    parser.epilog = "Faces are not removed: whoever has a whole head can draw one."
    parser.add_argument("scans", nargs="+", metavar="SCAN_ID", help="scans, as `results/` names them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where they go (made if need be)")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--deidentify", action="store_true", help="by the basic profile of DICOM PS3.15, with codes")
    how.add_argument("--identified", action="store_true", help="as they are, with the patient's name and numbers")
    parser.add_argument(
        "--state", type=Path, default=Settings().state, metavar="DIR", help="state folder (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; 0 when done, 1 where a scan or the disk stands in its way, 2 for scans that are not there."""
    folders = [args.state / "results" / scan / "dicom" for scan in args.scans]
    for scan, folder in zip(args.scans, folders, strict=True):
        if not scan.isalnum() or not folder.is_dir():
            return _fail(f"there are no DICOM results of scan {scan!r} in {args.state}", 2)
    try:
        secret = read_secret(args.state / "keys" / "pseudonym.key") if args.deidentify else b""
        audit = AuditTrail(args.state / TRAIL)
    except SecretError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"the audit trail cannot be written: {error.strerror}", 1)
    how = "de-identified" if args.deidentify else "identified"
    try:
        for scan, folder in zip(args.scans, folders, strict=True):
            n = _export(folder, _place(args.out), secret)
            audit.record("export", objects={"scan": scan, "objects": str(n)}, reason=how)
            print(f"{scan}  {n} objects, {how}")
    except (OSError, DeliveryError) as error:
        words = str(error) if isinstance(error, DeliveryError) else f"{args.out}: {error.strerror}"
        audit.record("export", "serious", objects={"scan": scan}, reason=f"{how}, not finished")
        return _fail(words, 1)
    finally:
        audit.close()
    return 0


def _place(out: Path) -> Path:
    """Return a folder of its own for one scan, by number: its name would lead back to the site."""
    out.mkdir(parents=True, exist_ok=True)
    number = 1
    while (out / f"{number:04d}").exists():
        number += 1
    return out / f"{number:04d}"


def _export(folder: Path, place: Path, secret: bytes) -> int:
    files = sorted(folder.rglob("*.dcm"))
    for file in files:
        target = place / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if secret:
            write_atomically(target, deidentified_file(file, secret))
        else:
            shutil.copyfile(file, target)
    if files:
        sync_folder(place)
    return len(files)


def _fail(reason: str, code: int) -> int:
    print(f"scanside export: {reason}", file=sys.stderr)
    return code
