"""Interactions that need not fit into memory: row groups of Parquet files, and what must be known of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flm_torchrec.data.collate import LEAST_SPREAD, Known
from flm_torchrec.data.dataset import (
    PreparedData,
    check_rows,
    load_prepared,
)
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.splits import Rule, check_timestamps, cold_rule, lasting, nothing_left, sampled

BINS = 2**16
"""Of a histogram of timestamps: two passes find one second in 136 years."""


@dataclass(frozen=True)
class Stream:
    """All interactions on disk, and what training must know of them: O(users + items) in memory."""

    groups: RowGroups
    rule: Rule
    offsets: np.ndarray  # [users + 1] int64: first row of each user
    train_end: np.ndarray  # [users] int64: user u is learnt from up to row train_end[u]
    counts: np.ndarray  # [items] int64: training events of each item
    known: Known
    fit_rows: int
    """Training events."""

    def held_out(self, item: np.ndarray) -> np.ndarray:
        """[n] bool: items that are never learnt from."""
        return np.zeros(len(item), bool) if self.rule.cold_items is None else self.rule.cold_items[item] > 0


@dataclass(frozen=True)
class StreamedData(PreparedData):
    """The events of some users in memory, to validate on; those of all are in the stream, to train on."""

    stream: Stream


def load_streamed(
    path: Path, features: str | Sequence[str], kind: str, holdout: float, sample: int, seed: int
) -> StreamedData:
    """Survey all interactions, in two passes or six for a time split, and load those of the users to validate on.

    Args:
        kind: of split, and `holdout`, as for `split`.
        sample: users to load, drawn once by `seed` from those with something to predict in validation.

    Raises:
        DataError: as `load_prepared` and `split`.
    """
    schema = Schema.load(path / "schema.yaml")
    groups = RowGroups(path)
    offsets, seen = _users_and_items(groups, schema)
    train_end, candidates, rule = _split(groups, schema, offsets, seen, kind, holdout)
    if not len(candidates):
        raise nothing_left(path, kind, "validation")
    stream = _survey(groups, schema, rule, offsets, train_end)
    loaded = load_prepared(path, features, candidates[sampled(len(candidates), sample, seed)])
    return StreamedData(**{name: getattr(loaded, name) for name in PreparedData.__dataclass_fields__}, stream=stream)


def hide_values(data: PreparedData) -> PreparedData:
    """The same, all values 1: for a model that must not see them."""
    shown = replace(data, value=np.ones_like(data.value))
    if isinstance(shown, StreamedData):
        known = replace(shown.stream.known, value_scale=0.0)
        shown = replace(shown, stream=replace(shown.stream, known=known))
    return shown


def _users_and_items(groups: RowGroups, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    """[users + 1] first row of each user, and [items] bool, which occur; ids are checked on the way."""
    events, seen = np.zeros(schema.users, np.int64), np.zeros(schema.items, bool)
    row, newest = 0, 0
    for user, item in groups.scan(["user_id", "item_id"]):
        check_rows(user, item, schema, groups.path, row, newest)
        starts = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
        events[user[starts]] += np.diff(np.append(starts, len(user)))
        seen[item] = True
        row, newest = row + len(user), int(user[-1])
    return np.concatenate([[0], np.cumsum(events)]), seen


def _split(
    groups: RowGroups, schema: Schema, offsets: np.ndarray, seen: np.ndarray, kind: str, holdout: float
) -> tuple[np.ndarray, np.ndarray, Rule]:
    """[users] end of the rows to learn from, the users with something to predict in validation, and the rule."""
    if kind == "time":
        check_timestamps(schema, groups.path)
        last = groups.rows - 1  # ranks as numpy.quantile's method "higher" takes them
        ranks = [int(np.ceil(last * q)) for q in (1 - 2 * holdout, 1 - holdout)]
        valid_from, test_from = order_statistics(groups, ranks)
        rule = Rule(kind, valid_from, test_from)
        before = np.zeros((2, schema.users), np.int64)
        for user, timestamp in groups.scan(["user_id", "timestamp"]):
            for counts, limit in zip(before, (rule.valid_from, rule.test_from), strict=True):
                np.add.at(counts, user[timestamp < limit], 1)
        return offsets[:-1] + before[0], np.flatnonzero(before[1] > before[0]), rule
    candidates = np.flatnonzero(lasting(offsets))
    train_end = np.where(lasting(offsets), offsets[1:] - 2, offsets[1:])
    if kind == "cold-start":
        rule = cold_rule(seen, np.diff(offsets), holdout)
        assert rule.cold_users is not None
        return np.where(rule.cold_users > 0, offsets[:-1], train_end), candidates, rule
    return train_end, candidates, Rule(kind)


def order_statistics(groups: RowGroups, ranks: Sequence[int]) -> list[int]:
    """The timestamps at these ranks, from 0, of all sorted: by histograms ever finer, BINS numbers in memory each."""
    least, most = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for (timestamp,) in groups.scan(["timestamp"]):
        least, most = min(least, int(timestamp.min())), max(most, int(timestamp.max()))
    # Of each rank, between which values it lies, and how many are below these.
    low, width, below = [least] * len(ranks), most - least + 1, [0] * len(ranks)
    while width > 1:
        step = -(-width // BINS)
        counts = np.zeros((len(ranks), BINS), np.int64)
        for (timestamp,) in groups.scan(["timestamp"]):
            for row, start in zip(counts, low, strict=True):
                inside = timestamp[(timestamp >= start) & (timestamp < start + width)]
                row += np.bincount((inside - start) // step, minlength=BINS)
        for n, rank in enumerate(ranks):
            upto = below[n] + np.cumsum(counts[n])
            found = int(np.searchsorted(upto, rank, "right"))
            below[n] = int(upto[found] - counts[n][found])
            low[n] += found * step
        width = step
    return low


def _survey(groups: RowGroups, schema: Schema, rule: Rule, offsets: np.ndarray, train_end: np.ndarray) -> Stream:
    """What the rows up to `train_end` tell: counts of items, known ids, mean and deviation of values."""
    nothing = Known(np.zeros(schema.items, np.float32), np.zeros(schema.users, np.float32), 0.0, 0.0)
    stream = Stream(groups, rule, offsets, train_end, np.zeros(schema.items, np.int64), nothing, 0)
    row, rows, mean, squares = 0, 0, 0.0, 0.0
    for user, item, value in groups.scan(["user_id", "item_id", "value"]):
        fit = (np.arange(row, row + len(user)) < train_end[user]) & ~stream.held_out(item)
        row += len(user)
        if not fit.any():
            continue
        np.add.at(stream.counts, item[fit], 1)
        nothing.users[user[fit]] = 1.0
        # Means and squares of parts, put together (Chan, Golub & LeVeque, COMPSTAT 1982).
        part = value[fit].astype(np.float64)
        apart, total = part.mean() - mean, rows + len(part)
        squares += np.square(part - part.mean()).sum() + apart**2 * rows * len(part) / total
        mean, rows = mean + apart * len(part) / total, total
    spread = float(np.sqrt(squares / max(1, rows)))
    known = Known(
        items=(stream.counts > 0).astype(np.float32), users=nothing.users, value_mean=float(mean),
        value_scale=1.0 / spread if spread > LEAST_SPREAD else 0.0,
    )  # fmt: skip
    return replace(stream, known=known, fit_rows=rows)
