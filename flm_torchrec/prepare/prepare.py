"""A source → the layout of docs/layout.md, out of core: intake, vocabulary, cleaning, features, files.

Shards become Parquet files of good rows (intake.py); keys become ids; rows go to buckets of whole users, each small
enough for memory, where an engine's SQL marks duplicates; a core is counted over all of them; each bucket becomes a
file. Only keys and features of users and items are ever held whole.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flm_torchrec.claim import claim
from flm_torchrec.data.keys import RULE
from flm_torchrec.data.schema import Entity, Schema, Table, sparsity
from flm_torchrec.errors import DataError
from flm_torchrec.files import put_in_place
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.dropped import check_losses, mend, warning_of
from flm_torchrec.prepare.engine import DuckEngine, Engine
from flm_torchrec.prepare.features import Coding, Encoded, encode
from flm_torchrec.prepare.hash_users import hash_keys
from flm_torchrec.prepare.intake import Intake, shards_of
from flm_torchrec.prepare.interactions import Cleaning, Interactions, Written
from flm_torchrec.prepare.sources.raw import Raw
from flm_torchrec.prepare.table_options import by_table
from flm_torchrec.prepare.work_folder import work_folder

ROWS_PER_FILE = 2_000_000
"""Rows of a bucket at most, unless one user has more."""
ROWS_PER_GROUP = 131_072
"""What the loader reads at once."""


@dataclass(frozen=True)
class Options:
    """How to clean and encode; defaults change as little as can be."""

    k_core: int = 0
    min_user_events: int = 0
    min_item_events: int = 0
    min_value: float | None = None
    dedup: str = "none"
    dedup_window: int = 0
    """Seconds, of dedup 'window'."""
    session_gap: int = 0
    """Seconds; 0: no sessions."""
    min_count: int = 1
    text_buckets: int = 10_000
    text_ngrams: int = 1
    quantiles: int = 100
    keep_unseen_items: bool = False
    max_dropped: float = 0.9
    """Share of the rows that may be unreadable or lack what an event needs."""
    tables: dict[str, Table] = field(default_factory=dict)

    def least(self, entity: Entity) -> int:
        """Events that every user or item must have."""
        return max(self.k_core, self.min_user_events if entity == "user" else self.min_item_events)


@dataclass(frozen=True)
class Machine:
    """What to prepare with; it changes no byte of the result."""

    engine: str = "duckdb"
    memory: int = 0
    """Bytes; 0: what the machine has."""
    threads: int = 0
    """0: all cores."""


def prepare(
    raw: Raw, output: Path, options: Options, overwrite: bool = False, machine: Machine | None = None,
    secret: bytes = b"",
) -> dict[str, Any]:  # fmt: skip
    """Write the layout; returns the report. The folder appears whole or not at all.

    After a kill, the same call goes on with the shards that were not taken in yet.

    Args:
        overwrite: replace older prepared data; anything else in the way is never replaced.
        secret: keys of users become their HMAC-SHA256 under it; empty: they stay as they are.

    Raises:
        DataError: no rows are left, a feature cannot be encoded, or the folder is in use.
        InUse: another process writes the folder.
    """
    check_output(output, overwrite)
    output, shards = output.resolve(), shards_of(raw)
    made_of = [raw.source, options.min_value, *(shard.identity for shard in shards)]
    with ExitStack() as held:
        held.enter_context(claim(output))
        check_output(output, overwrite)  # another preparation may have written it until now
        work = held.enter_context(work_folder(output, made_of))
        engine = held.enter_context(_engine(machine or Machine(), work))
        intake = Intake(work, options.min_value)
        engine.shards(shards, intake)
        report = _fill(work / "fresh", raw, options, intake, len(shards), engine, secret)
        put_in_place(work / "fresh", output)
    return report


def _fill(
    folder: Path, raw: Raw, options: Options, intake: Intake, shards: int, engine: Engine, secret: bytes
) -> dict[str, Any]:
    """Make the prepared folder; returns the report."""
    names, rows_read, dropped = intake.report(shards)
    files = intake.files(shards)
    if not files:
        raise _nothing_left(raw, rows_read, dropped)
    check_losses(raw.name, rows_read, dropped, options.max_dropped)
    cleaning = Cleaning(
        options.dedup, options.dedup_window, options.session_gap, options.least("user"), options.least("item"),
        raw.timestamps,
    )  # fmt: skip
    interactions = Interactions(engine, files, intake.folder, names, ROWS_PER_FILE)
    seen_users, seen_items, events = interactions.keys()
    seen_users = seen_users.with_columns(shown=pl.Series(_shown(seen_users["key"], secret), dtype=pl.String))
    seen_users, seen_items = _numbered(_ordered(seen_users, "shown")), _numbered(_ordered(seen_items, "key"))
    kept_users, kept_items = interactions.clean(seen_users, seen_items, events, cleaning, dropped)
    if not len(kept_users):
        raise _nothing_left(raw, rows_read, dropped)
    described = raw.users
    if described is not None and secret:
        described = described.with_columns(key=pl.Series(_shown(described["key"], secret), dtype=pl.String))
    users = _entities(described, seen_users["shown"].gather(kept_users), keep_unseen=False)
    items = _entities(raw.items, seen_items["key"].gather(kept_items), options.keep_unseen_items)
    folder.mkdir()
    written = interactions.write(
        folder / "interactions", _new_ids(seen_users["shown"], kept_users, users),
        _new_ids(seen_items["key"], kept_items, items), ROWS_PER_GROUP,
    )  # fmt: skip
    coding = Coding(options.min_count, options.text_buckets, options.text_ngrams, options.quantiles)
    encoded = [encode(f, (items if f.entity == "item" else users)[f.name], coding) for f in raw.features]
    features = tuple(e.feature for e in encoded)
    schema = Schema(
        name=raw.name, source=raw.source, users=len(users), items=len(items), interactions=int(written.per_user.sum()),
        events=tuple(events), timestamps=raw.timestamps, title=raw.title,
        features=features, tables=by_table(options.tables, features),
    )  # fmt: skip
    for entity, keys in (("item", items), ("user", users)):
        _write_entity(folder, entity, keys, [e for e in encoded if e.feature.entity == entity])  # type: ignore[arg-type]
    _write_vocabularies(folder, encoded)
    report = _report(raw, rows_read, written, schema, items, dropped, options)
    (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    schema.save(folder / "schema.yaml")
    return report


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


def _engine(machine: Machine, work: Path) -> AbstractContextManager[Engine]:
    spill = work / "spill"
    spill.mkdir()
    if machine.engine == "duckdb":
        return DuckEngine(machine.memory, machine.threads, spill)
    from flm_torchrec.prepare.spark import SparkEngine  # Imported here: optional.

    return SparkEngine(machine.memory, machine.threads, spill)


def _nothing_left(raw: Raw, rows_read: int, dropped: Dropped) -> DataError:
    reason = max(dropped.counts, key=dropped.counts.__getitem__, default="the source has none")
    where = dropped.examples.get(reason, [raw.name])[0]
    return DataError(
        f"{raw.name}: none of {rows_read} rows is left (most dropped: {reason}; e.g. {where}); {mend(reason)}"
    )


def _entities(described: pl.DataFrame | None, seen: pl.Series, keep_unseen: bool) -> pl.DataFrame:
    """One row an entity, in the order of its id: by the text before the number at a key's end, then by number."""
    rows = pl.DataFrame({"key": seen.unique()}).with_columns(_seen=pl.lit(True))
    if described is not None:
        rows = rows.join(described, "key", "full" if keep_unseen else "left", coalesce=True)
    return _ordered(rows, "key").with_columns(pl.col("_seen").fill_null(False))


def _ordered(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    parts = [pl.col(column).str.extract(r"^(.*?)(\d{1,18})$", group) for group in (1, 2)]
    # Two keys such as 7 and 07 tie by number; the key itself settles it.
    return rows.sort(pl.coalesce(parts[0], column), parts[1].cast(pl.Int64), column)


def _numbered(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(id=pl.int_range(pl.len(), dtype=pl.Int64))


def _shown(keys: pl.Series, secret: bytes) -> list[str]:
    return hash_keys(keys, secret) if secret else keys.to_list()


def _new_ids(keys: pl.Series, kept: np.ndarray, entities: pl.DataFrame) -> np.ndarray:
    """[keys] int64: where each key stands among the entities; -1 where it was not kept."""
    found = np.full(len(keys), -1)
    place = pl.DataFrame({"key": keys.gather(kept)}).join(
        entities.select("key", place=pl.int_range(pl.len())), "key", "left", maintain_order="left"
    )
    found[kept] = place["place"].to_numpy()
    return found


def _write_entity(folder: Path, entity: Entity, rows: pl.DataFrame, encoded: list[Encoded]) -> None:
    ids = pl.Series(f"{entity}_id", range(len(rows)), dtype=pl.Int64)
    columns = [ids, rows["key"].rename(f"{entity}_key")]
    for e in encoded:
        columns += [*e.columns[:-1], e.columns[-1].rename(e.feature.column)]
    pl.DataFrame(columns).write_parquet(folder / f"{entity}s.parquet")


def _write_vocabularies(folder: Path, encoded: list[Encoded]) -> None:
    (folder / "vocab").mkdir()
    for e in encoded:
        if e.vocabulary is not None:
            e.vocabulary.write_parquet(folder / "vocab" / f"{e.feature.entity}_{e.feature.name}.parquet")


def _report(
    raw: Raw, rows_read: int, written: Written, schema: Schema, items: pl.DataFrame, dropped: Dropped, options: Options
) -> dict[str, Any]:
    per_user = pl.Series(written.per_user)
    quantiles = {f"{q:.0%}": per_user.quantile(q, "nearest") for q in (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)}
    known = [_known(items[f.name]) for f in raw.features if f.entity == "item"]
    bare = len(items) if not known else int((~np.any(known, axis=0)).sum())
    return {
        "source": raw.source,
        "rows_read": rows_read,
        "rows_kept": schema.interactions,
        "dropped": dropped.to_json(),
        "duplicates": sum(n for reason, n in dropped.counts.items() if reason.startswith("duplicate")),
        "users": schema.users,
        "items": schema.items,
        "items_without_features": bare,
        "items_never_interacted": int((~items["_seen"]).sum()),
        "users_with_fewer_than_3_events": int((per_user < 3).sum()),
        "events_per_user": quantiles,
        **({"sessions": written.sessions} if options.session_gap else {}),
        "sparsity": sparsity(written.pairs, schema.users, schema.items),
        "warnings": [*raw.warnings, *dropped.notes, *warning_of(rows_read, schema.interactions, dropped)],
        "options": asdict(options),
        "ids": RULE,
        **raw.notes,
        **({"oracle": raw.oracle} if raw.oracle and schema.interactions == rows_read else {}),
    }


def _known(column: pl.Series) -> np.ndarray:
    """Where an item has the feature: neither null nor an empty list or text."""
    known = column.is_not_null()
    if isinstance(column.dtype, pl.List):
        known &= column.list.len().fill_null(0) > 0
    elif column.dtype == pl.String:
        known &= (column != "").fill_null(False)
    return known.to_numpy()
