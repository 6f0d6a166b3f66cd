"""The baseline Markov: transitions between training events, by hand and against plain loops."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples, split
from flm_torchrec.evaluation.baselines import Markov, Popularity
from tests.evaluation.test_ranking import HISTORIES, make_data


def scores_of(scorer: Markov, users: int, items: int) -> torch.Tensor:
    known = scorer.block(np.arange(users))
    middle = items // 2
    return torch.cat([scorer.scores(known, "Markov", 0, middle), scorer.scores(known, "Markov", middle, items)], 1)


def all_events(data: PreparedData) -> np.ndarray:
    return np.ones(len(data.item), bool)


def test_markov_of_a_hand_worked_case() -> None:
    """Leave-one-out learns from 0 1 0 1, from 1 2 and from 3: 0→1 twice, 1→0 once, 1→2 once."""
    data = make_data([[0, 1, 0, 1, 0, 4], [1, 2, 1, 4], [3, 3, 0]], 5)
    splits = split(data, "leave-one-out", 0.1)
    scorer = Markov(data, splits.train_mask(data), splits.test)
    assert {(i, j): scorer.transitions[i, j] for i, j in zip(*scorer.transitions.nonzero(), strict=True)} == {
        (0, 1): 2.0, (1, 0): 1.0, (1, 2): 1.0,
    }  # fmt: skip
    # Training events of the items: 2, 3, 1, 1, 0. Last known items of the users: 0, 1, 3.
    by_popularity = np.array([2, 3, 1, 1, 0]) / 4
    expected = np.array([[0, 2, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]) + by_popularity
    np.testing.assert_allclose(scores_of(scorer, 3, 5).numpy(), expected)


@settings(max_examples=30)
@given(HISTORIES)
def test_markov_is_that_of_plain_loops_and_popularity_only_breaks_ties(histories: list[list[int]]) -> None:
    data = make_data(histories, 12)
    splits = split(data, "leave-one-out", 0.1)
    found = scores_of(Markov(data, splits.train_mask(data), splits.test), len(histories), 12).numpy()
    learnt = [history[:-2] for history in histories]
    transitions = Counter(pair for history in learnt for pair in pairwise(history))
    popularity = Counter(item for history in learnt for item in history)
    for history, scores in zip(histories, found, strict=True):
        keys = [(transitions[history[-2], item], popularity[item]) for item in range(12)]
        places = {key: place for place, key in enumerate(sorted(set(keys)))}
        assert np.unique(scores, return_inverse=True)[1].tolist() == [places[key] for key in keys]


@settings(max_examples=30)
@given(HISTORIES, st.integers(0, 11), st.integers(0, 11))
def test_markov_learns_nothing_from_held_out_events(histories: list[list[int]], valid: int, test: int) -> None:
    """Other held-out events change no transition and no popularity."""
    others = [[*history[:-2], valid, test] for history in histories]
    scorers = []
    for data in (make_data(histories, 12), make_data(others, 12)):
        splits = split(data, "leave-one-out", 0.1)
        scorers.append(Markov(data, splits.train_mask(data), splits.valid))
    one, other = (scores_of(scorer, len(histories), 12) for scorer in scorers)
    assert torch.equal(one, other)


def test_a_held_out_item_between_two_events_is_in_no_transition() -> None:
    data = make_data([[0, 1, 2]], 3)
    scorer = Markov(data, data.item != 1, Examples(np.array([0]), np.array([2])))
    assert scorer.transitions[0, 2] == 1.0 and scorer.transitions.nnz == 1
    assert scores_of(scorer, 1, 3)[0].max() < 1.0  # the last known item was never learnt from


def test_repeated_transitions_add_up_and_are_kept_once() -> None:
    data = make_data([[0, 1] * 500, [1, 1, 1]], 3)
    scorer = Markov(data, all_events(data), Examples(np.array([0, 1]), np.array([1, 1001])))
    assert scorer.transitions[0, 1] == 500 and scorer.transitions[1, 0] == 499 and scorer.transitions[1, 1] == 2
    assert scorer.transitions.nnz == 3
    assert scores_of(scorer, 2, 3).argmax(1).tolist() == [1, 0]


def test_a_user_without_events_gets_popularity() -> None:
    data = make_data([[2, 2, 2, 1, 0, 1], [0]], 4)
    examples = Examples(np.array([1, 0, 1]), np.array([6, 0, 7]))  # the first two with no event before them
    scorer = Markov(data, all_events(data), examples)
    popular = Popularity(data, all_events(data)).scores(2, "popularity", 0, 4).argsort(stable=True)
    found = scores_of(scorer, 3, 4)
    assert torch.equal(found[:2].argsort(stable=True), popular) and found[:2].max() < 1.0
    assert found[2].argmax() == 1  # after 0 came 1
    assert scorer.scores(scorer.block(np.zeros(0, np.int64)), "Markov", 1, 3).shape == (0, 2)


def test_popularity_never_outranks_a_transition_however_often_an_item_was_seen() -> None:
    data = make_data([[3] * 100_000, [0, 1], [0]], 4)
    scorer = Markov(data, all_events(data), Examples(np.array([2]), np.array([100_003])))
    scores = scores_of(scorer, 1, 4)[0]
    assert scores.argmax() == 1 and scores[3] == scores[[0, 2, 3]].max()
    assert scores.dtype == torch.float32


def test_markov_of_a_large_catalogue_holds_its_distinct_transitions_alone() -> None:
    """200,000 items would take 160 GB."""
    rng = np.random.default_rng(0)
    histories = rng.integers(0, 200_000, (100, 20)).tolist() * 3
    data = make_data(histories, 200_000)
    scorer = Markov(data, all_events(data), Examples(np.array([0]), np.array([1])))
    assert scorer.transitions.shape == (200_000, 200_000)
    assert scorer.transitions.nnz == len({pair for history in histories for pair in pairwise(history)})
