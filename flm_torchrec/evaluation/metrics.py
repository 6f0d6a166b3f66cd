"""Ranking metrics with one relevant item for each user, from a histogram of that item's ranks.

The counts are integers. Their sum over processes is the same in any order, so metrics do not depend on the number of
processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RankCounts:
    """How many users' true items have each rank."""

    histogram: np.ndarray  # [items] int64: `histogram[r - 1]` users whose true item has rank r; 1 is best
    covered: dict[int, int]
    """By K: the number of items in the top K of at least one user."""

    @property
    def users(self) -> int:
        """The number of users."""
        return int(self.histogram.sum())

    def hit_rate(self, k: int) -> float:
        """HR@K: the share of users whose true item is among the first K. With one relevant item this is recall@K."""
        return float(self.histogram[:k].sum() / self.users)

    def ndcg(self, k: int) -> float:
        """NDCG@K = mean of 1 / log2(1 + rank), 0 beyond K; the ideal DCG of one relevant item is 1.

        Järvelin & Kekäläinen, ACM TOIS 2002.
        """
        top = self.histogram[:k]
        return float((top / np.log2(np.arange(2, len(top) + 2))).sum() / self.users)

    def mrr(self) -> float:
        """Mean of 1 / rank over all users, without a cut-off (Voorhees, TREC-8 1999)."""
        return float((self.histogram / np.arange(1, len(self.histogram) + 1)).sum() / self.users)

    def coverage(self, k: int) -> float:
        """The share of all items that are in the top K of at least one user."""
        return self.covered[k] / len(self.histogram)

    def metrics(self, ks: tuple[int, ...]) -> dict[str, float]:
        """hr@K and ndcg@K for each K, mrr, and coverage@K for each K in `covered`."""
        values = {}
        for k in ks:
            values[f"hr@{k}"] = self.hit_rate(k)
            values[f"ndcg@{k}"] = self.ndcg(k)
        values["mrr"] = self.mrr()
        return values | {f"coverage@{k}": self.coverage(k) for k in self.covered}
