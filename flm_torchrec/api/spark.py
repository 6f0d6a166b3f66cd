"""Recommendations for more users than one machine serves: Spark maps partitions of their histories, or of an export."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.config.heads import FUSED
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.manifest import Manifest, load_manifest
from flm_torchrec.names import nearest

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SCHEMA = "user string, rank int, item string, title string, score float"
"""Columns of the result, as of `Recommender.recommend`."""
VECTORS = "user string, embedding array<float>"
"""Columns of the vectors of users."""
NEEDED = ("user", "item", "timestamp")
EVENTS = 100_000
"""Events that are answered at once, unless one user has more."""


def recommend(histories: DataFrame, export: str | os.PathLike[str], k: int = 10, **options: Any) -> DataFrame:
    """The k best items for each user of a table of events, as `Recommender.recommend` answers histories.

    Every executor needs flm_torchrec and opens the export under the same path, once a partition: have about as many
    partitions (`spark.sql.shuffle.partitions`) as cores. Nothing is computed before Spark runs the result.

    Args:
        histories: columns `user`, `item` and `timestamp`, and if you have them `event`, `value` and features of events.
            Events of a user at one time are in the order of their items.
        options: `head`, `filter` and `include_seen` of `Recommender.recommend`.

    Returns:
        Columns `user`, `rank` (from 1), `item`, `title`, `score`.

    Raises:
        FlmError: a column is missing, or there is no such export. What is wrong with a row or an option is the last
            line of the error that Spark gives when it runs.

    Example::

        events = session.read.parquet("logs/").withColumnsRenamed({"uid": "user", "sku": "item", "ts": "timestamp"})
        recommend(events, "exports/shop", k=20).write.parquet("recommendations/")
    """
    for name in NEEDED:
        if name not in histories.columns:
            raise DataError(
                f"histories: no column '{name}'; Spark keeps no order of rows, so user, item and time count"
            )
    load_manifest(Path(export))
    by_user = histories.repartition("user").sortWithinPartitions("user", "timestamp", "item")
    return by_user.mapInArrow(partial(_answers, export=os.fspath(export), k=k, options=options), SCHEMA)


def recommend_known(session: SparkSession, export: str | os.PathLike[str], k: int = 10, **options: Any) -> DataFrame:
    """The k best items for each user of an export, as `flm recommend --all` gives them.

    Spark maps the part files of the users. Every executor needs flm_torchrec and opens the items and the index of the
    export under the same path, once a partition. The files are checked once, here. Forgotten users are left out.

    Args:
        options: `head`, `filter` and `include_seen` of `Recommender.recommend`.

    Returns:
        Columns `user`, `rank` (from 1), `item`, `title`, `score`.

    Raises:
        FlmError: there is no such export, or it has changed. What is wrong with an option is the last line of the error
            that Spark gives when it runs.

    Example::

        recommend_known(session, "exports/shop", k=20).write.parquet("recommendations/")
    """
    manifest = load_manifest(Path(export))
    answers = partial(_answers_to_known, export=os.fspath(export), manifest=manifest, options={"k": k, **options})
    return _parts_of(session, manifest).mapInArrow(answers, SCHEMA)


def known_vectors(session: SparkSession, export: str | os.PathLike[str], head: str = FUSED) -> DataFrame:
    """The vectors of all users of an export by one head, as float32 however they are stored.

    Spark maps the part files of the users, which each executor sees under the same path. The files are checked once,
    here. Forgotten users are left out.

    Returns:
        Columns `user`, and `embedding`: D numbers.

    Raises:
        FlmError: there is no such export or head, or the export has changed.

    Example::

        known_vectors(session, "exports/shop").write.parquet("vectors/")
    """
    manifest = load_manifest(Path(export))
    if head not in manifest.heads:
        raise RunError(f"known_vectors: no head '{head}'; {nearest(head, manifest.heads)}")
    vectors = partial(_vectors_of_known, export=os.fspath(export), manifest=manifest, head=head)
    return _parts_of(session, manifest).mapInArrow(vectors, VECTORS)


def _parts_of(session: SparkSession, manifest: Manifest) -> DataFrame:
    """Numbers of the parts of the users."""
    return session.range(-(-manifest.users // manifest.part_rows))


def _answers_to_known(
    batches: Iterable[pa.RecordBatch], export: str, manifest: Manifest, options: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The recommendations for the users of some parts, in a process of an executor."""
    import faiss

    from flm_torchrec.export.recommend import ExportRecommender, RecommendOptions

    faiss.omp_set_num_threads(1)  # Spark has a process for each core
    parts = [number for batch in batches for number in batch["id"].to_pylist()]
    if parts:
        recommender = ExportRecommender(export, manifest)
        recommender.users = recommender.users.only(parts)
        for table in recommender.for_many(RecommendOptions(**options)):
            yield from table.combine_chunks().to_batches()


def _vectors_of_known(
    batches: Iterable[pa.RecordBatch], export: str, manifest: Manifest, head: str
) -> Iterator[pa.RecordBatch]:
    """The vectors of the users of some parts, in a process of an executor."""
    from flm_torchrec.export.parts import ExportRows
    from flm_torchrec.export.vectors import decode

    users = ExportRows(Path(export), manifest, "users")
    parts = [number for batch in batches for number in batch["id"].to_pylist()]
    for table in users.only(parts).known(["user_key", head]):
        vectors = decode(table[head])
        ends = pa.array(np.arange(len(vectors) + 1, dtype=np.int32) * np.int32(manifest.dim))
        columns = {"user": table["user_key"], "embedding": pa.ListArray.from_arrays(ends, pa.array(vectors.ravel()))}
        yield from pa.table(columns).combine_chunks().to_batches()


def _answers(
    batches: Iterable[pa.RecordBatch], export: str, k: int, options: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The recommendations of a partition, in a process of an executor."""
    import faiss
    import torch

    from flm_torchrec.api.recommender import Recommender

    torch.set_num_threads(1)  # Spark has a process for each core
    faiss.omp_set_num_threads(1)
    recommender = None
    for table in _complete_users(batches, EVENTS):
        recommender = recommender or Recommender(export, frame="arrow")
        yield from recommender.recommend(table, k, **options).to_batches()


def _complete_users(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Batches in order of users as tables of about so many rows; a user's are in one table."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) < rows:
            continue
        table = pa.Table.from_batches(held)
        ready = pc.sum(pc.not_equal(table["user"], table["user"][-1])).as_py()
        if ready:
            yield table.slice(0, ready)
        held = table.slice(ready or 0).to_batches()
    if any(map(len, held)):
        yield pa.Table.from_batches(held)
