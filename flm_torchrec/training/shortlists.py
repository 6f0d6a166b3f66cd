"""The best items of each head, ranked again by one fusion of the heads after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config.heads import HEADS
from flm_torchrec.evaluation.best_items import best_items
from flm_torchrec.evaluation.head_scorer import HeadScorer
from flm_torchrec.evaluation.protocol import Collectives, Encoder
from flm_torchrec.evaluation.ranking import RankingProblem, rank_targets, user_blocks

SHORT, LONG = 50, 400
"""Least and most items of each head."""
LEAST, MOST = -1e30, 1e300
"""Stand for infinities where these are multiplied by a weight that may be 0."""
AT_ONCE = 256
"""Examples that are ranked at once: what a pass makes stays in a processor's cache."""


def items_for(metric: str) -> int:
    """How many items of each head are needed for a metric such as hr@100: twice its cut-off, or SHORT if that is more.

    Past the end of the lists ranks are too good, so a cut-off must not come near to it.
    """
    cut = metric.partition("@")[2]
    return max(SHORT, 2 * int(cut or 0))


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


class Shortlists:
    """Of each of this rank's n examples, the heads' scores of the true item, first, and of the heads' best items.

    An item that is among the best of no head is not ranked. A metric's cut-off is far above.

    Args:
        best: items of each head, see `items_for`.

    Attributes:
        own: [heads, n] scores of the true items.
        above: [heads, n, C] by how much an item scores above the true one; LEAST for a second copy of an item.
        columns: C.
    """

    def __init__(self, problem: RankingProblem, encoder: Encoder, comm: Collectives, best: int = SHORT) -> None:
        self.comm = comm
        items = problem.data.schema.items
        scorer = _Remembering(encoder, items, problem.blocks.items, comm, heads={name: name for name in HEADS})
        ranked = rank_targets(problem, scorer, comm, top_k=best)
        self.columns = 1 + len(HEADS) * min(best, items)  # processes add up counts of this width, without examples too
        parts, done = [torch.zeros(len(HEADS), 0, self.columns)], 0
        for rows, users in zip(
            user_blocks(len(problem.examples), problem.blocks.users, comm), scorer.users, strict=True
        ):
            here = slice(done, done + len(rows))
            done += len(rows)
            target = torch.from_numpy(problem.data.item[problem.examples.take(rows).end])
            ids = torch.cat([target[:, None], *(torch.from_numpy(ranked.top[name][here]) for name in HEADS)], 1)
            ids = torch.where(ids < 0, target[:, None], ids)  # where fewer items are ranked: a copy
            scores = scorer.scores_at(users, HEADS, ids).cpu()  # collective, also without examples
            if len(rows):
                parts.append(scores.masked_fill(_copies(ids), -torch.inf))
        self.above = torch.cat(parts, 1)
        self.own = self.above[:, :, 0].clone()
        self.above.sub_(self.own[:, :, None]).clamp_(min=LEAST)
        self._grown: dict[int, tuple[float, Tensor]] = {}

    def ranks_by_sum(self, weights: Tensor) -> Tensor:
        """[heads] → [n] ranks of the true items by the sum of weighted scores, 1 is best. The maximum weight is 1."""
        return self._ranks(list(self.above), weights[:, None].expand_as(self.own))

    def ranks_by_mixture(self, mixed: Tensor) -> Tensor:
        """[2, heads] scale and bias → [n] ranks by log sum over heads of exp(scale score + bias).

        An item is ahead where the sum over heads of share (exp(scale above) - 1) is not below 0; a share is that of the
        head in the true item's sum. Fusions that are tried one after another mostly differ in one head, so the other
        factors are kept.
        """
        logs = mixed[0, :, None] * self.own + mixed[1, :, None]  # [heads, n]
        shares = (logs - logs.amax(0)).double().exp_()  # as float32 they would be 0 where others have no bound
        return self._ranks([self._ahead(head, scale) for head, scale in enumerate(mixed[0].tolist())], shares)

    def mean_mass(self, scale: Tensor) -> Tensor:
        """[heads] → [heads] the mean over all processes' examples of the log of the sum of exp(scale score)."""
        mass = torch.stack([torch.logsumexp(above * s, 1) for above, s in zip(self.above, scale, strict=True)])
        mass += scale[:, None] * self.own
        total = self.comm.all_reduce_sum(torch.cat([mass.sum(1), torch.tensor([float(mass.shape[1])])]))
        return total[:-1] / total[-1].clamp(min=1)

    def _ahead(self, head: int, scale: float) -> Tensor:
        """[n, C] exp(scale above) - 1 of this head."""
        if self._grown.get(head, (None,))[0] != scale:
            self._grown[head] = scale, torch.expm1(self.above[head].double() * scale).clamp_(max=MOST)
        return self._grown[head][1]

    def _ranks(self, parts: list[Tensor], weights: Tensor) -> Tensor:
        """By head [n, C], [heads, n] → [n] in how many columns the weighted sum is not below 0."""
        examples = self.own.shape[1]
        ranks = [torch.zeros(0, dtype=torch.int64)]
        for start in range(0, examples, AT_ONCE):
            stop = min(start + AT_ONCE, examples)
            ahead = torch.zeros(stop - start, self.columns, dtype=parts[0].dtype)
            for part, weight in zip(parts, weights, strict=True):
                ahead.addcmul_(part[start:stop], weight[start:stop, None])
            ranks.append(best_items(ahead.float(), torch.zeros(len(ahead)), 0)[0])
        return torch.cat(ranks)


def _copies(ids: Tensor) -> Tensor:
    """[n, C] → [n, C] bool: an id that stands further left in its row."""
    ordered, order = torch.sort(ids, dim=1, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    return repeated.scatter(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
