"""New events in a run's own vocabulary, appended to the events that are known of their users."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flm_torchrec.data.columns import EventBlock
from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.disk_columns import Units
from flm_torchrec.data.history import Events
from flm_torchrec.data.keys import NO_EVENT, json_text, keys
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.times import seconds
from flm_torchrec.data.windows import Windows, cut
from flm_torchrec.prepare.clean import rules
from flm_torchrec.training.follow.ids import IdIntake, KnownIds
from flm_torchrec.training.follow.sources import BadRow

FIELDS = ("user", "item", "timestamp", "event", "value")
KEYED = ("user", "item", "event")
"""FIELDS that hold a key of a vocabulary."""
COLUMNS = {
    "item_id": np.int64,
    "timestamp": np.int64,
    "event_id": np.int32,
    "value": np.float32,
    "user_id": np.int64,
}
"""Columns of a row in a run's vocabulary, in the order of `NewEvents`, with their types."""
LEARNED = "events"
"""Folder of a follower's run with the events that it learned from: a Parquet file a chunk, columns FIELDS."""
EXAMPLES = 5
"""Rows that the report names for each reason."""


@dataclass(frozen=True)
class RowForm:
    """How a source writes its rows."""

    columns: dict[str, str]
    """Its names of FIELDS, where they differ."""
    time_unit: str = "s"
    """Unit of timestamps that are numbers."""


@dataclass(frozen=True)
class NewEvents(Events):
    """Events of any users, in order of arrival."""

    user: np.ndarray  # [n] int64


class EventEncoder:
    """Rows with the keys of a source → events with the ids of a vocabulary.

    Args:
        vocabulary: folder of a run.
        form: how the source writes its rows.
        intake: what lets unknown users and items in; None refuses them.
    """

    def __init__(self, vocabulary: Path, form: RowForm, intake: IdIntake | None = None) -> None:
        self.time_unit = form.time_unit
        self.intake = intake
        self.schema = Schema.load(vocabulary / "schema.yaml")
        self.ids = KnownIds(vocabulary)
        self.events = {name: code for code, name in enumerate(self.schema.events)}
        self.names = {field: form.columns.get(field, field) for field in FIELDS}

    def encode(self, rows: Iterable[tuple[str, Any]], refused: dict[str, Any]) -> NewEvents:
        """Rows, each with where it stands → events. Rows that cannot be learned from are left out.

        Args:
            refused: the rows left out are counted here, by reason, with examples of where they stand.
        """
        rows = list(rows)
        objects = [(where, row) for where, row in rows if isinstance(row, dict)]
        for where, row in rows:
            if not isinstance(row, dict):
                _refuse(refused, (row if isinstance(row, BadRow) else BadRow()).reason, [where])
        frame = self._read([where for where, _ in objects], [row for _, row in objects])
        for reason, bad in [*rules(), ("unknown event", pl.col("event_id").is_null())]:
            bad = bad.fill_null(False)
            _refuse(refused, reason, frame.filter(bad)["where"].to_list())
            frame = frame.filter(~bad)
        if self.intake is not None:
            frame = frame.with_columns(self.intake.take_in(frame, [row for _, row in objects], self.ids))
        else:
            unknown = [pl.when(pl.col(f"{e}_id").is_null()).then(pl.lit(f"unknown {e}")) for e in ("user", "item")]
            frame = frame.with_columns(pl.coalesce(unknown).alias("reason"))
        for reason in frame["reason"].drop_nulls().unique(maintain_order=True):
            _refuse(refused, reason, frame.filter(pl.col("reason") == reason)["where"].to_list())
        frame = frame.filter(pl.col("reason").is_null())
        frame = frame.with_columns(self._ids(frame, "user"), self._ids(frame, "item"))
        return NewEvents(*(frame[name].to_numpy().astype(kind) for name, kind in COLUMNS.items()))

    def _read(self, where: list[str], rows: list[dict[str, Any]]) -> pl.DataFrame:
        """Columns of FIELDS as preparation has them, `where`, and the ids of KEYED; null where there is none."""
        text = {
            field: pl.Series(name, [json_text(row.get(name)) for row in rows], dtype=pl.String)
            for field, name in self.names.items()
        }
        by_field = {what: keys(text[what], "") for what in KEYED}
        # An event without a name has the name that preparation gives it; data of one kind of event have that kind.
        by_field["event"] = by_field["event"].fill_null(next(iter(self.events)) if len(self.events) == 1 else NO_EVENT)
        vocabularies = {"user": self.ids.user, "item": self.ids.item, "event": self.events}
        ids = [
            pl.Series(f"{what}_id", [vocabularies[what].get(key) for key in by_field[what]], dtype=pl.Int64)
            for what in KEYED
        ]
        times = pl.Series("timestamp", np.zeros(len(rows), np.int64))  # of data without timestamps, the order counts
        if self.schema.timestamps:
            times = seconds(text["timestamp"], self.time_unit)
        values = text["value"].fill_null("1").cast(pl.Float64, strict=False)
        columns = [by_field["user"].rename("user"), by_field["item"].rename("item"), times.rename("timestamp")]
        position = pl.Series("position", range(len(rows)), dtype=pl.Int64)
        return pl.DataFrame(
            [pl.Series("where", where, dtype=pl.String), position, *columns, values.rename("value"), *ids]
        )

    def _ids(self, frame: pl.DataFrame, what: str) -> pl.Series:
        of = self.ids.user if what == "user" else self.ids.item
        return pl.Series(f"{what}_id", [of[key] for key in frame[what]], dtype=pl.Int64)


def _refuse(refused: dict[str, Any], reason: str, where: list[str]) -> None:
    if where:
        entry = refused.setdefault(reason, {"rows": 0, "examples": []})
        entry["rows"] += len(where)
        entry["examples"] += where[: EXAMPLES - len(entry["examples"])]


def append(data: PreparedData, learned_from: np.ndarray, new: NewEvents) -> tuple[PreparedData, np.ndarray, np.ndarray]:
    """The data with the new events, each user's in order of time; [interactions] bool twice: learned from, new.

    Where the data have no timestamps, the new events come after all others, in order of arrival.

    Args:
        learned_from: [interactions] bool of the data before.
    """
    timestamp = new.timestamp
    if not data.schema.timestamps:
        timestamp = np.arange(len(new)) + (int(data.timestamp.max(initial=-1)) + 1)
    user = np.concatenate([data.event_users(), new.user])
    events = data.events + replace(new, timestamp=timestamp)
    order = np.lexsort([events.timestamp, user])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=data.schema.users))])
    grown = replace(data, offsets=offsets, **vars(events.take(order)), segment=None)
    is_new = order >= len(data.item)
    return grown, np.concatenate([learned_from, np.ones(len(new), bool)])[order], is_new


def append_on_disk(data: PreparedData, new: NewEvents) -> tuple[PreparedData, np.ndarray]:
    """As `append`, of data whose events stay on disk: the new events of a unit's users are merged when it is read.

    Returns the data, and [interactions] bool: new.
    """
    assert data.units is not None
    timestamp = new.timestamp
    if not data.schema.timestamps:
        newest = max((int(data.timestamp[block.rows].max(initial=-1)) for block in data.blocks()), default=-1)
        timestamp = np.arange(len(new)) + newest + 1
    added = replace(new, timestamp=timestamp).take(np.argsort(new.user, kind="stable"))
    starts = np.searchsorted(added.user, np.arange(data.schema.users + 1))  # [users + 1] of the new events of each
    offsets = data.offsets + starts
    units = Units(data.units.groups, offsets, np.append(data.units.users[:-1], data.schema.users))

    def parts(block: EventBlock) -> tuple[slice, slice]:
        """Rows of the known and of the new events of a block."""
        return block.within(data.offsets), block.within(starts)

    def order_of(block: EventBlock) -> np.ndarray:
        old, more = parts(block)
        lengths = np.diff(data.offsets[block.first : block.first + len(block.offsets)])
        user = np.concatenate([block.first + np.repeat(np.arange(len(lengths)), lengths), added.user[more]])
        return np.lexsort([np.concatenate([data.timestamp[old], added.timestamp[more]]), user])

    def merged(known: np.ndarray, more_of: np.ndarray) -> Any:
        def of_block(block: EventBlock) -> np.ndarray:
            old, more = parts(block)
            return np.concatenate([known[old], more_of[more]])[order[block.rows]]

        return units.column(np.result_type(known.dtype, more_of.dtype), of_block)

    order = units.column(np.int64, order_of)
    columns = {name: merged(column, getattr(added, name)) for name, column in vars(data.events).items()}
    none, all_new = data.no_events, np.broadcast_to(np.True_, len(new))
    return replace(data, offsets=offsets, **columns, segment=None, units=units), merged(none, all_new)


def newest(data: PreparedData, learned_from: np.ndarray, events: int) -> tuple[PreparedData, np.ndarray]:
    """Only the last `events` events of each user, and which of them are learned from, [interactions] bool."""
    start = np.maximum(data.offsets[:-1], data.offsets[1:] - events)
    lengths = data.offsets[1:] - start
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    parts, learned = [], []
    for block in data.blocks():
        of_block = slice(block.first, block.first + len(block.offsets) - 1)
        kept = spans(start[of_block] - block.rows.start, lengths[of_block])
        parts.append(data.events.take(block.rows).take(kept))
        learned.append(learned_from[block.rows][kept])
    shorter = replace(data, offsets=offsets, **vars(Events.concat(parts)), segment=None, units=None)
    return shorter, np.concatenate(learned)


def new_windows(data: PreparedData, is_new: np.ndarray, max_history: int) -> Windows:
    """The fewest windows, counted from a user's newest event, that hold all events that are new.

    Args:
        is_new: [interactions] bool.
    """
    users, first = np.unique(data.event_users()[is_new], return_index=True)
    end = data.offsets[users + 1]
    span = max_history + 1
    wanted = -(-(end - np.flatnonzero(is_new)[first]) // span)
    return cut(users, np.maximum(data.offsets[users], end - wanted * span), end, max_history)
