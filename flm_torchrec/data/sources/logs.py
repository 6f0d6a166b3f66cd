"""A user's own logs: Parquet or CSV files with a mapping of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import polars as pl

from flm_torchrec.config.load import nearest
from flm_torchrec.data.raw import Declared, Raw
from flm_torchrec.data.schema import Entity, Kind
from flm_torchrec.data.sources.tables import read_csv, read_parquet
from flm_torchrec.errors import DataError

ROLES = ("user", "item", "timestamp", "event", "value")
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True)
class Side:
    """A table that describes items or users."""

    file: Path
    key: str
    kinds: dict[str, Kind]


@dataclass(frozen=True)
class Mapping:
    """How columns of the logs map to roles."""

    columns: dict[str, str]
    """Column by role of ROLES; user and item are needed."""
    time_unit: str = "s"
    separator: str = ","
    list_separator: str = "|"
    sides: dict[Entity, Side] = field(default_factory=dict)
    title: str = ""


def read(source: str, path: Path, mapping: Mapping) -> Raw:
    """Read a file, or all files of a folder in the order of their names.

    Raises:
        DataError: a file or column is missing, a file is corrupt or empty, a key occurs twice.
    """
    reader: Callable[[Path], pl.DataFrame] = (
        read_parquet if source == "parquet" else lambda file: read_csv(file, mapping.separator)
    )
    files = [path] if path.is_file() else sorted(path.glob(f"*.{source}"))
    if not files:
        raise DataError(f"{path}: no file *.{source}; --input must be such a file or a folder of them")
    frames = [_interactions(reader(file), file, mapping) for file in files]
    sides: dict[Entity, pl.DataFrame] = {
        entity: _side(reader_of(side.file, mapping)(side.file), side, mapping.list_separator)
        for entity, side in mapping.sides.items()
    }
    declared = [Declared(n, e, kind) for e, side in mapping.sides.items() for n, kind in side.kinds.items()]
    titled = mapping.sides["item"].kinds.get(mapping.title) if "item" in mapping.sides else None
    if mapping.title and titled != "text":
        raise DataError(f"--title '{mapping.title}': declare it in --item-features as {mapping.title}:text")
    return Raw(
        name=path.stem,
        source=source,
        interactions=pl.concat(frames),
        items=sides.get("item"),
        users=sides.get("user"),
        features=tuple(declared),
        title=mapping.title,
        timestamps="timestamp" in mapping.columns,
    )


def parse_columns(text: str) -> dict[str, str]:
    """`user=uid,item=sku` → column by role.

    Raises:
        DataError: not of that form, unknown role, or user or item missing.
    """
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in ROLES:
            raise DataError(f"--columns: '{'='.join(pair)}' is not ROLE=COLUMN; {nearest(pair[0], ROLES)}")
    columns = dict(pairs)
    for role in ("user", "item"):
        if role not in columns:
            raise DataError(f"--columns: name the column of the {role}, e.g. {role}={role}_id")
    return columns


def parse_kinds(text: str, option: str) -> dict[str, Kind]:
    """`brand:categorical,price:numeric` → kind by column.

    Raises:
        DataError: not of that form, or an unknown kind.
    """
    kinds: dict[str, Kind] = {}
    for part in filter(None, text.split(",")):
        name, _, kind = part.partition(":")
        if kind not in get_args(Kind):
            raise DataError(f"{option}: '{part}' is not COLUMN:KIND; {nearest(kind, get_args(Kind))}")
        kinds[name] = kind  # type: ignore[assignment]
    return kinds


def reader_of(file: Path, mapping: Mapping) -> Callable[[Path], pl.DataFrame]:
    """By the file's name."""
    return read_parquet if file.suffix == ".parquet" else lambda f: read_csv(f, mapping.separator)


def _interactions(frame: pl.DataFrame, file: Path, mapping: Mapping) -> pl.DataFrame:
    for column in mapping.columns.values():
        _check_column(frame, column, file, "--columns")
    given = {role: pl.col(column) for role, column in mapping.columns.items()}
    return frame.select(
        "file",
        "row",
        given["user"].cast(pl.String).alias("user"),
        given["item"].cast(pl.String).alias("item"),
        _seconds(frame, mapping, file).alias("timestamp"),
        given["event"].cast(pl.String).fill_null("unknown").alias("event") if "event" in given else pl.lit("interaction").alias("event"),
        given["value"].cast(pl.Float64, strict=False).alias("value") if "value" in given else pl.lit(1.0).alias("value"),
    )


def _seconds(frame: pl.DataFrame, mapping: Mapping, file: Path) -> pl.Expr:
    if "timestamp" not in mapping.columns:
        return pl.int_range(pl.len(), dtype=pl.Int64)  # the order of the rows
    name = mapping.columns["timestamp"]
    kind, column = frame.schema[name], pl.col(name)
    if kind.is_temporal() and kind != pl.Time:
        return column.cast(pl.Datetime("us")).dt.epoch("s")
    if kind.is_numeric():
        return column.cast(pl.Float64).floordiv(UNITS[mapping.time_unit]).cast(pl.Int64, strict=False)
    if kind != pl.String:
        raise DataError(f"{file}: column '{name}' is {kind}, not a time; map timestamp to another column")
    whole = column.cast(pl.Int64, strict=False).floordiv(UNITS[mapping.time_unit])
    plain = column.str.replace("T", " ").str.replace(r"Z$", "")
    local = [plain.str.to_datetime(form, strict=False) for form in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")]
    zoned = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%:z", strict=False)
    return pl.coalesce(whole, *(time.dt.epoch("s") for time in (*local, zoned)))


def _side(frame: pl.DataFrame, side: Side, list_separator: str) -> pl.DataFrame:
    for column in (side.key, *side.kinds):
        _check_column(frame, column, side.file, "the feature options")
    keys = frame[side.key].cast(pl.String)
    if keys.is_duplicated().any():
        twice = keys.filter(keys.is_duplicated())[0]
        raise DataError(f"{side.file}: key '{twice}' occurs more than once in column '{side.key}'; keep one row each")
    columns = [_of_kind(frame[name], kind, list_separator, side.file) for name, kind in side.kinds.items()]
    return pl.DataFrame([keys.rename("key"), *columns])


def _of_kind(column: pl.Series, kind: Kind, list_separator: str, file: Path) -> pl.Series:
    if column.dtype == pl.String and kind in ("multi_categorical", "dense"):
        column = column.str.split(list_separator)
    try:
        if kind == "dense":
            return column.cast(pl.List(pl.Float32))
        return column.cast(pl.Float64) if kind == "numeric" else column
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{file}: column '{column.name}' is declared {kind} but has other values"
            f" ({str(error).splitlines()[0][:150]}); declare another kind or mend the column"
        ) from error


def _check_column(frame: pl.DataFrame, column: str, file: Path, option: str) -> None:
    if column not in frame.columns:
        known = [c for c in frame.columns if c not in ("file", "row")]
        raise DataError(f"{file}: no column '{column}' named in {option}; {nearest(column, known)}")
