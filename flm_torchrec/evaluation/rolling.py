"""Rolling windows: the held-out period of a time split in parts, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.splits import Examples

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class RollingWindows:
    """Parts of equal length of a period; each has its first moment, and the last one its last moment too."""

    edges: np.ndarray  # [windows + 1] float64, seconds

    @classmethod
    def of(cls, data: PreparedData, held_out: Examples, count: int) -> RollingWindows:
        """`count` windows from the first to the last of the events that a time split holds out."""
        time = data.timestamp[_held_out_rows(data, held_out)]
        return cls(np.linspace(time.min(), time.max(), count + 1))

    @property
    def names(self) -> np.ndarray:
        """[windows] str: number and dates, so that their order by name is that in time."""
        count = len(self.edges) - 1
        dates = [_date(edge) for edge in self.edges]
        digits = len(str(count))
        return np.array([f"window {w + 1:0{digits}}: {dates[w]} to {dates[w + 1]}" for w in range(count)])

    def examples(self, data: PreparedData, held_out: Examples) -> Examples:
        """In each window, the first event of a user (of joint data: in each domain) is predicted from all before it.

        What happened in the windows before is known then, though no weight has learnt it. The user's events of the same
        window are held out together.
        """
        rows = _held_out_rows(data, held_out)
        user = np.searchsorted(data.offsets, rows, "right") - 1
        window = np.searchsorted(self.edges[1:-1], data.timestamp[rows], "right")
        place = user * len(self.names) + window  # ascending, as the events of a user are in order of time
        last = rows[np.searchsorted(place, place, "right") - 1]
        predicted = np.arange(len(rows)) if data.targets is None else np.flatnonzero(data.targets[data.event[rows]])
        key = place[predicted]
        if data.item_domain is not None:
            key = key * len(data.schema.domains) + data.item_domain[data.item[rows[predicted]]]
        first = predicted[np.unique(key, return_index=True)[1]]
        return Examples(user[first], rows[first], self.names[window[first]], last[first] + 1)


def _held_out_rows(data: PreparedData, held_out: Examples) -> np.ndarray:
    """[n] events of the users of the examples in the period, ascending, each once."""
    assert held_out.until is not None
    users, where = np.unique(held_out.user, return_inverse=True)
    first = np.full(len(users), len(data.item))
    np.minimum.at(first, where, held_out.end)
    until = np.zeros(len(users), np.int64)
    np.maximum.at(until, where, held_out.until)
    return spans(first, until - first)


def _date(seconds: float) -> str:
    """The date of a moment, in UTC; the number where no calendar has it."""
    try:
        return f"{EPOCH + timedelta(seconds=float(seconds)):%Y-%m-%d}"
    except OverflowError:
        return f"{seconds:g}"
