"""Rows of all shards → rows of interactions, a bucket of complete users at a time, by an engine's SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.data.event_files import WEIGHT
from flm_torchrec.prepare.clean import EXAMPLES, Dropped, mark_sql
from flm_torchrec.prepare.engine import Engine, buckets
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.sources.source_data import CONTEXT

FILE_ORDER = "shard, line"
ROWS_PER_BUCKET = 2_000_000
"""Rows of a bucket at most, unless one user has more; a bucket is held in memory."""
ROWS_PER_GROUP = 131_072
"""Rows of a row group, which a loader reads at once."""

Contexts = dict[str, pl.Series]
"""By column of a feature of events, its values in order of code."""


@dataclass(frozen=True)
class InteractionCounts:
    """Counts of the interactions that were written."""

    per_user: np.ndarray  # [users] events
    sessions: int
    pairs: int
    """Pairs of a user and an item that meet at least once."""
    weight: float | None = None
    """Sum of the events' weights; None: they have none."""


class Interactions:
    """The good rows of all shards, to be cleaned and written.

    Args:
        files: good rows, as the intake stored them.
        names: of the shards, for the report.
        folder: for intermediate files.
        timestamps: false where only the order of the rows counts.
    """

    def __init__(
        self, engine: Engine, files: Sequence[Path], names: list[str], folder: Path, *, timestamps: bool
    ) -> None:
        self.engine = engine
        self.names = names
        self.folder = folder
        self.timestamps = timestamps
        engine.files("taken", files)
        stored = pq.read_schema(files[0]).names
        self.contexts = [name for name in stored if name.startswith(CONTEXT)]
        self.extra = [*(name for name in ("segment", "event_weight") if name in stored), *self.contexts]
        """Columns that not every source has."""

    def keys(self) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
        """Users and items, each with columns `key` and `events` (their number of rows), and the names of events."""
        users, items = (
            self.engine.query(f"SELECT {side}_key AS key, COUNT(*) AS events FROM taken GROUP BY {side}_key")
            for side in ("user", "item")
        )
        names = self.engine.query("SELECT DISTINCT event_name FROM taken")["event_name"]
        return users, items, names.sort().to_list()

    def clean(
        self, users: pl.DataFrame, items: pl.DataFrame, events: list[str], options: PrepareOptions, dropped: Dropped
    ) -> tuple[np.ndarray, np.ndarray]:
        """Code the rows, mark duplicates and find the core.

        Args:
            users, items: columns id, key and events; the rows of a user go to one bucket.
            events: names of the event codes.
            dropped: counts duplicates, and rows outside the core.

        Returns:
            The ids of the users and of the items that stay, ascending.
        """
        self._code(users, items, events, options)
        if options.dedup != "none":
            self._count("duplicate = 1", f"duplicate ({options.dedup})", dropped)
        everything = np.arange(len(users)), np.arange(len(items))
        return self._core(*everything, options, dropped)

    def _code(self, users: pl.DataFrame, items: pl.DataFrame, events: list[str], options: PrepareOptions) -> None:
        """Replace keys by ids, mark duplicates and number sessions, bucket by bucket: the view `marked`."""
        begin = users["events"].cum_sum() - users["events"]
        self.engine.frame("users", users.select("id", "key", (begin // ROWS_PER_BUCKET).alias("bucket")))
        self.engine.frame("items", items.select("id", "key"))
        self.engine.frame("events", pl.DataFrame({"id": np.arange(len(events)), "name": events}))
        extra = "".join(f", {name}" for name in self.extra)
        needs_marks = options.dedup != "none" or options.session_gap > 0 or not self.timestamps
        times = "event_time" if needs_marks else "event_time AS seconds, 0 AS duplicate"
        coded, marked = self.folder / "coded", self.folder / "marked"
        self.engine.write(
            f"SELECT CAST(u.id AS BIGINT) AS user_id, CAST(i.id AS BIGINT) AS item_id, {times},"
            f" CAST(e.id AS INTEGER) AS event, event_value, shard, row_index, line{extra}, u.bucket AS bucket"
            " FROM taken AS t JOIN users AS u ON t.user_key = u.key JOIN items AS i ON t.item_key = i.key"
            " JOIN events AS e ON t.event_name = e.name",
            coded,
        )
        if needs_marks:
            self.engine.write_each("coded", coded, mark_sql(options, self.timestamps, extra), marked)
        self.marked = marked if needs_marks else coded
        self.engine.files("marked", sorted(self.marked.glob("*/*.parquet")))

    def _count(self, bad: str, reason: str, dropped: Dropped) -> None:
        """Count the rows that fulfil a condition of SQL as dropped."""
        rows = int(self.engine.query(f"SELECT COUNT(*) AS n FROM marked WHERE {bad}")["n"][0])
        first = f"SELECT {FILE_ORDER} FROM marked WHERE {bad} ORDER BY {FILE_ORDER} LIMIT {EXAMPLES}"
        shown = self.engine.query(first).rows() if rows else []
        dropped.add(reason, rows, (f"{self.names[shard]}: row {line}" for shard, line in shown))

    def _core(
        self, users: np.ndarray, items: np.ndarray, options: PrepareOptions, dropped: Dropped
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take out users and items with too few rows until all have enough: the core (Seidman 1983), of two kinds.

        Items that too few different users have are taken out too.
        """
        minimum = options.minimum_events("user"), options.minimum_events("item")
        if max(*minimum, options.min_users) <= 1:
            return users, items
        kept = "duplicate = 0 AND user_id IN (SELECT id FROM core_users) AND item_id IN (SELECT id FROM core_items)"
        while True:
            for name, ids in (("core_users", users), ("core_items", items)):
                self.engine.frame(name, pl.DataFrame({"id": ids}))
            people = ", COUNT(DISTINCT user_id) AS people" if options.min_users > 1 else ""
            by_user, by_item = (
                self.engine.query(
                    f"SELECT {side}_id AS id, COUNT(*) AS n{more} FROM marked WHERE {kept} GROUP BY {side}_id"
                )
                for side, more in (("user", ""), ("item", people))
            )
            if people:
                by_item = by_item.filter(pl.col("people") >= options.min_users)
            core = [
                c.filter(pl.col("n") >= n)["id"].sort().to_numpy()
                for c, n in zip((by_user, by_item), minimum, strict=True)
            ]
            if (len(core[0]), len(core[1])) == (len(users), len(items)):
                break
            users, items = core
        per_user, per_item = minimum
        name = f"{per_user}-core" if per_user == per_item else f"core of {per_user} events a user, {per_item} an item"
        name += f", and of {options.min_users} users an item" if options.min_users > 1 else ""
        self._count(f"duplicate = 0 AND NOT ({kept})", f"outside the {name}", dropped)
        return users, items

    def contexts_of(self, user_ids: np.ndarray, item_ids: np.ndarray, options: PrepareOptions) -> Contexts:
        """The values of features of events that the rows that stay have, often enough; arguments as of `write`."""
        counted: dict[str, list[pl.DataFrame]] = {name: [] for name in self.contexts}
        for bucket in buckets(self.marked) if self.contexts else ():
            frame = self._final_rows(bucket, user_ids, item_ids, {})
            for name, parts in counted.items():
                # A bucket has all rows of a user, so that users of buckets add up.
                parts.append(frame.group_by(name).agg(rows=pl.len(), users=pl.col("user_id").n_unique()))
        found = {}
        for name, parts in counted.items():
            totals = pl.concat(parts).group_by(name).sum().drop_nulls().filter(pl.col(name) != "")
            kept = totals.filter((pl.col("rows") >= options.min_count) & (pl.col("users") >= options.min_users))
            found[name] = kept[name].sort()
        return found

    def write(
        self, folder: Path, user_ids: np.ndarray, item_ids: np.ndarray, contexts: Contexts | None = None
    ) -> InteractionCounts:
        """Write the rows that stay, sorted by user and time, a file a bucket.

        Args:
            user_ids, item_ids: [ids given to `clean`] the final id of each; -1 where it does not stay.
            contexts: see `contexts_of`.
        """
        folder.mkdir()
        per_user = np.zeros(user_ids.max() + 1, np.int64)
        part = sessions = pairs = 0
        weight = 0.0
        for bucket in buckets(self.marked):
            frame = self._final_rows(bucket, user_ids, item_ids, contexts or {})
            if len(frame) == 0:
                continue
            pq.write_table(frame.to_arrow(), folder / f"part-{part:05d}.parquet", row_group_size=ROWS_PER_GROUP)
            part += 1
            if WEIGHT in frame.columns:
                weight += float(frame[WEIGHT].sum())
            per_user += np.bincount(frame["user_id"].to_numpy(), minlength=len(per_user))
            if "session" in frame.columns:
                sessions += frame.select("user_id", "session").n_unique()
            pairs += frame.select("user_id", "item_id").n_unique()  # a bucket has all rows of a user
        return InteractionCounts(per_user, sessions, pairs, weight if "event_weight" in self.extra else None)

    def _final_rows(self, bucket: Path, user_ids: np.ndarray, item_ids: np.ndarray, contexts: Contexts) -> pl.DataFrame:
        files = sorted(bucket.glob("*.parquet"))
        frame = pl.read_parquet(files, glob=False, hive_partitioning=False).filter(pl.col("duplicate") == 0)
        frame = frame.with_columns(
            user_id=pl.Series(user_ids[frame["user_id"].to_numpy()], dtype=pl.Int64),
            item_id=pl.Series(item_ids[frame["item_id"].to_numpy()], dtype=pl.Int64),
        ).filter((pl.col("user_id") >= 0) & (pl.col("item_id") >= 0))
        return frame.sort("user_id", "seconds", "shard", "row_index").select(
            "user_id",
            "item_id",
            pl.col("seconds").alias("timestamp"),
            "event",
            pl.col("event_value").alias("value"),
            *(pl.col(name).alias("weight") for name in ("event_weight",) if name in frame.columns),
            *(name for name in ("segment", "session") if name in frame.columns),
            *(_coded(name, contexts.get(name)) for name in self.contexts),
        )


def _coded(name: str, values: pl.Series | None) -> pl.Expr:
    """A column's codes by the order of the values, -1 for others; the column itself where there are no values."""
    if values is None:
        return pl.col(name)
    return pl.col(name).replace_strict(values, pl.int_range(len(values), eager=True), default=-1, return_dtype=pl.Int32)
