"""A source → the layout of docs/layout.md: clean, order, vocabulary, features, files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from flm_torchrec.data.clean import Dropped, deduplicate, drop_bad, in_order, k_core
from flm_torchrec.data.features import Encoded, encode
from flm_torchrec.data.raw import Raw
from flm_torchrec.data.rows import by_table
from flm_torchrec.data.schema import Entity, Schema, Table
from flm_torchrec.errors import DataError

ROWS_PER_FILE = 5_000_000


@dataclass(frozen=True)
class Options:
    """How to clean and encode; defaults change as little as can be."""

    k_core: int = 0
    min_value: float | None = None
    dedup: str = "none"
    min_count: int = 1
    text_buckets: int = 10_000
    keep_unseen_items: bool = False
    tables: dict[str, Table] = field(default_factory=dict)


def prepare(raw: Raw, output: Path, options: Options, overwrite: bool = False) -> dict[str, Any]:
    """Write the layout; returns the report. The folder appears whole or not at all.

    Args:
        overwrite: replace older prepared data; anything else in the way is never replaced.

    Raises:
        DataError: no rows are left, a feature cannot be encoded, or the folder is in use.
    """
    check_output(output, overwrite)
    dropped = Dropped()
    frame = drop_bad(raw.interactions, dropped, options.min_value)
    frame = deduplicate(in_order(frame), options.dedup, dropped)
    frame = k_core(frame, options.k_core, dropped)
    if len(frame) == 0:
        reason = max(dropped.counts, key=dropped.counts.__getitem__, default="the source has none")
        where = dropped.examples.get(reason, [raw.name])[0]
        raise DataError(
            f"{raw.name}: none of {len(raw.interactions)} rows is left (most dropped: {reason}; e.g. {where});"
            " mend the file, the column mapping or the filters"
        )
    items = _entities(raw.items, frame["item"], options.keep_unseen_items)
    users = _entities(raw.users, frame["user"], keep_unseen=False)
    events = frame["event"].unique().sort().to_list()
    encoded = [
        encode(f, (items if f.entity == "item" else users)[f.name], options.min_count, options.text_buckets)
        for f in raw.features
    ]
    features = tuple(e.feature for e in encoded)
    schema = Schema(
        name=raw.name, source=raw.source, users=len(users), items=len(items), interactions=len(frame),
        events=tuple(events), timestamps=raw.timestamps, title=raw.title,
        features=features, tables=by_table(options.tables, features),
    )  # fmt: skip
    report = _report(raw, frame, schema, items, dropped, options)
    with _whole(output) as folder:
        _write_interactions(folder, frame, users, items, events)
        for entity, keys in (("item", items), ("user", users)):
            _write_entity(folder, entity, keys, [e for e in encoded if e.feature.entity == entity])  # type: ignore[arg-type]
        _write_vocabularies(folder, encoded)
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


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end; until then `output` stays as it was."""
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
            fresh, old = Path(name) / "fresh", Path(name) / "old"
            fresh.mkdir()
            yield fresh
            if output.exists():
                output.rename(old)
            fresh.rename(output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or error}); give another --output") from error


def _entities(described: pl.DataFrame | None, seen: pl.Series, keep_unseen: bool) -> pl.DataFrame:
    """One row an entity, in the order of its id: by the text before the number at a key's end, then by number."""
    rows = pl.DataFrame({"key": seen.unique()}).with_columns(_seen=pl.lit(True))
    if described is not None:
        rows = rows.join(described, "key", "full" if keep_unseen else "left", coalesce=True)
    parts = [pl.col("key").str.extract(r"^(.*?)(\d{1,18})$", group) for group in (1, 2)]
    # Two keys such as 7 and 07 tie by number; the key itself settles it.
    ordered = rows.sort(pl.coalesce(parts[0], "key"), parts[1].cast(pl.Int64), "key")
    return ordered.with_columns(pl.col("_seen").fill_null(False))


def _write_interactions(
    folder: Path, frame: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame, events: list[str]
) -> None:
    def ids(column: str, keys: pl.Series, kind: type[pl.Int32] | type[pl.Int64]) -> pl.Expr:
        return pl.col(column).replace_strict(keys, pl.int_range(len(keys), dtype=kind, eager=True), return_dtype=kind)

    rows = frame.select(
        ids("user", users["key"], pl.Int64).alias("user_id"),
        ids("item", items["key"], pl.Int64).alias("item_id"),
        pl.col("timestamp").cast(pl.Int64),
        ids("event", pl.Series(events), pl.Int32).alias("event"),
        pl.col("value").cast(pl.Float32),
        *(["segment"] if "segment" in frame.columns else []),
    ).sort("user_id", maintain_order=True)
    (folder / "interactions").mkdir()
    ends = rows["user_id"].search_sorted(rows["user_id"][ROWS_PER_FILE - 1 :: ROWS_PER_FILE], side="right").to_list()
    for part, (start, end) in enumerate(zip([0, *ends], [*ends, len(rows)], strict=True)):
        if end > start:
            rows[start:end].write_parquet(folder / "interactions" / f"part-{part:05d}.parquet")


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
    raw: Raw, frame: pl.DataFrame, schema: Schema, items: pl.DataFrame, dropped: Dropped, options: Options
) -> dict[str, Any]:
    per_user = frame.group_by("user").len()["len"]
    quantiles = {f"{q:.0%}": per_user.quantile(q, "nearest") for q in (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)}
    known = [_known(items[f.name]) for f in raw.features if f.entity == "item"]
    bare = len(items) if not known else int((~np.any(known, axis=0)).sum())
    return {
        "source": raw.source,
        "rows_read": len(raw.interactions),
        "rows_kept": len(frame),
        "dropped": dropped.to_json(),
        "duplicates": sum(n for reason, n in dropped.counts.items() if reason.startswith("duplicate")),
        "users": schema.users,
        "items": schema.items,
        "items_without_features": bare,
        "items_never_interacted": int((~items["_seen"]).sum()),
        "users_with_fewer_than_3_events": int((per_user < 3).sum()),
        "events_per_user": quantiles,
        "sparsity": 1 - len(frame) / (schema.users * schema.items),
        "options": asdict(options),
        **raw.notes,
        **({"oracle": raw.oracle} if raw.oracle and len(frame) == len(raw.interactions) else {}),
    }


def _known(column: pl.Series) -> np.ndarray:
    """Where an item has the feature: neither null nor an empty list or text."""
    known = column.is_not_null()
    if isinstance(column.dtype, pl.List):
        known &= column.list.len().fill_null(0) > 0
    elif column.dtype == pl.String:
        known &= (column != "").fill_null(False)
    return known.to_numpy()
