"""Which events are learnt from and which are predicted: leave-one-out and time splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from flm_torchrec.data.columns import EventBlock
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.order_statistics import order_statistics
from flm_torchrec.data.schema import Schema
from flm_torchrec.errors import DataError

COLD_ITEM = "cold item"
"""Label of the examples whose next item is held out."""
SAMPLE_SEED = 0
"""Of users who are drawn to be ranked. Not `train.seed`: runs that differ in it are compared on the same users."""


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

    @property
    def users(self) -> int:
        """Number of the users, some of whom may have several examples."""
        return len(np.unique(self.user))

    def take(self, index: np.ndarray) -> Examples:
        """The examples at an index, in its order."""
        label, until = (None if part is None else part[index] for part in (self.label, self.until))
        return Examples(self.user[index], self.end[index], label, until)

    def drawn(self, most: int, seed: int = SAMPLE_SEED) -> Examples:
        """All examples of `most` users, drawn by the seed, or of all users where there are no more; 0: all."""
        users = np.unique(self.user)
        if not most or most >= len(users):
            return self
        return self.take(np.flatnonzero(np.isin(self.user, users[sampled(len(users), most, seed)])))

    def digest(self, data: PreparedData) -> str:
        """The same for the same predictions on the same data, whichever of the events are loaded."""
        start = data.offsets[self.user]
        found = hashlib.blake2b(data.fingerprint.encode(), digest_size=16)
        for part in (self.user, self.end - start, () if self.until is None else self.until - start):
            found.update(np.asarray(part, "<i8").tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Splits:
    """Training events, the first ones of each user, and the examples of validation and test."""

    train_end: np.ndarray  # [users] int64: user u learns from events offsets[u]:train_end[u]
    valid: Examples
    test: Examples
    cold_items: np.ndarray | None = None  # [items] bool: held out, for all users
    held_out: np.ndarray | None = None  # [interactions] bool: of joint data, or of some kinds of events
    cold_users: np.ndarray | None = None  # [users] bool: held out, with all their events

    def train_mask(self, data: PreparedData) -> np.ndarray:
        """[interactions] bool: the events that may be learnt from."""

        def learnt(block: EventBlock) -> np.ndarray:
            mask = np.arange(block.rows.start, block.rows.stop) < self.train_end[block.users]
            if self.cold_items is not None:
                mask &= ~self.cold_items[data.item[block.rows]]
            if self.held_out is not None:
                mask &= ~self.held_out[block.rows]
            return mask

        return data.column(bool, learnt)


def sampled(count: int, most: int, seed: int) -> np.ndarray:
    """[n] indices below `count`, ascending: `most` of them drawn by the seed, or all where there are no more."""
    if most >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


@dataclass(frozen=True)
class SplitSettings:
    """The settings that choose a split."""

    kind: str
    holdout: float
    target_events: Literal["all"] | tuple[str, ...] = "all"


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
    domain: np.ndarray | None = None
    """[items] of joint data: their domains, each of which is split on its own."""
    targets: np.ndarray | None = None
    """[kinds of events] bool: those to predict; None: all."""

    def held_out(self, user: np.ndarray, item: np.ndarray, event: np.ndarray) -> np.ndarray:
        """[n] users, items and kinds of all events of these users, in order → [n] bool: those never learnt from."""
        held = np.zeros(len(item), bool) if self.cold_items is None else self.cold_items[item] > 0
        if not self.groups or self.kind == "time":
            return held
        return held | (self.part(user, item, event) > 0)

    @property
    def groups(self) -> bool:
        """Whether what is held out depends on more than the place in a user's sequence."""
        return self.domain is not None or self.targets is not None

    def part(self, user: np.ndarray, item: np.ndarray, event: np.ndarray) -> np.ndarray:
        """As `last_of_domain`, of all events of these users, in order."""
        domain = np.zeros(len(item), np.int64) if self.domain is None else self.domain[item]
        return last_of_domain(user, domain, self.is_target(event))

    def is_target(self, event: np.ndarray) -> np.ndarray:
        """[n] kinds of events → [n] bool: those to predict."""
        return np.ones(len(event), bool) if self.targets is None else self.targets[event]


def split(data: PreparedData, kind: str, holdout: float) -> Splits:
    """Split by `data.split` of the config.

    leave-one-out: of a user with three events or more, the last event is test and the one before it is validation.
    time: the newest `holdout` share of all events is test, the same share before it is validation. The first event
    of a user in each of the two is predicted from all events before it.
    cold-start: `holdout` of the items and of the users with three events are never learnt from, half of each for
    validation and half for test. Predicted are every event of such an item, the last event of such a user, and the
    events that leave-one-out predicts of the other users; labels tell these apart. The same for any seed.

    With `data.targets`, only events of these kinds are predicted and counted: leave-one-out takes the last two of a
    user who has three of them, and nothing after the first of the two is learnt from.

    Raises:
        DataError: nothing is left to learn from, to validate or test on, or a time split of data without timestamps.
    """
    splits = split_by(data, rule_of(data, kind, holdout))
    check_learns(data.path, kind, data.offsets, splits.train_end)
    for name, examples in (("validation", splits.valid), ("test", splits.test)):
        if len(examples) == 0:
            raise nothing_left(data.path, kind, name, data.targets is not None)
    return splits


def check_learns(path: Path, kind: str, offsets: np.ndarray, train_end: np.ndarray) -> None:
    """Raise DataError where no user has an event to learn from: a time split of events that nearly all have one time.

    Args:
        offsets: [users + 1] first event of each user.
        train_end: [users] the training events of user u end before it.
    """
    if not (train_end > offsets[:-1]).any():
        raise DataError(
            f"{path}: no event to learn from in a {kind} split, as most events have the time of the first; choose"
            " --data.split leave-one-out or a smaller --data.holdout, or prepare with finer timestamps"
        )


def nothing_left(path: Path, kind: str, name: str, chosen: bool = False) -> DataError:
    """The error of a split that leaves no examples for validation or test.

    Args:
        chosen: only some kinds of events are predicted.
    """
    events = "events of data.target_events" if chosen else "events"
    return DataError(
        f"{path}: no {name} example in a {kind} split; users need three {events}"
        f" (leave-one-out) or {events} after the cut (time)"
    )


def rule_of(data: PreparedData, kind: str, holdout: float) -> Rule:
    """The rule of `split`, from data that are all in memory.

    Raises:
        DataError: a time split of data without timestamps.
    """
    if kind == "time":
        check_timestamps(data.schema, data.path)
        ranks = cuts(len(data.timestamp), holdout)
        valid_from, test_from = order_statistics(lambda: (data.timestamp[b.rows] for b in data.blocks()), ranks)
        return Rule(kind, valid_from, test_from, domain=data.item_domain, targets=data.targets)
    if kind == "cold-start":
        seen = np.zeros(data.schema.items, bool)
        for block in data.blocks():
            seen[data.item[block.rows]] = True
        rule = cold_rule(seen, np.diff(data.offsets), holdout)
        return replace(rule, domain=data.item_domain, targets=data.targets)
    return Rule(kind, domain=data.item_domain, targets=data.targets)


def cuts(events: int, holdout: float) -> list[int]:
    """The ranks of the first timestamps of validation and of test among those of all events, sorted.

    As numpy.quantile's method "higher" takes them.
    """
    return [int(np.ceil((events - 1) * q)) for q in (1 - 2 * holdout, 1 - holdout)]


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


NOT_LEARNT = 3
"""Part of an event that is not predicted and comes after one that is held out, see `last_of_domain`."""


def last_of_domain(user: np.ndarray, domain: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[n] int8: 2 for the last target of a user in a domain, 1 for the one before, NOT_LEARNT for other events after
    that one, 0 for the rest; and for all events of a user and a domain with fewer than three targets.

    Args:
        user: [n] ascending; all events of each user, in order.
        domain: [n] of each event's item.
        target: [n] bool, of a kind that is predicted.
    """
    key = user.astype(np.int64) * (1 + int(domain.max(initial=0))) + domain
    order = np.argsort(key, kind="stable")
    rows = order[target[order]]
    starts = np.flatnonzero(np.diff(key[rows], prepend=-1))
    sizes = np.diff(np.append(starts, len(rows)))
    ends = (starts + sizes)[sizes >= 3]
    part = np.zeros(len(key), np.int8)
    part[rows[ends - 1]], part[rows[ends - 2]] = 2, 1
    if not target.all():
        after = np.zeros(len(key), np.int64)  # held out so far of the user and the domain, in `order`
        counted = np.cumsum(part[order] > 0)
        first = np.flatnonzero(np.diff(key[order], prepend=-1))
        after[order] = counted - np.repeat(
            counted[first] - (part[order][first] > 0), np.diff(np.append(first, len(key)))
        )
        part[(after > 0) & (part == 0)] = NOT_LEARNT
    return part


def lasting(offsets: np.ndarray) -> np.ndarray:
    """[users] bool: True for users with three events or more, of which two can be held out."""
    return np.diff(offsets) >= 3


def _leave_one_out(data: PreparedData, rule: Rule) -> Splits:
    if rule.groups:
        return _leave_one_out_by_group(data, rule)
    ends = data.offsets[1:]
    users = np.flatnonzero(lasting(data.offsets))
    return Splits(
        train_end=np.where(lasting(data.offsets), ends - 2, ends),
        valid=Examples(users, ends[users] - 2),
        test=Examples(users, ends[users] - 1),
    )


def _leave_one_out_by_group(data: PreparedData, rule: Rule) -> Splits:
    """As leave-one-out splits the targets of each domain alone.

    What comes before an event in time is known, of all domains and kinds.
    """

    def part_of(block: EventBlock) -> np.ndarray:
        return rule.part(block.users, data.item[block.rows], data.event[block.rows])

    held = data.column(np.int8, part_of)
    train_end = data.offsets[:-1].copy()
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for block in data.blocks():
        part = held[block.rows]
        learnt = np.flatnonzero(part == 0)
        train_end[block.users[learnt]] = block.rows.start + learnt + 1  # the last of equal indices counts
        for number, found in enumerate(parts, start=1):
            rows = np.flatnonzero(part == number)
            found.append((block.users[rows], block.rows.start + rows))
    valid, test = (Examples(*map(np.concatenate, zip(*found, strict=True))) for found in parts)
    return Splits(train_end, valid, test, held_out=data.column(bool, lambda block: held[block.rows] > 0))


def _by_time(data: PreparedData, rule: Rule) -> Splits:

    def before(cut: float) -> np.ndarray:
        ends = data.offsets[:-1].copy()
        for block in data.blocks():
            np.add.at(ends, block.users[data.timestamp[block.rows] < cut], 1)
        return ends

    train_end, valid_end, ends = before(rule.valid_from), before(rule.test_from), data.offsets[1:]
    if rule.groups:
        spans_of = ((train_end, valid_end), (valid_end, ends))
        valid, test = (_first_of_groups(data, rule, *span) for span in spans_of)
        return Splits(train_end, valid, test)
    in_valid, in_test = np.flatnonzero(valid_end > train_end), np.flatnonzero(ends > valid_end)
    return Splits(
        train_end=train_end,
        valid=Examples(in_valid, train_end[in_valid], until=valid_end[in_valid]),
        test=Examples(in_test, valid_end[in_test], until=ends[in_test]),
    )


def _first_of_groups(data: PreparedData, rule: Rule, first: np.ndarray, end: np.ndarray) -> Examples:
    """The first target of each user and domain among the events `first:end` of each user, [users] each."""
    found = []
    for block in data.blocks():
        rows = np.arange(block.rows.start, block.rows.stop)
        rows = rows[(rows >= first[block.users]) & (rows < end[block.users])]
        rows = rows[rule.is_target(data.event[rows])]
        groups = block.users[rows - block.rows.start]
        if rule.domain is not None:
            groups = groups * (1 + int(rule.domain.max())) + rule.domain[data.item[rows]]
        found.append(rows[np.sort(np.unique(groups, return_index=True)[1])])
    rows = np.concatenate(found)
    users = np.searchsorted(data.offsets, rows, "right") - 1
    return Examples(users, rows, until=end[users])


def _cold_start(data: PreparedData, rule: Rule) -> Splits:
    cold_item, cold_user = rule.cold_items, rule.cold_users
    assert cold_item is not None and cold_user is not None
    warm = _leave_one_out(data, rule)

    def examples(part: int, last: Examples) -> Examples:
        cold = _cold_events(data, cold_item == part, rule)
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
    valid, test = examples(1, warm.valid), examples(2, warm.test)
    return Splits(train_end, valid, test, cold_item > 0, warm.held_out, cold_user > 0)


def _cold_events(data: PreparedData, cold: np.ndarray, rule: Rule) -> Examples:
    """All targets of the items `cold` [items] bool that have a history to predict them from, so no first events."""
    users, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for block in data.blocks():
        rows = np.arange(block.rows.start, block.rows.stop)
        found = cold[data.item[block.rows]] & (rows > data.offsets[block.users])
        found &= rule.is_target(data.event[block.rows])
        users.append(block.users[found])
        ends.append(rows[found])
    return Examples(np.concatenate(users), np.concatenate(ends))


def _drawn_parts(rng: np.random.Generator, ids: np.ndarray, share: float, size: int) -> np.ndarray:
    """[size]: 1 and 2 for half of a random share of the ids each, else 0."""
    chosen = rng.choice(ids, round(share * len(ids)), replace=False)
    part = np.zeros(size, np.int8)
    part[chosen[: len(chosen) // 2]], part[chosen[len(chosen) // 2 :]] = 1, 2
    return part
