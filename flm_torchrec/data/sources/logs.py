"""A user's own logs: Parquet or CSV files with a mapping of columns."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import polars as pl

from flm_torchrec.config.load import nearest
from flm_torchrec.data.raw import Declared, Raw
from flm_torchrec.data.schema import Entity, Kind
from flm_torchrec.data.sources.tables import check_unique, first_line, read_csv, read_parquet, with_place
from flm_torchrec.errors import DataError

ROLES = ("user", "item", "timestamp", "event", "value")
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
DATES = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
RESERVED = ("key", "id", "item_id", "user_id", "item_key", "user_key")
"""Names of columns and tables that the layout and the model use themselves."""


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
    """Read a file, all files of a folder, or all that a pattern such as `logs/2024-*.csv` matches, by name.

    Raises:
        DataError: a file or column is missing, a file is corrupt or empty, a key occurs twice.
    """
    titled = mapping.sides["item"].kinds.get(mapping.title) if "item" in mapping.sides else None
    if mapping.title and titled != "text":
        raise DataError(f"--title '{mapping.title}': declare it in --item-features as {mapping.title}:text")
    interactions = pl.concat([_interactions(source, file, mapping) for file in _files(source, path)])
    if "timestamp" not in mapping.columns:
        interactions = interactions.with_columns(timestamp=pl.int_range(pl.len()).over("user"))
    sides = {entity: _side(side, mapping) for entity, side in mapping.sides.items()}
    return Raw(
        name=re.sub(r"[*?\[\]]", "", path.stem) or source,
        source=source,
        interactions=interactions,
        items=sides.get("item"),
        users=sides.get("user"),
        features=tuple(Declared(n, e, k) for e, side in mapping.sides.items() for n, k in side.kinds.items()),
        title=mapping.title,
        timestamps="timestamp" in mapping.columns,
    )


def parse_columns(text: str) -> dict[str, str]:
    """`user=uid,item=sku` → column by role.

    Raises:
        DataError: not of that form, unknown role, or user or item missing.
    """
    columns: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        role, _, column = map(str.strip, part.partition("="))
        if role not in ROLES or not column:
            raise DataError(f"--columns: '{part}' is not ROLE=COLUMN; {nearest(role, ROLES)}")
        columns[role] = column
    for role in ("user", "item"):
        if role not in columns:
            raise DataError(f"--columns: name the column of the {role}, e.g. {role}={role}_id")
    return columns


def parse_kinds(text: str, option: str) -> dict[str, Kind]:
    """`brand:categorical,price:numeric` → kind by column.

    Raises:
        DataError: not of that form, an unknown kind, or a name that cannot be a feature's.
    """
    kinds: dict[str, Kind] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, kind = map(str.strip, part.rpartition(":"))
        if not name or kind not in get_args(Kind):
            raise DataError(f"{option}: '{part}' is not COLUMN:KIND; {nearest(kind, get_args(Kind))}")
        # The name becomes that of a file and of a module of the model.
        if not re.fullmatch(r"\w+", name) or name in RESERVED:
            raise DataError(f"{option}: '{name}' cannot name a feature; rename the column, in letters, digits and _")
        kinds[name] = kind  # type: ignore[assignment]
    for name, kind in kinds.items():
        if kind == "text" and f"{name}_tokens" in kinds:
            raise DataError(f"{option}: '{name}_tokens' is where the words of '{name}' go; rename the column")
    return kinds


def _files(source: str, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    pattern = str(path / f"*.{source}") if path.is_dir() else str(path)
    files = sorted(Path(name) for name in glob.glob(pattern) if Path(name).is_file())
    if not files:
        raise DataError(f"{path}: no file *.{source}; --input must be such a file, a folder of them or a pattern")
    return files


def _interactions(source: str, file: Path, mapping: Mapping) -> pl.DataFrame:
    wanted = mapping.columns.values()
    if source == "parquet":
        frame = read_parquet(file, wanted=wanted)
    else:
        frame = read_csv(file, mapping.separator, wanted=wanted)
    given = {role: frame[column] for role, column in mapping.columns.items()}
    columns = [
        _keys(given["user"], file).rename("user"),
        _keys(given["item"], file).rename("item"),
        # Where nothing maps to a role, what the layout says of a source without it; the order is counted later.
        _seconds(given["timestamp"], mapping.time_unit, file) if "timestamp" in given else pl.lit(0, pl.Int64),
        _keys(given["event"], file).fill_null("unknown") if "event" in given else pl.lit("interaction"),
        _cast(given["value"], pl.Float64(), file, strict=False) if "value" in given else pl.lit(1.0),
    ]
    return with_place(frame.select(c.alias(role) for c, role in zip(columns, ROLES, strict=True)), file)


def _keys(column: pl.Series, file: Path) -> pl.Series:
    """As text; whole numbers without a point, as a tool that knows no missing integer may have added one."""
    if column.dtype.is_float() and (column.fill_null(0.0) == column.fill_null(0.0).round()).all():
        column = column.cast(pl.Int64, strict=False)
    return _cast(column, pl.String(), file)


def _cast(column: pl.Series, kind: pl.DataType, file: Path, strict: bool = True) -> pl.Series:
    try:
        if column.dtype.is_nested() and not kind.is_nested():
            raise TypeError(f"a {column.dtype.base_type()} is not one value")
        return column.cast(kind, strict=strict)
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise DataError(
            f"{file}: column '{column.name}' is {column.dtype}, and {kind} is needed ({first_line(error)}); mend it,"
            " or name another column or kind"
        ) from error


def _seconds(column: pl.Series, unit: str, file: Path) -> pl.Series:
    """Unix seconds; null where unreadable. Times that name no zone are UTC."""
    kind = column.dtype
    if isinstance(kind, pl.Datetime | pl.Date):
        return column.dt.epoch("s")
    if kind.is_integer():
        return column.cast(pl.Int64, strict=False) // UNITS[unit]
    if kind.is_float():
        return (column // UNITS[unit]).cast(pl.Int64, strict=False)
    if kind != pl.String:
        raise DataError(f"{file}: column '{column.name}' is {kind}, not a time; map timestamp to another column")
    text = pl.col(column.name).str.strip_chars()
    plain = text.str.replace(r"^(\d{4}-\d\d-\d\d)T", "$1 ").str.replace(r"Z$", "")
    numbers = [text.cast(number, strict=False) // UNITS[unit] for number in (pl.Int64, pl.Float64)]
    local = [plain.str.to_datetime(form, time_unit="us", strict=False) for form in DATES]
    zoned = plain.str.to_datetime(f"{DATES[0]}%z", time_unit="us", strict=False)
    whole = [number.cast(pl.Int64, strict=False) for number in numbers]
    return column.to_frame().select(pl.coalesce(*whole, *(t.dt.epoch("s") for t in (*local, zoned)))).to_series()


def _side(side: Side, mapping: Mapping) -> pl.DataFrame:
    wanted = (side.key, *side.kinds)
    if side.file.suffix == ".parquet":
        frame = read_parquet(side.file, wanted=wanted)
    else:
        frame = read_csv(side.file, mapping.separator, wanted=wanted)
    keys = _keys(frame[side.key], side.file).rename("key")
    columns = [_of_kind(frame[name], kind, mapping.list_separator, side.file) for name, kind in side.kinds.items()]
    described = pl.DataFrame([keys, *columns]).filter(pl.col("key").is_not_null() & (pl.col("key") != ""))
    check_unique(described["key"], side.file, f"'{side.key}'")
    return described


def _of_kind(column: pl.Series, kind: Kind, list_separator: str, file: Path) -> pl.Series:
    if column.dtype == pl.String and kind in ("multi_categorical", "dense"):
        column = column.str.split(list_separator)
    if kind == "dense":
        return _cast(column, pl.List(pl.Float32), file)
    if kind == "multi_categorical":
        return _cast(column, pl.List(pl.String), file)
    return _cast(column, pl.Float64() if kind == "numeric" else pl.String(), file)
