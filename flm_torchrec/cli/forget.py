"""`flm forget`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_torchrec.documents import Unreadable, read_text
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.hash_users import hash_keys, read_secret
from flm_torchrec.safe_text import visible

if TYPE_CHECKING:
    from flm_torchrec.client import Client

MOST_KEY_BYTES = 4096
SERVER_KEY = "FLM_ADMIN_KEY"
"""Variable of the environment that may have the admin key of servers."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `forget` to the subcommands."""
    parser = subparsers.add_parser(
        "forget",
        help="take users out of prepared data, runs, exports, databases and running servers",
        description="Take users out of prepared data, of the tables and checkpoints of runs made with it, of exports,"
        " vector databases and running servers. Ids of all others stay. While a training writes one of the runs, the"
        " command is refused. After an interruption, give the same command again.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data (required, but for --verify)")
    parser.add_argument(
        "--user", action="append", default=[], metavar="KEY", help="id of a user in the source; may be repeated"
    )
    parser.add_argument(
        "--users", type=Path, metavar="FILE", help="such ids: text with one a line, or a table with a column user"
    )
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
        help="export made with the data, which is rewritten; may be repeated",
    )
    parser.add_argument(
        "--events",
        action="append",
        default=[],
        metavar="FILE",
        help="live events of 'flm serve --events', a file or a database; it may run meanwhile; may be repeated",
    )
    _add_services(parser)
    _add_record(parser)
    parser.set_defaults(run=run)


def _add_services(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        action="append",
        default=[],
        dest="stores",
        metavar="KIND:PLACE",
        help="vector database with users of 'flm load --entity users', as of its --to; #COLLECTION behind it where that"
        " is not users; may be repeated",
    )
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        dest="servers",
        metavar="URL",
        help="running 'flm serve': live events are removed, and its export is loaded anew; may be repeated",
    )
    parser.add_argument(
        "--server-key",
        type=Path,
        metavar="FILE",
        help=f"admin key of the servers; or the key in {SERVER_KEY}",
    )


def _add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="append to this signed record what was removed, where and when"
    )
    parser.add_argument(
        "--record-key", type=Path, metavar="FILE", help="secret that signs the record and hashes the keys in it"
    )
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="FILE",
        help="only check a record, with --record-key; with users, say when each was forgotten",
    )


def run(args: argparse.Namespace) -> None:
    """Take users out of all places named, and print what was done; or check a record.

    Raises:
        FlmError: nobody is named, an id is unknown, a file is unreadable, a place cannot be reached, or a run is being
            written.
    """
    keys = [*args.user, *(_named(args.users) if args.users else [])]
    plain: dict[str, str] = {}
    if args.key_file:
        plain = dict(zip(hash_keys(keys, read_secret(args.key_file)), keys, strict=True))
        keys = list(plain)
    keys = list(dict.fromkeys(keys))
    if args.verify:
        _verify(args, keys)
        return
    if args.data is None:
        raise DataError("forget: give --data DIR, the prepared data that the users leave")
    if not keys and not args.runs:
        raise DataError("forget: nobody to forget; give --user KEY or --users FILE")
    secret = _record_secret(args) if args.record else None
    clients = _clients(args)
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.export.stores.forget import UserCollection
    from flm_torchrec.privacy.forget import forget
    from flm_torchrec.privacy.places import EventsPlace, ExportPlace, Place, ServerPlace, StorePlace
    from flm_torchrec.privacy.record import Log, Record, RecordKey

    places: list[Place] = [
        *(ExportPlace(export, args.data) for export in args.exports),
        *(EventsPlace(address) for address in args.events),
        *(StorePlace(UserCollection.of(store)) for store in args.stores),
        *(ServerPlace(client, tuple(args.exports)) for client in clients),
    ]
    with ExitStack() as stack:
        record = stack.enter_context(Record.opened(args.record, RecordKey(secret))) if secret else None
        log = Log(record, keys, lambda line: print(visible(line), flush=True))
        forget(args.data, keys, args.runs, places, log, plain)
        if record is not None:
            print(visible(f"{args.record}: {len(record.lines)} lines, the last signature is {_last(record.lines)}"))


def _named(file: Path) -> list[str]:
    from flm_torchrec.prepare.sources.user_list import read_users  # a wrong option should be reported at once

    return [str(key) for key in read_users(str(file)).to_pylist()]


def _verify(args: argparse.Namespace, keys: Sequence[str]) -> None:
    """Check a record, and print its length and, of users, when they were forgotten.

    Raises:
        FlmError: a line was altered, the key is another one, or nothing is recorded of a user.
    """
    from flm_torchrec.privacy.record import RecordKey, read_record, unfinished

    key = RecordKey(_record_secret(args))
    lines = read_record(args.verify, key)
    open_users = unfinished(lines)
    state = f"; {len(open_users)} users have not been forgotten everywhere yet" if open_users else ""
    print(visible(f"{args.verify}: {len(lines)} lines, none altered; the last signature is {_last(lines)}{state}"))
    for user in keys:
        named = [line for line in lines if key.pseudonym(user) in line.get("users", ())]
        if not named:
            raise DataError(f"user '{user}': not in {args.verify}; nobody of that key has been forgotten with it")
        for line in named:
            print(visible(f"{user}: {line['act']} {line['time']}, line {line['n']}"))


def _last(lines: Sequence[dict[str, Any]]) -> str:
    return lines[-1]["signature"] if lines else "none"


def _record_secret(args: argparse.Namespace) -> bytes:
    if args.record_key is None:
        raise DataError("--record-key: give the FILE with the secret that signs the record")
    return read_secret(args.record_key)


def _clients(args: argparse.Namespace) -> list[Client]:
    """A client of each server, with the admin key.

    Raises:
        DataError: an address is none of HTTP, or the key cannot be read.
    """
    from flm_torchrec.client import Client

    for url in args.servers:
        if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
            raise DataError(f"--server '{visible(url)}': wants http://HOST:PORT or https://HOST:PORT")
    key = os.environ.get(SERVER_KEY, "")
    if args.server_key:
        try:
            key = read_text(args.server_key, MOST_KEY_BYTES).strip()
        except Unreadable as error:
            raise DataError(f"{args.server_key}: not readable ({error}); --server-key must name a text file") from error
    if args.servers and (not key or not key.isascii() or len(key.split()) != 1):
        raise DataError(
            f"--server: give --server-key FILE, or {SERVER_KEY}, with an admin key of the server and nothing else"
        )
    return [Client(url, key) for url in args.servers]
