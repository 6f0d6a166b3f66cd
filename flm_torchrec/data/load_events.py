"""Interactions on disk → columns, a part of the rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.data.columns import CodedText, event_types, new_column
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
        raise DataError(f"{groups.path / 'interactions'}: no rows; check the filters given to 'flm prepare'")
    types = event_types(schema.items, len(schema.events))
    if schema.weights:
        types[WEIGHT] = np.dtype(np.float32)
    contexts = context_columns(schema)
    context = new_column(rows * len(contexts), np.int32).reshape(rows, len(contexts))
    columns = {name: new_column(rows, kind) for name, kind in types.items()}
    columns |= {name: context[:, number] for number, name in enumerate(contexts)}
    codes = new_column(rows, np.int32) if groups.has("segment") else None
    names: dict[str, int] = {}
    checks = RowChecks(groups.path, schema)
    for part in filter(len, parts):
        here = slice(checks.rows, checks.rows + len(part))
        arrays = {name: part[name].to_numpy() for name in ("user_id", *columns)}
        checks.check_more(arrays)
        checks.add(arrays["user_id"], arrays["item_id"], arrays["event"])
        for name, column in columns.items():
            column[here] = arrays[name]
        if codes is not None:
            codes[here] = _codes(part, names)
    item, timestamp, event, value = (columns[name] for name in EVENT_COLUMNS)
    segment = None if codes is None else CodedText(np.array(list(names), object), codes)
    return LoadedEvents(checks.offsets, item, timestamp, event, value, segment, columns.get(WEIGHT), context)


def _only(parts: Iterator[pa.RecordBatch], users: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The rows of these users."""
    wanted = pa.array(users)
    for part in parts:
        yield part.filter(pc.is_in(part["user_id"], value_set=wanted))


def _codes(part: pa.RecordBatch, names: dict[str, int]) -> np.ndarray:
    """[rows] the number of each row's segment in `names`, to which new ones are added; none counts as empty."""
    if "segment" not in part.schema.names:
        return np.full(len(part), names.setdefault("", len(names)), np.int32)
    coded = part["segment"].fill_null("").dictionary_encode()
    numbers = [names.setdefault(name, len(names)) for name in coded.dictionary.to_pylist()]
    return np.array(numbers, np.int32)[coded.indices.to_numpy()]
