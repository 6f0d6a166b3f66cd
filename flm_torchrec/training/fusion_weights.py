"""The fusion, chosen by what it is for: the rank of validation events.

A head fits the events that it has learned from more closely than those to come, and each head does so to another
degree. So a fusion that is fitted to training events favours the head that memorises best. One that is fitted to events
kept from all heads does not (stacking: Wolpert, Neural Networks 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config import Config
from flm_torchrec.config.heads import HEADS
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.protocol import Collectives, Encoder
from flm_torchrec.evaluation.ranking import RankingProblem
from flm_torchrec.mixture import Mixture
from flm_torchrec.training.shortlists import Shortlists, items_for

WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Weights that are tried for a head in a weighted sum."""
SCALES, BIASES = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0), (-3.0, -1.5, -0.7, -0.3, 0.3, 0.7, 1.5, 3.0)
"""Factors of a head's scale, and changes of its bias, that are tried in a mixture."""
ROUNDS = 2
"""Times that each number is tried."""
FORMS = ("weighted_sum", "mixture")
"""Names of the fusions among the metrics of a validation."""


@dataclass(frozen=True)
class ChosenFusion:
    """What ranks the validation examples best."""

    weights: tuple[float, ...]
    """Of the heads in the one vector h, in the order of HEADS."""
    mixture: Mixture | None
    """Scores in place of h, where it ranks better by more than a standard error."""
    tried: dict[str, float]
    """The metric of the best of each form, such as "mixture/ndcg@10"."""


def choose_fusion(
    problem: RankingProblem, encoder: Encoder, temperatures: list[float], comm: Collectives, config: Config
) -> ChosenFusion:
    """The fusion that ranks the examples best by the metric of `train.select`, such as ndcg@10; collective.

    The catalogue is ranked once, by each head. Every fusion that is tried ranks the heads' best items again.

    A weighted sum: heads that `loss` does not train have weight 0, the best head has weight 1; each other in turn takes
    the best of WEIGHTS. The best head alone is among those tried, so h is never worse than that head on these examples.

    A mixture, for `model.fusion` late: scales start from the learned temperatures, biases such that all heads have the
    same mean mass; then each in turn takes the best of a few changes.

    Args:
        temperatures: by head of HEADS, the factor of its scores in its softmax.

    Returns the same on all ranks.
    """
    metric = config.train.select.partition("/")[2]
    lists = Shortlists(problem, encoder, comm, items_for(metric))

    def score(ranks: Tensor) -> float:
        return _metric(ranks, lists, metric)

    trained = [index for index, name in enumerate(HEADS) if getattr(config.loss, name) > 0]

    def summed(weights: Tensor) -> float:
        return score(lists.ranks_by_sum(weights))

    alone = [torch.eye(len(HEADS))[index] for index in trained]
    weights = max(alone, key=summed)
    best = int(weights.argmax())
    for index in [index for index in trained if index != best] * ROUNDS:
        weights = max((_with(weights, index, value) for value in WEIGHTS), key=summed)
    chosen = tuple(weights.tolist())
    tried = {f"{FORMS[0]}/{metric}": summed(weights)}
    if config.model.fusion != "late" or len(trained) < len(HEADS):
        return ChosenFusion(chosen, None, tried)
    mixed = _best_mixture(lists, temperatures, score)
    after = lists.ranks_by_mixture(mixed)
    tried[f"{FORMS[1]}/{metric}"] = score(after)
    if not _better(lists.ranks_by_sum(weights), after, metric, comm):
        return ChosenFusion(chosen, None, tried)
    scale, bias = mixed.tolist()
    return ChosenFusion(chosen, Mixture(tuple(scale), tuple(bias)), tried)


def _best_mixture(lists: Shortlists, temperatures: list[float], score: Callable[[Tensor], float]) -> Tensor:
    """[2, heads] scale and bias."""
    scale = torch.tensor(temperatures)
    mixed = torch.stack([scale, -lists.mean_mass(scale)])

    def mixture(values: Tensor) -> float:
        return score(lists.ranks_by_mixture(values))

    for _ in range(ROUNDS):
        for index in range(len(HEADS)):
            tried = [_with(mixed, (1, index), mixed[1, index] + change) for change in BIASES]
            mixed = max([mixed, *tried], key=mixture)
        for index in range(len(HEADS)):
            tried = [_with(mixed, (0, index), mixed[0, index] * factor) for factor in SCALES]
            mixed = max([mixed, *tried], key=mixture)
    return mixed


def _with(values: Tensor, index: int | tuple[int, int], value: float | Tensor) -> Tensor:
    changed = values.clone()
    changed[index] = value
    return changed


def _metric(ranks: Tensor, lists: Shortlists, metric: str) -> float:
    """Of all processes' examples. It comes from counts, so that any number of processes finds the same fusion best."""
    counts = torch.bincount(ranks - 1, minlength=lists.columns)
    return _metric_of(RankCounts(lists.comm.all_reduce_sum(counts).numpy(), {}), metric)


def _better(before: Tensor, after: Tensor, metric: str, comm: Collectives) -> bool:
    """Whether the ranks [n] after are better by more than a standard error, over the examples of all processes."""
    differences = _gains(after, metric) - _gains(before, metric)
    sums = torch.stack([torch.ones_like(differences), differences, differences**2]).sum(1)
    count, total, squares = comm.all_reduce_sum(sums).tolist()
    mean = total / max(count, 1.0)
    variance = max(squares / max(count, 1.0) - mean**2, 0.0)
    return mean > math.sqrt(variance / max(count, 1.0))


def _gains(ranks: Tensor, metric: str) -> Tensor:
    """[n] → [n] float64: what each example adds to the metric."""
    values, position = ranks.unique(return_inverse=True)
    one = [_metric_of(RankCounts(np.bincount([int(rank) - 1]), {}), metric) for rank in values]
    return torch.tensor(one, dtype=torch.float64)[position]


def _metric_of(counts: RankCounts, metric: str) -> float:
    """A metric by its name, such as ndcg@10 or mrr."""
    cut = metric.partition("@")[2]
    return counts.metrics((int(cut),) if cut else ())[metric]
