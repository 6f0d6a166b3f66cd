"""Tables that describe items or users: the same formats, addresses and patterns as logs, but held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa

from flm_torchrec.data.schema import Kind
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.options import EntityTable, NumberForm, TextForm
from flm_torchrec.prepare.sources import lakehouse
from flm_torchrec.prepare.sources.json_lines import JsonShard
from flm_torchrec.prepare.sources.lists import as_lists, refuse_lists
from flm_torchrec.prepare.sources.number_text import number_expression, read_numbers
from flm_torchrec.prepare.sources.shards import (
    ENDINGS,
    LAKEHOUSES,
    CsvShard,
    InputFile,
    ParquetShard,
    TableShard,
    find_files,
    lakehouse_of,
    system_of,
)
from flm_torchrec.prepare.sources.source_data import Shard
from flm_torchrec.prepare.sources.tables import cast
from flm_torchrec.safe_text import redact_address

NUMERIC = ("numeric", "quantile")


def read_table(table: EntityTable, form: TextForm, dropped: Dropped, in_memory: pa.Table | None = None) -> pl.DataFrame:
    """The key column and the features, as the files have them, under the names that the options give.

    Args:
        dropped: takes notes. A row that cannot be read is an error.
        in_memory: the table itself, in place of its files.

    Raises:
        DataError: a file or column is missing, or a row cannot be read.
    """
    columns = (table.key, *table.kinds)
    short = {name: f"c{n}" for n, name in enumerate(dict.fromkeys(columns))}  # a shard adds columns `file` and `row`
    frames: list[pl.DataFrame] = []
    for name, shard in _shards(table, form, short, in_memory):
        frames += list(shard.batches(dropped))
        for reason, examples in dropped.examples.items():
            raise DataError(f"{name}: {reason} ({examples[0]}); mend it, every row of this file is needed")
    if not frames:
        raise DataError(f"{table.file}: has no rows; give a file with data")
    try:
        frame = pl.concat([frame.select(short.values()) for frame in frames], how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{table.file}: its files have columns of different types; write them alike") from error
    return frame.rename({column: name for name, column in short.items()})


def as_kind(column: pl.Series, kind: Kind, form: TextForm, file: str, note: Callable[[str], None]) -> pl.Series:
    """A feature's column in the type of its kind.

    Raises:
        DataError: values that are not of the kind.
    """
    if column.dtype == pl.String and kind in ("multi_categorical", "dense"):
        column = as_lists(column, form, file, note)
    elif column.dtype == pl.String and kind != "text":
        refuse_lists(column, kind, file)
    if kind == "multi_categorical":
        return cast(column, pl.List(pl.String), file)
    if kind == "dense":
        return cast(_numbers(column, form.numbers, file), pl.List(pl.Float32), file)
    if kind in NUMERIC:
        return cast(_numbers(column, form.numbers, file), pl.Float64(), file)
    return cast(column, pl.String(), file)


def one_row_a_key(
    described: pl.DataFrame, table: EntityTable, duplicates: str, note: Callable[[str], None]
) -> pl.DataFrame:
    """The rows of a table, one for each key.

    Args:
        duplicates: which row of a key stays: first, last; refuse: a second row is an error.
        note: takes a line where rows are left out.

    Raises:
        DataError: a key has two rows, and duplicates are refused.
    """
    twice = described["key"].filter(described["key"].is_duplicated())
    if not len(twice):
        return described
    if duplicates == "refuse":
        raise DataError(
            f"{table.file}: key '{twice[0]}' occurs more than once as '{table.key}'; keep one row of it, or say which"
            " one with --duplicates first or last"
        )
    shown = f"{table.option} {redact_address(table.file)}"
    note(f"{shown}: {twice.n_unique()} keys have several rows; the {duplicates} one of each is kept")
    return described.unique("key", keep="first" if duplicates == "first" else "last", maintain_order=True)


def source_of(location: str) -> str:
    """The format, by the ending of the name or, in a folder, of the first file with a known ending; else CSV.

    A local folder may also be one of LAKEHOUSES.
    """
    folder = Path(location)
    if folder.is_dir() and (kind := lakehouse_of(*system_of(location))):
        return kind
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else [location]
    for name in names:
        for source, endings in ENDINGS.items():
            if name.endswith(endings):
                return source
    return "csv"


def _shards(
    table: EntityTable, form: TextForm, short: dict[str, str], in_memory: pa.Table | None
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
    for file in find_files(source, table.file, table.option):
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
        return JsonShard(file, columns, rename, form, numbers, lists=True)
    return CsvShard(file, columns, rename, replace(form, multiline=True))


def _numbers(column: pl.Series, form: NumberForm, file: str) -> pl.Series:
    """Text in another form of numbers than the plain one → numbers; every other column stays as it is."""
    listed = column.dtype == pl.List(pl.String)
    if form == NumberForm() or not (listed or column.dtype == pl.String):
        return column
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
