"""The fusion, chosen by what it is for: the rank of validation events.

A head fits the events that it has learned from more closely than those to come, and each head does so to another
degree. So a fusion that is fitted to training events favours the head that memorises best. One that is fitted to events
kept from all heads does not (stacking: Wolpert, Neural Networks 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config import Config
from flm_torchrec.config.heads import HEADS
from flm_torchrec.evaluation.head_scorer import HeadScorer
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.protocol import Collectives, Encoder
from flm_torchrec.evaluation.ranking import RankingProblem, rank_targets, user_blocks
from flm_torchrec.mixture import Mixture

BEST = 50
"""Best items of each head that are ranked again by every fusion that is tried."""
WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Weights that are tried for a head in a weighted sum."""
SCALES, BIASES = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0), (-3.0, -1.5, -0.7, -0.3, 0.3, 0.7, 1.5, 3.0)
"""Factors of a head's scale, and changes of its bias, that are tried in a mixture."""
ROUNDS = 2
"""Times that each number is tried."""
FORMS = ("weighted_sum", "mixture")
"""Names of the fusions among the metrics of a validation."""
LEAST = -1e30
"""Stands for -inf where it is multiplied by a weight that may be 0."""


@dataclass(frozen=True)
class ChosenFusion:
    """What ranks the validation examples best."""

    weights: tuple[float, ...]
    """Of the heads in the one vector h, in the order of HEADS."""
    mixture: Mixture | None
    """Scores in place of h, where it ranks better by more than a standard error."""
    tried: dict[str, float]
    """The metric of the best of each form, such as "mixture/ndcg@10"."""


class _Remembering(HeadScorer):
    """Keeps the vectors of the users that it has encoded, block by block."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.users: list[dict[str, Tensor]] = []

    def blocks(self, own: np.ndarray, scored: list[np.ndarray]) -> list[dict[str, Tensor]]:
        """As of `HeadScorer`."""
        found = super().blocks(own, scored)
        self.users.append(found[self.comm.rank if self.shares.spread else 0])
        return found


class _Shortlists:
    """Of each of this rank's n examples, the heads' scores of the true item, first, and of the heads' best items.

    An item that is among the BEST best of no head is not ranked. A metric's cut-off is far above.

    Attributes:
        scores: [heads, n, C]; -inf for a second copy of an item.
    """

    def __init__(self, problem: RankingProblem, encoder: Encoder, comm: Collectives) -> None:
        self.comm = comm
        items = problem.data.schema.items
        heads = {name: name for name in HEADS}
        scorer = _Remembering(encoder, items, problem.blocks.items, comm, heads=heads)
        ranked = rank_targets(problem, scorer, comm, top_k=BEST)
        # Ranks add up counts of this width, a rank without examples too.
        parts, done = [torch.zeros(len(HEADS), 0, 1 + len(HEADS) * min(BEST, items))], 0
        for rows, users in zip(
            user_blocks(len(problem.examples), problem.blocks.users, comm), scorer.users, strict=True
        ):
            here = slice(done, done + len(rows))
            done += len(rows)
            target = torch.from_numpy(problem.data.item[problem.examples.take(rows).end])
            ids = torch.cat([target[:, None], *(torch.from_numpy(ranked.top[name][here]) for name in HEADS)], 1)
            ids = torch.where(ids < 0, target[:, None], ids)  # where fewer items are ranked: a copy
            vectors = scorer.fetch(ids)  # [b, C, S]; collective, also without examples
            if len(rows) == 0:
                continue
            scores = torch.stack([torch.einsum("bd,bcd->bc", users[name], vectors) for name in HEADS]).cpu()
            parts.append(scores.masked_fill(_copies(ids), -torch.inf))
        self.scores = torch.cat(parts, 1)

    def ranks(self, fuse: Callable[[Tensor], Tensor]) -> Tensor:
        """[n] ranks of the true items, 1 is best, by fusing [heads, n, C] → [n, C]."""
        fused = fuse(self.scores)
        return (fused >= fused[:, :1]).sum(1)

    def metric(self, fuse: Callable[[Tensor], Tensor], metric: str) -> float:
        """Of all ranks' examples. It comes from counts, so that any number of ranks finds the same fusion best."""
        counts = torch.bincount(self.ranks(fuse) - 1, minlength=self.scores.shape[2])
        return _metric_of(RankCounts(self.comm.all_reduce_sum(counts).numpy(), {}), metric)


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
    lists = _Shortlists(problem, encoder, comm)
    trained = [index for index, name in enumerate(HEADS) if getattr(config.loss, name) > 0]

    def summed(weights: Tensor) -> float:
        return lists.metric(lambda z: _sum(z, weights), metric)

    alone = [torch.eye(len(HEADS))[index] for index in trained]
    weights = max(alone, key=summed)
    best = int(weights.argmax())
    for index in [index for index in trained if index != best] * ROUNDS:
        weights = max((_with(weights, index, value) for value in WEIGHTS), key=summed)
    chosen = tuple(weights.tolist())
    tried = {f"{FORMS[0]}/{metric}": summed(weights)}
    if config.model.fusion != "late" or len(trained) < len(HEADS):
        return ChosenFusion(chosen, None, tried)
    mixed = _best_mixture(lists, temperatures, metric)
    tried[f"{FORMS[1]}/{metric}"] = lists.metric(lambda z: _mix(z, mixed), metric)
    before, after = (lists.ranks(fuse) for fuse in (lambda z: _sum(z, weights), lambda z: _mix(z, mixed)))
    if not _better(before, after, metric, comm):
        return ChosenFusion(chosen, None, tried)
    scale, bias = mixed.tolist()
    return ChosenFusion(chosen, Mixture(tuple(scale), tuple(bias)), tried)


def _best_mixture(lists: _Shortlists, temperatures: list[float], metric: str) -> Tensor:
    """[2, heads] scale and bias."""
    scale = torch.tensor(temperatures)
    mass = torch.logsumexp(lists.scores * scale[:, None, None], 2)  # [heads, n]
    total = lists.comm.all_reduce_sum(torch.cat([mass.sum(1), torch.tensor([float(mass.shape[1])])]))
    mixed = torch.stack([scale, -total[:-1] / total[-1].clamp(min=1)])

    def mixture(values: Tensor) -> float:
        return lists.metric(lambda z: _mix(z, values), metric)

    for _ in range(ROUNDS):
        for index in range(len(HEADS)):
            tried = [_with(mixed, (1, index), mixed[1, index] + change) for change in BIASES]
            mixed = max([mixed, *tried], key=mixture)
        for index in range(len(HEADS)):
            tried = [_with(mixed, (0, index), mixed[0, index] * factor) for factor in SCALES]
            mixed = max([mixed, *tried], key=mixture)
    return mixed


def _sum(scores: Tensor, weights: Tensor) -> Tensor:
    """[heads, n, C], [heads] → [n, C]; an item that is left out stays out."""
    return (scores.clamp(min=LEAST) * weights[:, None, None]).sum(0).masked_fill(torch.isinf(scores[0]), -torch.inf)


def _mix(scores: Tensor, mixed: Tensor) -> Tensor:
    """[heads, n, C], [2, heads] → [n, C]."""
    return torch.logsumexp(scores * mixed[0, :, None, None] + mixed[1, :, None, None], 0)


def _with(values: Tensor, index: int | tuple[int, int], value: float | Tensor) -> Tensor:
    changed = values.clone()
    changed[index] = value
    return changed


def _copies(ids: Tensor) -> Tensor:
    """[n, C] → [n, C] bool: an id that stands further left in its row."""
    ordered, order = torch.sort(ids, dim=1, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    return repeated.scatter(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])


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
