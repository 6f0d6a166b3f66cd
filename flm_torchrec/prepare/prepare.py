"""A source → the layout of docs/layout.md, out of core: intake, vocabulary, cleaning, features, files.

Shards become Parquet files of good rows (intake.py). Keys become ids. Rows go to buckets of complete users, each small
enough for memory, in which an engine's SQL marks duplicates. The core is counted over all buckets. Each bucket becomes
a file. Only keys and features of users and items are ever held in memory for all rows.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil

from flm_torchrec.claim import claim
from flm_torchrec.data.keys import RULE
from flm_torchrec.data.schema import Entity, Schema, sparsity
from flm_torchrec.errors import DataError
from flm_torchrec.files import put_in_place
from flm_torchrec.prepare.dropped import check_share_dropped, how_to_mend, warnings_of
from flm_torchrec.prepare.engine import DuckEngine, Engine
from flm_torchrec.prepare.features import EncodedFeature, encode, encode_context
from flm_torchrec.prepare.hash_users import hash_keys
from flm_torchrec.prepare.intake import Intake, ShardReport, shards_of
from flm_torchrec.prepare.interactions import InteractionCounts, Interactions
from flm_torchrec.prepare.memory import memory_bytes
from flm_torchrec.prepare.options import MachineOptions, PrepareOptions
from flm_torchrec.prepare.sources.source_data import SourceData
from flm_torchrec.prepare.table_options import by_table
from flm_torchrec.prepare.work_folder import work_folder

KEY_BYTES = 215
"""Memory of a user or an item while keys become ids, measured with keys of eight letters and one feature."""


@dataclass(frozen=True)
class Vocabulary:
    """Users and items that stay, in the order of their ids; ids of the interactions before cleaning lead to them."""

    users: pl.DataFrame
    """Columns key, _seen (has events) and one a feature."""
    items: pl.DataFrame
    new_user_ids: np.ndarray  # [users before cleaning] int64; -1: dropped
    new_item_ids: np.ndarray  # [items before cleaning] int64; -1: dropped


def prepare(
    source: SourceData,
    output: Path,
    options: PrepareOptions,
    overwrite: bool = False,
    machine: MachineOptions | None = None,
    secret: bytes = b"",
) -> dict[str, Any]:
    """Write the layout; returns the report. The folder appears complete or not at all.

    After a kill, the same call resumes with the shards that were not taken in yet.

    Args:
        overwrite: replace older prepared data; anything else at the output is never replaced.
        secret: keys of users become their HMAC-SHA256 under it; empty: they stay as they are.

    Raises:
        DataError: no rows are left, a feature cannot be encoded, or the folder is in use.
        InUse: another process writes the folder.
    """
    check_output(output, overwrite)
    output, shards = output.resolve(), shards_of(source)
    made_of = [source.source, options.min_value, *(shard.identity for shard in shards)]
    with ExitStack() as stack:
        stack.enter_context(claim(output))
        check_output(output, overwrite)  # another preparation may have written it in the meantime
        work = stack.enter_context(work_folder(output, made_of))
        engine = stack.enter_context(_engine(machine or MachineOptions(), work))
        intake = Intake(work, options.min_value)
        engine.shards(shards, intake)
        preparation = Preparation(source, options, engine, secret)
        report = preparation.write(work / "fresh", intake.report(len(shards)), intake.files(len(shards)))
        put_in_place(work / "fresh", output)
    return report


@dataclass(frozen=True)
class Preparation:
    """From the good rows of all shards to a prepared folder."""

    source: SourceData
    options: PrepareOptions
    engine: Engine
    secret: bytes

    def write(self, folder: Path, read: ShardReport, files: list[Path]) -> dict[str, Any]:
        """Make the folder; returns the report.

        Args:
            folder: does not exist yet; intermediate files go beside it.
            files: good rows, as the intake stored them.

        Raises:
            DataError: no rows are left, too many are dropped, or a feature cannot be encoded.
        """
        source, options = self.source, self.options
        if not files:
            raise self._nothing_left(read)
        check_share_dropped(source.name, read.rows_read, read.dropped, options.max_dropped)
        interactions = Interactions(self.engine, files, read.names, folder.parent, timestamps=source.timestamps)
        vocabulary, events = self._vocabulary(interactions, read)
        folder.mkdir()
        ids = vocabulary.new_user_ids, vocabulary.new_item_ids
        contexts = interactions.contexts_of(*ids, options)
        counts = interactions.write(folder / "interactions", *ids, contexts)
        if counts.weight == 0:
            raise DataError(f"{source.name}: the weight of every event is 0, so nothing counts; name another column")
        rows = {"user": vocabulary.users, "item": vocabulary.items}
        encoded = [
            encode_context(feature, contexts)
            if feature.entity == "event"
            else encode(feature, rows[feature.entity][feature.name], options)
            for feature in source.features
        ]
        features = tuple(one.feature for one in encoded)
        schema = Schema(
            name=source.name,
            source=source.source,
            users=len(vocabulary.users),
            items=len(vocabulary.items),
            interactions=int(counts.per_user.sum()),
            events=tuple(events),
            timestamps=source.timestamps,
            title=source.title,
            features=features,
            tables=by_table(options.tables, [f for f in features if f.entity != "event"]),
            weights=counts.weight is not None,
        )
        _write_entity(folder, "item", vocabulary.items, encoded)
        _write_entity(folder, "user", vocabulary.users, encoded)
        _write_vocabularies(folder, encoded)
        report = self._report(read, schema, counts, vocabulary.items)
        (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        schema.save(folder / "schema.yaml")  # last: what has a schema is complete
        return report

    def _vocabulary(self, interactions: Interactions, read: ShardReport) -> tuple[Vocabulary, list[str]]:
        """Clean the interactions; returns the users and items that stay, and the names of the event codes."""
        seen_users, seen_items, events = interactions.keys()
        check_keys(self.source.name, len(seen_users), len(seen_items))
        seen_users = seen_users.with_columns(shown=self._shown(seen_users["key"]))
        seen_users, seen_items = _numbered(seen_users, "shown"), _numbered(seen_items, "key")
        kept_users, kept_items = interactions.clean(seen_users, seen_items, events, self.options, read.dropped)
        if not len(kept_users):
            raise self._nothing_left(read)
        described = self.source.users
        if described is not None:
            described = described.with_columns(key=self._shown(described["key"]))
        users = _entities(described, seen_users["shown"].gather(kept_users), keep_unseen=False)
        items = _entities(self.source.items, seen_items["key"].gather(kept_items), self.options.keep_unseen_items)
        new_user_ids = _new_ids(seen_users["shown"], kept_users, users)
        return Vocabulary(users, items, new_user_ids, _new_ids(seen_items["key"], kept_items, items)), events

    def _shown(self, keys: pl.Series) -> pl.Series:
        """Keys of users as the output has them."""
        return pl.Series("shown", hash_keys(keys, self.secret), dtype=pl.String) if self.secret else keys

    def _nothing_left(self, read: ShardReport) -> DataError:
        counts, name = read.dropped.counts, self.source.name
        reason = max(counts, key=counts.__getitem__, default="the source has none")
        where = read.dropped.examples.get(reason, [name])[0]
        return DataError(
            f"{name}: none of {read.rows_read} rows is left (most dropped: {reason}; e.g. {where});"
            f" {how_to_mend(reason)}"
        )

    def _report(
        self, read: ShardReport, schema: Schema, counts: InteractionCounts, items: pl.DataFrame
    ) -> dict[str, Any]:
        """The contents of report.json."""
        source, dropped = self.source, read.dropped
        per_user = pl.Series(counts.per_user)
        quantiles = {f"{q:.0%}": per_user.quantile(q, "nearest") for q in (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)}
        has_feature = [_has_value(items[f.name]) for f in source.features if f.entity == "item"]
        bare = len(items) if not has_feature else int((~np.any(has_feature, axis=0)).sum())
        return {
            "source": source.source,
            "rows_read": read.rows_read,
            "rows_kept": schema.interactions,
            "dropped": dropped.to_json(),
            "duplicates": sum(n for reason, n in dropped.counts.items() if reason.startswith("duplicate")),
            "users": schema.users,
            "items": schema.items,
            "items_without_features": bare,
            "items_never_interacted": int((~items["_seen"]).sum()),
            "users_with_fewer_than_3_events": int((per_user < 3).sum()),
            "events_per_user": quantiles,
            **({"sessions": counts.sessions} if self.options.session_gap else {}),
            "sparsity": sparsity(counts.pairs, schema.users, schema.items),
            "warnings": [*source.warnings, *dropped.notes, *warnings_of(read.rows_read, schema.interactions, dropped)],
            "options": asdict(self.options),
            "ids": RULE,
            **source.notes,
            **({"oracle": source.oracle} if source.oracle and schema.interactions == read.rows_read else {}),
        }


def check_keys(name: str, users: int, items: int) -> None:
    """Check that the keys of users and items fit into the free memory.

    Raises:
        DataError: they do not.
    """
    needed, free = KEY_BYTES * (users + items), psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{name}: the keys of {users:,} users and {items:,} items need {needed / 2**30:,.1f} GiB ({KEY_BYTES} bytes"
            f" each), and {free / 2**30:,.1f} GiB are free; give a smaller --memory to DuckDB, or prepare on a machine"
            " with more memory"
        )


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace anything but older prepared data, and that only when asked.

    Raises:
        DataError: the folder is in use.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "schema.yaml").is_file():
        raise DataError(f"{output}: exists and holds no prepared data, so it is not replaced; give another --output")
    if not overwrite:
        raise DataError(f"{output}: exists; give another --output, or --overwrite to replace it")


def _engine(machine: MachineOptions, work: Path) -> AbstractContextManager[Engine]:
    spill = work / "spill"
    spill.mkdir()
    memory = machine.memory or memory_bytes("")
    if machine.engine == "duckdb":
        return DuckEngine(memory, machine.threads, spill)
    from flm_torchrec.prepare.spark import SparkEngine  # Imported here: optional.

    return SparkEngine(memory, machine.threads, spill)


def _entities(described: pl.DataFrame | None, seen: pl.Series, keep_unseen: bool) -> pl.DataFrame:
    """One row an entity, in the order of the ids: by the text before the number at a key's end, then by that number."""
    rows = pl.DataFrame({"key": seen.unique()}).with_columns(_seen=pl.lit(True))
    if described is not None:
        rows = rows.join(described, "key", "full" if keep_unseen else "left", coalesce=True)
    return ordered(rows, "key").with_columns(pl.col("_seen").fill_null(False))


def ordered(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    """Rows by a column of keys: by the text before the number at a key's end, then by that number."""
    parts = [pl.col(column).str.extract(r"^(.*?)(\d{1,18})$", group) for group in (1, 2)]
    # Two keys such as 7 and 07 tie by number; the key itself decides.
    return rows.sort(pl.coalesce(parts[0], column), parts[1].cast(pl.Int64), column)


def _numbered(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    """Rows in the order of a column of keys, with their numbers as `id`."""
    return ordered(rows, column).with_columns(id=pl.int_range(pl.len(), dtype=pl.Int64))


def _new_ids(keys: pl.Series, kept: np.ndarray, entities: pl.DataFrame) -> np.ndarray:
    """[keys] int64: the position of each key among the entities; -1 where it was not kept."""
    ids = np.full(len(keys), -1)
    positions = pl.DataFrame({"key": keys.gather(kept)}).join(
        entities.select("key", position=pl.int_range(pl.len())), "key", "left", maintain_order="left"
    )
    ids[kept] = positions["position"].to_numpy()
    return ids


def _write_entity(folder: Path, entity: Entity, rows: pl.DataFrame, encoded: list[EncodedFeature]) -> None:
    """Write users.parquet or items.parquet: id, key, features."""
    ids = pl.Series(f"{entity}_id", range(len(rows)), dtype=pl.Int64)
    columns = [ids, rows["key"].rename(f"{entity}_key")]
    for one in encoded:
        if one.feature.entity == entity:
            columns += [*one.columns[:-1], one.columns[-1].rename(one.feature.column)]
    pl.DataFrame(columns).write_parquet(folder / f"{entity}s.parquet")


def _write_vocabularies(folder: Path, encoded: list[EncodedFeature]) -> None:
    """Write the values of each categorical feature by code."""
    (folder / "vocab").mkdir()
    for one in encoded:
        if one.vocabulary is not None:
            one.vocabulary.write_parquet(folder / "vocab" / f"{one.feature.entity}_{one.feature.name}.parquet")


def _has_value(column: pl.Series) -> np.ndarray:
    """[rows] bool: neither null nor an empty list or text."""
    has = column.is_not_null()
    if isinstance(column.dtype, pl.List):
        has &= column.list.len().fill_null(0) > 0
    elif column.dtype == pl.String:
        has &= (column != "").fill_null(False)
    return has.to_numpy()
