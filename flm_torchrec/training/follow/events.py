"""New events in a run's own vocabulary, appended to the events that are known of their users."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flm_torchrec.data.columns import EventBlock
from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.disk_columns import Units
from flm_torchrec.data.event_files import WEIGHT
from flm_torchrec.data.feature_values import FeatureValues, codes_of, describe
from flm_torchrec.data.history import CONTEXT, Events
from flm_torchrec.data.keys import NO_EVENT, is_rounded, json_text, keys, stripped
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.times import seconds
from flm_torchrec.data.windows import Windows, cut
from flm_torchrec.errors import ConfigError
from flm_torchrec.folders import SCHEMA
from flm_torchrec.names import nearest
from flm_torchrec.prepare.clean import WEIGHT_RULES
from flm_torchrec.prepare.options import NumberForm
from flm_torchrec.prepare.sources.number_text import read_numbers
from flm_torchrec.training.follow.ids import IdIntake, KnownIds
from flm_torchrec.training.follow.row_rules import RowRules
from flm_torchrec.training.follow.sources import BadRow
from flm_torchrec.training.follow.user_keys import UserKeys

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
ROUNDED = "an id as a float of 2^53 or more, which is rounded"
EXAMPLES = 5
"""Rows that the report names for each reason."""


def fields_of(schema: Schema) -> tuple[str, ...]:
    """What a row of a source has: FIELDS, the weight of data with weights, and the features of events."""
    weight = (WEIGHT,) if schema.weights else ()
    return (*FIELDS, *weight, *(f.name for f in schema.of("event", sparse=True)))


@dataclass(frozen=True)
class RowForm:
    """How a source writes its rows."""

    columns: dict[str, str]
    """Its names of `fields_of` the data, where they differ."""
    time_unit: str = "s"
    """Unit of timestamps that are numbers."""
    key_file: Path | None = None
    """Secret to hash its users with, where those of the run are hashed; None: they come hashed."""

    def check(self, vocabulary: Path) -> None:
        """Raise ConfigError where a name is given for a field that no event of a run has."""
        known = fields_of(Schema.load(vocabulary / SCHEMA))
        for name, column in self.columns.items():
            if name not in known:
                raise ConfigError(f"--columns '{name}={column}': write it as FIELD=NAME; {nearest(name, known)}")


@dataclass(frozen=True)
class NewEvents(Events):
    """Events of any users, in order of arrival."""

    user: np.ndarray  # [n] int64
    weight: np.ndarray = field(default_factory=lambda: np.ones((), np.float32), kw_only=True)
    """[n] float32, or one number for all: what an event counts as a target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weight", np.broadcast_to(self.weight, len(self)))


class EventEncoder:
    """Rows with the keys of a source → events with the ids of a vocabulary.

    Args:
        vocabulary: folder of a run.
        form: how the source writes its rows.
        intake: what lets unknown users and items in; None refuses them.
        schema: of the data as the run reads them; None: as the vocabulary has it.
        row_rules: which rows the run leaves out.
    """

    def __init__(
        self,
        vocabulary: Path,
        form: RowForm,
        intake: IdIntake | None = None,
        schema: Schema | None = None,
        row_rules: RowRules | None = None,
    ) -> None:
        self.time_unit = form.time_unit
        self.intake = intake
        self.row_rules = row_rules or RowRules()
        self.schema = Schema.load(vocabulary / SCHEMA) if schema is None else schema
        self.ids = KnownIds(vocabulary)
        self.users = UserKeys(vocabulary, self.ids.user, form.key_file)
        self.events = {name: code for code, name in enumerate(self.schema.events)}
        described = [describe(vocabulary, f) for f in self.schema.of("event", sparse=True)]
        self.contexts = [FeatureValues.described(one) for one in described]
        self.names = {field: form.columns.get(field, field) for field in fields_of(self.schema)}

    def encode(
        self, rows: Iterable[tuple[str, Any]], refused: dict[str, Any], known: PreparedData | None = None
    ) -> NewEvents:
        """Rows, each with where it stands → events. Rows that cannot be learned from are left out.

        Args:
            refused: the rows left out are counted here, by reason, with examples of where they stand.
            known: the newest events of all users, of which a row may be a duplicate.

        Raises:
            DataError: the users of the run are hashed, and that of a row is not.
        """
        rows = list(rows)
        objects = [(where, row) for where, row in rows if isinstance(row, dict)]
        for where, row in rows:
            if not isinstance(row, dict):
                _refuse(refused, (row if isinstance(row, BadRow) else BadRow()).reason, [where])
        frame = self._read([where for where, _ in objects], [row for _, row in objects])
        of_rows = [*self.row_rules.reasons(), *(WEIGHT_RULES if self.schema.weights else ())]
        more = [("unknown event", pl.col("event_id").is_null()), ("a list as a context", pl.col("listed"))]
        for reason, bad in [(ROUNDED, pl.col("rounded")), *of_rows, *more]:
            frame = _without(frame, reason, bad, refused)
        frame = _without(frame, *self.row_rules.duplicates(frame, known), refused)
        if self.intake is not None:
            frame = frame.with_columns(self.intake.take_in(frame, [row for _, row in objects], self.ids))
        else:
            unknown = [pl.when(pl.col(f"{e}_id").is_null()).then(pl.lit(f"unknown {e}")) for e in ("user", "item")]
            frame = frame.with_columns(pl.coalesce(unknown).alias("reason"))
        for reason in frame["reason"].drop_nulls().unique(maintain_order=True):
            _refuse(refused, reason, frame.filter(pl.col("reason") == reason)["where"].to_list())
        frame = frame.filter(pl.col("reason").is_null())
        frame = frame.with_columns(self._ids(frame, "user"), self._ids(frame, "item"))
        return NewEvents(
            *(frame[name].to_numpy().astype(kind) for name, kind in COLUMNS.items()),
            weight=frame[WEIGHT].to_numpy().astype(np.float32),
            context=self._context(frame),
        )

    def check_users(self, rows: Iterable[tuple[str, Any]]) -> None:
        """Raise DataError as `encode` does, and take in nothing."""
        objects = [(where, row.get(self.names["user"])) for where, row in rows if isinstance(row, dict)]
        users = pl.Series("user", [json_text(user) for _, user in objects], dtype=pl.String)
        self.users.read(keys(users, ""), [where for where, _ in objects])

    def _read(self, where: list[str], rows: list[dict[str, Any]]) -> pl.DataFrame:
        """Columns of FIELDS as preparation has them, `where`, and the ids of KEYED; null where there is none."""
        text = {
            field: pl.Series(name, [json_text(row.get(name)) for row in rows], dtype=pl.String)
            for field, name in self.names.items()
        }
        by_field = {what: keys(text[what], "") for what in KEYED}
        by_field["user"] = self.users.read(by_field["user"], where)
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
        values = read_numbers(text["value"].fill_null("1"), NumberForm())
        ones = pl.Series(["1"] * len(rows), dtype=pl.String)  # of data without weights
        weights = read_numbers(text.get(WEIGHT, ones), NumberForm()).rename(WEIGHT)
        contexts = [f.name for f in self.contexts]
        listed = [any(isinstance(row.get(self.names[name]), list | dict) for name in contexts) for row in rows]
        rounded = [any(is_rounded(row.get(self.names[name])) for name in ("user", "item")) for row in rows]
        columns = [by_field["user"].rename("user"), by_field["item"].rename("item"), times.rename("timestamp")]
        position = pl.Series("position", range(len(rows)), dtype=pl.Int64)
        return pl.DataFrame(
            [
                pl.Series("where", where, dtype=pl.String),
                position,
                *columns,
                values.rename("value"),
                *ids,
                weights,
                pl.Series("listed", listed, dtype=pl.Boolean),
                pl.Series("rounded", rounded, dtype=pl.Boolean),
                *(text[name].rename(f"{CONTEXT}{name}") for name in contexts),
            ]
        )

    def _context(self, frame: pl.DataFrame) -> np.ndarray:
        """[n, C] int32 codes. A value without a code is unknown, and a line in `ids.left_out`."""
        unknown = ("", json_text(float("nan")))
        found = np.full((len(frame), len(self.contexts)), -1, np.int32)
        for number, feature in enumerate(self.contexts):
            for row, value in enumerate(frame[f"{CONTEXT}{feature.name}"]):
                if value is not None and stripped(value) not in unknown:
                    found[row, number] = next(codes_of(feature, value, self.ids.left_out, "context"), -1)
        return found

    def _ids(self, frame: pl.DataFrame, what: str) -> pl.Series:
        of = self.ids.user if what == "user" else self.ids.item
        return pl.Series(f"{what}_id", [of[key] for key in frame[what]], dtype=pl.Int64)


def _without(frame: pl.DataFrame, reason: str, bad: pl.Expr, refused: dict[str, Any]) -> pl.DataFrame:
    """The rows of the frame that are not bad; the others are refused."""
    bad = bad.fill_null(False)
    _refuse(refused, reason, frame.filter(bad)["where"].to_list())
    return frame.filter(~bad)


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
    weight = None if data.weight is None else np.concatenate([data.weight, new.weight])[order]
    grown = replace(data, offsets=offsets, **vars(events.take(order)), weight=weight, segment=None)
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

        return units.column(np.result_type(known.dtype, more_of.dtype), of_block, known.shape[1:])

    order = units.column(np.int64, order_of)
    known = vars(data.events) | ({} if data.weight is None else {"weight": data.weight})
    columns = {name: merged(column, getattr(added, name)) for name, column in known.items()}
    none, all_new = data.no_events, np.broadcast_to(np.True_, len(new))
    return replace(data, offsets=offsets, **columns, segment=None, units=units), merged(none, all_new)


def newest(data: PreparedData, learned_from: np.ndarray, events: int) -> tuple[PreparedData, np.ndarray]:
    """Only the last `events` events of each user, and which of them are learned from, [interactions] bool."""
    start = np.maximum(data.offsets[:-1], data.offsets[1:] - events)
    lengths = data.offsets[1:] - start
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    parts, learned, weights = [], [], list[np.ndarray]()
    for block in data.blocks():
        of_block = slice(block.first, block.first + len(block.offsets) - 1)
        kept = spans(start[of_block] - block.rows.start, lengths[of_block])
        parts.append(data.events.take(block.rows).take(kept))
        learned.append(learned_from[block.rows][kept])
        weights += [] if data.weight is None else [data.weight[block.rows][kept]]
    columns = {**vars(Events.concat(parts)), "weight": np.concatenate(weights) if weights else None}
    shorter = replace(data, offsets=offsets, **columns, segment=None, units=None)
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
