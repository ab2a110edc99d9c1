"""`scanside triage`: findings for DICOM series and NIfTI volumes, whoever made them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge.atomic import write_atomically
from edge.contact_sheet import Entry, write_sheets
from edge.contrast_name import contrast_of_words
from edge.dicom_read import DicomSeries, read_series
from edge.dicom_reference import Reference, reference_of_series
from edge.evidence import write_evidence
from edge.nifti import is_nifti, read_nifti
from edge.triage_json import findings_json, measurements_json
from edge.triage_models import TRIAGE, close, open_tools
from recon.errors import AcquisitionError, ScanError
from recon.scan import Volume
from triage.assess import CONTRASTS, Assessed, Site, Tools, assess_series, fuse
from triage.findings import LABELS, State, not_assessed


@dataclass(frozen=True, eq=False)
class Source:
    """One series to look at. volume: None where it could not be read, and `problem` says why."""

    name: str
    volume: Volume | None
    contrast: str
    problem: str = ""
    reference: Reference | None = None
    study: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside triage`."""
    parser.epilog = (
        "Writes DIR/findings.json, DIR/contact_sheet.png, and for DICOM one structured report a series. "
        "Not assessed is not nothing found. For notification only; not for diagnostic use."
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="DICOM folder or file, or NIfTI file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go (made if need be)")
    parser.add_argument(
        "--contrast", choices=CONTRASTS, help="of all series given; without it their names and headers say"
    )
    parser.add_argument("--alpha", type=float, default=Site.alpha, help="of the conformal sets (%(default)s)")
    parser.add_argument(
        "--min-coverage",
        type=float,
        default=0.0,
        metavar="MM",
        help="of the head for a finding to be not flagged; 0 takes a single slice for what it is (%(default)s)",
    )
    parser.add_argument(
        "--research", action="store_true", help="also write segmentations and heat maps of what is flagged"
    )
    parser.add_argument("--models", type=Path, default=TRIAGE, metavar="DIR", help="another folder of triage networks")


def run(args: argparse.Namespace) -> int:
    """Do `scanside triage`: 0 done, 1 a series could not be read, 2 wrong use."""
    missing = [path for path in args.paths if not path.exists()]
    if missing:
        return _fail(f"{missing[0]}: there is no such file or folder", 2)
    if not 0 < args.alpha < 1 or not args.min_coverage >= 0:
        return _fail(
            f"--alpha {args.alpha} --min-coverage {args.min_coverage}: 0 < alpha < 1 and 0 or more are needed", 2
        )
    tools, problems = open_tools(args.models)
    for problem in problems:
        print(f"scanside triage: {problem}", file=sys.stderr)
    site = Site(LABELS, args.alpha, args.min_coverage)
    try:
        entries, n_unread = _triage(args.paths, args.contrast, tools, site, args.out, args.research)
    except OSError as error:
        return _fail(f"{args.out} cannot be written: {error.strerror}", 2)
    finally:
        close(tools.models)
    for entry in entries:
        print(f"{entry.name}  {entry.contrast or 'contrast unknown'}  {entry.words}")
    print(f"{args.out / 'findings.json'}  {args.out / 'contact_sheet.png'}")
    print("Not assessed is not nothing found. For notification only. Not for diagnostic use.")
    return 1 if n_unread else 0


def _triage(
    paths: Sequence[Path], contrast: str | None, tools: Tools, site: Site, out: Path, is_research: bool
) -> tuple[list[Entry], int]:
    out.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    records: list[dict[str, Any]] = []
    exams: dict[str, list[tuple[str, Assessed]]] = {}
    n_unread = 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("series", total=len(paths))
        for path in paths:
            found = list(sources(path))
            progress.update(task, total=(progress.tasks[0].total or 0) + len(found) - 1)
            for source in found:
                if contrast:
                    source = replace(source, contrast=contrast)  # noqa: PLW2901
                assessed = _assess(source, tools, site)
                if source.volume is None:
                    n_unread += 1
                    print(f"scanside triage: {source.name}: {source.problem}", file=sys.stderr)
                else:
                    entries.append(_entry(source, source.volume, assessed))
                    if source.reference is not None:
                        folder = out / "dicom" / f"{len(records) + 1:04d}"
                        write_evidence(folder, source.volume, assessed, source.reference, is_research)
                records.append(_record(source.name, source.contrast, assessed))
                if source.study:
                    exams.setdefault(source.study, []).append((source.name, assessed))
                progress.advance(task)
    _write(out / "findings.json", records)
    fused = [
        {"sources": [name for name, _ in each], **_found(fuse([a for _, a in each], site.labels))}
        for each in exams.values()
        if len(each) > 1
    ]
    if fused:
        _write(out / "exams.json", fused)
    write_sheets(out, entries)
    return entries, n_unread


def sources(path: Path) -> Iterator[Source]:
    """Yield the series at a path: a NIfTI file, the NIfTI files of a folder, or every DICOM series under it."""
    files = (
        [path] if is_nifti(path) else sorted(each for each in path.glob("*") if is_nifti(each)) if path.is_dir() else []
    )
    for file in files:
        try:
            yield Source(str(file), read_nifti(file), contrast_of_words(file.name))
        except ScanError as error:
            yield Source(str(file), None, contrast_of_words(file.name), str(error))
    if files:
        return
    try:
        for found in read_series(path):
            yield _dicom(found, path)
    except AcquisitionError as error:
        yield Source(str(path), None, "", str(error))


def _dicom(found: DicomSeries | AcquisitionError, path: Path) -> Source:
    if isinstance(found, AcquisitionError):
        return Source(str(path), None, "", str(found))
    reference = reference_of_series(found)
    return Source(str(found.folder), found.volume, found.contrast, found.refusal, reference, reference.study_uid)


def _assess(source: Source, tools: Tools, site: Site) -> Assessed:
    if source.problem or source.volume is None:
        return Assessed(source.contrast, not_assessed(source.problem, site.labels))
    if not source.contrast:
        return Assessed("", not_assessed("the contrast is not known; --contrast says it", site.labels))
    try:
        return assess_series(source.volume, source.contrast, tools, site)
    except ScanError as error:
        return Assessed(source.contrast, not_assessed(str(error), site.labels))


def _found(findings: Any) -> dict[str, Any]:
    return {"findings": findings_json(findings), "measurements": measurements_json(findings.measurements)}


def _record(name: str, contrast: str, assessed: Assessed) -> dict[str, Any]:
    return {"source": name, "contrast": contrast or None, **_found(assessed.findings)}


def _entry(source: Source, volume: Volume, assessed: Assessed) -> Entry:
    by_state: dict[str, list[str]] = {}
    for each in assessed.findings.findings:
        words = f"{each.label} {each.probability:.2f}" if each.state is State.FLAGGED else each.label
        by_state.setdefault(each.state.value, []).append(words)
    words = "; ".join(f"{state}: {', '.join(labels)}" for state, labels in by_state.items())
    return Entry(source.name, source.contrast, volume, assessed, words)


def _write(path: Path, content: list[dict[str, Any]]) -> None:
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode())


def _fail(reason: str, code: int) -> int:
    print(f"scanside triage: {reason}", file=sys.stderr)
    return code
