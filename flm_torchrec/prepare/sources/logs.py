"""A user's own logs: Parquet, CSV or JSON lines, with a mapping from roles to columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from types import MappingProxyType

import polars as pl
import pyarrow as pa

from flm_torchrec.data.history import CONTEXT
from flm_torchrec.data.keys import NO_EVENT, keys
from flm_torchrec.data.schema import Entity
from flm_torchrec.data.times import check_unit, seconds
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.column_options import ROLES
from flm_torchrec.prepare.options import LogOptions, NumberForm
from flm_torchrec.prepare.sources import lakehouse
from flm_torchrec.prepare.sources.described import DescribedTable
from flm_torchrec.prepare.sources.entity_tables import KindColumn
from flm_torchrec.prepare.sources.input_files import LAKEHOUSES, InputFile, find_files
from flm_torchrec.prepare.sources.json_lines import JsonShard
from flm_torchrec.prepare.sources.number_text import read_numbers
from flm_torchrec.prepare.sources.shards import CsvShard, ParquetShard, TableShard, ToRoles
from flm_torchrec.prepare.sources.source_data import DeclaredFeature, Shard, SourceData
from flm_torchrec.prepare.sources.tables import cast
from flm_torchrec.prepare.text_encoder import ENDING, encoder_digest
from flm_torchrec.safe_text import redact_address

NO_TABLES: Mapping[Entity, pa.Table] = MappingProxyType({})


def read(source: str, location: str, options: LogOptions, tables: Mapping[Entity, pa.Table] = NO_TABLES) -> SourceData:
    """A file, all files of a folder, or all that a pattern such as `logs/2024-*.csv` matches, by name.

    Logs and tables of items and users are read later, in parts.

    Args:
        source: format of the logs: parquet, csv or jsonl; or delta or iceberg, the kind of the table that is there.
        tables: of items and users that are in memory, in place of the files of the options.

    Raises:
        DataError: a file or column is missing, a file is corrupt or empty, a key occurs twice.
    """
    notes = list[str]()
    if source in LAKEHOUSES:
        shards = _table_shards(source, location, options)
    else:
        files = find_files(source, location, notes.append)
        shards = [_SHARDS[source](_read_with(options, file), options) for file in files]
    name = re.sub(r"[*?\[\]]", "", PurePosixPath(redact_address(location)).stem) or source
    return replace(_with_tables(name, source, shards, (options, tables)), warnings=tuple(notes))


def read_table_of_events(
    name: str, events: pa.Table, options: LogOptions, tables: Mapping[Entity, pa.Table] = NO_TABLES
) -> SourceData:
    """Logs that are an Arrow table in memory.

    Args:
        name: of the data.
        tables: as of `read`.

    Raises:
        DataError: as of `read`.
    """
    shard = TableShard.of("events", events, _columns(options), partial(_roles, options, "events"))
    return _with_tables(name, "table", [shard], (options, tables))


def _with_tables(
    name: str, source: str, shards: Sequence[Shard], described: tuple[LogOptions, Mapping[Entity, pa.Table]]
) -> SourceData:
    options, in_memory = described
    tables: dict[Entity, DescribedTable] = {}
    features = []
    for table in options.entity_tables:
        digests = {name: encoder_digest(folder) for name, folder in table.encoders.items()}
        tables[table.entity] = DescribedTable(table, options, digests, in_memory.get(table.entity))
        features += [DeclaredFeature(name, table.entity, kind) for name, kind in table.kinds.items()]
        features += [DeclaredFeature(name + ENDING, table.entity, "dense", of) for name, of in digests.items()]
    features += [DeclaredFeature(name, "event", "categorical") for name in options.event_features]
    return SourceData(
        name=name,
        source=source,
        interactions=tuple(shards),
        tables=tables,
        features=tuple(features),
        title=options.title,
        timestamps="timestamp" in options.columns,
    )


def _table_shards(source: str, location: str, options: LogOptions) -> Sequence[Shard]:
    if "timestamp" not in options.columns:
        raise DataError(f"--source {source}: rows of such a table have no order; name the timestamp in --columns")

    def to_roles(file: InputFile) -> ToRoles:
        return partial(_roles, options, file.url)

    shards = lakehouse.shards(source, location, options.table_version, _columns(options), to_roles)
    return [replace(shard, file=_read_with(options, shard.file)) for shard in shards]


def _read_with(options: LogOptions, file: InputFile) -> InputFile:
    """The file, as another shard than with other options."""
    return replace(file, identity=f"{file.identity} {options}")


def _parquet(file: InputFile, options: LogOptions) -> Shard:
    return ParquetShard(file, _columns(options), partial(_roles, options, file.url))


def _csv(file: InputFile, options: LogOptions) -> Shard:
    return CsvShard(file, _columns(options), partial(_roles, options, file.url), options.form)


def _jsonl(file: InputFile, options: LogOptions) -> Shard:
    numbers = tuple(options.columns[role] for role in ("value", "weight") if role in options.columns)
    ids = options.columns["user"], options.columns["item"]
    return JsonShard(file, _columns(options), partial(_roles, options, file.url), options.form, numbers, ids)


_SHARDS = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl}


def _columns(options: LogOptions) -> tuple[str, ...]:
    return (*options.columns.values(), *options.event_features)


def _roles(options: LogOptions, file: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Columns user, item, timestamp, event and value; a role without a column has what the layout says of that.

    And weight, where that has a column, and the features of events, with CONTEXT before their names.
    """
    given = {role: frame[column] for role, column in options.columns.items()}
    columns = [
        keys(given["user"], file).rename("user"),
        keys(given["item"], file).rename("item"),
        # Without times the order of the rows is counted later.
        _times(given["timestamp"], options.time_unit, file) if "timestamp" in given else pl.lit(0, pl.Int64),
        keys(given["event"], file).fill_null(NO_EVENT) if "event" in given else pl.lit("interaction"),
        _values(given["value"], options.form.numbers, file) if "value" in given else pl.lit(1.0),
    ]
    if "weight" in given:
        columns.append(_values(given["weight"], options.form.numbers, file))
    roles = [c.alias(role) for c, role in zip(columns, ROLES, strict=False)]
    features = [
        KindColumn("categorical", options.form, file).read(frame[name]).alias(CONTEXT + name)
        for name in options.event_features
    ]
    return frame.select(*roles, *features)


def _values(column: pl.Series, form: NumberForm, file: str) -> pl.Series:
    return cast(read_numbers(column, form), pl.Float64(), file, strict=False)


def _times(column: pl.Series, unit: str, file: str) -> pl.Series:
    try:
        times = seconds(column, unit)
        check_unit(column, unit, times)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    return times
