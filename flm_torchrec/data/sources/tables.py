"""Reading tables from CSV and Parquet with errors that name the file."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from flm_torchrec.errors import DataError


def read_csv(
    file: Path, separator: str, columns: tuple[str, ...] | None = None, encoding: str = "utf-8"
) -> pl.DataFrame:
    """All columns as text, with columns `file` and `row` (from 1, the header not counted) before them.

    Args:
        columns: names of the columns, where the file has no header.

    Raises:
        DataError: missing, empty or malformed file.
    """
    _check_there(file)
    try:
        frame = pl.read_csv(
            file, separator=separator, has_header=columns is None, new_columns=columns, infer_schema=False,
            encoding=encoding, quote_char='"' if separator == "," else None,
        )  # fmt: skip
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable table ({_first_line(error)}); check separator and encoding") from error
    if columns is not None and len(frame.columns) < len(columns):
        raise DataError(f"{file}: {len(frame.columns)} columns, expected {len(columns)}: {', '.join(columns)}")
    return _with_place(frame, file)


def read_parquet(file: Path) -> pl.DataFrame:
    """The table, with columns `file` and `row` (from 1) before its own.

    Raises:
        DataError: missing, empty or corrupt file.
    """
    _check_there(file)
    try:
        return _with_place(pl.read_parquet(file), file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({_first_line(error)}); write it again") from error


def _with_place(frame: pl.DataFrame, file: Path) -> pl.DataFrame:
    if len(frame) == 0:
        raise DataError(f"{file}: has no rows")
    clash = [c for c in ("file", "row") if c in frame.columns]
    kept = frame.drop(clash)
    return kept.select(pl.lit(file.name).alias("file"), pl.int_range(1, pl.len() + 1).alias("row"), pl.all())


def _check_there(file: Path) -> None:
    if not file.is_file():
        raise DataError(f"{file}: not found")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: is empty")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
