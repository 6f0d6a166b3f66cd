"""What the rows of tables stand for, by key, and where each row of new data comes from in a run's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from flm_torchrec.data.hashing import HeldIds
from flm_torchrec.data.history import HISTORY_KEYS
from flm_torchrec.data.schema import ITEM_TABLES, Entity, Feature, Schema
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.folders import SCHEMA

ENTITIES: dict[str, Entity] = {**dict.fromkeys(ITEM_TABLES, "item"), "user_id": "user"}
"""By the name that a batch looks ids up by, whose ids they are."""


def first_row(feature: Feature) -> int:
    """Row of the first code: row 0 of a feature of events is for what is unknown."""
    return int(feature.entity == "event")


@dataclass(frozen=True)
class RowKeys:
    """The keys behind ids and codes: of prepared data, or of a run, whose folder `vocabulary` has the same files."""

    folder: Path
    schema: Schema
    """With only the features that the model uses."""

    @classmethod
    def load(cls, folder: Path, features: str | Sequence[str] = "all") -> RowKeys:
        """The vocabulary of a folder, with the features named, or "all" or "none".

        Raises:
            DataError: the folder has no schema, or lacks a feature.
        """
        schema = Schema.load(folder / SCHEMA)
        if features != "all":
            schema = schema.keeping(() if features == "none" else features, folder)
        return cls(folder, schema)

    def keys(self, table: str, looked_up: Sequence[str]) -> pl.DataFrame:
        """Columns key and code, of all ids of a table with a key; each key once.

        Args:
            table: name of the table.
            looked_up: names that a batch looks its ids up by: `item_id`, `user_id`, `event`, or features.

        Raises:
            DataError: a file is missing or broken, or features that share the table give a value two codes.
        """
        if looked_up[0] in ENTITIES:
            entity = ENTITIES[looked_up[0]]
            columns = (pl.col(f"{entity}_key").alias("key"), pl.col(f"{entity}_id").cast(pl.Int64).alias("code"))
            return self._read(f"{entity}s.parquet", columns)
        if looked_up[0] == "event":  # row 0 is the prefix, which has no event
            names = list(self.schema.events)
            return pl.DataFrame({"key": names, "code": range(1, len(names) + 1)}, {"key": pl.String, "code": pl.Int64})
        columns = (pl.col("value").cast(pl.String).alias("key"), pl.col("code").cast(pl.Int64))
        parts = [
            self._read(f"vocab/{f.entity}_{f.name}.parquet", columns).with_columns(pl.col("code") + first_row(f))
            for f in self.features(table)
        ]
        found = pl.concat(parts).unique(maintain_order=True)
        if found["key"].n_unique() < len(found):
            raise DataError(
                f"{self.folder}: features of table '{table}' give one value two codes; give each its own table"
            )
        return found

    def features(self, table: str) -> list[Feature]:
        """The features whose values are rows of a table."""
        return [f for f in self.schema.features if f.sparse and f.table == table]

    def rows(self, table: str, looked_up: Sequence[str]) -> int:
        """Rows of a table that has one for each id."""
        if looked_up[0] in ENTITIES:
            return self.schema.items if ENTITIES[looked_up[0]] == "item" else self.schema.users
        if looked_up[0] == "event":
            return len(self.schema.events) + 1
        return max(f.cardinality + first_row(f) for f in self.features(table))

    def _read(self, name: str, columns: Sequence[pl.Expr]) -> pl.DataFrame:
        file = self.folder / name
        try:
            return pl.read_parquet(file).select(columns).drop_nulls().unique("key", keep="first", maintain_order=True)
        except (OSError, pl.exceptions.PolarsError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{file}: not readable ({reason}), so no row can be told by its key; prepare the data again"
            ) from error


@dataclass(frozen=True)
class RowMatch:
    """Where the rows of a new table come from in an old one."""

    origin: np.ndarray | None
    """[rows] int64: the old row of each new row, -1 where there is none. None: every row stays where it is."""
    kept: int
    """Keys that both have."""
    new: int
    dropped: int
    held: HeldIds | None = None
    """Of a managed table: rows move with the ids that hold them, and `origin` is None."""


def match_rows(old: RowKeys, new: RowKeys, table: str, looked_up: Sequence[str]) -> RowMatch:
    """Match the rows of a table by key.

    Args:
        table: name of the table.
        looked_up: names that a batch looks its ids up by.

    Raises:
        RunError: the rows of the table cannot be moved.
        DataError: a vocabulary is missing or broken.
    """
    if looked_up[0] in HISTORY_KEYS and looked_up[0] != "event":  # rows mean the same in all data
        return RowMatch(None, 0, 0, 0)
    before, after = old.features(table), new.features(table)
    if looked_up[0] not in (*ENTITIES, *HISTORY_KEYS):
        if not before or {f.kind for f in before} != {f.kind for f in after}:
            raise RunError(f"table '{table}': {old.folder} has no such table of features of these kinds")
        if after[0].kind == "text":
            return _of_words(table, before, after)
        if after[0].kind == "quantile":
            return _of_quantiles(old.keys(table, looked_up), new.keys(table, looked_up))
    shared, other = old.schema.table(table), new.schema.table(table)
    if (shared.kind, shared.rows) != (other.kind, other.rows):
        raise RunError(
            f"table '{table}': has rows of kind {_kind(shared.kind, shared.rows)} in {old.folder}, and"
            f" {_kind(other.kind, other.rows)} in {new.folder}; prepare the data with the same --tables"
        )
    pairs = new.keys(table, looked_up).join(old.keys(table, looked_up), "key", "full", suffix="_old", coalesce=True)
    kept = pairs.drop_nulls()
    counts = len(kept), pairs["code_old"].null_count(), pairs["code"].null_count()
    if other.managed:
        held = HeldIds.of(table, *(kept[column].to_numpy() for column in ("code_old", "code")))
        return RowMatch(None, *counts, held)
    if other.kind == "hash":
        if (kept["code"] != kept["code_old"]).any():
            option = "item_id" if table in ITEM_TABLES else table
            raise RunError(
                f"table '{table}': its rows are shared (hash) by numbers of ids, which have moved; prepare the data"
                f" with {option}=direct or {option}=zch:ROWS in --tables, and train anew once"
            )
        return RowMatch(None, *counts)
    origin = np.full(new.rows(table, looked_up), -1)
    origin[kept["code"].to_numpy()] = kept["code_old"].to_numpy()
    if looked_up[0] == "event" or any(first_row(f) for f in after):
        origin[0] = 0
    return RowMatch(_unless_same(origin, old.rows(table, looked_up)), *counts)


def _of_words(table: str, before: Sequence[Feature], after: Sequence[Feature]) -> RowMatch:
    """Words are hashed into rows alike in all data."""
    rows = max(f.cardinality for f in after)
    if max(f.cardinality for f in before) != rows:
        raise RunError(
            f"table '{table}': words are hashed into {max(f.cardinality for f in before)} rows in the run, and into"
            f" {rows} here; prepare the data with the same --text-buckets"
        )
    return RowMatch(None, rows, 0, 0)


def _of_quantiles(before: pl.DataFrame, after: pl.DataFrame) -> RowMatch:
    """A bucket of numbers comes from the old bucket that holds its least number."""
    old, new = (frame.with_columns(pl.col("key").cast(pl.Float64)).sort("code") for frame in (before, after))
    if not len(old) or not len(new):
        return RowMatch(np.full(max(1, len(new)), -1), 0, len(new), len(old))
    origin = np.searchsorted(old["key"].to_numpy(), new["key"].to_numpy(), "right") - 1
    origin = old["code"].to_numpy()[origin]
    return RowMatch(_unless_same(origin, len(old)), len(new), 0, len(old) - len(np.unique(origin)))


def _unless_same(origin: np.ndarray, rows: int) -> np.ndarray | None:
    return None if np.array_equal(origin, np.arange(rows)) else origin


def _kind(kind: str, rows: int) -> str:
    return f"{kind}:{rows}" if rows else kind
