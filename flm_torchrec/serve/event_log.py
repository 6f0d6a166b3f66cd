"""The log of a store of live events, as Parquet files that `flm follow` and `flm prepare` read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.claim import claim
from flm_torchrec.errors import ConfigError
from flm_torchrec.files import replacing_file, telling, write_text
from flm_torchrec.serve.live_event import LoggedEvent
from flm_torchrec.serve.live_store import LiveStore

COLUMNS = {
    "user": pa.string(),
    "item": pa.string(),
    "timestamp": pa.int64(),
    "event": pa.string(),
    "value": pa.float64(),
}
"""Columns of every file, with their types; a feature of events has a column of texts besides."""
FILE_EVENTS = 500_000
"""Events of a file: `flm follow` learns from a file at a time."""


@dataclass
class WrittenEvents:
    """What `export_events` has done."""

    written: int = 0
    missing: int = 0
    """Events before them that the store has no longer: its limits dropped them, or their user was forgotten."""
    left_out: dict[str, int] = field(default_factory=dict)
    """By feature of events that was not asked for, the events written without its value."""


def check_names(features: Sequence[str]) -> None:
    """Raise ConfigError where features of events cannot all have a column."""
    for name in features:
        if name in COLUMNS or features.count(name) > 1:
            what = "is named twice" if name not in COLUMNS else "is a column that every event has"
            raise ConfigError(f"--event-features: '{name}' {what}; leave it out")


def export_events(store: LiveStore, folder: Path, features: Sequence[str] = ()) -> WrittenEvents:
    """Write the events that the folder does not have into new files.

    A file is named `events-STORE-FIRST-LAST.parquet` by the store and by the numbers of its events, so the next call
    goes on behind the last one. Columns: those of COLUMNS, then the features; events in the order in which they came.

    Args:
        features: those of the events' contexts to write, null where an event has none.

    Raises:
        RunError: the folder cannot be written, or another process writes it.
        StoreError: the store cannot be read.
    """
    with claim(folder), telling(folder):
        folder.mkdir(parents=True, exist_ok=True)
        after, done = _last(folder, store.identity()), WrittenEvents()
        for rows in _chunks(store, after):
            first, last = rows[0].number, rows[-1].number
            if not done.written:
                done.missing = first - after - 1
            file = folder / f"events-{store.identity()}-{first:012d}-{last:012d}.parquet"
            with replacing_file(file) as fresh:
                pq.write_table(_table(rows, features), fresh)
            done.written += len(rows)
            for name in (name for row in rows for name in row.context if name not in features):
                done.left_out[name] = done.left_out.get(name, 0) + 1
    return done


def export_items(store: LiveStore, file: Path) -> int:
    """Write all cold items as JSON lines for `flm prepare --items`: item_id, features, and title, null without one.

    Returns their number.

    Raises:
        RunError: the file cannot be written.
        StoreError: the store cannot be read.
    """
    items = store.items_after(0)
    rows = ({"title": item.title or None, **item.features, "item_id": item.key} for item in items)
    with telling(file):
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(items)


def _last(folder: Path, store: str) -> int:
    """Number of the last event of the store that the folder has; 0 without any."""
    name = re.compile(rf"events-{store}-\d{{12}}-(\d{{12}})\.parquet")
    found = [name.fullmatch(file.name) for file in folder.iterdir()]
    return max((int(match[1]) for match in found if match), default=0)


def _chunks(store: LiveStore, after: int) -> Iterator[list[LoggedEvent]]:
    while rows := store.log(after, FILE_EVENTS):
        yield rows
        after = rows[-1].number


def _table(rows: list[LoggedEvent], features: Sequence[str]) -> pa.Table:
    columns = {name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in COLUMNS.items()}
    contexts = {name: pa.array([row.context.get(name) for row in rows], pa.string()) for name in features}
    return pa.table({**columns, **contexts})
