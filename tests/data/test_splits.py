"""Leave-one-out and time splits never learn from what they predict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.negatives import Candidates
from flm_torchrec.data.splits import COLD_ITEM, everyone, split
from flm_torchrec.errors import DataError


def test_leave_one_out_predicts_the_last_two_events(small: PreparedData) -> None:
    splits = split(small, "leave-one-out", 0.1)
    fit = splits.train_mask(small)
    for row in (0, 50, len(splits.test) - 1):
        user = splits.test.user[row]
        start, end = small.offsets[user], small.offsets[user + 1]
        assert (splits.valid.end[row], splits.test.end[row]) == (end - 2, end - 1)
        assert fit[start:end].tolist() == [True] * (end - start - 2) + [False] * 2


def test_a_user_with_fewer_than_three_events_is_learnt_from_only(small: PreparedData) -> None:
    offsets = small.offsets.copy()
    offsets[1] = 2  # the first user keeps two events, the second gets the rest
    data = dataclasses.replace(small, offsets=offsets)
    splits = split(data, "leave-one-out", 0.1)
    assert 0 not in splits.test.user and 0 not in splits.valid.user and splits.train_mask(data)[:2].all()


def test_a_time_split_learns_only_from_before_the_cut(small: PreparedData) -> None:
    splits = split(small, "time", 0.2)
    fit = splits.train_mask(small)
    learnt, valid, test = small.timestamp[fit], small.timestamp[splits.valid.end], small.timestamp[splits.test.end]
    assert learnt.max() < valid.min() and valid.max() < test.min()
    assert 0.5 < fit.mean() < 0.7
    # What comes before the example's event is older than it, and the example is the user's first in its window.
    assert all(
        small.offsets[u] <= e < small.offsets[u + 1] for u, e in zip(splits.test.user, splits.test.end, strict=True)
    )


def test_a_time_split_needs_timestamps(small: PreparedData) -> None:
    data = dataclasses.replace(small, schema=dataclasses.replace(small.schema, timestamps=False))
    with pytest.raises(DataError, match=r"data\.split=leave-one-out"):
        split(data, "time", 0.1)


def test_nobody_to_test_on_is_an_error(small: PreparedData) -> None:
    offsets = np.minimum(small.offsets, 2)
    data = dataclasses.replace(small, offsets=offsets, item=small.item[:2], timestamp=small.timestamp[:2])
    with pytest.raises(DataError, match="no validation example"):
        split(data, "leave-one-out", 0.1)


def test_everyone_is_represented_after_all_events(small: PreparedData) -> None:
    examples = everyone(small)
    assert len(examples) == small.schema.users and examples.end[-1] == len(small.item)


def test_a_cold_start_split_never_learns_from_its_items_and_users(small: PreparedData) -> None:
    splits = split(small, "cold-start", 0.2)
    fit = splits.train_mask(small)
    assert splits.cold_items is not None and splits.cold_items.sum() == round(0.2 * len(np.unique(small.item)))
    assert not splits.cold_items[small.item[fit]].any() and fit.any()
    users = np.repeat(np.arange(small.schema.users), np.diff(small.offsets))
    for part, other in ((splits.valid, splits.test), (splits.test, splits.valid)):
        assert part.label is not None and other.label is not None
        cold = part.label == COLD_ITEM
        assert cold.any() and (splits.cold_items[small.item[part.end]] == cold).all()
        assert not np.isin(small.item[part.end[cold]], small.item[other.end]).any()
        new = part.user[part.label == "cold user"]
        assert len(new) and not np.isin(users[fit], new).any()
        assert (part.end > small.offsets[part.user]).all() and not fit[part.end].any()
    again = split(small, "cold-start", 0.2)
    assert (again.test.end == splits.test.end).all()


def test_batches_leave_out_held_out_items_as_if_they_had_not_happened(small: PreparedData) -> None:
    splits = split(small, "cold-start", 0.2)
    fit = splits.train_mask(small)
    users = np.flatnonzero(splits.train_end > small.offsets[:-1])
    start, end = small.offsets[users], splits.train_end[users]
    drawn = Candidates(np.arange(small.schema.items), None)
    batch = Assembler(small, fit).training(users, start, end, drawn)
    ids, at = batch.item_ids.values().numpy(), 0
    for row, (first, last) in enumerate(zip(start, end, strict=True)):
        kept = [int(small.item[p]) for p in range(first, last) if fit[p]]
        span = slice(at, at + int(batch.lengths[row]))
        assert ids[batch.targets[span]].tolist() == kept
        assert ids[batch.tokens[span][1:]].tolist() == kept[:-1]
        at = span.stop


def test_users_are_drawn_with_all_of_their_examples(small: PreparedData) -> None:
    examples = split(small, "cold-start", 0.2).test
    several = np.unique(examples.user, return_counts=True)[1]
    assert several.max() > 1
    drawn = examples.drawn(5, 3)
    assert drawn.users == 5 and drawn.user.tolist() == examples.drawn(5, 3).user.tolist()
    of_these = np.isin(examples.user, drawn.user)
    assert drawn.end.tolist() == examples.end[of_these].tolist()
    assert examples.drawn(0, 3) is examples.drawn(len(several), 3) is examples
    assert any(examples.drawn(5, seed).user.tolist() != drawn.user.tolist() for seed in range(3))
