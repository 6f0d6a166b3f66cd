"""`flm forget`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from flm_torchrec.documents import Unreadable, read_text
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.hash_users import hash_keys, read_secret
from flm_torchrec.safe_text import visible

MOST_BYTES = 2**30
"""Maximum size of a file of users."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `forget` to the subcommands."""
    parser = subparsers.add_parser(
        "forget",
        help="take users out of prepared data and of the runs made with it",
        description="Take users out of prepared data and of the tables and checkpoints of runs made with it. Ids of all"
        " others stay. While a training writes one of the runs, the command is refused. After an interruption, give"
        " the same command again.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data (required)")
    parser.add_argument(
        "--user", action="append", default=[], metavar="KEY", help="id of a user in the source; may be repeated"
    )
    parser.add_argument("--users", type=Path, metavar="FILE", help="file of such ids, one a line")
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="secret that 'flm prepare --hash-users' hashed the ids with; give the ids as they were before",
    )
    parser.add_argument(
        "--run",
        type=Path,
        action="append",
        default=[],
        dest="runs",
        metavar="DIR",
        help="run made with the data; may be repeated; without users it is brought up to date with the data",
    )
    parser.add_argument(
        "--export",
        type=Path,
        action="append",
        default=[],
        dest="exports",
        metavar="DIR",
        help="export to look through: one that still has a user must be exported again; may be repeated",
    )
    parser.add_argument(
        "--events",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="live events of 'flm serve --events', which may run meanwhile; may be repeated",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Take users out of prepared data and runs, and print what was done.

    Raises:
        FlmError: nobody is named, an id is unknown, a file is unreadable, or a run is being written.
    """
    keys = [*args.user, *(_lines(args.users) if args.users else [])]
    if not keys and not args.runs:
        raise DataError("forget: nobody to forget; give --user KEY or --users FILE")
    if args.key_file:
        keys = hash_keys(keys, read_secret(args.key_file))
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.privacy.forget import forget

    keys = list(dict.fromkeys(keys))
    live = _forget_live(args.events, keys)
    try:
        done = forget(args.data, keys, args.runs, args.exports, live)
    finally:  # what was removed is told, whatever else fails
        for file, counts in live.items():
            print(visible(f"{file}: {len(counts)} users and their {sum(counts.values())} live events forgotten"))
    for line in done:
        print(visible(line))


def _forget_live(files: Sequence[Path], keys: Sequence[str]) -> dict[Path, dict[str, int]]:
    """By store: the live events that were removed of each user.

    Raises:
        FlmError: there is no such store, or it cannot be changed.
    """
    from flm_torchrec.serve.event_store import EventStore

    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: not found; --events must name the file of 'flm serve --events'")
    found = {}
    for file in files:
        store = EventStore(file)
        found[file] = store.forget(keys)
        store.close()
    return found


def _lines(file: Path) -> list[str]:
    try:
        lines = re.split("\r\n|\r|\n", read_text(file, MOST_BYTES))
    except Unreadable as error:
        raise DataError(f"{file}: not readable ({error}); --users must name a text file, one id a line") from error
    keys = [line for line in lines if line.strip()]
    if not keys:
        raise DataError(f"{file}: names nobody; write one id a line")
    return keys
