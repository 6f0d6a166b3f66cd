"""Interactions: bad rows out and counted, duplicates out, k-core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import polars as pl

EXAMPLES = 5
"""Rows of the source that the report names for each reason."""


@dataclass
class Dropped:
    """Rows dropped so far, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def take(self, frame: pl.DataFrame, bad: pl.Expr, reason: str) -> pl.DataFrame:
        """The rows of `frame` that are not `bad`; the others are counted."""
        out = frame.filter(bad.fill_null(False))
        if len(out) == 0:
            return frame
        self.counts[reason] = self.counts.get(reason, 0) + len(out)
        examples = self.examples.setdefault(reason, [])
        shown = out.head(EXAMPLES - len(examples)).select("file", "row").iter_rows()
        examples.extend(f"{file}: row {row}" for file, row in shown)
        return frame.filter(~bad.fill_null(False))

    def to_json(self) -> dict[str, Any]:
        return {reason: {"rows": n, "examples": self.examples[reason]} for reason, n in self.counts.items()}


def _finite(value: pl.Expr) -> pl.Expr:
    """As it will be stored: a number too large for float32 is none."""
    return value.cast(pl.Float32).is_finite().fill_null(False)


def drop_bad(frame: pl.DataFrame, dropped: Dropped, min_value: float | None) -> pl.DataFrame:
    """Take out rows that no model can learn from, and those below `min_value`."""
    rules = [
        ("no user", pl.col("user").is_null() | (pl.col("user") == "")),
        ("no item", pl.col("item").is_null() | (pl.col("item") == "")),
        ("timestamp missing or unreadable", pl.col("timestamp").is_null()),
        ("negative timestamp", pl.col("timestamp") < 0),
        ("value missing or not a finite number", ~_finite(pl.col("value"))),
    ]
    if min_value is not None:
        rules.append((f"value below {min_value}", pl.col("value") < min_value))
    for reason, bad in rules:
        frame = dropped.take(frame, bad, reason)
    return frame


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    """Sorted by user, then time, then order of input."""
    return frame.with_row_index("_input").sort("user", "timestamp", "_input").drop("_input")


def _exact(frame: pl.DataFrame) -> pl.Expr:
    return ~pl.struct("user", "item", "timestamp", "event").is_first_distinct()


def _consecutive(frame: pl.DataFrame) -> pl.Expr:
    return (pl.col("item") == pl.col("item").shift()) & (pl.col("user") == pl.col("user").shift())


def _first(frame: pl.DataFrame) -> pl.Expr:
    return ~pl.struct("user", "item").is_first_distinct()


def _last(frame: pl.DataFrame) -> pl.Expr:
    return ~pl.struct("user", "item").is_last_distinct()


DEDUP: dict[str, Callable[[pl.DataFrame], pl.Expr]] = {
    "exact": _exact,
    "consecutive": _consecutive,
    "first": _first,
    "last": _last,
}
"""Which rows of an ordered frame are duplicates. exact: same user, item, time and event; consecutive: the same item
again at once; first, last: keep a user's first or last event with an item."""


def deduplicate(frame: pl.DataFrame, how: str, dropped: Dropped) -> pl.DataFrame:
    """Take duplicates out of an ordered frame; `how` is 'none' or a name of DEDUP."""
    return frame if how == "none" else dropped.take(frame, DEDUP[how](frame), f"duplicate ({how})")


def k_core(frame: pl.DataFrame, k: int, dropped: Dropped) -> pl.DataFrame:
    """Drop rows until every user and every item has at least k rows (Seidman 1983)."""
    while k > 1:
        rare = (pl.len().over("user") < k) | (pl.len().over("item") < k)
        kept = dropped.take(frame, rare, f"outside the {k}-core")
        if len(kept) == len(frame):
            break
        frame = kept
    return frame
