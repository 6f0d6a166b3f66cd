"""Spark's partitions get the answers that one process gives."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from flm_torchrec.api.recommender import Recommender
from flm_torchrec.api.spark import _complete_users, known_vectors, recommend, recommend_known
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.forget import forget_in_export
from flm_torchrec.export.manifest import load_manifest
from flm_torchrec.export.recommend import COLUMNS, ExportRecommender
from flm_torchrec.export.write import ExportOptions, export
from tests.conftest import QUICK_JAVA
from tests.evaluation.test_ranking import Alone
from tests.export.test_export import source_of

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

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


@pytest.fixture(scope="module")
def session() -> Iterator[SparkSession]:
    """Two processes of this machine."""
    pytest.importorskip("pyspark", reason="the extra 'spark' is not installed")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYSPARK_PYTHON", sys.executable)  # else the first python3 of PATH
        patched.setenv("JAVA_TOOL_OPTIONS", QUICK_JAVA)
        builder = SparkSession.builder.master("local[2]").config("spark.driver.host", "127.0.0.1")
        builder = builder.config("spark.ui.enabled", "false").config("spark.sql.shuffle.partitions", "2")
        builder = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", "40")
        made = builder.config("spark.sql.adaptive.enabled", "false").getOrCreate()
        yield made
        made.stop()


def assert_alike(found: pa.Table, one: pa.Table) -> None:
    """Recommendations of Spark and of one process are the same, but for the order of users and of sums."""
    found, one = (table.sort_by(BY_RANK) for table in (found.cast(COLUMNS), one))
    for name in ("user", "rank", "item", "title"):
        assert found[name].to_pylist() == one[name].to_pylist(), name
    assert np.allclose(found["score"], one["score"], rtol=1e-5, atol=1e-5)


def test_partitions_get_the_answers_of_one_process(exported: Path, session: SparkSession) -> None:
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
    made = recommend(session.createDataFrame(histories), exported, k=3, filter={}, include_seen=False)
    assert made.rdd.getNumPartitions() == 2
    one = local.recommend(histories, k=3)
    assert_alike(made.toArrow(), one)
    assert len(one) == 37 * 3


def test_known_users_get_the_answers_and_vectors_of_one_process(
    small: PreparedData, tmp_path: Path, session: SparkSession
) -> None:
    folder = tmp_path / "export"
    export(source_of(small), Alone(), folder, ExportOptions(quantise="fp16", part_rows=32))
    keys = pa.array([small.user_keys[user] for user in (3, 40)])
    assert forget_in_export(folder, keys.to_pylist(), {}) == 2
    local = Recommender(folder, frame="arrow")
    made = recommend_known(session, folder, k=4, head="content")
    assert made.rdd.getNumPartitions() == 2
    users = local.embeddings("users", "content")
    assert len(users) == small.schema.users - 2
    assert_alike(made.toArrow(), local.recommend(users.select(["user"]), k=4, head="content"))

    vectors = known_vectors(session, folder, "content").toArrow().sort_by("user")
    assert vectors["user"].to_pylist() == users.sort_by("user")["user"].to_pylist()
    assert vectors["embedding"].to_pylist() == users.sort_by("user")["embedding"].to_pylist()
    with pytest.raises(RunError, match="no head 'contents'"):
        known_vectors(session, folder, "contents")


def test_an_export_that_was_replaced_meanwhile_is_refused(exported: Path) -> None:
    manifest = load_manifest(exported)
    assert ExportRecommender(exported, manifest).manifest == manifest
    with pytest.raises(RunError, match="has changed since it was checked"):
        ExportRecommender(exported, replace(manifest, model_version="another"))
