"""The IVF-PQ index of a large export, built in shards by processes or machines that see its folder.

Call `train_index` once, `build_shard` for each shard, in any order and place, and `merge_index` once.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from flm_torchrec.claim import claim
from flm_torchrec.errors import RunError
from flm_torchrec.export.index import INDEX, ROWS, check_memory, groups_of, merge_shards
from flm_torchrec.export.manifest import RECALL, IndexReport, read_manifest
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.shards import IndexShards
from flm_torchrec.files import path_of, sha256, telling


def train_index(export: str | os.PathLike[str], work: str | os.PathLike[str], shards: int) -> None:
    """Train an index of so many shards on a sample of the items, and write it into a folder.

    Args:
        export: folder of an export with no index (`flm export --index none`).
        work: a folder for the shards; those of an earlier training are removed.
        shards: from 1 to the number of parts of the items.

    Raises:
        RunError: the export has an index or too few distinct items, or the folder cannot be written.

    Example::

        train_index("exports/shop", "exports/shop-index", shards=16)
        for shard in range(16):     # or each on another machine
            build_shard("exports/shop", "exports/shop-index", shard)
        merge_index("exports/shop", "exports/shop-index")
    """
    items = _items(path_of(export, "export"))
    check_memory("ivfpq", items.count, items.dim)
    IndexShards.train(items, groups_of(items).first, path_of(work, "work"), shards)


def build_shard(export: str | os.PathLike[str], work: str | os.PathLike[str], shard: int) -> None:
    """Build one shard, and write it into the folder of `train_index`.

    Args:
        shard: its number, from 0.

    Raises:
        RunError: nothing was trained there for this export, there is no such shard, or it cannot be written.
    """
    IndexShards(_items(path_of(export, "export")), path_of(work, "work")).build(shard)


def merge_index(export: str | os.PathLike[str], work: str | os.PathLike[str], recall: float = RECALL) -> IndexReport:
    """Merge all shards, tune the index as `flm export` does, and put it into the export.

    The work folder may be removed afterwards. A server loads the export again when it is told to.

    Args:
        recall: recall@100 that the index promises; a flat index takes its place where it stays below.

    Raises:
        RunError: a shard is missing, or is of another export, training, width or metric, or the export has an index.
    """
    folder = path_of(export, "export")
    with claim(folder), telling(folder):
        items = _items(folder)
        shards = IndexShards(items, path_of(work, "work"))
        check_memory("ivfpq", items.count, items.dim)
        report = merge_shards(folder, items.manifest, shards, recall)
        files = {name: sha256(folder / name) for name in (INDEX, ROWS) if (folder / name).is_file()}
        replace(items.manifest, index=report, sha256=items.manifest.sha256 | files).save(folder)
    return report


def _items(folder: Path) -> ExportRows:
    manifest = read_manifest(folder)
    if manifest.index is not None:
        raise RunError(f"{folder}: has an index already; export with --index none")
    return ExportRows(folder, manifest, "items")
