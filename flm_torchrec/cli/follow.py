"""`flm follow`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from flm_torchrec.config import add_data_path, given_overrides
from flm_torchrec.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `follow` to the subcommands."""
    parser = subparsers.add_parser(
        "follow",
        help="train a run further on new events as they come, from a folder or Kafka",
        description="Train a run's best model further on new events as they come: complete Parquet or JSONL files put"
        " into a folder, or messages of a Kafka topic, JSON or Avro. Started again, it resumes. New users and items"
        " come in. Rows that cannot be learnt from are counted in OUTPUT/follow.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, dest="run_folder", type=Path, metavar="DIR", help="run of 'flm train'")
    parser.add_argument("--source", required=True, metavar="URL", help="folder, or kafka://HOST:PORT/TOPIC")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="run folder to write or to resume")
    _add_row_form(parser)
    parser.add_argument(
        "--admit-after",
        type=int,
        default=1,
        metavar="N",
        help="take in an unknown user, or an unknown item without features, when it is seen for the Nth time; 0: refuse"
        " unknown users and items (default: %(default)s)",
    )
    parser.add_argument(
        "--expire-after",
        type=int,
        default=0,
        metavar="DAYS",
        help="forget what was learnt of a user or an item that has had no event for so long; 0: never"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--items",
        type=Path,
        metavar="FILE",
        help="Parquet, JSONL or CSV with features of items: its new items come in at once; read again when it changes",
    )
    parser.add_argument(
        "--avro-schema",
        default="",
        metavar="FILE",
        help="schema (.avsc) of the messages of a topic, which are then Avro, with Confluent's header or without;"
        " ID=FILE,… of several schemas, by their ids in the header (default: JSON)",
    )
    parser.add_argument("--once", action="store_true", help="end when there is nothing new (default: wait for more)")
    add_data_path(parser)
    parser.set_defaults(run=run)


def _add_row_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--columns",
        default="",
        metavar="FIELD=NAME,...",
        help="names in the source of user, item, timestamp, event, value, weight and features of events"
        " (default: the same)",
    )
    parser.add_argument(
        "--time-unit",
        choices=("s", "ms", "us", "ns"),
        default="s",
        help="unit of numeric timestamps; dates are read as they are (default: %(default)s)",
    )
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="secret that 'flm prepare --hash-users' hashed the ids of users with; the source has them as they were"
        " before (default: it has them hashed, if the run's are)",
    )


def run(args: argparse.Namespace) -> None:
    """Learn from new events of a source, and print how many.

    Raises:
        FlmError: an option, the run, its data, the source or the output is wrong.
    """
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.training.follow.events import RowForm
    from flm_torchrec.training.follow.follower import FollowOptions, follow

    columns = {}
    for part in filter(None, args.columns.split(",")):
        field, equals, name = part.partition("=")
        if not equals:
            raise ConfigError(f"--columns '{part}': write it as FIELD=NAME, such as user=user_id")
        columns[field] = name
    form = RowForm(columns, args.time_unit, args.key_file)
    options = FollowOptions(
        form, args.once, args.admit_after, args.expire_after, args.items, avro_schema=args.avro_schema
    )
    counts = follow(args.run_folder, args.source, args.output, options, given_overrides(args))
    if os.environ.get("RANK", "0") == "0":
        new = f"; {counts['users']} new users, {counts['items']} new items" if counts["users"] + counts["items"] else ""
        new += f"; {counts['left_out']} values of features without a row" if counts["left_out"] else ""
        new += f"; {counts['changed']} items with other features in the item file" if counts["changed"] else ""
        print(f"{args.output}: {counts['events']} events learnt from, {counts['refused']} rows refused{new}")
