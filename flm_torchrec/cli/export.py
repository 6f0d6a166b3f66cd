"""`flm export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from flm_torchrec.api.export import ExportChoices, Tower, export_run
from flm_torchrec.config import add_data_path, given_options, given_overrides
from flm_torchrec.export.manifest import RECALL, IndexKind, Manifest, MapMethod, Quantise, Storage

if TYPE_CHECKING:
    from flm_torchrec.export.delta import Delta


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `export` to the subcommands."""
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
        "--quantise",
        choices=get_args(Quantise),
        help="store vectors in half or a quarter of the space; the cost is measured and printed (default: none)",
    )
    parser.add_argument(
        "--index",
        choices=get_args(IndexKind),
        help="faiss index: flat is exact, hnsw faster for millions of items, ivfpq also smaller (default: flat)",
    )
    parser.add_argument(
        "--recall",
        type=float,
        metavar="PART",
        help="recall@100 that the index promises, of each head beside brute force; a flat index takes the place of one"
        f" that stays below, which is printed and written to manifest.json (default: {RECALL})",
    )
    parser.add_argument(
        "--since",
        type=Path,
        metavar="DIR",
        help="write a delta: only the rows that differ from this older export, in its format",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="PART",
        help="with --since: a row whose vectors have each moved by at most this part of their length, and that is the"
        " same otherwise, is not in the delta (default: 0, every bit counts)",
    )
    _add_tower(parser)
    add_data_path(parser)
    parser.set_defaults(run=run)


def _add_tower(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tower",
        choices=get_args(Tower),
        default="int8",
        help="package the user tower beside the vectors, for 'flm serve'; its tables' rows as (default: %(default)s)",
    )
    parser.add_argument(
        "--onnx", action="store_true", help="write the packaged user tower as ONNX too, tower/user.onnx (default: no)"
    )
    drawn = "how the web page's map is drawn (default: umap where umap-learn is installed, pca elsewhere)"
    parser.add_argument("--map", choices=get_args(MapMethod), dest="item_map", help=drawn)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the packaged user tower for this machine, into your cache; takes about a minute, once for all"
        " exports of a model's shape (default: no)",
    )


def run(args: argparse.Namespace) -> None:
    """Export the best model of a run, complete or as a delta, and print one line about the export.

    Raises:
        FlmError: an option, the run, its data or the output is wrong.
    """
    # Imported here: every command reads this file to build its help.
    from flm_torchrec.export.item_map import method_of, method_used

    how = args.format, args.quantise, args.index, args.recall, args.tower, args.onnx, args.item_map, args.compile
    choices = ExportChoices(*how, args.since, args.tolerance)
    options = given_overrides(args), given_options(args)
    done = export_run(args.run_folder, args.output, choices, args.overwrite, *options)
    if done is not None:
        told = summary(done) if isinstance(done, Manifest) else f"{_changes(done)}; since model {done.base_version}"
        used = method_used(args.output)
        why = " (UMAP needs umap-learn)" if args.item_map is None and used == method_of(None) == "pca" else ""
        print(f"{args.output}: {told}; map by {used.upper()}{why}")


def _changes(delta: Delta) -> str:
    parts = [
        f"{delta.changed[e]} of {total} {e} new or changed, {delta.removed[e]} gone"
        for e, total in (("items", delta.whole.items), ("users", delta.whole.users))
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
