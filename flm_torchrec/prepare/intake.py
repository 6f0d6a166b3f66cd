"""Shards of a source → Parquet files of good rows, one a shard, with what was dropped: what can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.documents import read_json
from flm_torchrec.files import write_text
from flm_torchrec.prepare.clean import Dropped, drop_bad
from flm_torchrec.prepare.sources.raw import Raw, Shard

NO_ROWS = pl.DataFrame(
    schema={
        "file": pl.String, "row": pl.Int64, "user": pl.String, "item": pl.String, "timestamp": pl.Int64,
        "event": pl.String, "value": pl.Float64,
    }
)  # fmt: skip


@dataclass(frozen=True)
class FrameShard:
    """Interactions that are in memory already."""

    frame: pl.DataFrame

    @property
    def name(self) -> str:
        return str(self.frame["file"][0]) if len(self.frame) else ""

    identity = "in memory"

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        yield self.frame


def shards_of(raw: Raw) -> tuple[Shard, ...]:
    return (FrameShard(raw.interactions),) if isinstance(raw.interactions, pl.DataFrame) else raw.interactions


def rows_file(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:06d}.parquet"


@dataclass(frozen=True)
class Intake:
    """Takes shards in; a picklable function of a shard, so that any engine can spread it."""

    folder: Path
    min_value: float | None

    def __call__(self, number: int, shard: Shard) -> None:
        """Write the shard's good rows, unless that was done before."""
        file = rows_file(self.folder, number)
        if file.is_file():
            return
        dropped, read, place = Dropped(), 0, 0
        fresh = file.with_suffix(".tmp")
        writer: pq.ParquetWriter | None = None
        for frame in shard.batches(dropped):
            read += len(frame)
            table = _stored(drop_bad(frame, dropped, self.min_value), number, place).to_arrow()
            place += len(table)
            writer = writer or pq.ParquetWriter(fresh, table.schema)
            writer.write_table(table)
        unread = sum(n for reason, n in dropped.counts.items() if reason.startswith("malformed"))
        report = {"name": shard.name, "rows": read + unread, "dropped": dropped.to_json(), "notes": dropped.notes}
        write_text(file.with_suffix(".json"), json.dumps(report))
        writer = writer or pq.ParquetWriter(fresh, _stored(NO_ROWS, number, 0).to_arrow().schema)
        writer.close()
        fresh.rename(file)  # last: the shard is done

    def report(self, shards: int) -> tuple[list[str], int, Dropped]:
        """Names of the shards, rows read, and what was dropped of them."""
        records = [read_json(rows_file(self.folder, n).with_suffix(".json")) for n in range(shards)]
        dropped = Dropped()
        for record in records:
            dropped.merge(Dropped.from_json(record["dropped"], record["notes"]))
        return [record["name"] for record in records], sum(record["rows"] for record in records), dropped

    def files(self, shards: int) -> list[Path]:
        """Of shards with good rows."""
        files = [rows_file(self.folder, n) for n in range(shards)]
        return [file for file in files if pq.read_metadata(file).num_rows]


def _stored(frame: pl.DataFrame, number: int, place: int) -> pl.DataFrame:
    """With names that are no keywords of SQL: `place` orders the rows of a shard, `line` is where people find them."""
    return frame.select(
        pl.lit(number, pl.Int32).alias("shard"),
        pl.int_range(place, place + pl.len(), dtype=pl.Int64).alias("place"),
        pl.col("row").cast(pl.Int64).alias("line"),
        pl.col("user").alias("user_key"),
        pl.col("item").alias("item_key"),
        pl.col("timestamp").cast(pl.Int64).alias("stamp"),
        pl.col("event").alias("event_name"),
        pl.col("value").cast(pl.Float32).alias("worth"),
        *(["segment"] if "segment" in frame.columns else []),
    )
