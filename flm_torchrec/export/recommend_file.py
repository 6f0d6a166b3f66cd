"""Recommendations for many users → one Parquet file, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.claim import claim
from flm_torchrec.errors import RunError
from flm_torchrec.export.recommend import COLUMNS, ExportRecommender, RecommendOptions
from flm_torchrec.files import replacing_file, telling

MARK = b"flm_recommendations"
"""Key of the file's metadata: the model version. Only a file that has it is replaced."""

HEAD = pa.field("head", pa.string())
"""Column of the heads, where there are several."""
EVERY_HEAD = "all"
"""In place of a head: all of the export, one after another, named in the column `head`."""


@dataclass(frozen=True)
class WrittenRecommendations:
    """What a file of recommendations holds."""

    users: int
    """Users with at least one item."""
    rows: int


def write_recommendations(
    recommender: ExportRecommender,
    output: Path,
    options: RecommendOptions,
    wanted: pa.Array | None = None,
    overwrite: bool = False,
) -> WrittenRecommendations:
    """Write the recommendations for all users, or for those with the wanted keys; the file appears complete or not.

    Args:
        options: `head` may be `EVERY_HEAD`.
        overwrite: replace an older file of recommendations; anything else is never replaced.

    Raises:
        RunError: a question that cannot be answered, an output that is there, or a disk that cannot be written.
    """
    check_output_file(output, overwrite)
    by_head = _by_head(recommender, options, wanted)
    columns = COLUMNS.append(HEAD) if options.head == EVERY_HEAD else COLUMNS
    users = dict.fromkeys(by_head, 0)
    rows = 0
    with claim(output), telling(output):
        check_output_file(output, overwrite)  # another process may have written it until now
        schema = columns.with_metadata({MARK: recommender.manifest.model_version})
        with replacing_file(output) as fresh, pq.ParquetWriter(fresh, schema) as writer:
            for head, table in ((head, table) for head, tables in by_head.items() for table in tables):
                named = table.append_column(HEAD, pa.repeat(head, len(table)))
                writer.write_table(named.select(columns.names).replace_schema_metadata(schema.metadata))
                rows += len(table)
                users[head] += int((table["rank"].to_numpy() == 1).sum())
    return WrittenRecommendations(max(users.values()), rows)


def _by_head(
    recommender: ExportRecommender, options: RecommendOptions, wanted: pa.Array | None
) -> dict[str, Iterator[pa.Table]]:
    """By head, the tables of `ExportRecommender.for_many`; everything is checked now, and computed later."""
    heads = recommender.manifest.heads if options.head == EVERY_HEAD else [options.head]
    return {head: recommender.for_many(replace(options, head=head), wanted) for head in heads}


def check_output_file(output: Path, overwrite: bool) -> None:
    """Raise RunError unless the output is a new file, or an older one of recommendations that may be replaced."""
    if output.suffix != ".parquet":
        raise RunError(f"{output}: recommendations are Parquet; give an --output that ends in .parquet")
    if not output.exists():
        return
    if not _is_ours(output):
        raise RunError(f"{output}: exists and holds no recommendations, so it is not replaced; give another --output")
    if not overwrite:
        raise RunError(f"{output}: exists; give another --output, or --overwrite to replace it")


def _is_ours(file: Path) -> bool:
    try:
        return file.is_file() and MARK in (pq.read_schema(file).metadata or {})
    except (pa.ArrowException, OSError):
        return False
