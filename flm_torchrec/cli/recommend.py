"""`flm recommend`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.table import Table


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `recommend` to the subcommands."""
    parser = subparsers.add_parser(
        "recommend",
        help="recommend items to a user or to many, or by paths from an item, from an export alone",
        description="Recommend items to a user, or to many users into a Parquet file, or items that are one or two hops"
        " from an item, from an export alone.",
        allow_abbrev=False,
    )
    parser.add_argument("--export", required=True, metavar="DIR", help="folder of 'flm export'")
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("--user", metavar="KEY", help="one user, by the id of the source")
    whom.add_argument(
        "--users",
        metavar="FILE",
        help="these users: text with an id a line (.txt), or Parquet, CSV or JSON lines with a column user",
    )
    whom.add_argument("--all", action="store_true", help="all users")
    whom.add_argument("--item", metavar="KEY", help="no user: items that are near this item, or that paths lead to")
    parser.add_argument(
        "--hops",
        type=int,
        choices=(1, 2),
        help="of --item: 1: the nearest items (default); 2: items over users or items",
    )
    parser.add_argument(
        "--over", choices=("users", "items"), help="of --hops 2: what paths lead over (default: users who had the item)"
    )
    help_of_head = (
        f"one of {', '.join(REPRESENTATIONS)}; of --users and --all also all: lists by each of them, and a column head"
        " (default: %(default)s)"
    )
    parser.add_argument("-k", type=int, default=10, help="number of items (default: %(default)s)")
    parser.add_argument("--head", default="fused", help=help_of_head)
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="FEATURE=VALUE",
        help="only items with this value; may be repeated: one value of each feature must fit (default: all items)",
    )
    parser.add_argument(
        "--domain",
        metavar="NAME",
        help="only items of this domain, of a model of joint data, whatever the user's history is of (default: all)",
    )
    parser.add_argument("--include-seen", action="store_true", help="also items the user has had (default: without)")
    parser.add_argument("--json", action="store_true", help="of --user and --item: print JSON (default: a table)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.parquet",
        help="of --users and --all: file to write, with columns user, rank, item, title, score",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace older recommendations (default: refuse)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print recommendations for one user, or write those for many.

    Raises:
        FlmError: an option, the export or its target is wrong.
    """
    single = args.user is not None or args.item is not None
    if single and (args.output is not None or args.overwrite):
        raise ConfigError("--output: is of --users and --all; else give --json and redirect the output")
    _check_hops(args)
    if not single and (args.output is None or args.json):
        raise ConfigError("--output: name the Parquet file to write for --users and --all, which print no list")
    wanted = _filter(args.filter)
    if args.domain is not None:
        wanted.setdefault("domain", []).append(args.domain)
    if args.item is not None:
        _from_item(args, wanted)
        return
    if args.user is None:
        _write(args, wanted)
        return
    from flm_torchrec.export.recommend import ExportRecommender
    from flm_torchrec.terminal import PlainConsole

    found = ExportRecommender(args.export).recommend(args.user, args.k, args.head, args.include_seen, wanted)
    if args.json:
        # `item`, as the service answers and as events are given
        print(json.dumps([{"item": r.item_key, "title": r.title, "score": r.score} for r in found], indent=2))
        return
    table = _table(f"for user {args.user}, by {args.head}", "", "item", "title", "score")
    for place, r in enumerate(found, start=1):
        table.add_row(str(place), r.item_key, r.title, f"{r.score:.3f}")
    PlainConsole().print(table)


def _table(title: str, *columns: str) -> Table:
    """Without rows. Keys and titles that are too long go on in the next line: a key that is cut names no item."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        number = column in ("", "score")
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _check_hops(args: argparse.Namespace) -> None:
    """Raise ConfigError where options of --item are given without what they need."""
    if args.hops is not None and args.item is None:
        raise ConfigError("--hops: is of --item; name the item that paths begin at")
    if args.over is not None and args.hops != 2:
        raise ConfigError("--over: is of --hops 2; give both")
    if args.item is not None and (args.include_seen or args.head != "fused"):
        raise ConfigError("--include-seen, --head: are of users; leave them out with --item")


def _from_item(args: argparse.Namespace, wanted: dict[str, list[str]]) -> None:
    """Print the items that are one or two hops from an item, each with its path."""
    from flm_torchrec.api.recommender import Recommender
    from flm_torchrec.terminal import PlainConsole

    recommender = Recommender(args.export, frame="arrow")
    if args.hops == 2:
        found = recommender.hops(args.item, args.k, over=args.over or "users", filter=wanted)
        paths = [[row["item"], row["via"], row["reached"]] for row in found.to_pylist()]
    else:
        found = recommender.similar_items([args.item], args.k, filter=wanted)
        paths = [[row["item"], row["similar"]] for row in found.to_pylist()]
    rows = [
        {"item": path[-1], "title": row["title"], "score": row["score"], "path": path}
        for path, row in zip(paths, found.to_pylist(), strict=True)
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    table = _table(f"from item {args.item}", "", "item", "title", "score", "path")
    for place, row in enumerate(rows, start=1):
        table.add_row(str(place), row["item"], row["title"], f"{row['score']:.3f}", " → ".join(row["path"]))
    PlainConsole().print(table)


def _write(args: argparse.Namespace, wanted: dict[str, list[str]]) -> None:
    # Imported here: a wrong option should be reported at once.
    from flm_torchrec.export.recommend import ExportRecommender, RecommendOptions
    from flm_torchrec.export.recommend_file import EVERY_HEAD, check_output_file, write_recommendations
    from flm_torchrec.prepare.sources.user_list import read_users

    check_output_file(args.output, args.overwrite)
    users = read_users(args.users) if args.users else None
    options = RecommendOptions(args.k, args.head, args.include_seen, wanted)
    recommender = ExportRecommender(args.export)
    began = time.monotonic()
    written = write_recommendations(recommender, args.output, options, users, args.overwrite)
    seconds = time.monotonic() - began
    by = "all heads" if args.head == EVERY_HEAD else args.head
    print(
        f"{args.output}: {written.rows} recommendations by {by} for {written.users} users in {seconds:.1f} s,"
        f" {written.users / max(seconds, 1e-9):.0f} users/s; model {recommender.manifest.model_version}"
    )


def _filter(given: list[str]) -> dict[str, list[str]]:
    """`genre=war`, `genre=comedy`, `year=1994` → values by feature."""
    wanted: dict[str, list[str]] = {}
    for part in given:
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise RunError(f"--filter '{part}': write it as FEATURE=VALUE, such as --filter genre=comedy")
        wanted.setdefault(name, []).append(value)
    return wanted
