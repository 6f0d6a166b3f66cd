"""The log of a store of live events, as Parquet files that `flm follow` and `flm prepare` read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.claim import claim
from flm_torchrec.files import replacing_file, telling, write_text
from flm_torchrec.serve.live_store import LiveStore

COLUMNS = pa.schema(
    [("user", pa.string()), ("item", pa.string()), ("timestamp", pa.int64()), ("event", pa.string()),
     ("value", pa.float64())]
)  # fmt: skip
FILE_EVENTS = 500_000
"""Events of a file: `flm follow` learns from a file at a time."""


def export_events(store: LiveStore, folder: Path) -> tuple[int, int]:
    """Write the events that the folder does not have into new files; their number, and that of events dropped before.

    A file is named `events-STORE-FIRST-LAST.parquet` by the store and by the numbers of its events, so the next call
    goes on behind the last one. Columns: user, item, timestamp, event, value, in the order in which events came.

    Raises:
        RunError: the folder cannot be written, or another process writes it.
        StoreError: the store cannot be read.
    """
    with claim(folder), telling(folder):
        folder.mkdir(parents=True, exist_ok=True)
        after = _last(folder, store.identity())
        written = dropped = 0
        for rows in _chunks(store, after):
            first, last = rows[0][0], rows[-1][0]
            if not written:
                dropped = first - after - 1
            file = folder / f"events-{store.identity()}-{first:012d}-{last:012d}.parquet"
            with replacing_file(file) as fresh:
                columns = [pa.array(column, kind) for column, kind in zip(_columns(rows), COLUMNS.types, strict=True)]
                pq.write_table(pa.table(columns, schema=COLUMNS), fresh)
            written += len(rows)
    return written, dropped


def export_items(store: LiveStore, file: Path) -> int:
    """Write all cold items as JSON lines for `flm prepare --items`: item_id, features, and title; their number.

    Raises:
        RunError: the file cannot be written.
        StoreError: the store cannot be read.
    """
    items = store.items_after(0)
    rows = ({"title": item.title, **item.features, "item_id": item.key} for item in items)
    with telling(file):
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(items)


def _last(folder: Path, store: str) -> int:
    """Number of the last event of the store that the folder has; 0 without any."""
    name = re.compile(rf"events-{store}-\d{{12}}-(\d{{12}})\.parquet")
    found = [name.fullmatch(file.name) for file in folder.iterdir()]
    return max((int(match[1]) for match in found if match), default=0)


def _chunks(store: LiveStore, after: int) -> Iterator[list[tuple[int, str, str, int, str, float]]]:
    while rows := store.log(after, FILE_EVENTS):
        yield rows
        after = rows[-1][0]


def _columns(rows: list[tuple[int, str, str, int, str, float]]) -> Iterator[list[object]]:
    """Columns of rows, without the number."""
    for position in range(1, len(rows[0])):
        yield [row[position] for row in rows]
