"""Recommendations for many users → one Parquet file, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.claim import claim
from flm_torchrec.errors import RunError
from flm_torchrec.export.recommend import COLUMNS, ExportRecommender, RecommendOptions
from flm_torchrec.files import replacing_file, telling

MARK = b"flm_recommendations"
"""Key of the file's metadata: the model version. Only a file that has it is replaced."""


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
        overwrite: replace an older file of recommendations; anything else is never replaced.

    Raises:
        RunError: a question that cannot be answered, an output that is there, or a disk that cannot be written.
    """
    check_output_file(output, overwrite)
    tables = recommender.for_many(options, wanted)
    users = rows = 0
    with claim(output), telling(output):
        check_output_file(output, overwrite)  # another process may have written it until now
        schema = COLUMNS.with_metadata({MARK: recommender.manifest.model_version})
        with replacing_file(output) as fresh, pq.ParquetWriter(fresh, schema) as writer:
            for table in tables:
                writer.write_table(table.replace_schema_metadata(schema.metadata))
                rows += len(table)
                users += int((table["rank"].to_numpy() == 1).sum())
    return WrittenRecommendations(users, rows)


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
