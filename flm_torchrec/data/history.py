"""Columns of events, and how the model sees an event of a history: one rule for training and for serving.

NumPy alone: serving imports this file without the training stack.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np

HISTORY_KEYS = ("event", "gap")
"""Embedding tables that a history reads beside the table of items."""
GAP_BUCKETS = 32
"""Buckets of the time since the user's previous event, by log2 of seconds: 2^31 s are 68 years."""
GAP_ROWS = GAP_BUCKETS + 1
"""Rows of the table of gaps. Row 0 is for the prefix token, which has no event; the last row is spare."""


def table_rows(event_kinds: int) -> dict[str, int]:
    """Rows of each table of HISTORY_KEYS; row 0 of both is for the prefix token."""
    return {"event": event_kinds + 1, "gap": GAP_ROWS}


CONTEXT = "context_"
"""Before the name of a feature of events, as a column of interactions."""
NO_CONTEXT = np.zeros((0, 0), np.int32)
"""Of events without features."""


@dataclass(frozen=True)
class Events:
    """Columns of n events. A subclass may add columns, all of length n."""

    item: np.ndarray  # [n] int64: row of the item
    timestamp: np.ndarray  # [n] int64: seconds since 1970
    event: np.ndarray  # [n] integer: code of the kind of event
    value: np.ndarray  # [n] float32
    context: np.ndarray = field(default_factory=lambda: NO_CONTEXT, kw_only=True)
    """[n, C] int32: codes of the features of events, in the schema's order, -1 where unknown. C is 0 where none are
    given."""

    def __post_init__(self) -> None:
        if not self.context.shape[1]:
            object.__setattr__(self, "context", np.zeros((len(self.item), 0), np.int32))

    def __len__(self) -> int:
        return len(self.item)

    def __add__(self, later: Events) -> Self:
        """These events, then `later`, with the columns of these events."""
        return self.concat([self, later])

    @classmethod
    def concat(cls, parts: list[Events]) -> Self:
        """The events of all parts, in order; at least one part, each with the columns of this class.

        The context of parts that give none is unknown.
        """
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        features = max(part.context.shape[1] for part in parts)
        columns["context"] = [part.with_context(features) for part in parts]
        return cls(**{name: np.concatenate(of_parts) for name, of_parts in columns.items()})

    def with_context(self, features: int) -> np.ndarray:
        """[n, features] int32: the context; all unknown where none is given."""
        given = self.context.shape[1]
        return self.context if given or not features else np.full((len(self), features), -1, np.int32)

    def take(self, index: np.ndarray | slice) -> Self:
        """The events at an index, in its order."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


NO_EVENTS = Events(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


@dataclass(frozen=True)
class CodedEvents:
    """Events of histories as the model takes them."""

    event: np.ndarray  # [n] int64: row of the table of event kinds
    gap: np.ndarray  # [n] int64: row of the table of gaps
    value: np.ndarray  # [n] float32: standardised
    time: np.ndarray  # [n] int64: seconds since the first event shown of the same history
    context: np.ndarray  # [n, C] int64: rows of the tables of the features of events; row 0: unknown


@dataclass(frozen=True)
class HistoryCoding:
    """How events become inputs of the model."""

    value_mean: float
    value_scale: float
    """1 / standard deviation of the values; 0 hides the values."""
    timestamps: bool
    """False: the data have an order but no times, so that gap and time are 0."""
    gap_rows: int = GAP_ROWS
    features: int = 0
    """Features of events that the model knows."""

    def code(self, events: Events, previous: np.ndarray, first: np.ndarray) -> CodedEvents:
        """Code n events, of one history or of several.

        Args:
            previous: [n] timestamp of the user's previous event, shown or not; of a user's first event, its own.
            first: [n] or [1] timestamp of the first event shown of the same history.
        """
        gap = time = np.zeros(len(events), np.int64)
        if self.timestamps:
            gap = self.gap_of(events.timestamp - previous)
            time = events.timestamp - first
        return CodedEvents(
            event=events.event.astype(np.int64) + 1,  # row 0 is for the prefix token
            gap=gap,
            value=(events.value - self.value_mean) * self.value_scale,
            time=time,
            context=events.with_context(self.features).astype(np.int64) + 1,  # row 0 is an unknown value
        )

    def gap_of(self, seconds: np.ndarray) -> np.ndarray:
        """[n] seconds since the previous event → [n] rows of the table of gaps, 1 … gap_rows - 2."""
        bucket = np.log2(np.maximum(seconds, 0) + 1).astype(np.int64)
        return np.minimum(bucket, self.gap_rows - 3) + 1


def previous_times(timestamp: np.ndarray) -> np.ndarray:
    """[n] timestamps of one user's events, oldest first → [n] that of the event before; the first keeps its own."""
    return np.concatenate([timestamp[:1], timestamp[:-1]])
