"""A mixture is the log of a sum of probabilities, and its shares are their parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_torchrec.config.heads import HEADS
from flm_torchrec.mixture import LEAST, MOST, Mixture, shortlist

MIXTURE = Mixture((2.0, 0.5, 10.0), (-1.0, 3.0, 0.0))
NUMBERS = st.floats(-30, 30)
PER_HEAD = st.tuples(*[NUMBERS] * len(HEADS))


def by_hand(mixture: Mixture, scores: list[float]) -> float:
    return math.log(sum(math.exp(s * z + b) for s, b, z in zip(mixture.scale, mixture.bias, scores, strict=True)))


def test_a_score_is_the_log_of_the_sum() -> None:
    by_head = [[0.0, 0.3, -2.0], [1.0, -0.7, 4.0], [0.1, 0.9, -0.5]]  # [heads, items]
    want = [by_hand(MIXTURE, [row[item] for row in by_head]) for item in range(3)]
    found = MIXTURE.score([np.array(row, np.float32) for row in by_head])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_one_sure_head_is_enough() -> None:
    """A weighted sum would prefer the second item."""
    sure, middling = MIXTURE.score([np.array([-5.0, 0.5]), np.array([-5.0, 0.5]), np.array([2.0, 0.5])])
    assert sure > middling


def test_scores_beyond_the_range_of_exp_are_finite() -> None:
    extreme = Mixture((MOST, MOST, MOST), (MOST, -MOST, 0.0))
    by_head = [np.array([100.0, -100.0], np.float32)] * 3
    assert np.isfinite(extreme.score(by_head)).all() and np.isfinite(extreme.shares(by_head)).all()


@given(PER_HEAD, PER_HEAD, st.lists(PER_HEAD, min_size=1, max_size=5))
def test_shares_add_up_to_one(
    scale: tuple[float, ...], bias: tuple[float, ...], items: list[tuple[float, ...]]
) -> None:
    by_head = list(np.array(items, np.float32).T)
    mixture = Mixture(scale, bias)
    shares = mixture.shares(by_head)
    assert shares.shape == (len(HEADS), len(items)) and (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-9)
    largest = [s * np.float64(z) + b for s, b, z in zip(scale, bias, by_head, strict=True)]
    np.testing.assert_allclose(shares.max(0), np.exp(np.max(largest, 0) - np.logaddexp.reduce(largest)), rtol=1e-4)


@pytest.mark.parametrize(("k", "most"), [(1, LEAST), (LEAST // 2, LEAST), (LEAST, 2 * LEAST), (1000, 2000)])
def test_a_shortlist_is_longer_than_what_is_asked_for(k: int, most: int) -> None:
    assert shortlist(k) == most
