"""Interactions on disk → columns, in memory or read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.data.columns import CodedText, EventBlock, event_types, new_column
from flm_torchrec.data.disk_columns import Units
from flm_torchrec.data.event_files import EVENT_COLUMNS, WEIGHT, RowChecks, context_columns, event_columns
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.data.schema import Schema
from flm_torchrec.errors import DataError


@dataclass(frozen=True)
class LoadedEvents:
    """The fields of `PreparedData` that hold interactions."""

    offsets: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    event: np.ndarray
    value: np.ndarray
    segment: CodedText | None
    weight: np.ndarray | None
    context: np.ndarray


def load_events(groups: RowGroups, schema: Schema, users: np.ndarray | None) -> LoadedEvents:
    """Load all events, or only those of `users` [n].

    Raises:
        DataError: there are none, an id is outside the schema, users are not in order, or the disk is too small.
    """
    parts, rows = groups.batches(["user_id", *event_columns(schema)], ["segment"]), groups.rows
    if users is not None:  # how many events these have is not known before; they are few
        kept = list(_only(parts, users))
        parts, rows = iter(kept), sum(map(len, kept))
    if rows == 0:
        raise _no_rows(groups)
    types = _types(schema)
    contexts = context_columns(schema)
    context = new_column(rows * len(contexts), np.int32).reshape(rows, len(contexts))
    columns = {name: new_column(rows, kind) for name, kind in types.items()}
    columns |= {name: context[:, number] for number, name in enumerate(contexts)}
    codes = new_column(rows, np.int32) if groups.has("segment") else None
    names: dict[str, int] = {}
    checks = RowChecks(groups.path, schema)
    for part in filter(len, parts):
        here = slice(checks.rows, checks.rows + len(part))
        arrays = _checked(part, checks, (*columns,))
        for name, column in columns.items():
            column[here] = arrays[name]
        if codes is not None:
            codes[here] = _codes(part, names)
    item, timestamp, event, value = (columns[name] for name in EVENT_COLUMNS)
    segment = None if codes is None else CodedText(np.array(list(names), object), codes)
    return LoadedEvents(checks.offsets, item, timestamp, event, value, segment, columns.get(WEIGHT), context)


def open_events(groups: RowGroups, schema: Schema) -> tuple[LoadedEvents, Units]:
    """All events, checked in one pass, with columns that stay on disk, of the same types as in memory.

    Raises:
        DataError: as of `load_events`.
    """
    if groups.rows == 0:
        raise _no_rows(groups)
    checks, names, wanted = RowChecks(groups.path, schema), dict[str, int](), event_columns(schema)
    for part in filter(len, groups.batches(["user_id", *wanted], ["segment"])):
        _checked(part, checks, wanted)
        if groups.has("segment"):
            _codes(part, names)
    units = Units(groups, checks.offsets)

    def column(name: str, kind: np.dtype) -> Any:
        return units.column(kind, lambda block: groups.read(block.rows.start, block.rows.stop, [name])[name])

    def segments(block: EventBlock) -> np.ndarray:
        return np.concatenate([_codes(t, names) for t in groups.tables(block.rows.start, block.rows.stop, ["segment"])])

    def codes(block: EventBlock) -> np.ndarray:
        columns = groups.read(block.rows.start, block.rows.stop, contexts)
        return np.stack([columns[name] for name in contexts], 1)

    columns = {name: column(name, kind) for name, kind in _types(schema).items()}
    contexts = context_columns(schema)
    context: Any = np.broadcast_to(np.int32(0), (groups.rows, 0))
    if contexts:
        context = units.column(np.int32, codes, (len(contexts),))
    segment: Any = units.column(np.int32, segments)
    segment = CodedText(np.array(list(names), object), segment) if names else None
    item, timestamp, event, value = (columns[name] for name in EVENT_COLUMNS)
    loaded = LoadedEvents(checks.offsets, item, timestamp, event, value, segment, columns.get(WEIGHT), context)
    return loaded, units


def _types(schema: Schema) -> dict[str, np.dtype]:
    """By column of numbers, its type in memory."""
    weight = {WEIGHT: np.dtype(np.float32)} if schema.weights else {}
    return event_types(schema.items, len(schema.events)) | weight


def _no_rows(groups: RowGroups) -> DataError:
    return DataError(f"{groups.path / 'interactions'}: no rows; check the filters given to 'flm prepare'")


def _checked(part: pa.RecordBatch, checks: RowChecks, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The user and the columns of the next rows.

    Raises:
        DataError: an id, a weight or a code is outside the schema, or users are not in order.
    """
    arrays = {name: part[name].to_numpy() for name in ("user_id", *columns)}
    checks.check_more(arrays)
    checks.add(arrays["user_id"], arrays["item_id"], arrays["event"])
    return arrays


def _only(parts: Iterator[pa.RecordBatch], users: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The rows of these users."""
    wanted = pa.array(users)
    for part in parts:
        yield part.filter(pc.is_in(part["user_id"], value_set=wanted))


def _codes(part: pa.RecordBatch | pa.Table, names: dict[str, int]) -> np.ndarray:
    """[rows] the number of each row's segment in `names`, to which new ones are added; none counts as empty."""
    if "segment" not in part.schema.names:
        return np.full(len(part), names.setdefault("", len(names)), np.int32)
    column = part["segment"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    coded = column.fill_null("").dictionary_encode()
    numbers = [names.setdefault(name, len(names)) for name in coded.dictionary.to_pylist()]
    return np.array(numbers, np.int32)[coded.indices.to_numpy()]
