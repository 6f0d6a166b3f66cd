"""The paired bootstrap: what it must be for any ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.evaluation import paired
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.paired import differences

PAIRS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60)


@given(pairs=PAIRS)
@settings(max_examples=30)
def test_the_mean_is_the_difference_of_the_tables_metrics(pairs: list[tuple[int, int]]) -> None:
    ranks, others = np.array(pairs).T
    tables = [RankCounts(np.bincount(r - 1, minlength=30), {}).metrics((5, 10)) for r in (ranks, others)]
    users = np.arange(len(ranks)) // 2
    found, back = differences(ranks, others, users, (5, 10)), differences(others, ranks, users, (5, 10))
    assert list(found) == ["hr@5", "ndcg@5", "hr@10", "ndcg@10"]
    for metric, one in found.items():
        assert one.mean == pytest.approx(tables[0][metric] - tables[1][metric], abs=1e-12)
        assert one.low - 1e-12 <= one.mean <= one.high + 1e-12 or one.low == one.high
        assert back[metric].mean == pytest.approx(-one.mean, abs=1e-12)
        assert one.clear == (one.low > 0 or one.high < 0)


def test_the_interval_is_that_of_resampled_users() -> None:
    rng = np.random.default_rng(3)
    ranks, others = rng.integers(1, 40, 300), rng.integers(1, 60, 300)
    found = differences(ranks, others, np.arange(300), (10,))["ndcg@10"]
    gain = [np.where(r <= 10, 1 / np.log2(1 + r), 0.0) for r in (ranks, others)]
    drawn = rng.integers(0, 300, (4000, 300))
    low, high = np.percentile((gain[0] - gain[1])[drawn].mean(1), (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    # One example each: the draws of a seed are those of the versions that took each example for a user.
    assert (found.low, found.high) == pytest.approx((0.0006114148702086417, 0.06435245565601246), rel=1e-14)


def test_a_user_who_is_drawn_brings_all_examples() -> None:
    rng = np.random.default_rng(4)
    size = rng.integers(1, 6, 200)
    users = rng.permutation(np.repeat(np.arange(200), size))
    bad = rng.random(200) < 0.5  # so that the examples of a user are alike
    ranks, others = rng.integers(1, 20, len(users)), rng.integers(1, 8, len(users)) + 9 * bad[users]
    found = differences(ranks, others, users, (10,))["hr@10"]
    gained = np.bincount(users, (ranks <= 10).astype(float) - (others <= 10))
    drawn = rng.integers(0, 200, (4000, 200))
    low, high = np.percentile(gained[drawn].sum(1) / size[drawn].sum(1), (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.mean == pytest.approx(gained.sum() / len(users))
    alone = differences(ranks, others, np.arange(len(users)), (10,))["hr@10"]
    assert found.high - found.low > 1.2 * (alone.high - alone.low)


@pytest.mark.parametrize("memory", [2**24, 5000])
def test_examples_that_are_there_twice_tell_nothing_more(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    ranks, others, users = rng.integers(1, 40, 300), rng.integers(1, 60, 300), np.arange(300)
    once = differences(ranks, others, users, (5, 10))
    monkeypatch.setattr(paired, "DRAWN", memory)
    twice = differences(np.tile(ranks, 2), np.tile(others, 2), np.tile(users, 2), (5, 10))
    for metric, one in once.items():
        assert (twice[metric].low, twice[metric].high) == pytest.approx((one.low, one.high), rel=1e-9)


def test_alike_is_no_difference_and_better_for_all_is_clear() -> None:
    ranks = users = np.arange(1, 21)
    same = differences(ranks, ranks, users, (10,))["ndcg@10"]
    assert (same.mean, same.low, same.high, same.clear) == (0, 0, 0, False)
    better = differences(np.ones(20, int), np.full(20, 2), users, (10,))["ndcg@10"]
    assert better.clear and better.low == pytest.approx(better.high)
    assert not differences(np.ones(20, int), np.full(20, 2), users, (10,))["hr@10"].clear
