"""`flm push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.api.hub import push
from flm_torchrec.api.seeds import add_seeds


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `push` to the subcommands."""
    parser = subparsers.add_parser(
        "push",
        help="write the best model of a run as a folder to share: safetensors and a model card",
        description="Write the best model of a run as a new folder to share: safetensors of the dense part and the"
        " tables, the settings, the keys of users and items, and a model card. It has no events and no pickle.",
        allow_abbrev=False,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder of 'flm train'")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write; it must not exist")
    add_seeds(parser, "model card")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the folder.

    Raises:
        RunError: the run cannot be pushed, or the folder cannot be written.
    """
    push(args.run_folder, args.folder, args.seeds)
    print(f"{args.folder}: written; name the licence in README.md before you share it")
