"""New events in a run's own vocabulary, behind the events that are known of their users."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flm_torchrec.data.loader import Windows, cut
from flm_torchrec.data.prepared import PreparedData, spans, told_as_data_error
from flm_torchrec.data.schema import Schema

FIELDS = ("user", "item", "timestamp", "event", "value")
KEPT = "events"
"""Folder of a follower's run with the events that it learnt from, a Parquet file a chunk, of columns of `NewEvents`."""
EXAMPLES = 5
"""Rows that the report names for each reason."""
LATEST = 2**40
"""Seconds: what is after it, in the year 36812, was not given in seconds."""


class Refused(ValueError):
    """Why a row is not learnt from."""


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
    """

    def __init__(self, vocabulary: Path, columns: dict[str, str]) -> None:
        self.schema = Schema.load(vocabulary / "schema.yaml")
        self.users, self.items = (_places(vocabulary / f"{e}s.parquet", f"{e}_key") for e in ("user", "item"))
        self.events = {name: code for code, name in enumerate(self.schema.events)}
        self.names = {field: columns.get(field, field) for field in FIELDS}

    def encode(self, rows: Iterable[tuple[str, Any]], refused: dict[str, Any]) -> NewEvents:
        """Rows that cannot be learnt from are counted in `refused` by reason, with examples of where they stand."""
        found: list[tuple[int, int, int, int, float]] = []
        for where, row in rows:
            try:
                found.append(self._one(row))
            except Refused as reason:
                entry = refused.setdefault(str(reason), {"rows": 0, "examples": []})
                entry["rows"] += 1
                if len(entry["examples"]) < EXAMPLES:
                    entry["examples"].append(where)
        columns = list(zip(*found, strict=True)) or [()] * len(FIELDS)
        kinds = (np.int64, np.int64, np.int64, np.int32, np.float32)
        return NewEvents(*(np.array(c, kind) for c, kind in zip(columns, kinds, strict=True)))

    def _one(self, row: Any) -> tuple[int, int, int, int, float]:
        if not isinstance(row, dict):
            raise Refused("not a JSON object")
        given = {field: row.get(name) for field, name in self.names.items()}
        return (
            _place("user", given["user"], self.users),
            _place("item", given["item"], self.items),
            _seconds(given["timestamp"]) if self.schema.timestamps else 0,
            0 if given["event"] is None and len(self.events) == 1 else _place("event", given["event"], self.events),
            1.0 if given["value"] is None else _number(given["value"]),
        )


def _places(file: Path, column: str) -> dict[str, int]:
    with told_as_data_error(file):
        return {key: place for place, key in enumerate(pq.read_table(file, columns=[column])[column].to_pylist())}


def _place(what: str, key: Any, places: dict[str, int]) -> int:
    if key is None or key == "":
        raise Refused(f"no {what}")
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise Refused(f"{what} is neither a text nor a whole number")
    place = places.get(str(key))
    if place is None:
        raise Refused(f"unknown {what}")
    return place


def _seconds(given: Any) -> int:
    if isinstance(given, datetime):
        given = (given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp()
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < LATEST:
        raise Refused("timestamp missing or not in seconds since 1970")
    return int(given)


def _number(given: Any) -> float:
    known = isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < np.finfo(np.float32).max
    if not known or not math.isfinite(given):
        raise Refused("value is not a finite number")
    return float(given)


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
