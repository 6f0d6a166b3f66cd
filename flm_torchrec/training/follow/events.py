"""New events in a run's own vocabulary, behind the events that are known of their users."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.data.dataset import PreparedData, spans, told_as_data_error
from flm_torchrec.data.keys import NO_EVENT, json_text, keys
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.times import seconds
from flm_torchrec.data.windows import Windows, cut
from flm_torchrec.prepare.clean import rules

FIELDS = ("user", "item", "timestamp", "event", "value")
KEYED = ("user", "item", "event")
"""FIELDS that hold a key of a vocabulary."""
KEPT = "events"
"""Folder of a follower's run with the events that it learnt from, a Parquet file a chunk, of columns of `NewEvents`."""
EXAMPLES = 5
"""Rows that the report names for each reason."""


@dataclass(frozen=True)
class RowForm:
    """How a source writes its rows."""

    columns: dict[str, str]
    """Its names of FIELDS, where they differ."""
    time_unit: str = "s"
    """Of timestamps that are numbers."""


@dataclass(frozen=True)
class NewEvents:
    """Events in order of arrival."""

    user: np.ndarray  # [n] int64
    item: np.ndarray  # [n] int64
    timestamp: np.ndarray  # [n] int64
    event: np.ndarray  # [n] int32
    value: np.ndarray  # [n] float32


class Encoder:
    """Rows with the keys of a source → events with the ids of a vocabulary.

    Args:
        vocabulary: folder of a run.
        columns: names that the rows give to FIELDS, where they differ.
        time_unit: of timestamps that are numbers.
    """

    def __init__(self, vocabulary: Path, columns: dict[str, str], time_unit: str = "s") -> None:
        self.time_unit = time_unit
        self.schema = Schema.load(vocabulary / "schema.yaml")
        self.users, self.items = (_places(vocabulary / f"{e}s.parquet", f"{e}_key") for e in ("user", "item"))
        self.events = {name: code for code, name in enumerate(self.schema.events)}
        self.names = {field: columns.get(field, field) for field in FIELDS}

    def encode(self, rows: Iterable[tuple[str, Any]], refused: dict[str, Any]) -> NewEvents:
        """Rows that cannot be learnt from are counted in `refused` by reason, with examples of where they stand."""
        given = list(rows)
        objects = [(where, row) for where, row in given if isinstance(row, dict)]
        _refuse(refused, "not a JSON object", [where for where, row in given if not isinstance(row, dict)])
        frame = self._read([where for where, _ in objects], [row for _, row in objects])
        for reason, bad in [*rules(), *((f"unknown {what}", pl.col(f"{what}_id").is_null()) for what in KEYED)]:
            bad = bad.fill_null(False)
            _refuse(refused, reason, frame.filter(bad)["where"].to_list())
            frame = frame.filter(~bad)
        kinds = {"user_id": np.int64, "item_id": np.int64, "timestamp": np.int64, "event_id": np.int32,
                 "value": np.float32}  # fmt: skip
        return NewEvents(*(frame[name].to_numpy().astype(kind) for name, kind in kinds.items()))

    def _read(self, where: list[str], rows: list[dict[str, Any]]) -> pl.DataFrame:
        """Columns of FIELDS as preparation has them, `where`, and the ids of KEYED; null where there is none."""
        given = {
            field: pl.Series(name, [json_text(row.get(name)) for row in rows], dtype=pl.String)
            for field, name in self.names.items()
        }
        found = {what: keys(given[what], "") for what in KEYED}
        # As preparation calls an event without a name; where the data have one kind alone, it is of that kind.
        found["event"] = found["event"].fill_null(next(iter(self.events)) if len(self.events) == 1 else NO_EVENT)
        places = {"user": self.users, "item": self.items, "event": self.events}
        ids = [
            pl.Series(f"{what}_id", [places[what].get(key) for key in found[what]], dtype=pl.Int64) for what in KEYED
        ]
        times = pl.Series("timestamp", np.zeros(len(rows), np.int64))  # of data that have none, the order counts
        if self.schema.timestamps:
            times = seconds(given["timestamp"], self.time_unit)
        values = given["value"].fill_null("1").cast(pl.Float64, strict=False)
        columns = [found["user"].rename("user"), found["item"].rename("item"), times.rename("timestamp")]
        return pl.DataFrame([pl.Series("where", where, dtype=pl.String), *columns, values.rename("value"), *ids])


def _refuse(refused: dict[str, Any], reason: str, places: list[str]) -> None:
    if places:
        entry = refused.setdefault(reason, {"rows": 0, "examples": []})
        entry["rows"] += len(places)
        entry["examples"] += places[: EXAMPLES - len(entry["examples"])]


def _places(file: Path, column: str) -> dict[str, int]:
    with told_as_data_error(file):
        return {key: place for place, key in enumerate(pq.read_table(file, columns=[column])[column].to_pylist())}


def append(data: PreparedData, fit: np.ndarray, new: NewEvents) -> tuple[PreparedData, np.ndarray, np.ndarray]:
    """The data with the new events, each user's in order of time, which of all may be learnt from, and which are new.

    Where the data have no timestamps, the new events come after all others, in order of arrival.
    """
    timestamp = new.timestamp
    if not data.schema.timestamps:
        timestamp = np.arange(len(new.user)) + (int(data.timestamp.max(initial=-1)) + 1)
    user = np.concatenate([data.event_users(), new.user])
    timestamp = np.concatenate([data.timestamp, timestamp])
    order = np.lexsort([timestamp, user])
    grown = replace(
        data,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user, minlength=data.schema.users))]),
        item=np.concatenate([data.item, new.item])[order],
        timestamp=timestamp[order],
        event=np.concatenate([data.event, new.event])[order],
        value=np.concatenate([data.value, new.value])[order],
        segment=None,
    )
    fresh = order >= len(data.item)
    return grown, np.concatenate([fit, np.ones(len(new.user), bool)])[order], fresh


def newest(data: PreparedData, fit: np.ndarray, events: int) -> tuple[PreparedData, np.ndarray]:
    """The last `events` events of each user alone."""
    start = np.maximum(data.offsets[:-1], data.offsets[1:] - events)
    lengths = data.offsets[1:] - start
    kept = spans(start, lengths)
    shorter = replace(
        data, offsets=np.concatenate([[0], np.cumsum(lengths)]), item=data.item[kept], timestamp=data.timestamp[kept],
        event=data.event[kept], value=data.value[kept], segment=None,
    )  # fmt: skip
    return shorter, fit[kept]


def new_windows(data: PreparedData, fresh: np.ndarray, max_history: int) -> Windows:
    """The fewest windows, counted from a user's newest event, that hold all events that are `fresh` [interactions]."""
    users, first = np.unique(data.event_users()[fresh], return_index=True)
    end = data.offsets[users + 1]
    span = max_history + 1
    wanted = -(-(end - np.flatnonzero(fresh)[first]) // span)
    return cut(users, np.maximum(data.offsets[users], end - wanted * span), end, max_history)
