"""`flm prepare`."""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest
from flm_torchrec.prepare.memory import GIB, memory_bytes
from flm_torchrec.safe_text import visible

if TYPE_CHECKING:
    from flm_torchrec.data.schema import Entity
    from flm_torchrec.prepare.sources.raw import Raw


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `prepare` to the subcommands."""
    parser = subparsers.add_parser(
        "prepare",
        help="turn logs and features into the layout that everything else reads",
        description="Turn a source into prepared data: cleaned, de-duplicated, ids and features coded, as Parquet.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--source", default="synthetic", metavar="NAME",
        help=f"one of {', '.join(SOURCES)}; synthetic is made up, not data about people (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--input", metavar="PATH",
        help="folder of the source; for your own logs a file, a folder, or a pattern in quotes such as"
        " 'logs/2024-*.csv', here or at an address that fsspec knows (s3://…, gs://…), gzipped or not"
        " (needed by all sources but synthetic)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write (required)")
    parser.add_argument("--overwrite", action="store_true", help="replace older prepared data (default: refuse)")
    _add_machine(parser.add_argument_group("with what: changes no byte of the result"))
    _add_cleaning(parser.add_argument_group("cleaning"))
    _add_logs(parser.add_argument_group("your own logs (parquet, csv, jsonl)"))
    _add_form(parser.add_argument_group("how text is written: of --input, --items and --users alike"))
    _add_synthetic(parser.add_argument_group("synthetic: made-up logs with planted structure, for trying things out"))
    parser.set_defaults(run=run)


def _add_machine(group: Any) -> None:
    group.add_argument(
        "--memory", default="", metavar="SIZE",
        help="for the whole preparation, such as 2GiB or 1500MB, at least 1GiB; what does not fit goes to disk beside"
        " the output (default: half of the machine's)",
    )  # fmt: skip
    group.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine (default: all cores)")
    group.add_argument(
        "--engine", choices=("duckdb", "spark"), default="duckdb",
        help="duckdb: this machine; spark: a cluster, with the settings of spark-submit (default: %(default)s)",
    )  # fmt: skip


def _add_cleaning(group: Any) -> None:
    group.add_argument(
        "--k-core", type=int, default=0, metavar="K",
        help="keep users and items with at least K events each, repeated until all have (default: %(default)s, all)",
    )  # fmt: skip
    group.add_argument("--min-value", type=float, metavar="X", help="drop events of a lower value (default: none)")
    group.add_argument(
        "--dedup", choices=("none", "exact", "consecutive", "first", "last", "window"), default="none",
        help="exact: same user, item, time, event; consecutive: the same item again at once; first, last: keep that"
        " event of a user with an item; window: the same user, item and event at most --dedup-window seconds after"
        " the one before (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--dedup-window", type=int, default=0, metavar="SECONDS", help="of --dedup window")
    group.add_argument(
        "--session-gap", type=int, default=0, metavar="SECONDS",
        help="number a user's sessions, a pause of more seconds between two (default: no sessions)",
    )  # fmt: skip
    group.add_argument(
        "--min-user-events", type=int, default=0, metavar="N",
        help="as --k-core, of users alone (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--min-item-events", type=int, default=0, metavar="N",
        help="as --k-core, of items alone (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--hash-users", type=Path, metavar="KEYFILE",
        help="replace the ids of users by their HMAC-SHA256 under the bytes of a file (default: keep them)",
    )  # fmt: skip
    group.add_argument(
        "--min-count", type=int, default=1, metavar="N",
        help="values of a categorical feature that occur fewer times become unknown (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--text-buckets", type=int, default=10_000, metavar="N",
        help="rows of a text feature's table, into which words are hashed (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--text-ngrams", type=int, default=1, metavar="N",
        help="hash runs of up to N words of a text, not words alone (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--quantiles", type=int, default=100, metavar="N",
        help="buckets of a feature of kind quantile, equally many rows each (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--tables", default="", metavar="NAME=KIND:ROWS,…",
        help="for user_id or a sparse feature with more ids than rows: hash:ROWS, or zch:ROWS[:lfu|lru], where the ids"
        " seen most or last keep a row each (default: every id has a row)",
    )  # fmt: skip
    group.add_argument(
        "--keep-unseen-items", action="store_true", help="also keep described items without events (default: drop)"
    )
    group.add_argument(
        "--max-dropped", type=float, default=0.9, metavar="X",
        help="stop where more than this share of the rows is unreadable or lacks what an event needs; above a share of"
        " 0.2 a warning is given (default: %(default)s)",
    )  # fmt: skip


def _add_logs(group: Any) -> None:
    group.add_argument(
        "--columns", default="user=user_id,item=item_id,timestamp=timestamp", metavar="ROLE=COLUMN,…",
        help="roles: user, item, timestamp, event, value; without a timestamp the order of the rows counts. COLUMN may"
        " be a path into objects (user.id), or several names of which a file has one (uid|user_id)"
        " (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--time-unit", choices=("s", "ms", "us", "ns"), default="s",
        help="unit of numeric timestamps; ISO dates are read as they are (default: %(default)s)",
    )  # fmt: skip
    for side in ("item", "user"):
        group.add_argument(
            f"--{side}s", metavar="PATH",
            help=f"features of {side}s: Parquet, CSV or JSON lines, a path as of --input (default: none)",
        )  # fmt: skip
        group.add_argument(
            f"--{side}-key", default=f"{side}_id", metavar="COLUMN", help="its id column (default: %(default)s)"
        )
        group.add_argument(
            f"--{side}-features", default="", metavar="COLUMN:KIND,…",
            help="kinds: categorical, multi_categorical, text, numeric, quantile, dense (default: none)",
        )  # fmt: skip
    group.add_argument(
        "--duplicates", choices=("refuse", "first", "last"), default="refuse",
        help="of rows with one key in --items or --users, the one that is kept (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--title", default="", metavar="COLUMN", help="text feature to show to people (default: the id)")


def _add_form(group: Any) -> None:
    group.add_argument("--separator", default=",", help="of CSV columns, one character (default: '%(default)s')")
    group.add_argument(
        "--list-separator", default="|",
        help="inside a column of lists; lists of JSON are read as they are (default: '%(default)s')",
    )  # fmt: skip
    group.add_argument(
        "--encoding", default="utf-8", metavar="NAME",
        help="of text, such as latin-1, cp1252, utf-16 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--multiline", action="store_true",
        help="a quoted field of CSV events may hold line breaks, as those of --items and --users may"
        " (default: a row is a line, so that a stray quote spoils one row alone)",
    )  # fmt: skip
    group.add_argument("--decimal", default=".", metavar="SIGN", help="of numbers in text (default: '%(default)s')")
    group.add_argument(
        "--thousands", default="", metavar="SIGN", help="between groups of digits of numbers in text (default: none)"
    )
    group.add_argument(
        "--currency", default="", metavar="SIGN",
        help="sign or code beside numbers in text, such as € or EUR; another one makes no number (default: none)",
    )  # fmt: skip


def _add_synthetic(group: Any) -> None:
    for name, default, text in (
        ("users", 4000, "users"),
        ("items", 1000, "items"),
        ("events", 40, "mean events a user"),
        ("seed", 0, "the same seed gives the same data"),
    ):
        option = f"--synthetic-{name}"
        group.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    for name in ("content", "collaborative", "sequential"):
        group.add_argument(
            f"--synthetic-{name}", type=float, default=1.0, metavar="X",
            help=f"strength of the {name} signal relative to the others (default: %(default)s)",
        )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Prepare, and say in a few lines what came of it.

    Raises:
        DataError: an option, an input or the output is wrong.
    """
    started = time.monotonic()
    if args.source not in SOURCES:
        raise DataError(f"--source '{args.source}' is not known; {nearest(args.source, SOURCES)}")
    for option, least in LEAST.items():
        if getattr(args, option) < least:
            raise DataError(f"--{option.replace('_', '-')} {getattr(args, option)}: must be at least {least}")
    if not 0 <= args.max_dropped <= 1:
        raise DataError(f"--max-dropped {args.max_dropped}: must be a share, from 0 to 1")
    if (args.dedup == "window") != (args.dedup_window > 0):
        raise DataError("--dedup-window: give it with --dedup window, and only then")
    _check_input(args.source, args.input)
    # Imported here: a wrong option should be told at once.
    from flm_torchrec.prepare.hash_users import read_secret
    from flm_torchrec.prepare.prepare import Machine, Options, check_output, prepare
    from flm_torchrec.prepare.table_options import parse_tables

    check_output(args.output, args.overwrite)
    secret = read_secret(args.hash_users) if args.hash_users else b""
    machine = Machine(args.engine, memory_bytes(args.memory, LEAST_MEMORY), args.threads)
    options = Options(
        args.k_core, args.min_user_events, args.min_item_events, args.min_value, args.dedup, args.dedup_window,
        args.session_gap, args.min_count, args.text_buckets, args.text_ngrams, args.quantiles,
        args.keep_unseen_items, args.max_dropped, parse_tables(args.tables),
    )  # fmt: skip
    report = prepare(SOURCES[args.source](args), args.output, options, args.overwrite, machine, secret)
    _tell(report, args.output, time.monotonic() - started)


LEAST = {
    "k_core": 0, "min_user_events": 0, "min_item_events": 0, "dedup_window": 0, "session_gap": 0, "min_count": 1,
    "text_buckets": 1, "text_ngrams": 1, "quantiles": 2, "threads": 0,
}  # fmt: skip
"""Least value of an option."""
LEAST_MEMORY = GIB
"""Bytes that Python and the engine themselves need."""


def _check_input(source: str, path: str | None) -> None:
    if source == "synthetic":
        if path is not None:
            raise DataError(f"--input {path}: the source 'synthetic' reads nothing; name yours with --source")
        return
    if path is None:
        raise DataError(f"--input: name the folder or file of the source '{source}'")
    if "://" not in path and not Path(path).exists() and path == glob.escape(path):
        raise DataError(f"{path}: not found; --input must name the folder or file of the source")


def _tell(report: dict[str, Any], output: Path, seconds: float) -> None:
    made_up = " (synthetic: made up from a seed)" if report["source"] == "synthetic" else ""
    dropped = report["rows_read"] - report["rows_kept"]
    print(
        f"{output}: {report['rows_kept']} events of {report['users']} users with {report['items']} items{made_up};"
        f" {dropped} of {report['rows_read']} rows dropped, sparsity {report['sparsity']:.4%}, {seconds:.1f} s"
    )
    for reason, detail in report["dropped"].items():
        print(visible(f"  dropped {detail['rows']}: {reason} (e.g. {detail['examples'][0]})"))
    if report["items_without_features"]:
        print(f"  {report['items_without_features']} items have no features: only their ids tell of them")
    sys.stdout.flush()
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    print(f"next: flm train --data.path {output}")


def _synthetic(args: argparse.Namespace) -> Raw:
    from flm_torchrec.prepare.sources import synthetic

    given = {name: getattr(args, f"synthetic_{name}") for name in vars(synthetic.Recipe())}
    return synthetic.read(synthetic.Recipe(**given))


def _movielens(args: argparse.Namespace) -> Raw:
    from flm_torchrec.prepare.sources import movielens

    return movielens.read(Path(args.input))


def _s3rec(args: argparse.Namespace) -> Raw:
    from flm_torchrec.prepare.sources import s3rec

    return s3rec.read(Path(args.input))


def _logs(args: argparse.Namespace) -> Raw:
    from flm_torchrec.prepare.sources import logs
    from flm_torchrec.prepare.sources.form import Form, Numbers
    from flm_torchrec.prepare.sources.sides import Side

    entities: tuple[Entity, ...] = ("item", "user")
    sides = {}
    for side in entities:
        file, option = getattr(args, f"{side}s"), f"--{side}-features"
        kinds = logs.parse_kinds(getattr(args, f"{side}_features"), option)
        if kinds and file is None:
            raise DataError(f"{option}: name the file that has them with --{side}s")
        if file is not None:
            sides[side] = Side(file, getattr(args, f"{side}_key"), kinds)
    columns = logs.parse_columns(args.columns)
    separator, listed = (sign.replace("\\t", "\t") for sign in (args.separator, args.list_separator))  # as typed
    numbers = Numbers(args.decimal, args.thousands, args.currency)
    form = Form(separator, listed, args.encoding, args.multiline, numbers)
    mapping = logs.Mapping(columns, args.time_unit, form, sides, args.title, args.duplicates)
    return logs.read(args.source, args.input, mapping)


SOURCES: dict[str, Callable[[argparse.Namespace], Raw]] = {
    "synthetic": _synthetic,
    "movielens-100k": _movielens,
    "amazon-s3rec": _s3rec,
    "parquet": _logs,
    "csv": _logs,
    "jsonl": _logs,
}
"""What reads a source."""
