"""What training events say about ids and values: which ids were seen, the mean and spread of the values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm_torchrec.data.columns import new_column
from flm_torchrec.data.dataset import PreparedData

MIN_SPREAD = 1e-6
"""Values with a smaller standard deviation count as all the same."""


@dataclass(frozen=True)
class TrainStats:
    """Statistics of the training events. They take O(items + users) of memory, however many events there are."""

    items: np.ndarray  # [items] float32: 1 where a training event has the item, else 0
    users: np.ndarray  # [users] float32: 1 where a training event has the user, else 0
    value_mean: float
    value_scale: float
    """1 / standard deviation; 0 where all values are the same, or must stay hidden from the model."""

    @classmethod
    def of(cls, data: PreparedData, mask: np.ndarray, values: bool) -> TrainStats:
        """Statistics of the events `mask` [interactions] bool of data in memory.

        Args:
            values: False hides the values from the model.
        """
        shown, done = new_column(data.count(mask), np.float32), 0
        for block in data.blocks():
            part = data.value[block.rows][mask[block.rows]]
            shown[done : done + len(part)] = part
            done += len(part)
        mean = shown.mean()
        # As numpy.std, but the column, which may be on disk, is not copied.
        np.subtract(shown, mean, out=shown)
        np.square(shown, out=shown)
        return cls(
            items=(data.item_counts(mask) > 0).astype(np.float32),
            users=data.users_of(mask).astype(np.float32),
            value_mean=float(mean),
            value_scale=scale_of(float(np.sqrt(shown.mean()))) if values else 0.0,
        )


def scale_of(spread: float) -> float:
    """1 / standard deviation of values; 0 where the values are all the same."""
    return 1.0 / spread if spread > MIN_SPREAD else 0.0
