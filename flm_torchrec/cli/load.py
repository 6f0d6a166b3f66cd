"""`flm load`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.export.manifest import Vectors

VECTORS = tuple(dict.fromkeys((*get_args(Vectors), *REPRESENTATIONS)))


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `load` to the subcommands."""
    parser = subparsers.add_parser(
        "load",
        help="put the items or users of an export into a vector database",
        description="Put the items of an export, with keys, titles, attributes and model version, or its users with"
        " keys and model version, into Qdrant, Milvus, LanceDB, PostgreSQL or OpenSearch, or bring a collection there"
        " up to date by a delta. Done again it changes nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("--export", required=True, type=Path, metavar="DIR", help="export, or delta, to load")
    parser.add_argument(
        "--to",
        required=True,
        metavar="KIND:PLACE",
        help="qdrant:FOLDER, milvus:FILE.db, lancedb:FOLDER, postgresql://USER@HOST/DATABASE, or the URL of a server"
        " after qdrant:, milvus: or opensearch:",
    )
    parser.add_argument("--entity", choices=("items", "users"), default="items", help="(default: %(default)s)")
    parser.add_argument("--collection", metavar="NAME", help="or table, or index (default: as --entity)")
    parser.add_argument(
        "--vectors",
        choices=VECTORS,
        default="",
        help="of an item embedding, content or id, where embedding is what all heads score against; of a user a head"
        " or fused (default: embedding, or fused)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load an export or a delta into a vector database, and print what changed.

    Raises:
        FlmError: an option, the export or its target is wrong.
    """
    from flm_torchrec.export.stores.load import Chosen, load

    collection = args.collection or args.entity
    loaded = load(args.export, args.to, collection, Chosen(args.entity, args.vectors))
    print(f"{collection}: {loaded.upserted} {args.entity} put in, {loaded.deleted} taken out, {loaded.total} there now")
