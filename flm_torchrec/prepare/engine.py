"""DuckDB runs the SQL of preparation on one machine, in a given memory; what does not fit goes to disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import duckdb
import polars as pl

from flm_torchrec.prepare import sql
from flm_torchrec.prepare.memory import duckdb_bytes
from flm_torchrec.prepare.sources.source_data import Shard


class Engine(Protocol):
    """Runs standard SQL over Parquet files."""

    def shards(self, shards: Sequence[Shard], take_in: Callable[[int, Shard], None]) -> None:
        """Call `take_in` with each number and shard, in any order, on any machine."""

    def files(self, name: str, files: Sequence[Path]) -> None:
        """Make the rows of Parquet files a view of that name."""

    def frame(self, name: str, frame: pl.DataFrame) -> None:
        """Make a frame a view of that name."""

    def quoted(self, column: str) -> str:
        """The name of a column, of letters, digits and _ of any language, as SQL takes it."""

    def query(self, select: str) -> pl.DataFrame:
        """The rows of a result that fits into memory."""

    def write(self, select: str, folder: Path) -> None:
        """Write a result of any size as Parquet, a folder `bucket=N` for each value of its column bucket."""

    def write_each(self, name: str, source: Path, select: str, folder: Path) -> None:
        """As `write`; `select` reads what `write` left in `source` as the view `name`, perhaps bucket by bucket."""

    def save(self, select: str, folder: Path, order: str = "") -> list[Path]:
        """Write a result of any size as Parquet files, at least one, which hold it one after the other in an order.

        Args:
            order: SQL behind ORDER BY; empty: any order.
        """


class DuckEngine:
    """DuckDB.

    Args:
        memory: bytes for the process.
        threads: 0: all cores.
        spill: folder for what does not fit.

    Raises:
        DataError: DuckDB cannot use a folder of that name.
    """

    def __init__(self, memory: int, threads: int, spill: Path) -> None:
        settings: dict[str, str | bool | int | float | list[str]]
        settings = {"temp_directory": sql.checked(spill), "preserve_insertion_order": "false"}
        settings["memory_limit"] = f"{duckdb_bytes(memory)}B"
        if threads:
            settings["threads"] = str(threads)
        self.connection = duckdb.connect(config=settings)

    def __enter__(self) -> DuckEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.connection.close()

    def shards(self, shards: Sequence[Shard], take_in: Callable[[int, Shard], None]) -> None:
        """See `Engine`."""
        for number, shard in enumerate(shards):
            take_in(number, shard)

    def files(self, name: str, files: Sequence[Path]) -> None:
        """See `Engine`."""
        self.connection.execute(f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM {sql.read_parquet(files)}")

    def frame(self, name: str, frame: pl.DataFrame) -> None:
        """See `Engine`."""
        self.connection.register(name, frame.to_arrow())

    def quoted(self, column: str) -> str:
        """See `Engine`."""
        return f'"{column}"'

    def query(self, select: str) -> pl.DataFrame:
        """See `Engine`."""
        frame = pl.from_arrow(self.connection.sql(select).to_arrow_table())
        assert isinstance(frame, pl.DataFrame)
        return frame

    def write(self, select: str, folder: Path) -> None:
        """See `Engine`."""
        self.connection.execute(f"COPY ({select}) TO {sql.target(folder)} (FORMAT parquet, PARTITION_BY (bucket))")

    def write_each(self, name: str, source: Path, select: str, folder: Path) -> None:
        """See `Engine`."""
        for bucket in buckets(source):
            (folder / bucket.name).mkdir(parents=True)
            number, rows = bucket.name.removeprefix("bucket="), sql.read_parquet(sorted(bucket.glob("*.parquet")))
            self.connection.execute(f"CREATE OR REPLACE VIEW {name} AS SELECT *, {number} AS bucket FROM {rows}")
            target = sql.target(folder / bucket.name / "part.parquet")
            self.connection.execute(f"COPY ({select}) TO {target} (FORMAT parquet)")

    def save(self, select: str, folder: Path, order: str = "") -> list[Path]:
        """See `Engine`."""
        folder.mkdir()
        self.connection.execute(f"COPY ({in_order(select, order)}) TO {sql.target(folder / 'part.parquet')}")
        return [folder / "part.parquet"]


def in_order(select: str, order: str) -> str:
    """A query with its rows in an order; empty: any order."""
    return f"SELECT * FROM ({select}) AS saved ORDER BY {order}" if order else select


def buckets(folder: Path) -> list[Path]:
    """Folders that `Engine.write` left, in order."""
    return sorted(folder.glob("bucket=*"), key=lambda path: int(path.name.removeprefix("bucket=")))
