"""Windows over each user's training events: every event is the target of exactly one window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.hashing import mix
from flm_torchrec.data.splits import Splits


@dataclass(frozen=True)
class Windows:
    """Spans `start[w]:end[w]` of training events. Each event is the target of exactly one window."""

    user: np.ndarray  # [windows] int64, ascending; a user's windows are side by side, the newest first
    start: np.ndarray  # [windows] int64
    end: np.ndarray  # [windows] int64
    longest: int
    """Events of a window at most, which all windows of a user but the oldest have."""

    def __len__(self) -> int:
        return len(self.user)

    def moved(self, seed: int, epoch: int) -> Windows:
        """As many windows of the same events, cut elsewhere: so an event is not always as far from its window's start.

        All cuts of a user are later by one number, drawn of those that the oldest window has room for: so a user with
        one window keeps it. The number depends on seed, epoch and user alone.
        """
        newest, oldest = (np.diff(self.user, **edge) != 0 for edge in ({"prepend": -1}, {"append": -1}))
        room = self.longest - (self.end - self.start)[oldest]
        drawn = mix(mix(mix(np.array([seed])) + np.uint64(epoch)) + self.user[newest].astype(np.uint64))
        later = (drawn % (room + 1).astype(np.uint64)).astype(np.int64)[np.cumsum(newest) - 1]
        return Windows(self.user, self.start + later * ~oldest, self.end + later * ~newest, self.longest)


def windows(data: PreparedData, splits: Splits, max_history: int) -> Windows:
    """Cut each user's training events into spans of at most `max_history` + 1, counted from the newest."""
    return cut(np.arange(data.schema.users), data.offsets[:-1], splits.train_end, max_history)


def cut(users: np.ndarray, start: np.ndarray, end: np.ndarray, max_history: int) -> Windows:
    """Windows of the events `start[u]:end[u]` of each of `users`, counted from the newest event."""
    span = max_history + 1
    counts = number_of_windows(start, end, max_history)
    of_user = np.repeat(np.arange(len(users)), counts)  # [windows] index into `users`
    nth = np.arange(len(of_user)) - np.repeat(np.cumsum(counts) - counts, counts)  # [windows] from the newest
    ends = end[of_user] - nth * span
    return Windows(users[of_user], np.maximum(ends - span, start[of_user]), ends, span)


def number_of_windows(start: np.ndarray, end: np.ndarray, max_history: int) -> np.ndarray:
    """[users] the number of windows that each user's events `start[u]:end[u]` are cut into."""
    return -(-(end - start) // (max_history + 1))
