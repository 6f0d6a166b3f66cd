"""Leave-one-out and time splits never learn from what they predict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flm_torchrec.data.prepared import PreparedData
from flm_torchrec.data.splits import everyone, split
from flm_torchrec.errors import DataError


def test_leave_one_out_predicts_the_last_two_events(small: PreparedData) -> None:
    splits = split(small, "leave-one-out", 0.1)
    fit = splits.fit(small)
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
    assert 0 not in splits.test.user and 0 not in splits.valid.user and splits.fit(data)[:2].all()


def test_a_time_split_learns_only_from_before_the_cut(small: PreparedData) -> None:
    splits = split(small, "time", 0.2)
    fit = splits.fit(small)
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
