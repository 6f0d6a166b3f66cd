"""Rules of cleaning: which rows are bad, which are duplicates, and where a session begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from flm_torchrec.data.times import LATEST, TOO_LATE
from flm_torchrec.data.weights import MOST
from flm_torchrec.prepare.options import PrepareOptions

EXAMPLES = 5
"""Rows of the source that the report names for each reason."""
EXCLUDED = "user in --exclude-users"
"""A reason without examples: the report does not say who was left out."""


@dataclass
class Dropped:
    """Rows dropped so far, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Columns or cells that were not read as the user may expect, a line each."""

    def note(self, line: str) -> None:
        """Keep a line, once."""
        if line not in self.notes:
            self.notes.append(line)

    def add(self, reason: str, rows: int, examples: Iterable[str]) -> None:
        """Count `rows`; of the examples the first few are kept."""
        if rows:
            self.counts[reason] = self.counts.get(reason, 0) + rows
            kept = self.examples.setdefault(reason, [])
            kept.extend(example for example, _ in zip(examples, range(EXAMPLES - len(kept)), strict=False))

    def take(self, frame: pl.DataFrame, bad: pl.Expr, reason: str) -> pl.DataFrame:
        """The rows of `frame` that are not `bad`; the others are counted."""
        bad = bad.fill_null(False)
        out = frame.filter(bad)
        if len(out) == 0:
            return frame
        shown = out.head(EXAMPLES).select("file", "row").iter_rows()
        self.add(reason, len(out), (f"{file}: row {row}" for file, row in shown))
        return frame.filter(~bad)

    def merge(self, other: Dropped) -> None:
        """Add the rows and notes of another."""
        for reason, rows in other.counts.items():
            self.add(reason, rows, other.examples[reason])
        for line in other.notes:
            self.note(line)

    def example(self, reason: str) -> str:
        """A row that was dropped for a reason, in brackets behind a blank; empty where none is named."""
        shown = self.examples.get(reason)
        return f" (e.g. {shown[0]})" if shown else ""

    def to_json(self) -> dict[str, Any]:
        """Rows and examples by reason, as report.json has them."""
        return {reason: {"rows": n, "examples": self.examples[reason]} for reason, n in self.counts.items()}

    @classmethod
    def from_json(cls, record: dict[str, Any], notes: list[str]) -> Dropped:
        """What `to_json` gave, with the notes."""
        rows, examples = ({r: d[name] for r, d in record.items()} for name in ("rows", "examples"))
        return cls(rows, {r: list(shown) for r, shown in examples.items()}, list(notes))


def _finite(value: pl.Expr) -> pl.Expr:
    """Whether a value is finite as float32, which it is stored as."""
    return value.cast(pl.Float32).is_finite().fill_null(False)


WEIGHT_RULES = (
    (
        f"weight missing, no number, negative or above {MOST:,.0f}",
        ~pl.col("weight").is_between(0, MOST).fill_null(False),
    ),
)
"""As `rules`, of the weights of events."""


def drop_bad(frame: pl.DataFrame, dropped: Dropped, min_value: float | None) -> pl.DataFrame:
    """Take out rows that no model can learn from, and those below `min_value`."""
    for reason, bad in [*rules(min_value), *(WEIGHT_RULES if "weight" in frame.columns else ())]:
        frame = dropped.take(frame, bad, reason)
    return frame


def rules(min_value: float | None = None) -> list[tuple[str, pl.Expr]]:
    """Each reason to drop a row, with the condition for it; a row is counted under its first reason."""
    conditions = [
        ("no user", pl.col("user").is_null() | (pl.col("user") == "")),
        ("no item", pl.col("item").is_null() | (pl.col("item") == "")),
        ("timestamp missing or unreadable", pl.col("timestamp").is_null()),
        ("negative timestamp", pl.col("timestamp") < 0),
        (TOO_LATE, pl.col("timestamp") > LATEST),
        ("value missing or not a finite number", ~_finite(pl.col("value"))),
    ]
    if min_value is not None:
        conditions.append((f"value below {min_value}", pl.col("value") < min_value))
    return conditions


ORDER = "seconds, shard, row_index"
"""A user's events: by time, then by order of input."""


def _nth(key: str, order: str = ORDER) -> str:
    return f"ROW_NUMBER() OVER (PARTITION BY {key} ORDER BY {order}) > 1"


def _since(key: str) -> str:
    return f"seconds - LAG(seconds) OVER (PARTITION BY {key} ORDER BY {ORDER})"


DEDUP: dict[str, Callable[[int], str]] = {
    "none": lambda _: "FALSE",
    "exact": lambda _: _nth("user_id, item_id, seconds, event"),
    "consecutive": lambda _: f"LAG(item_id) OVER (PARTITION BY user_id ORDER BY {ORDER}) = item_id",
    "first": lambda _: _nth("user_id, item_id"),
    "last": lambda _: _nth("user_id, item_id", "seconds DESC, shard DESC, row_index DESC"),
    "window": lambda window: f"{_since('user_id, item_id, event')} <= {window}",
}
"""SQL: which rows are duplicates. exact: same user, item, time and event; consecutive: the same item again at once;
first, last: keep a user's first or last event with an item; window: the same user, item and event at most so many
seconds after the one before, even if that one is a duplicate itself."""


def mark_sql(options: PrepareOptions, timestamps: bool, extra: str = "") -> str:
    """SQL over `coded`: its rows, with `seconds`, `duplicate` (0 or 1) and, if there is a gap, `session` (from 0).

    Plain enough for DuckDB and Spark alike. Without timestamps, seconds are the position in the user's sequence.

    Args:
        timestamps: false where only the order of the rows counts.
        extra: further columns to keep, each after a comma.
    """
    when = "event_time" if timestamps else "ROW_NUMBER() OVER (PARTITION BY user_id ORDER BY shard, row_index) - 1"
    columns = f"user_id, item_id, seconds, event, event_value, shard, row_index, line, bucket{extra}"
    marked = f"""
        SELECT {columns}, CASE WHEN {DEDUP[options.dedup](options.dedup_window)} THEN 1 ELSE 0 END AS duplicate
        FROM (SELECT *, CAST({when} AS BIGINT) AS seconds FROM coded) AS timed"""
    if not options.session_gap:
        return marked
    return f"""
        SELECT {columns}, duplicate,
            CAST(SUM(CASE WHEN pause > {options.session_gap} THEN 1 ELSE 0 END)
                OVER (PARTITION BY user_id, duplicate ORDER BY {ORDER}) AS INTEGER) AS session
        FROM (SELECT *, {_since("user_id, duplicate")} AS pause FROM ({marked}) AS marked) AS paused"""
