"""`flm recommend`."""

from __future__ import annotations

import argparse
import json

from flm_torchrec.config.heads import REPRESENTATIONS


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `recommend` to the subcommands."""
    parser = subparsers.add_parser(
        "recommend",
        help="recommend items to a user, from an export alone",
        description="Recommend items to a user, from an export alone.",
        allow_abbrev=False,
    )
    parser.add_argument("--export", required=True, metavar="DIR", help="folder of 'flm export'")
    parser.add_argument("--user", required=True, metavar="KEY", help="user, by the id of the source")
    parser.add_argument("-k", type=int, default=10, help="number of items (default: %(default)s)")
    parser.add_argument("--head", default="fused", help=f"one of {', '.join(REPRESENTATIONS)} (default: %(default)s)")
    parser.add_argument("--include-seen", action="store_true", help="also items the user has had (default: without)")
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print recommendations for one user, as a table or as JSON.

    Raises:
        FlmError: an option, the export or its target is wrong.
    """
    from rich.table import Table

    from flm_torchrec.export.recommend import Recommender
    from flm_torchrec.terminal import PlainConsole

    found = Recommender(args.export).recommend(args.user, args.k, args.head, args.include_seen)
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
