"""A table of the user's own that describes items or users, read in parts: keys and features, a row an id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow as pa

from flm_torchrec.data.keys import keys
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.blocks import blocks, write_blocks
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.options import EntityTable, LogOptions
from flm_torchrec.prepare.sources.entity_tables import KindColumn, raw_frames, together
from flm_torchrec.prepare.text_vectors import text_vectors
from flm_torchrec.safe_text import redact_address


@dataclass(frozen=True)
class DescribedTable:
    """Files, or a table in memory, as `source_data.Described`."""

    table: EntityTable
    options: LogOptions
    digests: Mapping[str, str]
    """Of the text encoders, by column."""
    in_memory: pa.Table | None = None
    read: Dropped = field(default_factory=Dropped)

    @property
    def notes(self) -> list[str]:
        """See `Described`."""
        return self.read.notes

    def parts(self, folder: Path) -> Iterator[pl.DataFrame]:
        """See `Described`."""
        table, file = self.table, redact_address(self.table.file)
        features = {name: KindColumn(kind, self.options.form, file) for name, kind in table.kinds.items()}
        without_id = 0
        for frame in self._raw(folder):
            ids = keys(frame[table.key], file).rename("key")
            columns = [column.read(frame[name]) for name, column in features.items()]
            without_id += ids.null_count()
            part = pl.DataFrame([ids, *columns]).filter(pl.col("key").is_not_null())
            yield part.with_columns(
                text_vectors(part[name], encoder, self.digests[name], self.options.text_cache or str(folder / "texts"))
                for name, encoder in table.encoders.items()
            )
        for column in features.values():
            for line in column.notes():
                self.read.note(line)
        if without_id:
            self.read.note(f"{table.option} {file}: {without_id} rows have no id in '{table.key}' and are left out")

    def _raw(self, folder: Path) -> Iterator[pl.DataFrame]:
        """The rows as the files have them, under one type a column; files of one type each go between."""
        frames = raw_frames(self.table, self.options.form, self.read, self.in_memory)
        files: list[Path] = []
        schemas = []
        frame = next(frames, None)
        while frame is not None:
            run = _Run(frame, frames)
            files.append(folder / f"raw-{len(files)}.parquet")
            schemas.append(frame.schema)
            write_blocks(run, files[-1])
            frame = run.other
        wanted = together([pl.DataFrame(schema=schema) for schema in schemas], self.table).schema
        for file in files:
            for part in blocks([file], list(wanted)):
                yield part.cast(wanted)
            file.unlink()

    def repeated(self, number: int, key: str) -> str:
        """See `Described`."""
        table, duplicates = self.table, self.options.duplicates
        if duplicates == "refuse":
            raise DataError(
                f"{table.file}: key '{key}' occurs more than once as '{table.key}'; keep one row of it, or say which"
                " one with --duplicates first or last"
            )
        shown = f"{table.option} {redact_address(table.file)}"
        self.read.note(f"{shown}: {number} keys have several rows; the {duplicates} one of each is kept")
        return duplicates


class _Run:
    """Frames of one schema, from the first on; `other` is then the first frame of another schema, if there is one."""

    def __init__(self, first: pl.DataFrame, frames: Iterator[pl.DataFrame]) -> None:
        self.first, self.frames = first, frames
        self.other: pl.DataFrame | None = None

    def __iter__(self) -> Iterator[pl.DataFrame]:
        yield self.first
        for frame in self.frames:
            if frame.schema != self.first.schema:
                self.other = frame
                return
            yield frame
