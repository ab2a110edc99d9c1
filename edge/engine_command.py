"""`scanside engines`: build TensorRT engines on this device, and list those that are there."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from edge.engines import PLAN, Build, Engine, EngineCache
from edge.model import MODEL, RECONSTRUCTION
from edge.settings import SettingsError
from edge.settings_file import read_settings
from edge.superres_engines import RefinerEngine
from edge.superres_model import SUPER_RESOLUTION, open_refiner
from edge.supply import Supply
from recon.engine import Profile, profile_for, read_profile
from recon.errors import BackendError, ModelError, ScanError
from recon.superres_engine import PROFILE

_MATRICES = ((256, 256), (320, 320))
_ACCELERATIONS = (2, 4)
_ACS = 24
_COILS = (8, 12)
_POLL_S = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside engines`."""
    parser.epilog = (
        "An engine serves one protocol on the GPU it was built on. The daemon builds those that scans ask for."
    )
    actions = parser.add_subparsers(dest="action", metavar="build|list", required=True)
    build = actions.add_parser("build", help="build engines, check their images, and keep those that pass")
    build.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME",
        help="sizes, as the daemon's log names them; repeatable",
    )
    build.add_argument("--matrix", action="append", default=[], metavar="YxX", help="such as 320x320; repeatable")
    build.add_argument(
        "--acceleration", action="append", default=[], type=int, metavar="R", help="(2 and 4); repeatable"
    )
    build.add_argument("--acs", type=int, default=_ACS, metavar="N", help="calibration lines (%(default)s)")
    build.add_argument("--coils", action="append", default=[], type=int, metavar="N", help="virtual coils (8 and 12)")
    build.add_argument(
        "--super-resolution", action="store_true", help="the one engine of that network; alone, no reconstruction's"
    )
    build.add_argument("--force", action="store_true", help="build again what is there")
    for action in (build, actions.add_parser("list", help="show the engines and whether they may serve")):
        action.add_argument("--config", type=Path, metavar="FILE", help="the daemon's settings")
        action.add_argument("--state", type=Path, metavar="DIR", help="the daemon's state folder (the settings')")


def run(args: argparse.Namespace) -> int:
    """Do `scanside engines`: 0 done, 1 an engine could not be had, 2 wrong use or settings."""
    try:
        settings = read_settings(args.config)
    except SettingsError as error:
        return _fail(str(error), 2)
    folder = (args.state or settings.state) / "engines"
    if args.action == "list":
        return _list(EngineCache(folder))
    try:
        profiles = _profiles(args)
    except ModelError as error:
        return _fail(str(error), 2)
    finer = settings.super_resolution
    wants_finer = args.super_resolution or (finer.enabled and finer.backend in ("auto", "tensorrt"))
    code = 0
    if profiles:
        try:
            supply = Supply(Path(settings.network.model) if settings.network.model else RECONSTRUCTION, "auto", folder)
        except ScanError as error:
            return _fail(str(error), 1)
        try:
            code = _build(supply, EngineCache(folder), profiles, args.force)
        finally:
            supply.close()
    if wants_finer:
        code = max(code, _build_finer(Path(finer.model) if finer.model else SUPER_RESOLUTION, folder, args.force))
    return code


def _profiles(args: argparse.Namespace) -> list[Profile]:
    """Return what the arguments name; without any, what most scans are, unless super-resolution alone is wanted."""
    named = [read_profile(name) for name in args.profile]
    matrices = []
    for text in args.matrix:
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if found is None:
            raise ModelError(f"--matrix {text}: two sizes are needed, such as 320x320")
        matrices.append((int(found[1]), int(found[2])))
    if not matrices and (named or args.super_resolution):
        return named
    product = {
        profile_for(matrix, acceleration, args.acs, coils)
        for matrix in matrices or _MATRICES
        for acceleration in args.acceleration or _ACCELERATIONS
        for coils in args.coils or _COILS
    }
    return [*named, *sorted(product)]


def _build(supply: Supply, cache: EngineCache, profiles: list[Profile], force: bool) -> int:
    n_failed = 0
    with Progress(*_columns(), console=Console(stderr=True)) as progress:
        whole = progress.add_task("engines", total=len(profiles))
        for profile in profiles:
            task = progress.add_task(profile.name, total=None)
            try:
                engine = None if force else cache.find(supply.identity(profile))
                if engine is None:
                    engine = _finished(supply.start(profile), progress, task)
                engine = supply.check(engine)
                if engine.refusal:
                    raise BackendError(f"{profile.name} is refused: {engine.refusal}")
                progress.update(task, total=1, completed=1)
            except (BackendError, ModelError) as error:
                n_failed += 1
                print(f"scanside engines: {error}", file=sys.stderr)
                progress.remove_task(task)
                if supply.has_no_device:
                    return 1
            progress.advance(whole)
    return 1 if n_failed else 0


def _build_finer(model: Path, folder: Path, force: bool) -> int:
    """Build the engine of super-resolution, unless it is there; check it, and say why where there is none."""
    try:
        with Progress(*_columns(), console=Console(stderr=True)) as progress:
            task = progress.add_task(PROFILE, total=None)
            refiner = open_refiner(model)
            try:
                own = RefinerEngine(model / MODEL, refiner.card, folder)
                engine = None if force else own.find()
                engine = own.check(engine or _finished(own.start(), progress, task), refiner.network)
            finally:
                refiner.network.close()
            progress.update(task, total=1, completed=1)
        if engine.refusal:
            raise BackendError(f"{PROFILE} is refused: {engine.refusal}")
    except ScanError as error:
        return _fail(str(error), 1)
    return 0


def _finished(build: Build, progress: Progress, task: TaskID) -> Engine:
    """Return the engine once it is built, showing how far it is; raises BackendError where it cannot be."""
    try:
        while not build.wait(_POLL_S):
            progress.update(task, completed=build.done, total=build.of or None)
    except BaseException:
        build.stop()
        raise
    return build.finish()


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()


def _list(cache: EngineCache) -> int:
    table = Table(box=None, pad_edge=False)
    for heading in ("profile", "precision", "runtime", "GPU", "MiB", "built in s", "state"):
        table.add_column(heading)
    n = 0
    for folder, found in cache:
        n += 1
        if not isinstance(found, Engine):
            table.add_row(folder.name, "", "", "", "", "", f"[red]unusable[/]: {found}")
            continue
        about = found.identity
        size = f"{(folder / PLAN).stat().st_size / 2**20:.1f}"
        state = "[green]passed[/]" if found.parity else "not checked yet"
        if found.refusal:
            state = f"[red]refused[/]: {found.refusal}"
        elif found.parity:
            state += f", SSIM {found.parity[0]:.5f}, largest difference {found.parity[1]:.2%}"
        table.add_row(about.profile, about.precision, about.runtime, about.gpu, size, f"{found.seconds:g}", state)
    if n:
        Console().print(table)
    else:
        print(f"no engines in {cache.folder}")
    return 0


def _fail(reason: str, code: int) -> int:
    print(f"scanside engines: {reason}", file=sys.stderr)
    return code
