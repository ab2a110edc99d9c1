"""`scanside serve`: the daemon in the foreground."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import signal
import sys
from pathlib import Path

from edge.crash import log_crashes
from edge.daemon import Daemon
from edge.notify import Notifier
from edge.settings import Settings, SettingsError, check
from edge.settings_file import read_settings
from recon.errors import ScanError

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside serve`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML; every key has a default")
    parser.add_argument("--state", type=Path, metavar="DIR", help="spool, ledger and results (/var/lib/scanside)")
    parser.add_argument("--port", type=int, metavar="N", help="MRD port, instead of the settings'; 0 takes a free one")
    parser.add_argument(
        "--events", metavar="ADDRESS", help="event socket, instead of the settings'; port 0: a free one"
    )
    parser.add_argument("--alerts", metavar="ADDRESS", help="alert socket, likewise")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 1 where the state or a port cannot be used, 2 where the settings are wrong."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    log_crashes()
    try:
        settings = _with_arguments(read_settings(args.config), args)
        check(settings)
    except SettingsError as error:
        print(f"scanside serve: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_serve(settings, args))
    except ScanError as error:
        print(f"scanside serve: {error}", file=sys.stderr)
        return 1
    return 0


def _with_arguments(settings: Settings, args: argparse.Namespace) -> Settings:
    if args.state is not None:
        settings = dataclasses.replace(settings, state=args.state)
    if args.port is not None:
        settings = dataclasses.replace(settings, mrd=dataclasses.replace(settings.mrd, port=args.port))
    if args.events is not None:
        settings = dataclasses.replace(settings, events=dataclasses.replace(settings.events, address=args.events))
    if args.alerts is not None:
        settings = dataclasses.replace(settings, alerts=dataclasses.replace(settings.alerts, address=args.alerts))
    return settings


async def _serve(settings: Settings, args: argparse.Namespace) -> None:
    daemon = Daemon(settings)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, _reload, daemon, args)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)
    await daemon.run()


def _reload(daemon: Daemon, args: argparse.Namespace) -> None:
    """Read the settings again; those that cannot be used change nothing."""
    notifier = Notifier()
    notifier.reloading()
    try:
        settings = _with_arguments(read_settings(args.config), args)
        check(settings)
        daemon.reload(settings)
    except SettingsError as error:
        log.error("settings not taken over: %s", error)
    notifier.ready()
