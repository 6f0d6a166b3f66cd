"""`flm export`, `flm apply-delta`, `flm load` and `flm recommend`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from flm_torchrec.config import add_data_path, given_options, given_overrides
from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import RECALL, Kind, Manifest, Quantise, Storage, Vectors, read_manifest

TOWERS = ("int8", "fp32", "none")

if TYPE_CHECKING:
    from flm_torchrec.export.delta import Delta


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    _add_export(subparsers)
    _add_apply_delta(subparsers)
    _add_load(subparsers)
    _add_recommend(subparsers)


def _add_export(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write user and item embeddings as Parquet, and a faiss index",
        description="Write the embeddings of a run's best model: users by each head and fused, items in the one space"
        " that all heads score against, and a faiss index over the items.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="run folder of 'flm train'")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an older export (default: refuse)")
    parser.add_argument("--format", choices=get_args(Storage), help="of the rows (default: parquet)")
    parser.add_argument(
        "--quantise", choices=get_args(Quantise),
        help="store vectors in half or a quarter of the space; what it costs is told (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--index", choices=get_args(Kind),
        help="faiss index: flat is exact, hnsw faster for millions of items, ivfpq also smaller (default: flat)",
    )  # fmt: skip
    parser.add_argument(
        "--recall", type=float, metavar="PART",
        help="recall@100 that the index promises, of each head beside brute force; a flat index takes the place of one"
        f" that stays below, which is told and stands in manifest.json (default: {RECALL})",
    )  # fmt: skip
    parser.add_argument(
        "--since", type=Path, metavar="DIR",
        help="write a delta: only the rows that differ from this older export, in its format",
    )  # fmt: skip
    parser.add_argument(
        "--tower", choices=TOWERS, default="int8",
        help="package the user tower beside the vectors, for 'flm serve'; its tables' rows as (default: %(default)s)",
    )  # fmt: skip
    add_data_path(parser)
    parser.set_defaults(run=run_export)


def _add_apply_delta(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "apply-delta",
        help="bring an older export up to date by a delta",
        description="Write the export that a delta of 'flm export --since' leads to: the rows bit for bit those of a"
        " whole export, and an index of the kind that the older export has.",
        allow_abbrev=False,
    )
    parser.add_argument("--base", required=True, type=Path, metavar="DIR", help="the older export")
    parser.add_argument("--delta", required=True, type=Path, metavar="DIR", help="folder of 'flm export --since'")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an older export (default: refuse)")
    parser.set_defaults(run=run_apply_delta)


def _add_load(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "load",
        help="put the items of an export into a vector database",
        description="Put the items of an export, with keys, titles, attributes and model version, into Qdrant, Milvus,"
        " LanceDB or PostgreSQL, or bring a collection there up to date by a delta. Done again it changes nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("--export", required=True, type=Path, metavar="DIR", help="export, or delta, to load")
    parser.add_argument(
        "--to", required=True, metavar="KIND:PLACE",
        help="qdrant:FOLDER, milvus:FILE.db, lancedb:FOLDER, postgresql://USER@HOST/DATABASE, or the URL of a server"
        " after qdrant: or milvus:",
    )  # fmt: skip
    parser.add_argument("--collection", default="items", metavar="NAME", help="or table (default: %(default)s)")
    parser.add_argument(
        "--vectors", choices=get_args(Vectors), default="embedding",
        help="which view of an item: embedding is what all heads score against (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run_load)


def _add_recommend(subparsers: argparse._SubParsersAction) -> None:
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
    parser.set_defaults(run=run_recommend)


def run_export(args: argparse.Namespace) -> None:
    # Imported here: PyTorch takes seconds, and a wrong option should be told at once.
    from flm_torchrec.data.splits import everyone
    from flm_torchrec.export.delta import export_delta
    from flm_torchrec.export.quality import Held
    from flm_torchrec.export.tower.writer import write_tower
    from flm_torchrec.export.write import Options, Source, check_output, export
    from flm_torchrec.training.gathered import PackagedModel
    from flm_torchrec.training.restore import restore

    check_output(args.output, args.overwrite)
    older = read_manifest(args.since) if args.since else None
    if older is not None and args.output.resolve() == args.since.resolve():
        raise RunError(f"{args.output}: is what the delta is to be applied to; give another --output")
    if older is not None and args.index:
        raise RunError("--index: a delta has none; 'flm apply-delta' makes one of the kind that the older export has")
    if args.recall is not None and (older is not None or not 0 < args.recall <= 1):
        raise RunError(f"--recall {args.recall}: give a number above 0 and up to 1, and not with --since")
    with restore(args.run_folder, given_overrides(args), options=given_options(args)) as restored:
        job, valid = restored.job, restored.job.scope.splits.valid
        encoder = job.encoder(everyone(job.data))
        held = Held(job.encoder(valid), valid)
        source = Source(job.data, encoder, job.known.items > 0, restored.version, held)
        if args.tower != "none":
            model, main = PackagedModel(job), job.comm.rank == 0
            source = replace(source, beside=lambda folder: write_tower(job.data, model, main, args.tower, folder))
        options = Options(
            storage=args.format or (older.storage if older else "parquet"),
            quantise=args.quantise or (older.quantise if older else "none"),
            index=args.index or "flat",
            recall=RECALL if args.recall is None else args.recall,
            user_block=job.config.eval.user_block,
            item_block=job.config.eval.item_block,
        )
        if older is not None:
            delta = export_delta(source, job.comm, args.since, args.output, options, args.overwrite)
            done = None if delta is None else f"{_changes(delta)}; since model {delta.base_version}"
        else:
            manifest = export(source, job.comm, args.output, options, args.overwrite)
            done = None if manifest is None else summary(manifest)
    if done is not None:
        print(f"{args.output}: {done}")


def run_apply_delta(args: argparse.Namespace) -> None:
    from flm_torchrec.export.delta import apply_delta

    print(f"{args.output}: {summary(apply_delta(args.base, args.delta, args.output, args.overwrite))}")


def run_load(args: argparse.Namespace) -> None:
    from flm_torchrec.export.stores.load import load

    loaded = load(args.export, args.to, args.collection, args.vectors)
    print(f"{args.collection}: {loaded.upserted} items put in, {loaded.deleted} taken out, {loaded.total} there now")


def _changes(delta: Delta) -> str:
    parts = [
        f"{delta.changed[e]} of {whole} {e} new or changed, {delta.removed[e]} gone"
        for e, whole in (("items", delta.whole.items), ("users", delta.whole.users))
    ]
    return "; ".join(parts)


def summary(manifest: Manifest) -> str:
    """One line on what an export holds and what its index and quantising cost."""
    index, quality = manifest.index, manifest.quality
    line = f"{manifest.users} users x {len(manifest.heads)} heads, {manifest.items} items, {manifest.dim} numbers each"
    if index is not None:
        line += f"; {index.kind} index, {index.bytes_per_item:.0f} bytes an item, recall@100 {index.least:.4f}"
        if index.asked != index.kind:
            line += f" ({index.asked} did not reach the promised {index.promised:g}, so all items are searched)"
    if quality:
        line += f"; {manifest.quantise} changes NDCG@10 of validation by {quality['fused']['change']:+.2%}"
    return f"{line}; model {manifest.model_version}"


def run_recommend(args: argparse.Namespace) -> None:
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
