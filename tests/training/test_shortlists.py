"""The heads' best items, ranked again: by the formulas, and as the whole catalogue is ranked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flm_torchrec.config.heads import HEADS
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import split
from flm_torchrec.evaluation.head_scorer import HeadScorer
from flm_torchrec.evaluation.ranking import Blocks, RankingProblem, rank_targets
from flm_torchrec.mixture import Mixture
from flm_torchrec.training.shortlists import Shortlists
from tests.evaluation.test_ranking import Alone, make_data, together
from tests.training.test_fusion import Planted


@pytest.fixture
def lists(small: PreparedData) -> Shortlists:
    return made(small)[0]


def made(small: PreparedData) -> tuple[Shortlists, RankingProblem, Planted]:
    examples = split(small, "leave-one-out", 0.1).valid
    encoder = Planted(small, examples, {"content": 1.0, "collaborative": 0.5, "sequential": 0.7, "fused": 0.0})
    problem = RankingProblem(small, examples, Blocks(16, 64))
    return Shortlists(problem, encoder, Alone()), problem, encoder


def ranks(fused: Tensor) -> list[int]:
    return (fused >= fused[:, :1]).sum(1).tolist()


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.2, 1.0, 0.7), (0.0, 0.4, 1.0)])
def test_a_sum_ranks_by_the_weighted_scores(lists: Shortlists, weights: tuple[float, ...]) -> None:
    scores = (lists.own[:, :, None] + lists.above.clamp(min=-1e4)).double()
    expected = sum(weight * z for weight, z in zip(weights, scores, strict=True))
    assert isinstance(expected, Tensor) and lists.ranks_by_sum(torch.tensor(weights)).tolist() == ranks(expected)


@pytest.mark.parametrize("scale", [0.5, 10.0, 40.0])
def test_a_mixture_ranks_by_its_formula_whatever_was_ranked_before(lists: Shortlists, scale: float) -> None:
    """Also where an exponential of float32 has no bound."""
    scores = (lists.own[:, :, None] + lists.above.clamp(min=-1e4)).double()
    mixed = torch.tensor([[scale, 2 * scale, scale], [0.5, -1.0, 0.0]])
    for change in ((0, 0), (1, 2), (0, 1)):
        mixed[change] *= 1.5
        expected = torch.logsumexp(scores * mixed[0, :, None, None] + mixed[1, :, None, None], 0)
        assert lists.ranks_by_mixture(mixed).tolist() == ranks(expected)
    mass = torch.logsumexp(scores * mixed[0, :, None, None], 2).mean(1)
    torch.testing.assert_close(lists.mean_mass(mixed[0]).double(), mass, rtol=1e-5, atol=1e-5)


def test_a_process_without_examples_takes_part_where_items_are_few() -> None:
    """Fewer items than a list may hold, on more processes than blocks of users."""
    data = make_data([[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 1, 0]], 9)
    examples = split(data, "leave-one-out", 0.1).valid
    problem = RankingProblem(data, examples, Blocks(2, 64))
    noise = {"content": 1.0, "collaborative": 0.5, "sequential": 0.7, "fused": 0.0}

    def found(comm: Alone) -> tuple[int, list[int], list[float]]:
        lists = Shortlists(problem, Planted(data, examples, noise), comm)
        ones = torch.ones(len(HEADS))
        return lists.columns, lists.ranks_by_sum(ones).tolist(), lists.mean_mass(ones).tolist()

    (columns, ranks, mass), several = found(Alone()), together(4, found)
    assert len(ranks) == 3 and [len(one[1]) for one in several] == [2, 1, 0, 0]
    assert [rank for one in several for rank in one[1]] == ranks
    assert all(one[0] == columns and one[2] == pytest.approx(mass, rel=1e-5) for one in several)


def test_best_ranks_are_those_of_the_whole_catalogue(small: PreparedData) -> None:
    lists, problem, encoder = made(small)
    mixture = Mixture((9.0, 12.0, 10.0), (0.0, 0.5, -0.5))
    encoder.mixture = mixture  # type: ignore[assignment]
    whole = rank_targets(problem, HeadScorer(encoder, small.schema.items, 64, Alone()), Alone()).ranks["fused"]
    short = lists.ranks_by_mixture(torch.tensor([mixture.scale, mixture.bias])).numpy()
    best = (whole <= 10) | (short <= 10)
    assert best.sum() > 10 and (whole[best] == short[best]).mean() > 0.97
