"""The cost of quantised vectors: NDCG@10 of the same users with exact and with stored vectors, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.protocol import Collectives, Encoder
from flm_torchrec.evaluation.ranking import RankingProblem, target_and_seen, user_blocks
from flm_torchrec.export.manifest import Quantise
from flm_torchrec.export.parts import spread
from flm_torchrec.export.vectors import decode, encode

SAMPLE = 4096
"""Maximum of users. They are the same before and after, so that a difference of 1 % is visible."""
PAIRS, LEAST = 1 << 34, 256
"""Maximum of scores for each head: with many items fewer users are measured, and at least LEAST."""
CUT = 10
USERS = 512
"""Users that are scored at once."""


@dataclass(frozen=True)
class ValidationSet:
    """Validation examples, the same on every rank."""

    encoder: Encoder
    """For the users of `examples`."""
    examples: Examples


class Quality:
    """Counts for each example the items of this rank that score at least as high as the true one.

    The sum over ranks gives the true item's rank. As in evaluation, a tie counts against the model, and items of the
    known events are not ranked.
    """

    def __init__(
        self, data: PreparedData, validation: ValidationSet, quantise: Quantise, comm: Collectives, block: int
    ) -> None:
        rows = spread(len(validation.examples), min(SAMPLE, max(LEAST, PAIRS // data.schema.items)))
        examples = validation.examples.take(rows)
        self.comm = comm
        self.quantise: Quantise = quantise
        self.target = torch.from_numpy(data.item[examples.end])
        users = _encoded(validation.encoder, rows, comm, block)
        truth = torch.cat(
            [validation.encoder.items(part) for part in np.split(self.target.numpy(), range(block, len(rows), block))]
        )
        self.users = {"before": users, "after": {head: self._stored(h) for head, h in users.items()}}
        self.truth = {"before": truth, "after": self._stored(truth)}
        none = torch.zeros(len(rows), dtype=torch.int64)
        self.above = {when: {head: none.clone() for head in REPRESENTATIONS} for when in self.users}
        _, seen = target_and_seen(RankingProblem(data, examples), np.arange(len(rows)))
        order = np.argsort(seen.items.numpy(), kind="stable")
        self.seen_rows, self.seen_items = seen.rows.numpy()[order], seen.items.numpy()[order]

    def add(self, ids: np.ndarray, vectors: Tensor) -> None:
        """Count the items `ids` [n], an ascending range, with vectors [n, D]."""
        for when, shown in (("before", vectors), ("after", self._stored(vectors))):
            for head, users in self.users[when].items():
                for start in range(0, len(users), USERS):
                    part = slice(start, start + USERS)
                    self.above[when][head][part] += self._above(users[part], self.truth[when][part], ids, shown, start)

    def _above(self, users: Tensor, truth: Tensor, ids: np.ndarray, vectors: Tensor, first: int) -> Tensor:
        counted = users @ vectors.T >= (users * truth).sum(1, keepdim=True)
        own = self.target[first : first + len(users)] - int(ids[0])
        here = (own >= 0) & (own < len(ids))
        counted[here, own[here]] = False
        low, high = np.searchsorted(self.seen_items, [ids[0], ids[-1] + 1])
        rows, items = self.seen_rows[low:high] - first, self.seen_items[low:high] - ids[0]
        inside = (rows >= 0) & (rows < len(users))
        counted[rows[inside], items[inside]] = False
        return counted.sum(1)

    def _stored(self, vectors: Tensor) -> Tensor:
        return torch.tensor(decode(encode(vectors.numpy(), self.quantise)))

    def result(self) -> dict[str, dict[str, float]]:
        """By head: NDCG@10 "before" and "after", and the relative "change"; collective."""
        quality: dict[str, dict[str, float]] = {}
        for head in REPRESENTATIONS:
            above = {when: self.comm.all_reduce_sum(counts[head]) for when, counts in self.above.items()}
            ndcg = {when: RankCounts(np.bincount(counts.numpy()), {}).ndcg(CUT) for when, counts in above.items()}
            change = ndcg["after"] / ndcg["before"] - 1 if ndcg["before"] > 0 else 0.0
            quality[head] = {**ndcg, "change": change}
        return quality


def _encoded(encoder: Encoder, rows: np.ndarray, comm: Collectives, block: int) -> dict[str, Tensor]:
    """By head, the vectors [len(rows), D] of the examples `rows`, on every rank; collective."""
    parts: dict[str, list[Tensor]] = {head: [] for head in REPRESENTATIONS}
    for mine in user_blocks(len(rows), block, comm):
        encoded = encoder.users(rows[mine])
        for head in REPRESENTATIONS:
            padded = torch.cat([encoded[head], encoded[head].new_zeros(block - len(mine), encoder.dim)])
            parts[head].extend(comm.all_gather(padded))
    return {head: torch.cat(blocks)[: len(rows)] for head, blocks in parts.items()}
