"""`flm export`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from flm_torchrec.config import add_data_path, given_options, given_overrides
from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import RECALL, IndexKind, Manifest, Quantise, Storage, read_manifest

TOWERS = ("int8", "fp32", "none")

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
        "--tower",
        choices=TOWERS,
        default="int8",
        help="package the user tower beside the vectors, for 'flm serve'; its tables' rows as (default: %(default)s)",
    )
    add_data_path(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export the best model of a run, complete or as a delta, and print one line about the export.

    Raises:
        FlmError: an option, the run, its data or the output is wrong.
    """
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.data.splits import everyone
    from flm_torchrec.export.delta import export_delta
    from flm_torchrec.export.quality import ValidationSet
    from flm_torchrec.export.tower.writer import write_tower
    from flm_torchrec.export.write import ExportOptions, ExportSource, check_output, export
    from flm_torchrec.training.gathered import GatheredModel
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
        job, valid = restored.job, restored.job.events.splits.valid
        encoder = job.encoder(everyone(job.data))
        validation = ValidationSet(job.encoder(valid), valid)
        source = ExportSource(job.data, encoder, job.train_stats.items > 0, restored.version, validation)
        if args.tower != "none":
            model, main = GatheredModel(job), job.comm.rank == 0
            source = replace(source, beside=lambda folder: write_tower(job.data, model, main, args.tower, folder))
        options = ExportOptions(
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
