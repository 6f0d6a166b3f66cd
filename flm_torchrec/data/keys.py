"""Ids of users and items as text: one rule, whatever the file and its type."""

from __future__ import annotations

import math
import re
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.errors import DataError

NO_ID = ("", "NULL", "null", "NaN", "nan", "None", "<NA>", "\\N")
"""Texts that tools write where there is no value."""
NO_EVENT = "unknown"
"""Kind of an event that names none, where the source has kinds."""
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""White space, as Unicode and Polars have it."""
RULE = (
    "text without white space around it; a whole number has no point (1.0 is 1); bytes that are no UTF-8 are"
    f" hexadecimal; null, NaN and the texts {', '.join(repr(text) for text in NO_ID)} are no id"
)
"""For the report."""
EXACT = 2**53
"""Below this every whole number has a float of its own."""
EXACT_OF: dict[type[pl.DataType], int] = {pl.Float16: 2**11, pl.Float32: 2**24}
"""EXACT, of narrower floats."""


def keys(column: pl.Series, file: str) -> pl.Series:
    """[n] values → [n] text, null where there is no id; see RULE.

    Raises:
        DataError: lists, objects of Python, or whole numbers that a float has rounded, so that two ids may have become
            one.
    """
    if column.dtype.is_nested() or column.dtype == pl.Object:
        raise DataError(f"{file}: column '{column.name}' is {column.dtype}, an id is one value; name another column")
    if column.dtype.is_float():
        exact = EXACT_OF.get(column.dtype.base_type(), EXACT)
        rounded = column.cast(pl.Float64).filter(column.is_finite() & (column.abs() >= exact))
        if len(rounded):
            raise rounded_id(file, column.name, rounded[0], exact)
        column = column.set(~column.is_finite(), None)
    text = pl.col(column.name).str.strip_chars()
    plain = text.str.replace(r"^([+-]?\d+)\.0+$", "$1").str.replace(r"^-(0+)$", "$1")
    return as_text(column).to_frame().select(pl.when(~plain.is_in(NO_ID)).then(plain)).to_series()


def rounded_id(file: str, column: str, shown: object, exact: int = EXACT) -> DataError:
    """The error of an id that is a float in which different whole numbers may have become one."""
    return DataError(
        f"{file}: column '{column}' has the id {shown} as a float, which is rounded from 2^{exact.bit_length() - 1} on,"
        " so different ids may be one; store ids as integers or as text"
    )


def is_rounded(value: Any) -> bool:
    """Whether a value that `json.loads` made is no exact id: a float from EXACT on."""
    return isinstance(value, float) and math.isfinite(value) and abs(value) >= EXACT


HASHED = re.compile("[0-9a-f]{64}")
"""A user's key after `flm prepare --hash-users`."""
TOMBSTONE = "forgotten-"
"""Beginning of what replaces a forgotten user's key."""


def tombstone(user: int) -> str:
    """The text that replaces a forgotten user's key."""
    return f"{TOMBSTONE}{user}"


def are_tombstones(keys: pa.Array | pa.ChunkedArray, ids: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """[n] keys and ids of users → [n] bool: which of them were forgotten."""
    return pc.equal(keys, pc.binary_join_element_wise(TOMBSTONE, ids.cast(pa.string()), ""))


def frame_of(table: pa.Table, file: str) -> pl.DataFrame:
    """A table of Arrow for Polars: dictionaries and runs as the values that they stand for, bytes as of `as_text`.

    Raises:
        DataError: a column has a type that stands for neither numbers, times, texts nor lists of them.
    """
    return pl.DataFrame([_series(table.column(n), field.name, file) for n, field in enumerate(table.schema)])


def _series(column: pa.ChunkedArray, name: str, file: str) -> pl.Series:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
    elif pa.types.is_run_end_encoded(kind):
        column = pc.run_end_decode(column)
    elif pa.types.is_decimal256(kind):  # Polars has no decimals of over 38 digits
        column = column.cast(pa.string())
    try:
        frame = pl.from_arrow(pa.table({name: column}))
        assert isinstance(frame, pl.DataFrame)
        series = frame.to_series()
        if series.dtype in (pl.Binary, pl.Categorical, pl.Enum):
            return as_text(series)
        if series.dtype != pl.Duration:
            return series
    except pl.exceptions.PolarsError:
        pass  # a type that Polars does not know
    raise DataError(f"{file}: column '{name}' is {kind} in Arrow, which is not read; store it as numbers or as text")


def as_text(column: pl.Series) -> pl.Series:
    """[n] values → [n] text, as JSON lines or a CSV file would have them; empty where the value is a list or object.

    Times are UTC. Bytes are text if they are UTF-8, else hexadecimal.
    """
    kind, value = column.dtype, pl.col(column.name)
    if kind.is_nested():
        return column.to_frame().select(pl.when(value.is_not_null()).then(pl.lit("")).alias(column.name)).to_series()
    if isinstance(kind, pl.Datetime) and kind.time_zone:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    if kind == pl.Binary:
        return pl.Series(column.name, [None if v is None else text_of_bytes(v) for v in column], dtype=pl.String)
    if kind.is_float():
        whole = (value == value.round()) & (value.abs() < EXACT)
        text = pl.when(whole).then(value.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(value.cast(pl.String))
    else:
        text = value.cast(pl.String)
    return column.to_frame().select(text.alias(column.name)).to_series()


def stripped(text: str) -> str:
    """A value of a feature without the white space around it, as `categories` has it."""
    return text.strip(BLANKS)


def categories(column: pl.Series) -> pl.Series:
    """[n] values of a feature, or lists of them → [n] text, or lists of text, as of `as_text`; NaN is no value.

    White space around a value is no part of it. Lists of lists, and objects, stay as they are.
    """
    kind = column.dtype
    if isinstance(kind, pl.List | pl.Array) and not kind.inner.is_nested():  # type: ignore[union-attr]
        texts = pl.element().map_batches(categories, return_dtype=pl.String)
        listed = column.cast(pl.List(kind.inner)).to_frame()  # type: ignore[union-attr]
        return listed.select(pl.col(column.name).list.eval(texts)).to_series()
    if kind.is_nested():
        return column
    return as_text(column.fill_nan(None) if kind.is_float() else column).str.strip_chars()


def json_text(value: Any) -> str | None:
    """A value that `json.loads` made, as `as_text` writes one."""
    if value is None:
        return None
    if isinstance(value, list | dict):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else as_text(pl.Series("value", [value]))[0]
    return str(value).encode(errors="replace").decode()  # half of a surrogate pair is no text


def text_of_bytes(value: bytes) -> str:
    """The text that the bytes are in UTF-8; bytes that are none as hexadecimal."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()
