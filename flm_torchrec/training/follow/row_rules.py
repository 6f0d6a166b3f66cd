"""Rows that a follower leaves out as the preparation of its run's data did, or as the run's split does."""

from __future__ import annotations

from dataclasses import dataclass, field

import duckdb
import numpy as np
import polars as pl

from flm_torchrec.data.dataset import PreparedData, read_report, spans
from flm_torchrec.data.splits import Splits
from flm_torchrec.errors import ConfigError
from flm_torchrec.prepare.clean import mark_sql, rules
from flm_torchrec.prepare.options import PrepareOptions

HELD_OUT = "of a user or an item that the split holds out"
NOBODY = np.zeros(0, np.int64)
OPTIONS = ("min_value", "dedup", "dedup_window")
"""Of `flm prepare`: those that a follower keeps to."""
OF_ALL_EVENTS = ("first", "last")
"""Kinds of `dedup` for which all events of a user must be known; a follower knows the newest."""


@dataclass(frozen=True)
class RowRules:
    """What preparation of the run's data dropped, and what its split keeps from its model."""

    options: PrepareOptions = field(default_factory=PrepareOptions)
    timestamps: bool = True
    """False where only the order of events counts."""
    cold_users: np.ndarray = field(default_factory=lambda: NOBODY)
    """[n] ids that are never learnt from."""
    cold_items: np.ndarray = field(default_factory=lambda: NOBODY)
    """[n] likewise."""

    @classmethod
    def of(cls, data: PreparedData, splits: Splits) -> RowRules:
        """Those of a run that is followed.

        Raises:
            ConfigError: the data were prepared with one of OF_ALL_EVENTS.
            DataError: the report of the data cannot be read.
        """
        recorded = read_report(data.path).get("options", {})
        options = PrepareOptions(**{name: recorded[name] for name in OPTIONS if name in recorded})
        if options.dedup in OF_ALL_EVENTS:
            raise ConfigError(
                f"{data.path}: was prepared with --dedup {options.dedup}, which needs all events of a user; prepare the"
                " data again with the new events, and go on with flm train --train.warm_start"
            )
        cold = (splits.cold_users, splits.cold_items)
        return cls(
            options, data.schema.timestamps, *(NOBODY if mask is None else np.flatnonzero(mask) for mask in cold)
        )

    def reasons(self) -> list[tuple[str, pl.Expr]]:
        """Each reason to leave a row out for itself, with the condition, by the columns of `EventEncoder`'s frame."""
        cold = [
            pl.col(f"{e}_id").is_in(ids.tolist()) for e, ids in (("user", self.cold_users), ("item", self.cold_items))
        ]
        return [*rules(self.options.min_value), (HELD_OUT, cold[0] | cold[1])]

    def duplicates(self, frame: pl.DataFrame, known: PreparedData | None) -> tuple[str, pl.Expr]:
        """The reason to leave out repeated events, with the condition, by `position`; none with `dedup` none.

        Args:
            frame: rows to learn from, in order of arrival; keys without an id are told apart by `user` and `item`.
            known: the newest events of all users, which came before.
        """
        reason = f"duplicate ({self.options.dedup})"
        if self.options.dedup == "none" or not len(frame):
            return reason, pl.lit(False)
        ids = [
            pl.coalesce(f"{e}_id", -pl.col(e).rank("dense").cast(pl.Int64)).alias(f"{e}_id") for e in ("user", "item")
        ]
        new = frame.select(
            *ids,
            event_time="timestamp",
            event=pl.col("event_id").cast(pl.Int64),
            shard=pl.lit(1),
            row_index="position",
        )
        parts = [new] if known is None else [_events_of(new["user_id"].unique().to_numpy(), known), new]
        coded = pl.concat(parts).with_columns(event_value=pl.lit(1.0), line=pl.lit(0), bucket=pl.lit(0))
        with duckdb.connect() as connection:
            connection.register("coded", coded.to_arrow())
            marked = (
                f"SELECT row_index FROM ({mark_sql(self.options, self.timestamps)}) WHERE duplicate = 1 AND shard = 1"
            )
            found = connection.sql(marked).fetchnumpy()["row_index"]
        return reason, pl.col("position").is_in(found.tolist())


def _events_of(users: np.ndarray, known: PreparedData) -> pl.DataFrame:
    """The known events of users, some of whom may be unknown, as rows of an earlier shard."""
    users = users[(users >= 0) & (users < known.schema.users)]
    lengths = np.diff(known.offsets)[users]
    rows = spans(known.offsets[users], lengths)
    columns = {
        "user_id": np.repeat(users, lengths),
        "item_id": known.item[rows].astype(np.int64),
        "event_time": known.timestamp[rows],
        "event": known.event[rows].astype(np.int64),
    }
    return pl.DataFrame(columns).with_columns(shard=pl.lit(0), row_index=pl.Series(rows, dtype=pl.Int64))
