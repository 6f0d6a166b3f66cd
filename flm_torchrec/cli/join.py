"""`flm join`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flm_torchrec.safe_text import visible


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `join` to the subcommands."""
    parser = subparsers.add_parser(
        "join",
        help="make one data set of several domains, with shared users",
        description="Join prepared data of several domains into one prepared data set. Users with the same key are one"
        " user, whose events of all domains are in time order. Each item keeps its domain, which is called like its"
        " folder. 'flm train --data.path A B' joins in the same way.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders written by 'flm prepare'")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write (required)")
    parser.add_argument(
        "--apart",
        default="",
        metavar="NAMES",
        help="features whose values mean something else in each domain though they are written alike, such as numbers"
        " of categories; separated by commas (default: none)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="for the whole join, such as 2GiB or 1500MB, at least 100MiB; what does not fit goes to disk beside the"
        " output (default: half of the machine's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace older prepared data (default: refuse)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Join, and print a few lines about the result.

    Raises:
        DataError: the folders cannot be joined, or the output is in use.
    """
    from flm_torchrec.prepare.join import join
    from flm_torchrec.prepare.memory import LEAST, memory_bytes

    memory = memory_bytes(args.memory, LEAST) if args.memory else None
    report = join(args.folders, args.output, [name for name in args.apart.split(",") if name], args.overwrite, memory)
    print(
        f"{args.output}: {report['rows_kept']} events of {report['users']} users with {report['items']} items in"
        f" {len(report['domains'])} domains; {report['users_of_several_domains']} users are in several"
    )
    for name, one in report["domains"].items():
        print(visible(f"  {name}: {one['interactions']} events, {one['users']} users, {one['items']} items"))
    sys.stdout.flush()
    for line in report["warnings"]:
        print(visible(f"warning: {line}"), file=sys.stderr)
    print(f"next: flm train --data.path {args.output}")
