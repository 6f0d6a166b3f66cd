"""Which rows a follower leaves out beside those that nothing can be learnt from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from flm_torchrec.data.splits import Splits

HELD_OUT = "of a user or an item that the split holds out"
NOBODY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class RowRules:
    """What the run's split keeps from its model."""

    cold_users: np.ndarray = field(default_factory=lambda: NOBODY)
    """[n] ids that are never learnt from."""
    cold_items: np.ndarray = field(default_factory=lambda: NOBODY)
    """[n] likewise."""

    @classmethod
    def of(cls, splits: Splits) -> RowRules:
        """Those of a run that is followed."""
        cold = (splits.cold_users, splits.cold_items)
        return cls(*(NOBODY if mask is None else np.flatnonzero(mask) for mask in cold))

    def reasons(self) -> list[tuple[str, pl.Expr]]:
        """Each reason to leave a row out, with the condition for it, by `user_id` and `item_id`, null where unknown."""
        cold = [
            pl.col(f"{e}_id").is_in(ids.tolist()) for e, ids in (("user", self.cold_users), ("item", self.cold_items))
        ]
        return [(HELD_OUT, cold[0] | cold[1])]
