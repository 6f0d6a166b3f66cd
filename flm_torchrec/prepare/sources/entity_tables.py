"""Tables that describe items or users: the same formats, addresses and patterns as logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa

from flm_torchrec.data.keys import categories
from flm_torchrec.data.schema import Kind
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.options import EntityTable, NumberForm, TextForm
from flm_torchrec.prepare.sources import lakehouse
from flm_torchrec.prepare.sources.input_files import (
    LAKEHOUSES,
    InputFile,
    find_files,
    kind_of,
    lakehouse_of,
    system_of,
)
from flm_torchrec.prepare.sources.json_lines import JsonShard
from flm_torchrec.prepare.sources.lists import ListCells, refuse_lists
from flm_torchrec.prepare.sources.number_text import number_expression, read_numbers
from flm_torchrec.prepare.sources.packed import plain_name
from flm_torchrec.prepare.sources.shards import CsvShard, ParquetShard, TableShard
from flm_torchrec.prepare.sources.source_data import Shard
from flm_torchrec.prepare.sources.tables import cast

NUMERIC = ("numeric", "quantile")
JSON = ".json"


def read_table(table: EntityTable, form: TextForm, dropped: Dropped) -> pl.DataFrame:
    """The key column and the features, as the files have them, under the names that the options give: all in memory.

    Args:
        dropped: takes notes. A row that cannot be read is an error.

    Raises:
        DataError: a file or column is missing, or a row cannot be read.
    """
    return together(list(raw_frames(table, form, dropped)), table)


def raw_frames(
    table: EntityTable, form: TextForm, dropped: Dropped, in_memory: pa.Table | None = None
) -> Iterator[pl.DataFrame]:
    """As `read_table`, in parts, whose types may differ.

    Args:
        in_memory: the table itself, in place of its files.

    Raises:
        DataError: as of `read_table`.
    """
    columns = (table.key, *table.kinds)
    short = {name: f"c{n}" for n, name in enumerate(dict.fromkeys(columns))}  # a shard adds columns `file` and `row`
    for name, shard in _shards(table, form, short, dropped.note, in_memory):
        for frame in shard.batches(dropped):
            yield frame.select(pl.col(column).alias(given) for given, column in short.items())
        for reason, examples in dropped.examples.items():
            raise DataError(f"{name}: {reason} ({examples[0]}); mend it, every row of this file is needed")


def together(frames: list[pl.DataFrame], table: EntityTable) -> pl.DataFrame:
    """The frames one below the other, under one type a column.

    Raises:
        DataError: there are none, or no type holds two of them.
    """
    if not frames:
        raise DataError(f"{table.file}: has no rows; give a file with data")
    try:
        return pl.concat(frames, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{table.file}: its files have columns of different types; write them alike") from error


class KindColumn:
    """A feature's column, read in parts, in the type of its kind."""

    def __init__(self, kind: Kind, form: TextForm, file: str) -> None:
        self.kind, self.form, self.file = kind, form, file
        self.cells = ListCells(form, file)

    def read(self, column: pl.Series) -> pl.Series:
        """The part in the type of the kind.

        Raises:
            DataError: values that are not of the kind.
        """
        kind, form, file = self.kind, self.form, self.file
        if column.dtype == pl.String and kind in ("multi_categorical", "dense"):
            column = self.cells.read(column)
        elif column.dtype == pl.String and kind != "text":
            refuse_lists(column, kind, file)
        if kind == "multi_categorical":
            return cast(categories(column), pl.List(pl.String), file)
        if kind == "dense":
            return cast(_numbers(column, form.numbers, file), pl.List(pl.Float32), file)
        if kind in NUMERIC:
            return cast(_numbers(column, form.numbers, file), pl.Float64(), file)
        return cast(categories(column), pl.String(), file)

    def notes(self) -> list[str]:
        """Lines on how cells were read."""
        return self.cells.notes()


def source_of(location: str) -> str:
    """The format, by the ending of the name or, in a folder, of the first file with a known ending; else CSV.

    A local folder may also be one of LAKEHOUSES. A file *.json is taken for JSON lines, as many are.
    """
    folder = Path(location)
    if folder.is_dir() and (kind := lakehouse_of(*system_of(location))):
        return kind
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else [location]
    kinds = [kind for name in names if (kind := kind_of(name))]
    return [*kinds, "jsonl" if plain_name(location).endswith(JSON) else "csv"][0]


def _shards(
    table: EntityTable,
    form: TextForm,
    short: dict[str, str],
    note: Callable[[str], None],
    in_memory: pa.Table | None,
) -> Iterator[tuple[str, Shard]]:
    """Shards with their names in errors."""
    if in_memory is not None:
        yield table.file, TableShard.of(table.file, in_memory, tuple(short), lambda frame: frame.rename(short))
        return
    source = source_of(table.file)
    if source in LAKEHOUSES:
        for shard in lakehouse.shards(
            source, table.file, None, tuple(short), lambda _: lambda frame: frame.rename(short)
        ):
            yield shard.file.url, shard
        return
    for file in find_files(source, table.file, note, table.option):
        yield file.url, _shard(source, file, table, form, short)


def _shard(source: str, file: InputFile, table: EntityTable, form: TextForm, short: dict[str, str]) -> Shard:
    """A file as a shard whose columns get short names, so that a feature may be called `file` or `row`."""
    columns = tuple(short)

    def rename(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.rename(short)

    if source == "parquet":
        return ParquetShard(file, columns, rename)
    if source == "jsonl":
        numbers = tuple(name for name, kind in table.kinds.items() if kind in NUMERIC)
        return JsonShard(file, columns, rename, form, numbers, ids=(table.key,), lists=True)
    return CsvShard(file, columns, rename, replace(form, multiline=True))


def _numbers(column: pl.Series, form: NumberForm, file: str) -> pl.Series:
    """Text → numbers, or text without blanks that can be cast to numbers; every other column stays as it is."""
    listed = column.dtype == pl.List(pl.String)
    if not (listed or column.dtype == pl.String):
        return column
    if form == NumberForm():
        bare = (pl.element() if listed else pl.col(column.name)).str.strip_chars().replace("", None)
        return column.to_frame().select(pl.col(column.name).list.eval(bare) if listed else bare).to_series()
    texts = column.explode() if listed else column
    numbers = read_numbers(texts, form)
    bad = texts.filter(numbers.is_null() & texts.is_not_null() & (texts.str.strip_chars() != ""))
    if len(bad):
        raise DataError(
            f"{file}: column '{column.name}': '{bad[0][:60]}' is no number as --decimal '{form.decimal}',"
            f" --thousands '{form.thousands}' and --currency '{form.currency}' say; mend one or the other"
        )
    if not listed:
        return numbers
    expression = number_expression(pl.element(), form)
    return column.to_frame().select(pl.col(column.name).list.eval(expression)).to_series()
