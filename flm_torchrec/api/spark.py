"""Recommendations for more users than one machine serves: Spark maps partitions of their histories."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.errors import DataError
from flm_torchrec.export.manifest import load_manifest

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

SCHEMA = "user string, rank int, item string, title string, score float"
"""Columns of the result, as of `Recommender.recommend`."""
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
