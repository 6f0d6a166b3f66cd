"""Tables in and out of the Python API: pandas, polars and Arrow. pandas need not be installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

import pyarrow as pa

from flm_torchrec.errors import ConfigError, DataError
from flm_torchrec.names import nearest
from flm_torchrec.safe_text import first_line

FrameKind = Literal["polars", "pandas", "arrow"]
Frame = Any
"""A `polars.DataFrame`, `pandas.DataFrame` or `pyarrow.Table`, as was asked for."""


def is_frame(value: object) -> bool:
    """Whether a value is a table of pandas (2.2 or later), polars or Arrow, or another that exports Arrow."""
    return hasattr(value, "__arrow_c_stream__") and hasattr(value, "columns")


def arrow_of(frame: object, where: str) -> pa.Table:
    """A table as Arrow.

    Args:
        where: names the table in errors.

    Raises:
        DataError: it is no table, has no rows or two columns of one name, or a column mixes types.
    """
    if not is_frame(frame):
        raise no_table(frame, where)
    try:
        table = frame if isinstance(frame, pa.Table) else _converted(frame, where)
    except OverflowError as error:
        raise DataError(f"{where}: cannot be read ({first_line(error)}); give integers over 64 bits as text") from error
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{where}: cannot be read ({first_line(error)}); give each column one type") from error
    if not len(table):
        raise DataError(f"{where}: has no rows; give a table with data")
    return table


def _converted(frame: Any, where: str) -> pa.Table:
    names = list(map(str, frame.columns))
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{where}: two columns are named '{twice[0]}'; rename one")
    if objects := _objects(frame):
        raise DataError(f"{where}: column '{objects[0]}' has objects of Python; give texts or numbers")
    return pa.table(frame)


def _objects(frame: Any) -> list[str]:
    """Columns of Polars that have Python objects, of which Arrow would get the addresses in memory."""
    import polars as pl

    return [name for name, kind in frame.schema.items() if kind == pl.Object] if isinstance(frame, pl.DataFrame) else []


def no_table(value: object, where: str) -> DataError:
    """The error of a value that is neither a table nor a path."""
    hint = "collect it first" if hasattr(value, "collect") else "give a table of pandas, polars or Arrow, or a path"
    return DataError(f"{where}: is a {type(value).__name__}; {hint}")


def check_kind(kind: str) -> None:
    """Raise ConfigError where there is no such kind of table, or its library is not installed."""
    if kind not in get_args(FrameKind):
        raise ConfigError(f"frame '{kind}': {nearest(kind, get_args(FrameKind))}")
    if kind == "pandas" and find_spec("pandas") is None:
        raise ConfigError("frame 'pandas': pandas is not installed; run: pip install pandas, or ask for polars")


def framed(table: pa.Table, kind: FrameKind) -> Frame:
    """An Arrow table as a table of the kind asked for; see `check_kind`."""
    if kind == "polars":
        import polars as pl

        return pl.from_arrow(table)
    return table.to_pandas() if kind == "pandas" else table
