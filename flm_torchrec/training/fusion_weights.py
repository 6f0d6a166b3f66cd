"""The weights of a summed fusion, chosen by what h is for: the rank of validation events.

Heads fit what they have learnt more closely than what comes, each in its own measure, so weights fitted to training
events trust the head that memorises best. Events kept from all of them do not (stacking: Wolpert, Neural Networks
1992).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config.heads import HEADS
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.evaluation.protocol import Encoder
from flm_torchrec.evaluation.ranking import Blocks, HeadScorer, RankingProblem, count_ranks, rank_targets

STEPS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
ROUNDS = 2


class _Mixtures(HeadScorer):
    """Scores by weighted sums of the heads, one for each of `mixtures` [M, heads]; encodes each user once."""

    def __init__(self, encoder: Encoder, items: int, block: int, comm: Comm) -> None:
        super().__init__(encoder, items, block, comm)
        self.encoded: dict[int, Tensor] = {}  # by first row of a block, [heads, b, D]

    def mix(self, mixtures: Tensor) -> None:
        self.mixtures = mixtures
        self.heads = {str(m): str(m) for m in range(len(mixtures))}
        self.names = tuple(self.heads)

    def block(self, rows: np.ndarray) -> dict[str, Tensor]:
        first = int(rows[0]) if len(rows) else -1
        if first not in self.encoded:
            known = super().block(rows)
            self.encoded[first] = torch.stack([known[name] for name in HEADS])
        mixed = torch.einsum("mk,kbd->mbd", self.mixtures, self.encoded[first])
        return dict(zip(self.names, mixed, strict=True))


def choose_weights(
    data: PreparedData, examples: Examples, encoder: Encoder, comm: Comm, blocks: Blocks, heads: Sequence[str],
    metric: str,
) -> tuple[Tensor, float]:  # fmt: skip
    """Weights [heads] of HEADS with the best `metric`, such as ndcg@10, and that; collective, the same on all ranks.

    The best head has weight 1; each other in turn takes the best of STEPS, ROUNDS times. A mixture of nothing but
    that head is among those tried, so h is never worse than it on these examples. Ranks them some 25 times.

    Args:
        heads: names of the heads that may take part; the others have weight 0.
    """
    scorer = _Mixtures(encoder, data.schema.items, blocks.items, comm)
    cut = metric.partition("@")[2]
    ks = (int(cut),) if cut else ()

    def best_of(mixtures: Tensor) -> tuple[Tensor, float]:
        scorer.mix(mixtures)
        ranked = rank_targets(RankingProblem(data, examples, blocks), scorer, comm)
        scores = [count_ranks(ranked, n, data.schema.items, comm).metrics(ks)[metric] for n in scorer.names]
        return mixtures[int(np.argmax(scores))], max(scores)

    places = [HEADS.index(name) for name in heads]
    weights, score = best_of(torch.eye(len(HEADS))[places])
    base = int(weights.argmax())
    for place in [place for place in places if place != base] * ROUNDS:
        tried = weights.repeat(len(STEPS), 1)
        tried[:, place] = torch.tensor(STEPS)
        weights, score = best_of(tried)
    return weights, score
