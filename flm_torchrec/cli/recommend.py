"""`flm recommend`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.errors import ConfigError, RunError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `recommend` to the subcommands."""
    parser = subparsers.add_parser(
        "recommend",
        help="recommend items to a user or to many, from an export alone",
        description="Recommend items to a user, or to many users into a Parquet file, from an export alone.",
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
    parser.add_argument("-k", type=int, default=10, help="number of items (default: %(default)s)")
    parser.add_argument("--head", default="fused", help=f"one of {', '.join(REPRESENTATIONS)} (default: %(default)s)")
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
    parser.add_argument("--json", action="store_true", help="of --user: print JSON (default: a table)")
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
    if args.user is not None and (args.output is not None or args.overwrite):
        raise ConfigError("--output: is of --users and --all; for one user give --json and redirect the output")
    if args.user is None and (args.output is None or args.json):
        raise ConfigError("--output: name the Parquet file to write for --users and --all, which print no list")
    wanted = _filter(args.filter)
    if args.domain is not None:
        wanted.setdefault("domain", []).append(args.domain)
    if args.user is None:
        _write(args, wanted)
        return
    from rich.table import Table

    from flm_torchrec.export.recommend import ExportRecommender
    from flm_torchrec.terminal import PlainConsole

    found = ExportRecommender(args.export).recommend(args.user, args.k, args.head, args.include_seen, wanted)
    if args.json:
        # `item`, as the service answers and as events are given
        print(json.dumps([{"item": r.item_key, "title": r.title, "score": r.score} for r in found], indent=2))
        return
    table = Table(title=f"for user {args.user}, by {args.head}", title_justify="left")
    for column in ("", "item", "title", "score"):
        table.add_column(column, justify="right" if column in ("", "score") else "left")
    for place, r in enumerate(found, start=1):
        table.add_row(str(place), r.item_key, r.title, f"{r.score:.3f}")
    PlainConsole().print(table)


def _write(args: argparse.Namespace, wanted: dict[str, list[str]]) -> None:
    # Imported here: a wrong option should be reported at once.
    from flm_torchrec.export.recommend import ExportRecommender, RecommendOptions
    from flm_torchrec.export.recommend_file import check_output_file, write_recommendations
    from flm_torchrec.prepare.sources.user_list import read_users

    check_output_file(args.output, args.overwrite)
    users = read_users(args.users) if args.users else None
    options = RecommendOptions(args.k, args.head, args.include_seen, wanted)
    recommender = ExportRecommender(args.export)
    began = time.monotonic()
    written = write_recommendations(recommender, args.output, options, users, args.overwrite)
    seconds = time.monotonic() - began
    print(
        f"{args.output}: {written.rows} recommendations by {args.head} for {written.users} users in {seconds:.1f} s,"
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
