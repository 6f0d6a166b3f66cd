"""The weights of a summed fusion, chosen by what h is for: the rank of validation events.

A head fits the events that it has learned from more closely than those to come, and each head does so to another
degree. So weights that are fitted to training events favour the head that memorises best. Weights that are fitted to
events kept from all heads do not (stacking: Wolpert, Neural Networks 1992).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config import Config
from flm_torchrec.config.heads import HEADS
from flm_torchrec.evaluation.protocol import Collectives, Encoder
from flm_torchrec.evaluation.ranking import HeadScorer, RankingProblem, count_ranks, rank_targets

WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Weights that are tried for a head."""
ROUNDS = 2
"""Times that each head is tried."""


class _Mixtures(HeadScorer):
    """Scores by weighted sums of the heads, one for each of `mixtures` [M, heads]; encodes each user once."""

    def __init__(self, encoder: Encoder, items: int, block: int, comm: Collectives) -> None:
        super().__init__(encoder, items, block, comm)
        self.encoded: dict[int, Tensor] = {}  # by first row of a block, [heads, b, D]

    def mix(self, mixtures: Tensor) -> None:
        """Score by these [M, heads] from now on."""
        self.mixtures = mixtures
        self.heads = {str(m): str(m) for m in range(len(mixtures))}
        self.names = tuple(self.heads)

    def block(self, rows: np.ndarray) -> dict[str, Tensor]:
        """[b] indices of examples → by number of a mixture, [b, D]."""
        first = int(rows[0]) if len(rows) else -1
        if first not in self.encoded:
            by_head = super().block(rows)
            self.encoded[first] = torch.stack([by_head[name] for name in HEADS])
        mixed = torch.einsum("mk,kbd->mbd", self.mixtures, self.encoded[first])
        return dict(zip(self.names, mixed, strict=True))


def choose_weights(
    problem: RankingProblem, encoder: Encoder, comm: Collectives, config: Config
) -> tuple[Tensor, float]:
    """Weights [heads] in the order of HEADS that rank the examples best, and how well they do; collective.

    Best by the metric of `train.select`, such as ndcg@10. Heads that `loss` does not train have weight 0. The best
    head has weight 1; each other in turn takes the best of WEIGHTS, ROUNDS times. The best head alone is among the
    mixtures that are tried, so h is never worse than that head on these examples. This ranks the examples about 25
    times.

    Returns the same on all ranks.
    """
    metric = config.train.select.partition("/")[2]
    cut = metric.partition("@")[2]
    ks = (int(cut),) if cut else ()
    items = problem.data.schema.items
    scorer = _Mixtures(encoder, items, problem.blocks.items, comm)

    def best_of(mixtures: Tensor) -> tuple[Tensor, float]:
        scorer.mix(mixtures)
        ranked = rank_targets(problem, scorer, comm)
        scores = [count_ranks(ranked, n, items, comm).metrics(ks)[metric] for n in scorer.names]
        return mixtures[int(np.argmax(scores))], max(scores)

    trained = [index for index, name in enumerate(HEADS) if getattr(config.loss, name) > 0]
    weights, score = best_of(torch.eye(len(HEADS))[trained])
    best = int(weights.argmax())
    for index in [index for index in trained if index != best] * ROUNDS:
        tried = weights.repeat(len(WEIGHTS), 1)
        tried[:, index] = torch.tensor(WEIGHTS)
        weights, score = best_of(tried)
    return weights, score
