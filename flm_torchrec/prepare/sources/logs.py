"""A user's own logs: Parquet, CSV or JSON lines with a mapping of columns."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import get_args

import polars as pl

from flm_torchrec.data.keys import NO_EVENT, keys
from flm_torchrec.data.schema import Entity, Kind
from flm_torchrec.data.times import check_unit, seconds
from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.sources import sides
from flm_torchrec.prepare.sources.form import Form
from flm_torchrec.prepare.sources.json_lines import JsonShard
from flm_torchrec.prepare.sources.raw import Declared, Raw, Shard
from flm_torchrec.prepare.sources.shards import CsvShard, ParquetShard, Place, places
from flm_torchrec.prepare.sources.sides import Side, of_kind, once
from flm_torchrec.prepare.sources.tables import cast
from flm_torchrec.safe_text import redact_address

ROLES = ("user", "item", "timestamp", "event", "value")
RESERVED = ("key", "id", "item_id", "user_id", "item_key", "user_key")
"""Names of columns and tables that the layout and the model use themselves."""


@dataclass(frozen=True)
class Mapping:
    """How columns of the logs map to roles."""

    columns: dict[str, str]
    """Column by role of ROLES; user and item are needed. `a|b` is whichever a file has."""
    time_unit: str = "s"
    form: Form = field(default_factory=Form)
    sides: dict[Entity, Side] = field(default_factory=dict)
    title: str = ""
    duplicates: str = "refuse"
    """Rows of one key in a file of items or users: first, last, refuse."""


def read(source: str, location: str, mapping: Mapping) -> Raw:
    """A file, all files of a folder, or all that a pattern such as `logs/2024-*.csv` matches, by name.

    The logs are read later, shard by shard; what describes items and users is read here.

    Raises:
        DataError: a file or column is missing, a file is corrupt or empty, a key occurs twice.
    """
    mapping.form.check()
    titled = mapping.sides["item"].kinds.get(mapping.title) if "item" in mapping.sides else None
    if mapping.title and titled != "text":
        raise DataError(f"--title '{mapping.title}': declare it in --item-features as {mapping.title}:text")
    make = _SHARDS[source]
    shards = tuple(make(place, mapping) for place in _places(source, location, mapping))
    notes = Dropped()
    described = {entity: _described(entity, side, mapping, notes) for entity, side in mapping.sides.items()}
    return Raw(
        name=re.sub(r"[*?\[\]]", "", PurePosixPath(redact_address(location)).stem) or source,
        source=source,
        interactions=shards,
        items=described.get("item"),
        users=described.get("user"),
        features=tuple(Declared(n, e, k) for e, side in mapping.sides.items() for n, k in side.kinds.items()),
        title=mapping.title,
        timestamps="timestamp" in mapping.columns,
        warnings=tuple(notes.notes),
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
    return CsvShard(place, _columns(mapping), partial(_roles, mapping, place.url), mapping.form)


def _jsonl(place: Place, mapping: Mapping) -> Shard:
    numbers = (mapping.columns["value"],) if "value" in mapping.columns else ()
    return JsonShard(place, _columns(mapping), partial(_roles, mapping, place.url), mapping.form, numbers)


_SHARDS = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl}


def _places(source: str, location: str, mapping: Mapping) -> list[Place]:
    """Read otherwise, a file is another shard."""
    return [replace(place, identity=f"{place.identity} {mapping}") for place in places(source, location)]


def _columns(mapping: Mapping) -> tuple[str, ...]:
    return tuple(mapping.columns.values())


def _roles(mapping: Mapping, file: str, frame: pl.DataFrame) -> pl.DataFrame:
    given = {role: frame[column] for role, column in mapping.columns.items()}
    columns = [
        keys(given["user"], file).rename("user"),
        keys(given["item"], file).rename("item"),
        # Where nothing maps to a role, what the layout says of a source without it; the order is counted later.
        _times(given["timestamp"], mapping.time_unit, file) if "timestamp" in given else pl.lit(0, pl.Int64),
        keys(given["event"], file).fill_null(NO_EVENT) if "event" in given else pl.lit("interaction"),
        _values(given["value"], mapping.form, file) if "value" in given else pl.lit(1.0),
    ]
    return frame.select(c.alias(role) for c, role in zip(columns, ROLES, strict=True))


def _values(column: pl.Series, form: Form, file: str) -> pl.Series:
    return cast(form.numbers.read(column), pl.Float64(), file, strict=False)


def _times(column: pl.Series, unit: str, file: str) -> pl.Series:
    try:
        found = seconds(column, unit)
        check_unit(column, unit, found)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    return found


def _described(entity: Entity, side: Side, mapping: Mapping, notes: Dropped) -> pl.DataFrame:
    """What a file says of items or users: their keys and features, a row each."""
    option, file = f"--{entity}s", redact_address(side.file)
    frame = sides.read(side, option, mapping.form, notes)
    ids = keys(frame[side.key], file).rename("key")
    columns = [of_kind(frame[name], kind, mapping.form, file, notes.note) for name, kind in side.kinds.items()]
    if ids.null_count():
        notes.note(f"{option} {file}: {ids.null_count()} rows have no id in '{side.key}' and are left out")
    described = pl.DataFrame([ids, *columns]).filter(pl.col("key").is_not_null())
    return once(described, mapping.duplicates, side, option, notes.note)
