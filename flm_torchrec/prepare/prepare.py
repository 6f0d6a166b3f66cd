"""A source → the layout of docs/layout.md, out of core: intake, vocabulary, cleaning, features, files.

Shards become Parquet files of good rows (intake.py). Keys become ids (entities.py). Rows go to buckets of complete
users, each small enough for memory, in which an engine's SQL marks duplicates. The core is counted over all buckets.
Each bucket becomes a file. Nothing is held in memory for all rows, users or items but the vocabularies of features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from flm_torchrec.claim import claim
from flm_torchrec.data.keys import RULE
from flm_torchrec.data.schema import Entity, Schema, sparsity
from flm_torchrec.data.times import NO_SECONDS
from flm_torchrec.errors import DataError
from flm_torchrec.files import put_in_place
from flm_torchrec.folders import SCHEMA
from flm_torchrec.prepare.dropped import check_share_dropped, how_to_mend, warnings_of
from flm_torchrec.prepare.engine import DuckEngine, Engine
from flm_torchrec.prepare.entities import (
    EntityRows,
    Features,
    FrameTable,
    Written,
    join_described,
    store_described,
    write_entity,
)
from flm_torchrec.prepare.features import EncodedFeature, context_feature, learn
from flm_torchrec.prepare.hash_users import hash_keys
from flm_torchrec.prepare.intake import Intake, ShardReport, shards_of
from flm_torchrec.prepare.interactions import InteractionCounts, Interactions
from flm_torchrec.prepare.memory import memory_bytes
from flm_torchrec.prepare.options import MachineOptions, PrepareOptions
from flm_torchrec.prepare.sources.source_data import SourceData
from flm_torchrec.prepare.sources.user_list import read_users
from flm_torchrec.prepare.table_options import by_table
from flm_torchrec.prepare.work_folder import work_folder

ENTITIES: tuple[Entity, ...] = ("item", "user")


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
        DataError: no rows are left, a feature cannot be encoded, an option needs times that the source does not have, a
            file cannot be read, or the folder is in use.
        InUse: another process writes the folder.
    """
    check_output(output, overwrite)
    _check_times(source, options)
    excluded = read_users(options.exclude_users).to_pylist() if options.exclude_users else []
    output, shards = output.resolve(), shards_of(source)
    made_of = [source.source, options.min_value, *(shard.identity for shard in shards)]
    with ExitStack() as stack:
        stack.enter_context(claim(output))
        check_output(output, overwrite)  # another preparation may have written it in the meantime
        work = stack.enter_context(work_folder(output, made_of))
        engine = stack.enter_context(_engine(machine or MachineOptions(), work))
        preparation = Preparation(source, options, engine, secret, excluded)
        preparation.describe(work)  # before the logs, which take longer: mistakes in it are told first
        intake = Intake(work, options.min_value)
        engine.shards(shards, intake)
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
    excluded: Sequence[str] = ()
    """Keys of users whose events are left out."""
    features: dict[Entity, Features] = field(default_factory=dict)
    """Of items and users, as `describe` stored them."""
    notes: list[str] = field(default_factory=list)
    """What was not read of them as the user may expect, a line each."""

    def describe(self, folder: Path) -> None:
        """Read what describes items and users.

        Raises:
            DataError: it cannot be read, or has two rows of a key.
        """
        for entity, frame in zip(ENTITIES, (self.source.items, self.source.users), strict=True):
            hashed = self._hash if entity == "user" and self.secret else None
            own = folder / f"{entity}s"
            own.mkdir()
            table = self.source.tables.get(entity) if frame is None else FrameTable(frame)
            self.features[entity] = {} if table is None else store_described(self.engine, entity, own, table, hashed)
            self.notes.extend(table.notes if table is not None else ())

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
        events, seen = self._cleaned(interactions, read)
        folder.mkdir()
        rows = {entity: self._rows(entity, folder.parent) for entity in ENTITIES}
        ids = rows["user"].new_ids(seen["user"]), rows["item"].new_ids(seen["item"])
        contexts = interactions.contexts_of(*ids, options)
        counts = interactions.write(folder / "interactions", *ids, contexts)
        if counts.weight == 0:
            raise DataError(f"{source.name}: the weight of every event is 0, so nothing counts; name another column")
        encoded = [
            context_feature(feature, contexts)
            if feature.entity == "event"
            else learn(feature, rows[feature.entity].column(feature.name), options)
            for feature in source.features
        ]
        written = {
            entity: write_entity(rows[entity], [e for e in encoded if e.feature.entity == entity], folder)
            for entity in ENTITIES
        }
        features = tuple(one.feature for one in encoded)
        schema = Schema(
            name=source.name,
            source=source.source,
            users=written["user"].rows,
            items=written["item"].rows,
            interactions=counts.per_user.events,
            events=tuple(events),
            timestamps=source.timestamps,
            title=source.title,
            features=features,
            tables=by_table(options.tables, [f for f in features if f.entity != "event"]),
            weights=counts.weight is not None,
        )
        _write_vocabularies(folder, encoded)
        report = self._report(read, schema, counts, written["item"])
        (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        schema.save(folder / SCHEMA)  # last: what has a schema is complete
        return report

    def _cleaned(self, interactions: Interactions, read: ShardReport) -> tuple[list[str], dict[Entity, int]]:
        """Code and clean the interactions; returns the names of the event codes, and the numbers of keys."""
        hashed = self._hash if self.secret else None
        if self.excluded and not interactions.exclude(self.excluded, hashed, read.dropped):
            raise self._nothing_left(read)
        users, items, events = interactions.number(hashed)
        if not interactions.clean(events, self.options, read.dropped):
            raise self._nothing_left(read)
        return events, {"user": users, "item": items}

    def _rows(self, entity: Entity, folder: Path) -> EntityRows:
        """The users or items that stay, with what describes them."""
        described = self.source.items is not None or "item" in self.source.tables
        unseen = entity == "item" and described and self.options.keep_unseen_items
        return join_described(
            self.engine,
            entity,
            folder / f"{entity}s",
            self.features[entity],
            keep_unseen=unseen,
            withhold=unseen and self.options.min_users > 1,
        )

    def _hash(self, keys: pl.Series) -> pl.Series:
        """Keys of users as the output has them."""
        return pl.Series(hash_keys(keys, self.secret), dtype=pl.String)

    def _nothing_left(self, read: ShardReport) -> DataError:
        counts, name = read.dropped.counts, self.source.name
        reason = max(counts, key=counts.__getitem__, default="the source has none")
        return DataError(
            f"{name}: none of {read.rows_read} rows is left, most dropped: {reason}{read.dropped.example(reason)};"
            f" {how_to_mend(reason)}"
        )

    def _report(self, read: ShardReport, schema: Schema, counts: InteractionCounts, items: Written) -> dict[str, Any]:
        """The contents of report.json."""
        source, dropped = self.source, read.dropped
        return {
            "source": source.source,
            "rows_read": read.rows_read,
            "rows_kept": schema.interactions,
            "dropped": dropped.to_json(),
            "duplicates": sum(n for reason, n in dropped.counts.items() if reason.startswith("duplicate")),
            "users": schema.users,
            "items": schema.items,
            "items_without_features": items.bare,
            "items_never_interacted": items.never_seen,
            "users_with_fewer_than_3_events": counts.per_user.fewer_than(3),
            "events_per_user": counts.per_user.quantiles(),
            **({"sessions": counts.sessions} if self.options.session_gap else {}),
            "sparsity": sparsity(counts.pairs, schema.users, schema.items),
            "warnings": [
                *source.warnings,
                *self.notes,
                *dropped.notes,
                *warnings_of(read.rows_read, schema.interactions, dropped),
                *([f"{NO_SECONDS}; write them as 2024-03-31"] if counts.day_numbers else ()),
            ],
            "options": asdict(self.options),
            "ids": RULE,
            **source.notes,
            **({"oracle": source.oracle} if source.oracle and schema.interactions == read.rows_read else {}),
        }


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace anything but older prepared data, and that only when asked.

    Raises:
        DataError: the folder is in use.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / SCHEMA).is_file():
        raise DataError(f"{output}: exists and holds no prepared data, so it is not replaced; give another --output")
    if not overwrite:
        raise DataError(f"{output}: exists; give another --output, or --overwrite to replace it")


def _check_times(source: SourceData, options: PrepareOptions) -> None:
    """Raise DataError where an option counts seconds, and the source has only an order."""
    given = {"--session-gap": options.session_gap > 0, "--dedup window": options.dedup == "window"}
    for option in (option for option, used in given.items() if used and not source.timestamps):
        raise DataError(
            f"{source.name}: has no timestamps, which {option} needs; name their column in --columns, or leave it out"
        )


def _engine(machine: MachineOptions, work: Path) -> AbstractContextManager[Engine]:
    spill = work / "spill"
    spill.mkdir()
    memory = machine.memory or memory_bytes("")
    if machine.engine == "duckdb":
        return DuckEngine(memory, machine.threads, spill)
    from flm_torchrec.prepare.spark import SparkEngine  # Imported here: optional.

    return SparkEngine(memory, machine.threads, spill)


def _write_vocabularies(folder: Path, encoded: list[EncodedFeature]) -> None:
    """Write the values of each categorical feature by code."""
    (folder / "vocab").mkdir()
    for one in encoded:
        if one.vocabulary is not None:
            one.vocabulary.write_parquet(folder / "vocab" / f"{one.feature.entity}_{one.feature.name}.parquet")
