"""The weights of a summed fusion, chosen by what h is for: the rank of validation events.

Heads fit what they have learnt more closely than what comes, each in its own measure, so weights fitted to training
events trust the head that memorises best. Events kept from all of them do not (stacking: Wolpert, Neural Networks
1992).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.data.prepared import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.evaluation.protocol import Encoder
from flm_torchrec.evaluation.ranking import Blocks, HeadScorer, count_ranks, rank_targets
from flm_torchrec.model.tower import HEADS

STEPS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)


class _Mixtures(HeadScorer):
    """Scores by weighted sums of the heads, one for each of `mixtures` [M, heads]."""

    def __init__(self, encoder: Encoder, items: int, block: int, comm: Comm, mixtures: Tensor) -> None:
        super().__init__(encoder, items, block, comm, heads={str(m): str(m) for m in range(len(mixtures))})
        self.mixtures = mixtures

    def block(self, rows: np.ndarray) -> dict[str, Tensor]:
        known = super().block(rows)
        mixed = torch.einsum("mk,kbd->mbd", self.mixtures, torch.stack([known[name] for name in HEADS]))
        return dict(zip(self.names, mixed, strict=True))


def choose_weights(
    data: PreparedData, examples: Examples, encoder: Encoder, comm: Comm, blocks: Blocks, heads: Sequence[str],
    metric: str,
) -> tuple[Tensor, float]:  # fmt: skip
    """Weights [heads] of HEADS with the best `metric`, such as ndcg@10, and that; collective, the same on all ranks.

    Tried are all mixtures of STEPS in which some head has weight 1. Costs as many rankings of the examples.

    Args:
        heads: names of the heads that may take part; the others have weight 0.
    """
    allowed = [STEPS if name in heads else (0.0,) for name in HEADS]
    mixtures = torch.tensor([m for m in product(*allowed) if max(m) == 1.0])
    scorer = _Mixtures(encoder, data.schema.items, blocks.items, comm, mixtures)
    ranked = rank_targets(data, examples, scorer, comm, blocks)
    _, _, cut = metric.partition("@")
    ks = (int(cut),) if cut else ()
    scores = [count_ranks(ranked, n, data.schema.items, comm).metrics(ks)[metric] for n in scorer.names]
    return mixtures[int(np.argmax(scores))], max(scores)
