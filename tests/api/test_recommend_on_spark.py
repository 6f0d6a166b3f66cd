"""Spark's partitions get the answers that one process gives."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flm_torchrec.api.recommender import Recommender
from flm_torchrec.api.spark import _complete_users, recommend
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.recommend import COLUMNS

BY_RANK = [("user", "ascending"), ("rank", "ascending")]


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_a_user_is_in_one_table_and_no_row_is_lost(rows: int) -> None:
    users = np.repeat(["a", "b", "c", "d"], [1, 9, 2, 3])
    table = pa.table({"user": users, "number": np.arange(len(users))})
    batches = [*table.to_batches(max_chunksize=2), table.slice(0, 0).to_batches(max_chunksize=1)]
    parts = list(_complete_users([b for b in batches if isinstance(b, pa.RecordBatch)], rows))
    assert pa.concat_tables(parts).combine_chunks() == table
    in_parts = [set(part["user"].to_pylist()) for part in parts]
    assert sum(map(len, in_parts)) == 4
    assert len(parts) == {1: 4, 4: 4, 100: 1}[rows]


def test_what_is_missing_is_told_before_spark_runs(tmp_path: Path, exported: Path) -> None:
    class Frame:
        columns: tuple[str, ...] = ("user", "item")

    with pytest.raises(DataError, match="no column 'timestamp'; Spark keeps no order"):
        recommend(Frame(), exported)  # type: ignore[arg-type]
    Frame.columns = ("user", "item", "timestamp")
    with pytest.raises(RunError, match=f"{tmp_path}"):
        recommend(Frame(), tmp_path)  # type: ignore[arg-type]


def test_partitions_get_the_answers_of_one_process(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyspark", reason="the extra 'spark' is not installed")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    from pyspark.sql import SparkSession

    local = Recommender(exported, frame="arrow")
    items = local.embeddings("items")["item"]
    rng = np.random.default_rng(0)
    rows = 300
    histories = pa.table(
        {
            "user": [f"guest {n % 37}" for n in range(rows)],
            "item": items.take(pa.array(rng.integers(0, len(items), rows))),
            "timestamp": 1_700_000_000 + rng.permutation(rows) * 60,
        }
    )
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)  # else the first python3 of PATH
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
    builder = SparkSession.builder.master("local[2]").config("spark.driver.host", "127.0.0.1")
    builder = builder.config("spark.ui.enabled", "false").config("spark.sql.shuffle.partitions", "2")
    builder = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", "40")
    session = builder.config("spark.sql.adaptive.enabled", "false").getOrCreate()
    try:
        made = recommend(session.createDataFrame(histories), exported, k=3, filter={}, include_seen=False)
        assert made.rdd.getNumPartitions() == 2
        found = made.toArrow()
    finally:
        session.stop()
    one = local.recommend(histories, k=3)
    found, one = (table.sort_by(BY_RANK) for table in (found.cast(COLUMNS), one))
    for name in ("user", "rank", "item", "title"):
        assert found[name].to_pylist() == one[name].to_pylist(), name
    assert np.allclose(found["score"], one["score"], rtol=1e-5, atol=1e-5)
    assert len(one) == 37 * 3
