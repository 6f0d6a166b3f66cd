"""Rows of all shards → rows of interactions, bucket by bucket of whole users, by an engine's SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.prepare.clean import EXAMPLES, Dropped, mark_sql
from flm_torchrec.prepare.engine import Engine, buckets

PLACE = "shard, line"


@dataclass(frozen=True)
class Cleaning:
    """What to drop of rows that are good by themselves."""

    dedup: str
    window: int
    session_gap: int
    least_user: int
    least_item: int
    timestamps: bool

    @property
    def marks(self) -> bool:
        return self.dedup != "none" or self.session_gap > 0 or not self.timestamps


@dataclass(frozen=True)
class Written:
    """What became of it."""

    per_user: np.ndarray  # [users] events
    sessions: int
    pairs: int
    """Of a user and an item that meet at least once."""


class Interactions:
    """Rows taken in.

    Args:
        files: of the intake.
        work: folder for what is in between.
        names: of the shards, for the report.
        bucket_rows: rows of a bucket, which are held in memory.
    """

    def __init__(self, engine: Engine, files: Sequence[Path], work: Path, names: list[str], bucket_rows: int) -> None:
        self.engine = engine
        self.work = work
        self.names = names
        self.bucket_rows = bucket_rows
        engine.files("taken", files)
        self.segments = "segment" in pq.read_schema(files[0]).names

    def keys(self) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
        """Users and items with `key` and `events`, how many rows there are of each, and the names of events."""
        users, items = (
            self.engine.query(f"SELECT {side}_key AS key, COUNT(*) AS events FROM taken GROUP BY {side}_key")
            for side in ("user", "item")
        )
        names = self.engine.query("SELECT DISTINCT event_name FROM taken")["event_name"]
        return users, items, names.sort().to_list()

    def clean(
        self, users: pl.DataFrame, items: pl.DataFrame, events: list[str], cleaning: Cleaning, dropped: Dropped
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mark duplicates and find the core; returns the ids of the users and of the items that stay, ascending.

        Args:
            users, items: columns id, key and events; the rows of a user go to one bucket.
        """
        begin = users["events"].cum_sum() - users["events"]
        self.engine.frame("users", users.select("id", "key", (begin // self.bucket_rows).alias("bucket")))
        self.engine.frame("items", items.select("id", "key"))
        self.engine.frame("events", pl.DataFrame({"id": np.arange(len(events)), "name": events}))
        coded, marked = self.work / "coded", self.work / "marked"
        extra = ", segment" if self.segments else ""
        times = "stamp" if cleaning.marks else "stamp AS seconds, 0 AS duplicate"
        self.engine.write(
            f"SELECT CAST(u.id AS BIGINT) AS user_id, CAST(i.id AS BIGINT) AS item_id, {times},"
            f" CAST(e.id AS INTEGER) AS event, worth, shard, place, line{extra}, u.bucket AS bucket"
            " FROM taken AS t JOIN users AS u ON t.user_key = u.key JOIN items AS i ON t.item_key = i.key"
            " JOIN events AS e ON t.event_name = e.name",
            coded,
        )
        if cleaning.marks:
            sql = mark_sql(cleaning.dedup, cleaning.window, cleaning.session_gap, cleaning.timestamps, extra)
            self.engine.write_each("coded", coded, sql, marked)
        self.folder = marked if cleaning.marks else coded
        self.engine.files("marked", sorted(self.folder.glob("*/*.parquet")))
        if cleaning.dedup != "none":
            self._count("duplicate = 1", f"duplicate ({cleaning.dedup})", dropped)
        return self._core(np.arange(len(users)), np.arange(len(items)), cleaning, dropped)

    def _count(self, bad: str, reason: str, dropped: Dropped) -> None:
        rows = int(self.engine.query(f"SELECT COUNT(*) AS n FROM marked WHERE {bad}")["n"][0])
        first = f"SELECT {PLACE} FROM marked WHERE {bad} ORDER BY {PLACE} LIMIT {EXAMPLES}"
        shown = self.engine.query(first).rows() if rows else []
        dropped.add(reason, rows, (f"{self.names[shard]}: row {line}" for shard, line in shown))

    def _core(
        self, users: np.ndarray, items: np.ndarray, cleaning: Cleaning, dropped: Dropped
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take out users and items with too few rows until all have enough: the core (Seidman 1983), of two kinds."""
        least = (cleaning.least_user, cleaning.least_item)
        if max(least) <= 1:
            return users, items
        kept = "duplicate = 0 AND user_id IN (SELECT id FROM core_users) AND item_id IN (SELECT id FROM core_items)"
        while True:
            for name, ids in (("core_users", users), ("core_items", items)):
                self.engine.frame(name, pl.DataFrame({"id": ids}))
            counts = [
                self.engine.query(f"SELECT {side}_id AS id, COUNT(*) AS n FROM marked WHERE {kept} GROUP BY {side}_id")
                for side in ("user", "item")
            ]
            core = [c.filter(pl.col("n") >= n)["id"].sort().to_numpy() for c, n in zip(counts, least, strict=True)]
            if (len(core[0]), len(core[1])) == (len(users), len(items)):
                break
            users, items = core
        name = f"{least[0]}-core" if least[0] == least[1] else f"core of {least[0]} events a user, {least[1]} an item"
        self._count(f"duplicate = 0 AND NOT ({kept})", f"outside the {name}", dropped)
        return users, items

    def write(self, folder: Path, user_ids: np.ndarray, item_ids: np.ndarray, group: int) -> Written:
        """Write the rows that stay, sorted, a file a bucket.

        Args:
            user_ids, item_ids: the final id of each that `clean` knew, -1 where it does not stay.
            group: rows of a row group.
        """
        folder.mkdir()
        per_user = np.zeros(user_ids.max() + 1, np.int64)
        part = sessions = pairs = 0
        for bucket in buckets(self.folder):
            frame = self._bucket(bucket, user_ids, item_ids)
            if len(frame) == 0:
                continue
            pq.write_table(frame.to_arrow(), folder / f"part-{part:05d}.parquet", row_group_size=group)
            part += 1
            per_user += np.bincount(frame["user_id"].to_numpy(), minlength=len(per_user))
            if "session" in frame.columns:
                sessions += frame.select("user_id", "session").n_unique()
            pairs += frame.select("user_id", "item_id").n_unique()  # a bucket has all of a user
        return Written(per_user, sessions, pairs)

    def _bucket(self, bucket: Path, user_ids: np.ndarray, item_ids: np.ndarray) -> pl.DataFrame:
        files = sorted(bucket.glob("*.parquet"))
        frame = pl.read_parquet(files, glob=False, hive_partitioning=False).filter(pl.col("duplicate") == 0)
        frame = frame.with_columns(
            user_id=pl.Series(user_ids[frame["user_id"].to_numpy()], dtype=pl.Int64),
            item_id=pl.Series(item_ids[frame["item_id"].to_numpy()], dtype=pl.Int64),
        ).filter((pl.col("user_id") >= 0) & (pl.col("item_id") >= 0))
        return frame.sort("user_id", "seconds", "shard", "place").select(
            "user_id", "item_id", pl.col("seconds").alias("timestamp"), "event", pl.col("worth").alias("value"),
            *(name for name in ("segment", "session") if name in frame.columns),
        )  # fmt: skip
