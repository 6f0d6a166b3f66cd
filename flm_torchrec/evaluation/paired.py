"""Is one row of the table better than another, or was it luck? A paired bootstrap over users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 10_000
FEWER = 1_000
"""Resamples where more would take minutes. An end of the interval then varies by a fortieth of its width."""
MOST_DRAWS = 2**30
"""Numbers drawn for a row, where these are enough for `FEWER` resamples."""
LEAST = 20
"""Users that a segment needs for an interval; fewer say nothing of others like them."""
SEVERAL = 8
"""Users of a kind on average from which on a draw for each kind is faster than one for each user."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled means."""
DRAWN = 2**24
"""Numbers of drawn users that are in memory at once, 8 bytes each."""


@dataclass(frozen=True)
class Difference:
    """Mean of a metric of one row less that of another, and its 95 % interval over users."""

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
    segments: dict[str, Comparison] = field(default_factory=dict)
    """The same for the examples of each segment that has at least LEAST users."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in `evaluation-SPLIT.json`."""
        return asdict(self)


@dataclass(frozen=True)
class RanksOfExamples:
    """What is compared."""

    ranks: dict[str, np.ndarray]
    """By row, [n] of the examples' true items, 1 is best."""
    others: dict[str, np.ndarray]
    """By row, [n] what the row is compared with."""
    users: np.ndarray  # [n] whose example it is

    def of(self, chosen: np.ndarray) -> RanksOfExamples:
        """Of the examples [n] bool alone."""
        ranks, others = ({name: r[chosen] for name, r in by_row.items()} for by_row in (self.ranks, self.others))
        return RanksOfExamples(ranks, others, self.users[chosen])

    def compared(self, against: str, ks: tuple[int, ...], segments: Mapping[str, np.ndarray]) -> Comparison:
        """How the rows differ, in all examples and in those of each segment, [n] bool."""
        rows = {name: differences(self.ranks[name], theirs, self.users, ks) for name, theirs in self.others.items()}
        parts = {label: self.of(chosen) for label, chosen in segments.items()}
        by_segment = {
            label: part.compared(against, ks, {})
            for label, part in parts.items()
            if len(np.unique(part.users)) >= LEAST
        }
        return Comparison(against, len(np.unique(self.users)), rows, by_segment)


def differences(ranks: np.ndarray, others: np.ndarray, users: np.ndarray, ks: tuple[int, ...]) -> dict[str, Difference]:
    """How much better a scorer is than another, in hr@K and ndcg@K for each K.

    The percentile bootstrap over users (Efron & Tibshirani 1993; for ranking metrics: Sakai, SIGIR 2006). A user who is
    drawn brings all of his or her examples, as these are not independent. Seeded: the same ranks give the same
    interval.

    Args:
        ranks: [n] of the examples' true items by the scorer, 1 is best.
        others: [n] those by the other.
        users: [n] whose example it is.
    """
    user = np.unique(users, return_inverse=True)[1]
    found = {}
    for k in ks:
        mine, theirs = np.minimum(np.stack([ranks, others]), k + 1)  # ranks beyond K are alike
        place = np.arange(1, k + 2)
        gains = [np.where(place <= k, gain, 0.0) for gain in (np.ones(k + 1), 1 / np.log2(1 + place))]
        pair = mine * (k + 2) + theirs  # the order of users, by which draws go
        columns = [pair, np.ones(len(pair)), *(gain[mine - 1] - gain[theirs - 1] for gain in gains)]
        # Users with the same sums are alike, so a resample is one draw of a multinomial.
        sums, counts = np.unique([np.bincount(user, column) for column in columns], axis=1, return_counts=True)
        sums = np.ascontiguousarray(sums)  # NumPy adds in another order in an array that is not
        _, size, *drawn = _resampled(counts, sums)
        for name, gained, total in zip(("hr", "ndcg"), sums[2:], drawn, strict=True):
            low, high = np.percentile(total / (size / len(ranks)), INTERVAL) / len(ranks)
            found[f"{name}@{k}"] = Difference(float(counts @ gained) / len(ranks), float(low), float(high))
    return found


def _resampled(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """[m] number of users of each kind, [s, m] sums of one of them → [s, n] sums of as many users, drawn n times."""
    rng, users, kinds = np.random.default_rng(0), int(counts.sum()), len(counts)
    resamples = min(RESAMPLES, max(FEWER, MOST_DRAWS // kinds))
    if users < SEVERAL * kinds:  # it is faster to draw the users one by one
        kind = np.repeat(np.arange(kinds), counts)
        each = (np.bincount(kind[rng.integers(0, users, users)], minlength=kinds) for _ in range(resamples))
        return np.stack([sums @ drawn for drawn in each], axis=1)
    step = max(1, DRAWN // kinds)
    parts = []
    for start in range(0, resamples, step):
        drawn = rng.multinomial(users, counts / users, min(step, resamples - start)).astype(np.float64)
        parts.append([drawn @ one for one in sums])
    return np.concatenate(parts, axis=1)
