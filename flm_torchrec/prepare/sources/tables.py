"""Tables from CSV and Parquet files, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.sources.columns import no_column
from flm_torchrec.safe_text import first_line


def read_csv(
    file: Path,
    separator: str,
    *,
    wanted: Iterable[str] | None = None,
    names: tuple[str, ...] | None = None,
    encoding: str = "utf-8",
    quoted: bool = True,
) -> pl.DataFrame:
    """A CSV file as text.

    Args:
        wanted: the columns to read; all where None.
        names: names of the columns, where the file has no header.
        quoted: double quotes enclose a field; else they are part of it.

    Raises:
        DataError: missing, empty or malformed file, or a column is missing.
    """
    _check_there(file)
    try:
        frame = pl.read_csv(
            file,
            separator=separator,
            has_header=names is None,
            infer_schema=False,
            encoding=encoding,
            quote_char='"' if quoted else None,
            glob=False,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError, ValueError) as error:
        raise DataError(
            f"{file}: not a readable table ({first_line(error)}); mend the line, or give the right separator and"
            " encoding"
        ) from error
    if names is not None:
        if len(frame.columns) != len(names):
            raise DataError(f"{file}: {len(frame.columns)} columns, expected {len(names)}: {', '.join(names)}")
        frame.columns = list(names)
    wanted = _check_columns(file, wanted, frame.columns)
    return _with_rows(frame.select(wanted), file)


def read_parquet(file: Path, *, wanted: Iterable[str] | None = None) -> pl.DataFrame:
    """A Parquet file.

    Args:
        wanted: the columns to read; all where None.

    Raises:
        DataError: missing, empty or corrupt file, or a column is missing.
    """
    _check_there(file)
    try:
        wanted = _check_columns(file, wanted, pq.read_schema(file).names)
        return _with_rows(pl.read_parquet(file, columns=wanted, glob=False, hive_partitioning=False), file)
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({first_line(error)}); write it again") from error


def with_row_numbers(frame: pl.DataFrame, file: Path) -> pl.DataFrame:
    """Add the columns `file` and `row` (from 1, a header not counted), by which errors name a row."""
    return frame.with_columns(pl.lit(file.name).alias("file"), pl.int_range(1, pl.len() + 1).alias("row"))


def check_unique(keys: pl.Series, file: Path, what: str) -> None:
    """Check that no key describes two rows.

    Raises:
        DataError: one does.
    """
    twice = keys.filter(keys.is_duplicated())
    if len(twice):
        raise DataError(f"{file}: key '{twice[0]}' occurs more than once as {what}; keep one row of it")


def cast(column: pl.Series, kind: pl.DataType, file: str, strict: bool = True) -> pl.Series:
    """The column as another type; null where a value does not fit, if not `strict`.

    Raises:
        DataError: a value does not fit, or lists and plain values are mixed up.
    """
    try:
        if column.dtype.is_nested() and not kind.is_nested():
            raise TypeError(f"a {column.dtype.base_type()} is not one value")
        if isinstance(column.dtype, pl.List | pl.Array) and column.dtype.inner.is_nested():  # type: ignore[union-attr]
            raise TypeError("its lists do not hold plain values")
        return column.cast(kind, strict=strict)
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise DataError(
            f"{file}: column '{column.name}' is {column.dtype}, and {kind} is needed ({first_line(error)}); mend it,"
            " or name another column or kind"
        ) from error


def _check_columns(file: Path, wanted: Iterable[str] | None, present: Iterable[str]) -> list[str]:
    present = list(present)
    for column in wanted or ():
        if column not in present:
            raise no_column(str(file), column, present)
    return present if wanted is None else list(dict.fromkeys(wanted))


def _with_rows(frame: pl.DataFrame, file: Path) -> pl.DataFrame:
    """The frame, checked to have rows."""
    if len(frame) == 0:
        raise DataError(f"{file}: has no rows; give a file with data")
    return frame


def _check_there(file: Path) -> None:
    if not file.is_file():
        raise DataError(f"{file}: not found; give the path of a file")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: is empty; give a file with data")
