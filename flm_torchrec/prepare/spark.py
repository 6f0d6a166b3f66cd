"""Spark runs the SQL of preparation where one machine is too small, on the cluster that is configured for it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import polars as pl

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.engine import in_order
from flm_torchrec.prepare.sources.source_data import Shard


class SparkEngine:
    """An `Engine`. The whole cluster must see files, work folder and output under the same path.

    Args:
        memory: bytes of the driver, unless Spark is configured otherwise; the driver reads a bucket at a time.
        threads: of a local master, unless another master is configured; 0: all cores.
        spill: local folder for what does not fit.

    Raises:
        DataError: pyspark is not installed, or Spark does not start.
    """

    def __init__(self, memory: int, threads: int, spill: Path) -> None:
        try:
            from pyspark import SparkConf
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise DataError(f"--engine spark: {error}; install it with: pip install 'flm_torchrec[spark]'") from error
        builder = SparkSession.builder.appName("flm prepare").config("spark.local.dir", str(spill))
        builder = builder.config("spark.ui.enabled", "false").config("spark.sql.session.timeZone", "UTC")
        builder = builder.config("spark.driver.memory", f"{max(1, memory >> 30)}g")
        try:
            if not SparkConf().get("spark.master"):  # as spark-submit or spark-defaults.conf would have said
                builder = builder.master(f"local[{threads or '*'}]").config("spark.driver.host", "127.0.0.1")
                builder = builder.config("spark.sql.shuffle.partitions", "8")
            self.session = builder.getOrCreate()
        except (PySparkException, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"--engine spark: Spark does not start ({reason}); it needs Java 17 or newer") from error
        context = self.session.sparkContext
        context.setLogLevel("ERROR")
        if str(context.master).startswith("local"):
            context.pythonExec = sys.executable  # not whichever python comes first

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.session.stop()

    def shards(self, shards: Sequence[Shard], take_in: Callable[[int, Shard], None]) -> None:
        """See `Engine`."""
        numbered = list(enumerate(shards))
        spread = self.session.sparkContext.parallelize(numbered, len(numbered))
        failed = [text for text in spread.map(lambda pair: _error_of(take_in, *pair)).collect() if text]
        if failed:
            raise DataError(failed[0])

    def files(self, name: str, files: Sequence[Path]) -> None:
        """See `Engine`."""
        # `bucket` is not in the files, but in the name of the folder `bucket=N`. Other folders add no column.
        (base,) = {file.parent.parent if file.parent.name.startswith("bucket=") else file.parent for file in files}
        read = self.session.read.option("basePath", str(base))
        read.parquet(*map(_literal, files)).createOrReplaceTempView(name)

    def frame(self, name: str, frame: pl.DataFrame) -> None:
        """See `Engine`."""
        self.session.createDataFrame(frame.to_arrow()).createOrReplaceTempView(name)

    def quoted(self, column: str) -> str:
        """See `Engine`."""
        return f"`{column}`"

    def query(self, select: str) -> pl.DataFrame:
        """See `Engine`."""
        frame = pl.from_arrow(self.session.sql(select).toArrow())
        assert isinstance(frame, pl.DataFrame)
        return frame

    def write(self, select: str, folder: Path) -> None:
        """See `Engine`."""
        self.session.sql(select).repartition("bucket").write.partitionBy("bucket").parquet(str(folder))

    def write_each(self, name: str, source: Path, select: str, folder: Path) -> None:
        """See `Engine`."""
        self.files(name, sorted(source.glob("*/*.parquet")))
        self.write(select, folder)

    def save(self, select: str, folder: Path, order: str = "") -> list[Path]:
        """See `Engine`. A range of the order is a partition, and each partition a file, numbered in the order."""
        self.session.sql(in_order(select, order)).write.parquet(str(folder))
        return sorted(folder.glob("*.parquet"))


def _literal(file: Path) -> str:
    """A pattern that matches only this path."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", str(file))


def _error_of(take_in: Callable[[int, Shard], None], number: int, shard: Shard) -> str:
    """The text of an error in the data, or nothing. Spark would retry after an exception, and bury it in a trace."""
    try:
        take_in(number, shard)
    except DataError as error:
        return str(error)
    return ""
