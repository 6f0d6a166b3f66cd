"""`flm load`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from flm_torchrec.export.manifest import Vectors


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `load` to the subcommands."""
    parser = subparsers.add_parser(
        "load",
        help="put the items of an export into a vector database",
        description="Put the items of an export, with keys, titles, attributes and model version, into Qdrant, Milvus,"
        " LanceDB or PostgreSQL, or bring a collection there up to date by a delta. Done again it changes nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("--export", required=True, type=Path, metavar="DIR", help="export, or delta, to load")
    parser.add_argument(
        "--to",
        required=True,
        metavar="KIND:PLACE",
        help="qdrant:FOLDER, milvus:FILE.db, lancedb:FOLDER, postgresql://USER@HOST/DATABASE, or the URL of a server"
        " after qdrant: or milvus:",
    )
    parser.add_argument("--collection", default="items", metavar="NAME", help="or table (default: %(default)s)")
    parser.add_argument(
        "--vectors",
        choices=get_args(Vectors),
        default="embedding",
        help="which view of an item: embedding is what all heads score against (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load an export or a delta into a vector database, and print what changed.

    Raises:
        FlmError: an option, the export or its target is wrong.
    """
    from flm_torchrec.export.stores.load import load

    loaded = load(args.export, args.to, args.collection, args.vectors)
    print(f"{args.collection}: {loaded.upserted} items put in, {loaded.deleted} taken out, {loaded.total} there now")
