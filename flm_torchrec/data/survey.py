"""Interactions that need not fit into memory: passes over Parquet files collect what training must know about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flm_torchrec.data.dataset import PreparedData, domain_of_items, load_prepared
from flm_torchrec.data.event_files import RowChecks, event_columns
from flm_torchrec.data.order_statistics import order_statistics
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.splits import (
    Rule,
    SplitSettings,
    check_learns,
    check_timestamps,
    cold_rule,
    cuts,
    lasting,
    nothing_left,
    sampled,
)
from flm_torchrec.data.train_stats import TrainStats, scale_of
from flm_torchrec.data.weights import target_kinds
from flm_torchrec.folders import SCHEMA


@dataclass(frozen=True)
class EventStream:
    """All interactions on disk, and what training must know about them: O(users + items) of memory."""

    groups: RowGroups
    rule: Rule | None
    """What is held out; None: the data themselves are on disk, and have a column that says so."""
    offsets: np.ndarray  # [users + 1] int64: first row of each user
    train_end: np.ndarray  # [users] int64: the training events of user u end before row train_end[u]
    counts: np.ndarray  # [items] int64: training events of each item
    stats: TrainStats
    train_rows: int
    """Number of training events."""
    columns: tuple[str, ...]
    """Columns of the interactions to train on."""


@dataclass(frozen=True)
class StreamedData(PreparedData):
    """The events of some users in memory, to validate on. The events of all users are in the stream, to train on."""

    stream: EventStream


def load_streamed(
    path: Path, features: str | Sequence[str], how: SplitSettings, sample: int, seed: int
) -> StreamedData:
    """Survey all interactions, and load those of the users to validate on: two passes, or six for a time split.

    Args:
        how: as for `split`; `target_events` as of the config.
        sample: number of users to load, drawn by `seed` from those with something to predict in validation.

    Raises:
        DataError: as `load_prepared` and `split`.
        ConfigError: an event to predict is none of the data.
    """
    schema = Schema.load(path / SCHEMA)
    if features != "all":
        schema = schema.keeping(() if features == "none" else features, path)
    targets = target_kinds(schema, how.target_events)
    groups = RowGroups(path)
    offsets, seen = _users_and_items(groups, schema)
    train_end, candidates, rule = _Splitting(groups, schema, offsets, targets).split(how, seen)
    check_learns(path, how.kind, offsets, train_end)
    if not len(candidates):
        raise nothing_left(path, how.kind, "validation", targets is not None)
    stream = _survey(groups, schema, rule, offsets, train_end)
    loaded = load_prepared(path, features, candidates[sampled(len(candidates), sample, seed)])
    loaded = replace(loaded, targets=targets)
    return StreamedData(**{name: getattr(loaded, name) for name in PreparedData.__dataclass_fields__}, stream=stream)


def stream_of(data: PreparedData, train_end: np.ndarray, learned_from: np.ndarray, stats: TrainStats) -> EventStream:
    """The stream of data on disk.

    Args:
        train_end: [users] the training events of user u end before row train_end[u].
        learned_from: [interactions] bool: the training events.
        stats: of what the model has learned from.
    """
    assert data.units is not None
    return EventStream(
        groups=data.units.groups,
        rule=None,
        offsets=data.offsets,
        train_end=train_end,
        counts=data.item_counts(learned_from),
        stats=stats,
        train_rows=data.count(learned_from),
        columns=event_columns(data.schema),
    )


def hide_values(data: PreparedData) -> PreparedData:
    """The same data with all values 1, for a model that must not see them."""
    hidden = replace(data, value=np.broadcast_to(np.float32(1), data.value.shape))
    if isinstance(hidden, StreamedData):
        stats = replace(hidden.stream.stats, value_scale=0.0)
        hidden = replace(hidden, stream=replace(hidden.stream, stats=stats))
    return hidden


def _users_and_items(groups: RowGroups, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    """[users + 1] first row of each user, and [items] bool: the items that occur. Checks all ids."""
    checks, seen = RowChecks(groups.path, schema), np.zeros(schema.items, bool)
    for user, item, event in groups.scan(["user_id", "item_id", "event"]):
        checks.add(user, item, event)
        seen[item] = True
    return checks.offsets, seen


@dataclass(frozen=True)
class _Splitting:
    """Interactions on disk, to be split."""

    groups: RowGroups
    schema: Schema
    offsets: np.ndarray  # [users + 1]
    targets: np.ndarray | None
    """[kinds of events] bool: those to predict; None: all."""

    def split(self, how: SplitSettings, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, Rule]:
        """[users] end of each user's training rows, the users with something to predict in validation, and the rule.

        Args:
            seen: [items] bool: the items that occur.
        """
        file, schema = self.groups.path / "items.parquet", self.schema
        rule = Rule(how.kind, domain=domain_of_items(file, schema) if schema.domains else None, targets=self.targets)
        if how.kind == "time":
            return self._by_time(rule, how.holdout)
        ends, three = self.offsets[1:], lasting(self.offsets)
        candidates, train_end = np.flatnonzero(three), np.where(three, ends - 2, ends)
        if rule.groups:
            train_end, candidates = self._by_group(rule)
        if how.kind == "cold-start":
            cold = cold_rule(seen, np.diff(self.offsets), how.holdout)
            assert cold.cold_users is not None
            train_end = np.where(cold.cold_users > 0, self.offsets[:-1], train_end)
            rule = replace(rule, cold_items=cold.cold_items, cold_users=cold.cold_users)
        return train_end, candidates, rule

    def _by_time(self, rule: Rule, holdout: float) -> tuple[np.ndarray, np.ndarray, Rule]:
        check_timestamps(self.schema, self.groups.path)
        ranks = cuts(self.groups.rows, holdout)
        valid_from, test_from = order_statistics(lambda: (part for (part,) in self.groups.scan(["timestamp"])), ranks)
        before, in_valid = np.zeros(self.schema.users, np.int64), np.zeros(self.schema.users, bool)
        for user, timestamp, event in self.groups.scan(["user_id", "timestamp", "event"]):
            np.add.at(before, user[timestamp < valid_from], 1)
            inside = (timestamp >= valid_from) & (timestamp < test_from)
            in_valid[user[inside & rule.is_target(event)]] = True
        rule = replace(rule, valid_from=valid_from, test_from=test_from)
        return self.offsets[:-1] + before, np.flatnonzero(in_valid), rule

    def _by_group(self, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """[users] the end of what each user's training rows reach to, and the users with something to predict."""
        train_end, tested, row = self.offsets[:-1].copy(), np.zeros(len(self.offsets) - 1, bool), 0
        for user, item, event in whole_users(self.groups.scan(["user_id", "item_id", "event"])):
            held = rule.part(user, item, event) > 0
            learnt = np.flatnonzero(~held)
            train_end[user[learnt]] = row + learnt + 1
            tested[user[held]] = True
            row += len(user)
        return train_end, np.flatnonzero(tested)


def whole_users(parts: Iterator[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """Parts of columns, of which the first is the user, cut anew so that all rows of a user are in one part."""
    kept: tuple[np.ndarray, ...] = ()
    for part in parts:
        joined = tuple(map(np.concatenate, zip(kept, part, strict=True))) if kept else part
        cut = int(np.searchsorted(joined[0], joined[0][-1], "left"))
        if cut:
            yield tuple(column[:cut] for column in joined)
        kept = tuple(column[cut:] for column in joined)
    if kept:
        yield kept


@dataclass
class _Moments:
    """Mean and sum of squared deviations of numbers that come in parts (Chan, Golub & LeVeque, COMPSTAT 1982)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Take in more numbers, [n] with n > 0."""
        part = values.astype(np.float64)
        apart, total = part.mean() - self.mean, self.count + len(part)
        self.squares += np.square(part - part.mean()).sum() + apart**2 * self.count * len(part) / total
        self.mean, self.count = self.mean + apart * len(part) / total, total

    @property
    def spread(self) -> float:
        """The standard deviation; 0 of no numbers."""
        return float(np.sqrt(self.squares / max(1, self.count)))


def _survey(groups: RowGroups, schema: Schema, rule: Rule, offsets: np.ndarray, train_end: np.ndarray) -> EventStream:
    """One pass over the rows up to `train_end`: counts of items, ids that occur, mean and deviation of values."""
    counts, users, values = np.zeros(schema.items, np.int64), np.zeros(schema.users, np.float32), _Moments()
    row, checks = 0, RowChecks(groups.path, schema)
    columns = event_columns(schema)
    parts = groups.scan(["user_id", *(name for name in columns if name != "timestamp")])
    names = columns[columns.index("value") + 1 :]
    for user, item, event, value, *others in whole_users(parts) if rule.groups else parts:
        checks.rows = row
        checks.check_more(dict(zip(names, others, strict=True)))
        learnable = (np.arange(row, row + len(user)) < train_end[user]) & ~rule.held_out(user, item, event)
        row += len(user)
        if learnable.any():
            np.add.at(counts, item[learnable], 1)
            users[user[learnable]] = 1.0
            values.add(value[learnable])
    stats = TrainStats((counts > 0).astype(np.float32), users, float(values.mean), scale_of(values.spread))
    return EventStream(groups, rule, offsets, train_end, counts, stats, values.count, columns)
