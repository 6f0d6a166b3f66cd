"""Items drawn as negatives, and their probability to be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class DrawnShare:
    """How the negatives of a step are dealt out, if not to all ranks for the candidates of all."""

    place: int
    """This rank's number among the ranks that look up a step's negatives together."""
    ranks: int
    apart: bool
    """These negatives go to all ranks, and the targets of this rank stay with it."""


class Negatives:
    """Draws negatives with probability proportional to popularity ** power, the same for any number of ranks.

    Args:
        counts: [items] training events of each item.
        number: negatives of a step, of all ranks together; "all": every item is a candidate, nothing is drawn.
        share: of this rank; None: by its number among all ranks.
    """

    def __init__(
        self, counts: np.ndarray, number: int | Literal["all"], power: float, share: DrawnShare | None = None
    ) -> None:
        self.number = number
        self.share = share
        self.items = len(counts)
        weights = np.where(counts > 0, counts, 0).astype(np.float64) ** power * (counts > 0)
        self.cumulative = np.cumsum(weights / weights.sum())
        popularity = counts / counts.sum()
        # An item that is all of the data is never "not sampled"; a bound keeps the logarithm finite.
        not_sampled = np.log1p(-np.minimum(np.stack([popularity, weights / weights.sum()], 1), 1 - 1e-6))
        self.log_not_sampled = not_sampled.astype(np.float32)

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Candidates:
        """This rank's share of the negatives of a step; `rng` must have the same state on every rank."""
        share = self.share or DrawnShare(rank, world_size, apart=False)
        if self.number == "all":
            return Candidates(np.arange(share.place, self.items, share.ranks), None)
        drawn = np.searchsorted(self.cumulative, rng.random(self.number), side="right")
        own = np.minimum(drawn, self.items - 1)[share.place :: share.ranks]
        return Candidates(own, self.log_not_sampled, share.apart)


@dataclass(frozen=True)
class Candidates:
    """Items that the softmax of a step runs over on this rank, besides the targets."""

    items: np.ndarray  # [K] int64
    log_not_sampled: np.ndarray | None  # [items, 2] by item id; None: every item is a candidate, nothing is sampled
    apart: bool = False
    """See `DrawnShare`."""
