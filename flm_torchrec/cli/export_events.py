"""`flm export-events`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `export-events` to the subcommands."""
    parser = subparsers.add_parser(
        "export-events",
        help="write the live events of 'flm serve' as a log for the next training",
        description="Write the live events that 'flm serve' has kept into a folder of Parquet files, which 'flm follow"
        " --source DIR' and 'flm prepare --source parquet' read. Given again, it adds a file of the events since. The"
        " server may run meanwhile.",
        allow_abbrev=False,
    )
    parser.add_argument("--events", required=True, metavar="FILE", help="store of 'flm serve --events'")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--items", type=Path, metavar="FILE", help="also write the cold items as JSON lines, for 'flm prepare --items'"
    )
    parser.add_argument(
        "--event-features",
        default="",
        metavar="NAME,...",
        help="features of events, such as device, that get a column of their own",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the events that the folder lacks, and print how many.

    Raises:
        FlmError: there is no such store, or the output cannot be written.
    """
    # Imported here: a wrong option should be reported at once.
    from flm_torchrec.serve.event_log import check_names, export_events, export_items
    from flm_torchrec.serve.live_store import existing_store

    features = [name.strip() for name in args.event_features.split(",") if name.strip()]
    check_names(features)
    store = existing_store(args.events)
    done = export_events(store, args.output, features)
    gone = f"; {done.missing} before them are not there any more (dropped by the limits of 'flm serve', or forgotten)"
    print(f"{args.output}: {done.written} new events{gone if done.missing else ''}")
    for name, events in done.left_out.items():
        print(f"note: {events} of them have a {name}, which is not written; name it with --event-features {name}")
    if args.items:
        print(f"{args.items}: {export_items(store, args.items)} cold items")
    store.close()
