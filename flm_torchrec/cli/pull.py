"""`flm pull`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.api.hub import pull


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `pull` to the subcommands."""
    parser = subparsers.add_parser(
        "pull",
        help="make a run folder of a folder that 'flm push' wrote",
        description="Check every file of a folder that 'flm push' wrote, and make a new run folder of it. No code of"
        " the folder is run. 'flm evaluate', 'flm export' and 'flm finetune' then take the run; --data.path says where"
        " the data are that it was made with.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of 'flm push'")
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder to write; it must not exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the run folder.

    Raises:
        FlmError: a file of the folder is not as it was written, or the run folder cannot be written.
    """
    pull(args.folder, args.run_folder)
    print(f"{args.run_folder}: made of {args.folder}")
