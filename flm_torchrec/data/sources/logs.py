"""A user's own logs: Parquet, CSV or JSON lines with a mapping of columns."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import get_args

import polars as pl

from flm_torchrec.data.raw import Declared, Raw, Shard
from flm_torchrec.data.schema import Entity, Kind
from flm_torchrec.data.sources.shards import CsvShard, JsonShard, ParquetShard, Place, places
from flm_torchrec.data.sources.tables import check_unique, read_csv, read_parquet
from flm_torchrec.errors import DataError
from flm_torchrec.messages import first_line, redact_address
from flm_torchrec.names import nearest

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


def read(source: str, location: str, mapping: Mapping) -> Raw:
    """A file, all files of a folder, or all that a pattern such as `logs/2024-*.csv` matches, by name.

    The logs are read later, shard by shard; what describes items and users is read here.

    Raises:
        DataError: a file or column is missing, a file is corrupt or empty, a key occurs twice.
    """
    titled = mapping.sides["item"].kinds.get(mapping.title) if "item" in mapping.sides else None
    if mapping.title and titled != "text":
        raise DataError(f"--title '{mapping.title}': declare it in --item-features as {mapping.title}:text")
    make = _SHARDS[source]
    shards = tuple(make(place, mapping) for place in _places(source, location, mapping))
    sides = {entity: _side(side, mapping) for entity, side in mapping.sides.items()}
    return Raw(
        name=re.sub(r"[*?\[\]]", "", PurePosixPath(redact_address(location)).stem) or source,
        source=source,
        interactions=shards,
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


def _parquet(place: Place, mapping: Mapping) -> Shard:
    return ParquetShard(place, _columns(mapping), partial(_roles, mapping, place.url))


def _csv(place: Place, mapping: Mapping) -> Shard:
    return CsvShard(place, _columns(mapping), partial(_roles, mapping, place.url), mapping.separator)


def _jsonl(place: Place, mapping: Mapping) -> Shard:
    return JsonShard(place, _columns(mapping), partial(_roles, mapping, place.url))


_SHARDS = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl}


def _places(source: str, location: str, mapping: Mapping) -> list[Place]:
    """Read otherwise, a file is another shard."""
    return [replace(place, identity=f"{place.identity} {mapping}") for place in places(source, location)]


def _columns(mapping: Mapping) -> tuple[str, ...]:
    return tuple(mapping.columns.values())


def _roles(mapping: Mapping, file: str, frame: pl.DataFrame) -> pl.DataFrame:
    given = {role: frame[column] for role, column in mapping.columns.items()}
    columns = [
        _keys(given["user"], file).rename("user"),
        _keys(given["item"], file).rename("item"),
        # Where nothing maps to a role, what the layout says of a source without it; the order is counted later.
        _seconds(given["timestamp"], mapping.time_unit, file) if "timestamp" in given else pl.lit(0, pl.Int64),
        _keys(given["event"], file).fill_null("unknown") if "event" in given else pl.lit("interaction"),
        _cast(given["value"], pl.Float64(), file, strict=False) if "value" in given else pl.lit(1.0),
    ]
    return frame.select(c.alias(role) for c, role in zip(columns, ROLES, strict=True))


def _keys(column: pl.Series, file: str) -> pl.Series:
    """As text; whole numbers without a point, as a tool that knows no missing integer may have added one."""
    if not column.dtype.is_float():
        return _cast(column, pl.String(), file)
    value = pl.col(column.name)
    whole = (value == value.round()) & (value.abs() < 2**53)
    as_text = pl.when(whole).then(value.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(value.cast(pl.String))
    return column.to_frame().select(as_text).to_series()


def _cast(column: pl.Series, kind: pl.DataType, file: str, strict: bool = True) -> pl.Series:
    try:
        if column.dtype.is_nested() and not kind.is_nested():
            raise TypeError(f"a {column.dtype.base_type()} is not one value")
        return column.cast(kind, strict=strict)
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise DataError(
            f"{file}: column '{column.name}' is {column.dtype}, and {kind} is needed ({first_line(error)}); mend it,"
            " or name another column or kind"
        ) from error


def _seconds(column: pl.Series, unit: str, file: str) -> pl.Series:
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
    file = str(side.file)
    keys = _keys(frame[side.key], file).rename("key")
    columns = [_of_kind(frame[name], kind, mapping.list_separator, file) for name, kind in side.kinds.items()]
    described = pl.DataFrame([keys, *columns]).filter(pl.col("key").is_not_null() & (pl.col("key") != ""))
    check_unique(described["key"], side.file, f"'{side.key}'")
    return described


def _of_kind(column: pl.Series, kind: Kind, list_separator: str, file: str) -> pl.Series:
    if column.dtype == pl.String and kind in ("multi_categorical", "dense"):
        column = column.str.split(list_separator)
    if kind == "dense":
        return _cast(column, pl.List(pl.Float32), file)
    if kind == "multi_categorical":
        return _cast(column, pl.List(pl.String), file)
    return _cast(column, pl.Float64() if kind in ("numeric", "quantile") else pl.String(), file)
