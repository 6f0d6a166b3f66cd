"""Which events are learnt from and which are predicted: leave-one-out and time splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flm_torchrec.data.columns import new_column
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.schema import Schema
from flm_torchrec.errors import DataError

COLD_ITEM = "cold item"
"""Label of the examples whose next item is held out."""


@dataclass(frozen=True)
class Examples:
    """Predictions to make: of example *e*, the events `offsets[user[e]] : end[e]` are given, event `end[e]` is next.

    Where there is no next event (export), `end` is the end of the user's events.
    """

    user: np.ndarray  # [E] int64
    end: np.ndarray  # [E] int64, index into the arrays of interactions
    label: np.ndarray | None = None  # [E] str: kind of prediction, by which results are broken down
    until: np.ndarray | None = None  # [E] int64: the events `end:until` are held out together; None: `end` alone

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> Examples:
        """The examples at an index, in its order."""
        label, until = (None if part is None else part[index] for part in (self.label, self.until))
        return Examples(self.user[index], self.end[index], label, until)


@dataclass(frozen=True)
class Splits:
    """Training events, the first ones of each user, and the examples of validation and test."""

    train_end: np.ndarray  # [users] int64: user u learns from events offsets[u]:train_end[u]
    valid: Examples
    test: Examples
    cold_items: np.ndarray | None = None  # [items] bool: held out, for all users

    def train_mask(self, data: PreparedData) -> np.ndarray:
        """[interactions] bool: the events that may be learnt from."""
        mask = new_column(len(data.item), bool)
        for block in data.blocks():
            rows = np.arange(block.rows.start, block.rows.stop)
            mask[block.rows] = rows < self.train_end[block.users]
            if self.cold_items is not None:
                mask[block.rows] &= ~self.cold_items[data.item[block.rows]]
        return mask


def sampled(count: int, most: int, seed: int) -> np.ndarray:
    """[n] indices below `count`, ascending: `most` of them drawn by the seed, or all where there are no more."""
    if most >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


@dataclass(frozen=True)
class Rule:
    """What a split needs to know about all of the data. With a rule, some users are split as all users would be."""

    kind: str
    valid_from: float = 0.0
    """Of kind time: the first second of validation."""
    test_from: float = 0.0
    """Of kind time: the first second of test."""
    cold_items: np.ndarray | None = None  # [items] int8: 1 held out for validation, 2 for test
    cold_users: np.ndarray | None = None  # [users] int8: likewise

    def held_out(self, item: np.ndarray) -> np.ndarray:
        """[n] item ids → [n] bool: items that are never learnt from."""
        return np.zeros(len(item), bool) if self.cold_items is None else self.cold_items[item] > 0


def split(data: PreparedData, kind: str, holdout: float) -> Splits:
    """Split by `data.split` of the config.

    leave-one-out: of a user with three events or more, the last event is test and the one before it is validation.
    time: the newest `holdout` share of all events is test, the same share before it is validation. The first event
    of a user in each of the two is predicted from all events before it.
    cold-start: `holdout` of the items and of the users with three events are never learnt from, half of each for
    validation and half for test. Predicted are every event of such an item, the last event of such a user, and the
    events that leave-one-out predicts of the other users; labels tell these apart. The same for any seed.

    Raises:
        DataError: nothing is left to validate or test on, or a time split of data without timestamps.
    """
    splits = split_by(data, rule_of(data, kind, holdout))
    for name, examples in (("validation", splits.valid), ("test", splits.test)):
        if len(examples) == 0:
            raise nothing_left(data.path, kind, name)
    return splits


def nothing_left(path: Path, kind: str, name: str) -> DataError:
    """The error of a split that leaves no examples for validation or test."""
    return DataError(
        f"{path}: no {name} example in a {kind} split; users need three events"
        " (leave-one-out) or events after the cut (time)"
    )


def rule_of(data: PreparedData, kind: str, holdout: float) -> Rule:
    """The rule of `split`, from data that are all in memory.

    Raises:
        DataError: a time split of data without timestamps.
    """
    if kind == "time":
        check_timestamps(data.schema, data.path)
        valid_from, test_from = np.quantile(data.timestamp, [1 - 2 * holdout, 1 - holdout], method="higher")
        return Rule(kind, valid_from, test_from)
    if kind == "cold-start":
        seen = np.zeros(data.schema.items, bool)
        seen[data.item] = True
        return cold_rule(seen, np.diff(data.offsets), holdout)
    return Rule(kind)


def cold_rule(seen: np.ndarray, events: np.ndarray, holdout: float) -> Rule:
    """The rule of a cold-start split.

    Args:
        seen: [items] bool, True for items that have events.
        events: [users] number of events.
    """
    rng = np.random.default_rng(0)
    items = _drawn_parts(rng, np.flatnonzero(seen), holdout, len(seen))
    users = _drawn_parts(rng, np.flatnonzero(events >= 3), holdout, len(events))
    return Rule("cold-start", cold_items=items, cold_users=users)


def check_timestamps(schema: Schema, path: Path) -> None:
    """Raise DataError where data have no timestamps, so that they cannot be split by time."""
    if not schema.timestamps:
        raise DataError(f"{path}: has no timestamps; use data.split=leave-one-out")


def split_by(data: PreparedData, rule: Rule) -> Splits:
    """Split by a rule. Validation or test may be empty."""
    return {"leave-one-out": _leave_one_out, "time": _by_time, "cold-start": _cold_start}[rule.kind](data, rule)


def everyone(data: PreparedData) -> Examples:
    """One example for each user, at the end of the user's events: for export."""
    return Examples(np.arange(data.schema.users), data.offsets[1:])


def lasting(offsets: np.ndarray) -> np.ndarray:
    """[users] bool: True for users with three events or more, of which two can be held out."""
    return np.diff(offsets) >= 3


def _leave_one_out(data: PreparedData, _: Rule) -> Splits:
    ends = data.offsets[1:]
    users = np.flatnonzero(lasting(data.offsets))
    return Splits(
        train_end=np.where(lasting(data.offsets), ends - 2, ends),
        valid=Examples(users, ends[users] - 2),
        test=Examples(users, ends[users] - 1),
    )


def _by_time(data: PreparedData, rule: Rule) -> Splits:

    def before(cut: float) -> np.ndarray:
        ends = data.offsets[:-1].copy()
        for block in data.blocks():
            np.add.at(ends, block.users[data.timestamp[block.rows] < cut], 1)
        return ends

    train_end, valid_end, ends = before(rule.valid_from), before(rule.test_from), data.offsets[1:]
    in_valid, in_test = np.flatnonzero(valid_end > train_end), np.flatnonzero(ends > valid_end)
    return Splits(
        train_end=train_end,
        valid=Examples(in_valid, train_end[in_valid], until=valid_end[in_valid]),
        test=Examples(in_test, valid_end[in_test], until=ends[in_test]),
    )


def _cold_start(data: PreparedData, rule: Rule) -> Splits:
    cold_item, cold_user = rule.cold_items, rule.cold_users
    assert cold_item is not None and cold_user is not None
    warm = _leave_one_out(data, rule)

    def examples(part: int, last: Examples) -> Examples:
        cold = _cold_events(data, cold_item == part)
        parts = {
            "warm": last.take(np.flatnonzero(cold_user[last.user] == 0)),
            "cold user": warm.test.take(np.flatnonzero(cold_user[warm.test.user] == part)),
        }
        parts = {name: e.take(np.flatnonzero(cold_item[data.item[e.end]] == 0)) for name, e in parts.items()}
        parts[COLD_ITEM] = cold
        return Examples(
            user=np.concatenate([e.user for e in parts.values()]),
            end=np.concatenate([e.end for e in parts.values()]),
            label=np.concatenate([np.full(len(e), name) for name, e in parts.items()]),
        )

    train_end = np.where(cold_user > 0, data.offsets[:-1], warm.train_end)
    return Splits(train_end, examples(1, warm.valid), examples(2, warm.test), cold_item > 0)


def _cold_events(data: PreparedData, cold: np.ndarray) -> Examples:
    """All events of the items `cold` [items] bool that have a history to predict them from: not a user's first."""
    users, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for block in data.blocks():
        rows = np.arange(block.rows.start, block.rows.stop)
        found = cold[data.item[block.rows]] & (rows > data.offsets[block.users])
        users.append(block.users[found])
        ends.append(rows[found])
    return Examples(np.concatenate(users), np.concatenate(ends))


def _drawn_parts(rng: np.random.Generator, ids: np.ndarray, share: float, size: int) -> np.ndarray:
    """[size]: 1 and 2 for half of a random share of the ids each, else 0."""
    chosen = rng.choice(ids, round(share * len(ids)), replace=False)
    part = np.zeros(size, np.int8)
    part[chosen[: len(chosen) // 2]], part[chosen[len(chosen) // 2 :]] = 1, 2
    return part
