"""The `scanside` command: one word for each thing it does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

_EPILOG = """\
begin with:  scanside demo                      see the whole chain at work, with a simulated scanner
             scanside recon FILE.h5 --out DIR   reconstruct an ISMRMRD file
             scanside serve --state DIR         run the daemon; scanners connect to port 9002

exit codes:  0 done, 1 this scan could not be served (the reason is on standard error), 2 wrong use or settings

For research use only. Not for diagnostic use.
"""

# word: (module, one line of help)
COMMANDS = {
    "demo": ("edge.demo", "the main job end to end with a simulated scanner"),
    "serve": ("edge.serve", "the daemon: take scans over MRD, give images, DICOM and events"),
    "replay": ("edge.replay", "stream a raw data file to a server and save the images that come back"),
    "recon": ("edge.recon_file", "reconstruct a raw data file without a daemon"),
    "triage": ("edge.triage_file", "findings for DICOM series or NIfTI volumes, in three states"),
    "simulate": ("edge.simulate", "make a simulated brain scan as an ISMRMRD file, with its truth beside it"),
    "watch": ("edge.watch", "show alerts as they come, until somebody takes them"),
    "ack": ("edge.ack", "take an alert, so that nobody else is called"),
    "keys": ("edge.keys_command", "who may connect to events and alerts, and what for"),
    "engines": ("edge.engine_command", "build TensorRT engines on this device, or list those that are there"),
    "audit": ("edge.audit_command", "verify that nobody changed the audit trail"),
    "pacs": ("edge.pacs_command", "what waits for the archive, what was given up, and have it tried again"),
    "export": ("edge.export_command", "the DICOM objects of scans for use elsewhere, de-identified"),
    "ledger": ("edge.ledger_command", "copy the ledger while the daemon runs, and put a copy back"),
    "doctor": ("edge.doctor", "check what is installed, what would be used and what is missing"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="scanside",
        description="From an undersampled MRI scan's raw signal to images, DICOM and live events, beside the scanner.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scanside {version('scanside')}")
    chosen = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for word, (module, help_line) in COMMANDS.items():
        sub = chosen.add_parser(word, help=help_line, description=f"scanside {word}: {help_line}.")
        if words[:1] == [word]:  # only the module that is needed is imported
            import_module(module).configure(sub)
    args = parser.parse_args(words)
    try:
        code: int = import_module(COMMANDS[args.command][0]).run(args)
    except KeyboardInterrupt:
        code = 130
    return code


if __name__ == "__main__":
    sys.exit(main())
