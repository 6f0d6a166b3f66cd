"""Is one row of the table better than another, or was it luck? A paired bootstrap over users."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled means."""


@dataclass(frozen=True)
class Difference:
    """Mean over users of a metric of one row less that of another, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """The interval is on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Rows of a table against another row, or against the same rows of another run."""

    against: str
    users: int
    rows: dict[str, dict[str, Difference]]
    """By row, by metric."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in `evaluation-SPLIT.json`."""
        return asdict(self)


def differences(ranks: np.ndarray, others: np.ndarray, ks: tuple[int, ...]) -> dict[str, Difference]:
    """[n] ranks of the users' true items by a scorer, [n] those by another, 1 is best → hr@K and ndcg@K for each K.

    The percentile bootstrap over users (Efron & Tibshirani 1993; for ranking metrics: Sakai, SIGIR 2006). Users whose
    two ranks are the same are alike, so a resample is one draw of a multinomial. Seeded: the same ranks give the same
    interval.
    """
    found = {}
    for k in ks:
        pairs = np.minimum(np.stack([ranks, others]), k + 1)  # ranks beyond K are alike
        (mine, theirs), counts = np.unique(pairs, axis=1, return_counts=True)
        drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), RESAMPLES)
        place = np.arange(1, k + 2)
        for name, gain in ("hr", np.ones(k + 1)), ("ndcg", 1 / np.log2(1 + place)):
            gain = np.where(place <= k, gain, 0.0)
            gained = gain[mine - 1] - gain[theirs - 1]
            low, high = np.percentile(drawn @ gained, INTERVAL) / len(ranks)
            found[f"{name}@{k}"] = Difference(float(counts @ gained) / len(ranks), float(low), float(high))
    return found
