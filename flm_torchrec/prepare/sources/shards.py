"""Files of logs, and tables in memory, as shards that are read batch by batch."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from flm_torchrec.data.keys import frame_of
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.options import TextForm
from flm_torchrec.prepare.sources import lines, packed
from flm_torchrec.prepare.sources.columns import find_all
from flm_torchrec.prepare.sources.input_files import InputFile
from flm_torchrec.prepare.sources.source_data import IN_MEMORY
from flm_torchrec.safe_text import first_line

ROWS = 500_000
"""Of a Parquet file, decoded at once."""

ToRoles = Callable[[pl.DataFrame], pl.DataFrame]
"""Columns of a file → columns of `SourceData.interactions` except file and row."""


@dataclass(frozen=True)
class FileShard:
    """What shards of every format have in common: a file, its columns, and their roles."""

    file: InputFile
    columns: tuple[str, ...]
    """As people name them; no other column is ever read."""
    to_roles: ToRoles

    @property
    def name(self) -> str:
        """See `Shard`."""
        return self.file.name

    @property
    def identity(self) -> str:
        """See `Shard`."""
        return self.file.identity

    def _rows(self, table: pa.Table, rows: np.ndarray) -> pl.DataFrame:
        frame = self.to_roles(frame_of(table, self.file.url))
        return frame.with_columns(pl.lit(self.name).alias("file"), pl.Series("row", rows, dtype=pl.Int64))

    def _numbered(self, batches: Iterable[pa.RecordBatch], wanted: Mapping[str, str]) -> Iterator[pl.DataFrame]:
        """Batches of typed columns, with the path of each column by its name."""
        row = 1
        for batch in batches:
            table = pa.table({name: _at(batch, path) for name, path in wanted.items()})
            yield self._rows(table, np.arange(row, row + len(batch)))
            row += len(batch)

    def _drop(self, dropped: Dropped, before: int) -> Callable[[np.ndarray, str], None]:
        """What counts lines by number as dropped for a reason; `before` lines stand before the first row."""

        def drop(numbers: np.ndarray, reason: str) -> None:
            dropped.add(reason, len(numbers), (f"{self.name}: row {n - before}" for n in numbers.tolist()))

        return drop


class ParquetShard(FileShard):
    """Rows are numbered from 1."""

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: corrupt, or a column is missing or of a type that cannot be its role's.
        """
        try:
            with self.file.open() as stream, pq.ParquetFile(stream) as parquet:
                wanted = find_all(self.columns, paths_of(parquet.schema_arrow), self.file.url, dropped.note)
                if parquet.metadata.num_rows == 0:
                    raise DataError(f"{self.file.url}: has no rows; give a file with data")
                columns = list(dict.fromkeys(wanted.values()))
                yield from self._numbered(parquet.iter_batches(ROWS, columns=columns), wanted)
        except (pa.ArrowException, *packed.ERRORS) as error:
            raise DataError(
                f"{self.file.url}: not a readable Parquet file ({first_line(error)}); write it again"
            ) from error


@dataclass(frozen=True)
class TableShard(FileShard):
    """An Arrow table in memory, under a name in place of a file; rows are numbered from 1."""

    table: pa.Table

    @classmethod
    def of(cls, name: str, table: pa.Table, columns: tuple[str, ...], to_roles: ToRoles) -> TableShard:
        """A table that errors and the report call `name`."""
        return cls(InputFile(name, name, IN_MEMORY), columns, to_roles, table)

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: a column is missing or of a type that cannot be its role's.
        """
        wanted = find_all(self.columns, paths_of(self.table.schema), self.file.url, dropped.note)
        yield from self._numbered(self.table.to_batches(ROWS), wanted)


def paths_of(fields: Iterable[pa.Field], before: str = "") -> list[str]:
    """Names of columns, and of fields inside them with dots between."""
    names = []
    for field in fields:
        names.append(before + field.name)
        if pa.types.is_struct(field.type):
            names += paths_of(field.type, f"{before}{field.name}.")
    return names


def column_of(names: Sequence[str], path: str) -> str:
    """The column that a path leads into, or that has the path for its name."""
    return path if path in names else max((name for name in names if path.startswith(f"{name}.")), key=len)


def _at(batch: pa.RecordBatch, path: str) -> pa.Array:
    """The column of a path; null where a field that it leads through is."""
    name = column_of(batch.schema.names, path)
    column = batch[name]
    for part in path.removeprefix(name).split(".")[1:]:
        column = pc.struct_field(column, part)
    return column


@dataclass(frozen=True)
class CsvShard(FileShard):
    """A line a row, after the header; rows are numbered from 1, the header not counted."""

    form: TextForm

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: no header, no rows, or a column is missing.
        """
        url, drop, form = self.file.url, self._drop(dropped, 1), self.form
        names: list[str] | None = None
        any_line = False
        separator = form.separator if form.multiline else ""
        with self.file.text() as stream:
            found = lines.blocks(lines.pieces(stream, form.encoding), drop, separator)
            for block in lines.from_first_filled(found):
                if names is None:
                    names = self._header(block.line(0))
                    wanted = find_all(self.columns, names, url, dropped.note)
                    block = block.keep(np.arange(len(block.numbers)) > 0)
                any_line = any_line or len(block.numbers) > 0
                block = lines.readable(block, drop, quoted=True, encoding=form.encoding)
                if len(block.numbers):
                    table, rows = self._parsed(block, names, list(dict.fromkeys(wanted.values())), drop)
                    yield self._rows(pa.table({name: table[column] for name, column in wanted.items()}), rows)
        if not any_line:
            raise DataError(f"{url}: has no rows; give a file with data")

    def _header(self, line: bytes) -> list[str]:
        try:
            line.decode()
            options = pacsv.ParseOptions(delimiter=self.form.separator, newlines_in_values=self.form.multiline)
            return pacsv.read_csv(io.BytesIO(line + b"\n"), parse_options=options).column_names
        except (pa.ArrowException, UnicodeDecodeError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.file.url}: not a readable table ({first_line(error)}); give the right --separator and"
                " --encoding"
            ) from error

    def _parsed(
        self, block: lines.Block, names: list[str], wanted: list[str], drop: Callable[[np.ndarray, str], None]
    ) -> tuple[pa.Table, np.ndarray]:
        table, bad = self._table(block.data, names, wanted)
        if len(table) + len(bad) != len(block.numbers):  # Arrow takes a quote inside a field for text
            alone = np.array([self._is_row(block.line(n), names, wanted) for n in range(len(block.numbers))])
            drop(block.numbers[~alone], "malformed: a quote inside a field")
            block = block.keep(alone)
            table, bad = self._table(block.data, names, wanted)
        drop(block.numbers[bad], f"malformed: not {len(names)} columns")
        return table, np.delete(block.numbers, bad) - 1

    def _is_row(self, line: bytes, names: list[str], wanted: list[str]) -> bool:
        table, bad = self._table(line + b"\n", names, wanted)
        return len(table) + len(bad) == 1

    def _table(self, data: bytes, names: list[str], wanted: list[str]) -> tuple[pa.Table, list[int]]:
        """The lines with as many columns as there are names, and the positions of the other lines."""
        bad: list[int] = []

        def skip(row: pacsv.InvalidRow) -> str:
            bad.append(row.number - 1)
            return "skip"

        read = pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1)
        parse = pacsv.ParseOptions(
            delimiter=self.form.separator,
            invalid_row_handler=skip,
            ignore_empty_lines=False,
            newlines_in_values=self.form.multiline,
        )
        convert = pacsv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(wanted, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
        )
        return pacsv.read_csv(io.BytesIO(data), read, parse, convert), bad
