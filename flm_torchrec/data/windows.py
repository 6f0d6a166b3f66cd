"""Windows over each user's training events: every event is the target of exactly one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Splits


@dataclass(frozen=True)
class Windows:
    """Spans of training events: each event is the target of exactly one."""

    user: np.ndarray  # [windows] int64
    start: np.ndarray  # [windows] int64
    end: np.ndarray  # [windows] int64

    def __len__(self) -> int:
        return len(self.user)


def windows(data: PreparedData, splits: Splits, max_history: int) -> Windows:
    """Cut each user's training events into spans of at most `max_history` + 1, counted from the newest."""
    return cut(np.arange(data.schema.users), data.offsets[:-1], splits.train_end, max_history)


def cut(users: np.ndarray, start: np.ndarray, end: np.ndarray, max_history: int) -> Windows:
    """Windows of the events `start[u]:end[u]` of each of `users`."""
    span = max_history + 1
    counts = number_of_windows(start, end, max_history)
    row = np.repeat(np.arange(len(users)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = end[row] - nth * span
    return Windows(users[row], np.maximum(ends - span, start[row]), ends)


def number_of_windows(start: np.ndarray, end: np.ndarray, max_history: int) -> np.ndarray:
    """[users]: into how many windows each user's events are cut."""
    return -(-(end - start) // (max_history + 1))
