"""What SQL is given, as SQL writes it: texts, names, and files that are read under their own names alone."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from flm_torchrec.errors import DataError


def text(value: str) -> str:
    """A text, whatever characters it has."""
    return "'" + value.replace("'", "''") + "'"


def name(column: str) -> str:
    """The name of a column or of a table, whatever characters it has."""
    return '"' + column.replace('"', '""') + '"'


def target(path: Path) -> str:
    """A file or folder to write.

    Raises:
        DataError: DuckDB cannot write there.
    """
    return text(checked(path))


def read_parquet(files: Sequence[Path], *options: str) -> str:
    """The rows of Parquet files, to stand behind FROM.

    Every path is that of one file, not a pattern, and a folder `key=value` in a path adds no column.

    Args:
        options: more arguments of DuckDB's read_parquet, such as `file_row_number = true`.

    Raises:
        DataError: DuckDB cannot read a file of that name.
    """
    listed = ", ".join(text(glob.escape(checked(file))) for file in files)
    return f"read_parquet({', '.join((f'[{listed}]', 'hive_partitioning = false', *options))})"


def checked(path: Path) -> str:
    """The path as text, if DuckDB takes it as it is: DuckDB reads a backslash as the end of a folder's name.

    Raises:
        DataError: it has one.
    """
    if "\\" in str(path):
        raise DataError(f"{path}: DuckDB cannot use a path with a backslash; rename that folder or choose another")
    return str(path)
