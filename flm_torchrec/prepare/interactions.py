"""Rows of all shards → rows of interactions, a bucket of complete users at a time, by an engine's SQL."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.data.event_files import WEIGHT
from flm_torchrec.data.history import CONTEXT
from flm_torchrec.data.times import DAY_NUMBERS
from flm_torchrec.prepare.blocks import ROWS_PER_GROUP, blocks, rows_of
from flm_torchrec.prepare.clean import EXAMPLES, EXCLUDED, Dropped, mark_sql
from flm_torchrec.prepare.engine import Engine, buckets
from flm_torchrec.prepare.entities import NUMBERED, Hash, number_keys
from flm_torchrec.prepare.events_per_user import EventsPerUser
from flm_torchrec.prepare.options import PrepareOptions

FILE_ORDER = "shard, line"
ROWS_PER_BUCKET = 2_000_000
"""Rows of a bucket at most, unless one user has more; a bucket is held in memory."""

Contexts = dict[str, pl.Series]
"""By column of a feature of events, its values in order of code."""


@dataclass(frozen=True)
class InteractionCounts:
    """Counts of the interactions that were written."""

    per_user: EventsPerUser
    sessions: int
    pairs: int
    """Pairs of a user and an item that meet at least once."""
    weight: float | None = None
    """Sum of the events' weights; None: they have none."""
    day_numbers: bool = False
    """Every timestamp is one of DAY_NUMBERS."""


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

    def exclude(self, users: Collection[str], hashed: Hash | None, dropped: Dropped) -> int:
        """Take out the rows of users, given by their keys or by their hashed keys; returns how many rows are left.

        `number` comes after it.

        Args:
            hashed: of keys of users, as of `number_keys`.
            dropped: counts the rows, and gets a note where none of the users has any.
        """
        listed = pl.Series(list(users), dtype=pl.String).implode()
        files = self.engine.save("SELECT DISTINCT user_key AS key FROM taken", self.folder / "people")
        found = []
        for part in blocks(files, ("key",)):
            there = part["key"].is_in(listed)
            found.append(part.filter(there if hashed is None else there | hashed(part["key"]).is_in(listed)))
        self.engine.frame("excluded", pl.concat(found))
        of_them = "user_key IN (SELECT key FROM excluded)"
        counted = self.engine.query(f"SELECT {of_them} AS of_them, COUNT(*) AS n FROM taken GROUP BY {of_them}")
        rows = dict(counted.rows())
        if not rows.get(True):
            dropped.note(f"--exclude-users: none of its {len(users)} users has an event; are the ids those of --input?")
            return rows[False]
        dropped.add(EXCLUDED, rows[True], ())
        self.engine.files("taken", self.engine.save(f"SELECT * FROM taken WHERE NOT {of_them}", self.folder / "rest"))
        return rows.get(False, 0)

    def number(self, hashed: Hash | None) -> tuple[int, int, list[str]]:
        """Number users, items and names of events; returns how many users and items there are, and the names.

        Args:
            hashed: of keys of users, as of `number_keys`.
        """
        users = number_keys(self.engine, "user", self.folder / "users", ROWS_PER_BUCKET, hashed)
        items = number_keys(self.engine, "item", self.folder / "items", ROWS_PER_BUCKET)
        names = self.engine.query("SELECT DISTINCT event_name FROM taken")["event_name"]
        return users, items, names.sort().to_list()

    def clean(self, events: list[str], options: PrepareOptions, dropped: Dropped) -> int:
        """Code the rows, mark duplicates and find the core. `number` comes first.

        Makes the views `kept_users` and `kept_items`: the ids of the users and of the items that stay.

        Args:
            events: names of the event codes.
            dropped: counts duplicates, and rows outside the core.

        Returns:
            The number of users that stay.
        """
        self._code(events, options)
        if options.dedup != "none":
            self._count("duplicate = 1", f"duplicate ({options.dedup})", dropped)
        return self._core(options, dropped)

    def _code(self, events: list[str], options: PrepareOptions) -> None:
        """Replace keys by ids, mark duplicates and number sessions, bucket by bucket: the view `marked`."""
        self.engine.frame("events", pl.DataFrame({"id": np.arange(len(events)), "name": events}))
        extra = "".join(f", {self.engine.quoted(name)}" for name in self.extra)
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

    def _core(self, options: PrepareOptions, dropped: Dropped) -> int:
        """Take out users and items with too few rows until all have enough: the core (Seidman 1983), of two kinds.

        Items that too few different users have are taken out too. Returns the number of users that are left.
        """
        least = {"user": options.minimum_events("user"), "item": options.minimum_events("item")}
        kept = "duplicate = 0"
        numbered = [[self.folder / f"{entity}s" / NUMBERED] for entity in least]
        rows = self._keep(numbered)
        if max(*least.values(), options.min_users) <= 1:
            return rows[0]
        for turn in count():
            saved = [self._enough(entity, kept, n, options.min_users, turn) for entity, n in least.items()]
            before, rows = rows, self._keep(saved)
            if rows == before:
                break
            kept = "duplicate = 0 AND user_id IN (SELECT id FROM kept_users) AND item_id IN (SELECT id FROM kept_items)"
        per_user, per_item = least.values()
        name = f"{per_user}-core" if per_user == per_item else f"core of {per_user} events a user, {per_item} an item"
        name += f", and of {options.min_users} users an item" if options.min_users > 1 else ""
        self._count(f"duplicate = 0 AND NOT ({kept})", f"outside the {name}", dropped)
        return rows[0]

    def _keep(self, files: Sequence[Sequence[Path]]) -> list[int]:
        """Make the views of the users and of the items that are kept; returns how many each has."""
        for entity, some in zip(("user", "item"), files, strict=True):
            self.engine.files(f"kept_{entity}s", some)
        return [rows_of(some) for some in files]

    def _enough(self, entity: str, kept: str, events: int, users: int, turn: int) -> list[Path]:
        """Files with the ids that have enough of the rows kept; items: of enough users too."""
        people = f" AND COUNT(DISTINCT user_id) >= {users}" if users > 1 and entity == "item" else ""
        select = f"SELECT {entity}_id AS id FROM marked WHERE {kept} GROUP BY {entity}_id HAVING COUNT(*) >= {events}"
        return self.engine.save(select + people, self.folder / f"core-{entity}s-{turn}")

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
            user_ids, item_ids: [keys that `number` counted] the final id of each; -1 where it does not stay.
            contexts: see `contexts_of`.
        """
        folder.mkdir()
        per_user = EventsPerUser()
        part = sessions = pairs = 0
        weight, day_numbers = 0.0, self.timestamps
        for bucket in buckets(self.marked):
            frame = self._final_rows(bucket, user_ids, item_ids, contexts or {})
            if len(frame) == 0:
                continue
            pq.write_table(frame.to_arrow(), folder / f"part-{part:05d}.parquet", row_group_size=ROWS_PER_GROUP)
            part += 1
            if WEIGHT in frame.columns:
                weight += float(frame[WEIGHT].sum())
            per_user.add(frame["user_id"].rle().struct.field("len").to_numpy())  # a bucket has all rows of a user
            if "session" in frame.columns:
                sessions += frame.select("user_id", "session").n_unique()
            pairs += frame.select("user_id", "item_id").n_unique()
            day_numbers = day_numbers and frame.select(pl.sql_expr(DAY_NUMBERS).all()).item()
        total = weight if "event_weight" in self.extra else None
        return InteractionCounts(per_user, sessions, pairs, total, day_numbers)

    def _final_rows(self, bucket: Path, user_ids: np.ndarray, item_ids: np.ndarray, contexts: Contexts) -> pl.DataFrame:
        files = sorted(bucket.glob("*.parquet"))
        frame = pl.read_parquet(files, glob=False, hive_partitioning=False).filter(pl.col("duplicate") == 0)
        frame = frame.with_columns(
            user_id=pl.Series(np.asarray(user_ids[frame["user_id"].to_numpy()]), dtype=pl.Int64),
            item_id=pl.Series(np.asarray(item_ids[frame["item_id"].to_numpy()]), dtype=pl.Int64),
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
