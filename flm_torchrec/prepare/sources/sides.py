"""Files that describe items or users: the same formats, addresses and patterns as of events, held in memory whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from flm_torchrec.data.schema import Kind
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.sources.form import Form, Numbers
from flm_torchrec.prepare.sources.json_lines import JsonShard
from flm_torchrec.prepare.sources.lists import as_lists, refuse_lists
from flm_torchrec.prepare.sources.raw import Shard
from flm_torchrec.prepare.sources.shards import ENDINGS, CsvShard, ParquetShard, Place, places
from flm_torchrec.prepare.sources.tables import cast
from flm_torchrec.safe_text import redact_address

NUMERIC = ("numeric", "quantile")


@dataclass(frozen=True)
class Side:
    """A table that describes items or users."""

    file: str
    """A file, a folder, a pattern or an address."""
    key: str
    kinds: dict[str, Kind]


def read(side: Side, option: str, form: Form, dropped: Dropped) -> pl.DataFrame:
    """The key column and the features, as the files have them, by the names given.

    Args:
        option: that named the file, for errors.
        dropped: takes notes; a row that cannot be read is an error.

    Raises:
        DataError: a file or column is missing, or a row cannot be read.
    """
    source = _source(side.file)
    columns = tuple(dict.fromkeys((side.key, *side.kinds)))
    short = {name: f"c{n}" for n, name in enumerate(columns)}  # a feature may be called file or row, as a shard's are
    numbers = tuple(name for name, kind in side.kinds.items() if kind in NUMERIC)
    frames = []
    for place in places(source, side.file, option):
        frames += list(_shard(source, place, columns, numbers, form, short).batches(dropped))
        for reason, examples in dropped.examples.items():
            raise DataError(f"{place.url}: {reason} ({examples[0]}); mend it, every row of this file is needed")
    if not frames:
        raise DataError(f"{side.file}: has no rows; give a file with data")
    try:
        frame = pl.concat([frame.select(short.values()) for frame in frames], how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{side.file}: its files have columns of different types; write them alike") from error
    return frame.rename({now: name for name, now in short.items()})


def of_kind(column: pl.Series, kind: Kind, form: Form, file: str, tell: Callable[[str], None]) -> pl.Series:
    """A feature's column in the type of its kind.

    Raises:
        DataError: values that are not of the kind.
    """
    if column.dtype == pl.String and kind in ("multi_categorical", "dense"):
        column = as_lists(column, form, file, tell)
    elif column.dtype == pl.String and kind != "text":
        refuse_lists(column, kind, file)
    if kind == "multi_categorical":
        return cast(column, pl.List(pl.String), file)
    if kind == "dense":
        return cast(_read(column, form.numbers, file), pl.List(pl.Float32), file)
    if kind in NUMERIC:
        return cast(_read(column, form.numbers, file), pl.Float64(), file)
    return cast(column, pl.String(), file)


def once(
    described: pl.DataFrame, duplicates: str, side: Side, option: str, tell: Callable[[str], None]
) -> pl.DataFrame:
    """One row a key.

    Args:
        duplicates: which row of a key stays: first, last; refuse: a second one is an error.

    Raises:
        DataError: a key has two rows, and none was said to stay.
    """
    twice = described["key"].filter(described["key"].is_duplicated())
    if not len(twice):
        return described
    if duplicates == "refuse":
        raise DataError(
            f"{side.file}: key '{twice[0]}' occurs more than once as '{side.key}'; keep one row of it, or say which"
            " one with --duplicates first or last"
        )
    shown = f"{option} {redact_address(side.file)}"
    tell(f"{shown}: {twice.n_unique()} keys have several rows; the {duplicates} one of each is kept")
    return described.unique("key", keep="first" if duplicates == "first" else "last", maintain_order=True)


def _source(location: str) -> str:
    """By the ending of its name, or, of a folder, of its first file that is known by one; else CSV."""
    folder = Path(location)
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else [location]
    for name in names:
        for source, endings in ENDINGS.items():
            if name.endswith(endings):
                return source
    return "csv"


def _shard(
    source: str, place: Place, columns: tuple[str, ...], numbers: tuple[str, ...], form: Form, short: dict[str, str]
) -> Shard:
    def roles(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.rename(short)

    if source == "parquet":
        return ParquetShard(place, columns, roles)
    if source == "jsonl":
        return JsonShard(place, columns, roles, form, numbers, lists=True)
    return CsvShard(place, columns, roles, replace(form, multiline=True))


def _read(column: pl.Series, numbers: Numbers, file: str) -> pl.Series:
    """Numbers that people wrote; as it is where they are written as machines read them."""
    listed = column.dtype == pl.List(pl.String)
    if numbers == Numbers() or not (listed or column.dtype == pl.String):
        return column
    flat = column.explode() if listed else column
    read = numbers.read(flat)
    bad = flat.filter(read.is_null() & flat.is_not_null() & (flat.str.strip_chars() != ""))
    if len(bad):
        raise DataError(
            f"{file}: column '{column.name}': '{bad[0][:60]}' is no number as --decimal '{numbers.decimal}',"
            f" --thousands '{numbers.thousands}' and --currency '{numbers.currency}' say; mend one or the other"
        )
    if not listed:
        return read
    expression = numbers.expression(pl.element())
    return column.to_frame().select(pl.col(column.name).list.eval(expression)).to_series()
