"""Shards of a source → Parquet files of good rows, one a shard, with what was dropped: the part that can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.data.history import CONTEXT
from flm_torchrec.documents import read_json
from flm_torchrec.files import write_text
from flm_torchrec.prepare.clean import Dropped, drop_bad
from flm_torchrec.prepare.sources.source_data import IN_MEMORY, Shard, SourceData

NO_ROWS = pl.DataFrame(
    schema={
        "file": pl.String,
        "row": pl.Int64,
        "user": pl.String,
        "item": pl.String,
        "timestamp": pl.Int64,
        "event": pl.String,
        "value": pl.Float64,
    }
)


@dataclass(frozen=True)
class FrameShard:
    """Interactions that are in memory already, as a `Shard`."""

    frame: pl.DataFrame

    identity = IN_MEMORY

    @property
    def name(self) -> str:
        """See `Shard`."""
        return str(self.frame["file"][0]) if len(self.frame) else ""

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """The frame, as one batch."""
        yield self.frame


@dataclass(frozen=True)
class ShardReport:
    """What was read of all shards."""

    names: list[str]
    """Of the shards, in their order."""
    rows_read: int
    dropped: Dropped


def shards_of(source: SourceData) -> tuple[Shard, ...]:
    """The shards of a source; a frame in memory is one shard."""
    return (FrameShard(source.interactions),) if isinstance(source.interactions, pl.DataFrame) else source.interactions


def rows_file(folder: Path, number: int) -> Path:
    """The file of a shard's good rows; beside it stands a report of the same name that ends in .json."""
    return folder / f"rows-{number:06d}.parquet"


@dataclass(frozen=True)
class Intake:
    """Takes shards in; a picklable function of a shard, so that any engine can distribute it."""

    folder: Path
    min_value: float | None

    def __call__(self, number: int, shard: Shard) -> None:
        """Write the shard's good rows, unless that was done before."""
        file = rows_file(self.folder, number)
        if file.is_file():
            return
        dropped, rows_read, rows_kept = Dropped(), 0, 0
        unfinished = file.with_suffix(".tmp")
        writer: pq.ParquetWriter | None = None
        for frame in shard.batches(dropped):
            rows_read += len(frame)
            table = _stored(drop_bad(frame, dropped, self.min_value), number, rows_kept).to_arrow()
            rows_kept += len(table)
            writer = writer or pq.ParquetWriter(unfinished, table.schema)
            writer.write_table(table)
        rows_read += sum(n for reason, n in dropped.counts.items() if reason.startswith("malformed"))
        report = {"name": shard.name, "rows": rows_read, "dropped": dropped.to_json(), "notes": dropped.notes}
        write_text(file.with_suffix(".json"), json.dumps(report))
        writer = writer or pq.ParquetWriter(unfinished, _stored(NO_ROWS, number, 0).to_arrow().schema)
        writer.close()
        unfinished.rename(file)  # last: the shard is done

    def report(self, shards: int) -> ShardReport:
        """What was read of that many shards."""
        records = [read_json(rows_file(self.folder, n).with_suffix(".json")) for n in range(shards)]
        dropped = Dropped()
        for record in records:
            dropped.merge(Dropped.from_json(record["dropped"], record["notes"]))
        return ShardReport([record["name"] for record in records], sum(r["rows"] for r in records), dropped)

    def files(self, shards: int) -> list[Path]:
        """Files of the shards that have good rows."""
        files = [rows_file(self.folder, n) for n in range(shards)]
        return [file for file in files if pq.read_metadata(file).num_rows]


def _stored(frame: pl.DataFrame, number: int, first: int) -> pl.DataFrame:
    """The rows as stored, under names that are no keywords of SQL.

    `row_index` orders the rows of a shard; `line` is the row's number in its file, for people.

    Args:
        number: of the shard.
        first: row index of the first row.
    """
    return frame.select(
        pl.lit(number, pl.Int32).alias("shard"),
        pl.int_range(first, first + pl.len(), dtype=pl.Int64).alias("row_index"),
        pl.col("row").cast(pl.Int64).alias("line"),
        pl.col("user").alias("user_key"),
        pl.col("item").alias("item_key"),
        pl.col("timestamp").cast(pl.Int64).alias("event_time"),
        pl.col("event").alias("event_name"),
        pl.col("value").cast(pl.Float32).alias("event_value"),
        *([pl.col("weight").cast(pl.Float32).alias("event_weight")] if "weight" in frame.columns else []),
        *(["segment"] if "segment" in frame.columns else []),
        *(name for name in frame.columns if name.startswith(CONTEXT)),
    )
