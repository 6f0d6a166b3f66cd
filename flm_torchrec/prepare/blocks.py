"""Parquet files too large for memory: read and written some rows at a time, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

BLOCK = 131_072
"""Rows that are read at once."""
ROWS_PER_GROUP = 131_072
"""Rows of a row group, which a loader reads at once."""


def blocks(files: Sequence[Path], columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Columns of files, one file after the other: BLOCK rows at a time, however the files were written."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in _batches(files, columns):
        while rows + len(batch) >= BLOCK:
            yield _frame([*waiting, batch.slice(0, BLOCK - rows)])
            batch = batch.slice(BLOCK - rows)
            waiting, rows = [], 0
        if len(batch):
            waiting.append(batch)
            rows += len(batch)
    if waiting:
        yield _frame(waiting)


def _batches(files: Sequence[Path], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(BLOCK, columns=list(columns))


def _frame(batches: list[pa.RecordBatch]) -> pl.DataFrame:
    frame = pl.from_arrow(pa.Table.from_batches(batches))
    assert isinstance(frame, pl.DataFrame)
    return frame.rechunk()


def write_blocks(frames: Iterable[pl.DataFrame], file: Path) -> int:
    """Write frames of equal columns, of which there must be one, as a file; returns the number of rows.

    The bytes depend on the rows alone, not on which frame they come in.
    """
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []
    rows = ready = 0
    try:
        for frame in frames:
            waiting.append(frame.to_arrow())
            writer = writer or pq.ParquetWriter(file, waiting[0].schema, compression="zstd")
            rows, ready = rows + len(frame), ready + len(frame)
            if ready >= ROWS_PER_GROUP:
                waiting = [_write_groups(writer, waiting, ready - ready % ROWS_PER_GROUP)]
                ready = len(waiting[0])
        if writer is not None and ready:
            _write_groups(writer, waiting, ready)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _write_groups(writer: pq.ParquetWriter, tables: list[pa.Table], rows: int) -> pa.Table:
    """Write the first rows of the tables as row groups; returns the other rows."""
    together = pa.concat_tables(tables).combine_chunks()
    writer.write_table(together.slice(0, rows), row_group_size=ROWS_PER_GROUP)
    return together.slice(rows)


def rows_of(files: Sequence[Path]) -> int:
    """Rows of all files together."""
    return sum(pq.read_metadata(file).num_rows for file in files)
