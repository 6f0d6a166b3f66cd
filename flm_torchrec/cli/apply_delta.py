"""`flm apply-delta`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.cli.export import summary


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `apply-delta` to the subcommands."""
    parser = subparsers.add_parser(
        "apply-delta",
        help="bring an older export up to date by a delta",
        description="Write the export that a delta of 'flm export --since' leads to: the rows bit for bit those of a"
        " complete export, and an index of the kind that the older export has.",
        allow_abbrev=False,
    )
    parser.add_argument("--base", required=True, type=Path, metavar="DIR", help="the older export")
    parser.add_argument("--delta", required=True, type=Path, metavar="DIR", help="folder of 'flm export --since'")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an older export (default: refuse)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Apply a delta to an older export, and print one line about the result.

    Raises:
        FlmError: an option, the export or its target is wrong.
    """
    from flm_torchrec.export.delta import apply_delta

    print(f"{args.output}: {summary(apply_delta(args.base, args.delta, args.output, args.overwrite))}")
