"""The items of an export or a delta → a vector database, streamed from the part files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from flm_torchrec.errors import RunError
from flm_torchrec.export.delta import load_delta
from flm_torchrec.export.manifest import DELTA, Vectors, load_manifest
from flm_torchrec.export.parts import ATTRIBUTE, ExportRows
from flm_torchrec.export.stores.protocol import ItemBatch, Store
from flm_torchrec.export.vectors import decode
from flm_torchrec.names import nearest
from flm_torchrec.safe_text import first_line, redact, redact_address

STORES = {
    "qdrant": ("qdrant", "Qdrant"),
    "milvus": ("milvus", "Milvus"),
    "lancedb": ("lancedb", "LanceDB"),
    "postgresql": ("pgvector", "PgVector"),
}
"""By the start of --to: module and class. The module's name is also that of the extra that installs the client."""
BATCH = 1_000
"""Rows that are sent at once."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
"""Names of collections that every database takes."""


@dataclass(frozen=True)
class LoadReport:
    """What a load has changed, in items."""

    upserted: int
    deleted: int
    total: int
    """In the collection afterwards."""


@contextmanager
def opened(to: str, collection: str) -> Iterator[Store]:
    """The store that `--to` names.

    Raises:
        RunError: the store is unknown, not installed or not there, or it refuses a request.
    """
    kind, _, location = to.partition(":")
    shown = redact_address(to)
    if kind not in STORES or not location:
        raise RunError(
            f"--to '{shown}': wants KIND:PLACE, KIND one of {', '.join(STORES)}; {nearest(kind, list(STORES))}"
        )
    if not NAME.fullmatch(collection):
        raise RunError(f"--collection '{collection}': use letters, digits and underscores, 63 at most")
    module, name = STORES[kind]
    try:
        opener = getattr(importlib.import_module(f"flm_torchrec.export.stores.{module}"), name)
    except ModuleNotFoundError as error:
        raise RunError(f"--to {kind}: needs {error.name}; pip install 'flm_torchrec[{module}]'") from error
    try:
        store = opener(to if kind == "postgresql" else location, collection)
        try:
            yield store
        finally:
            store.close()
    except RunError as error:
        raise RunError(redact(str(error), to)) from error
    except (*opener.errors, OSError, ValueError) as error:
        raise RunError(f"--to {shown}: {first_line(error, to)}") from error


def load(folder: Path, to: str, collection: str, vectors: Vectors) -> LoadReport:
    """Put the items of an export into a collection, or update it by a delta. A second call changes nothing.

    Args:
        to: KIND:PLACE, such as qdrant:FOLDER, milvus:FILE.db, lancedb:FOLDER, postgresql://USER@HOST/DATABASE.
        vectors: the column of the items that is loaded.

    Raises:
        RunError: the export is incomplete, or the store refuses it.
    """
    removed = pa.array([], pa.string())
    if (folder / DELTA).is_file():
        delta = load_delta(folder)
        manifest, rows = delta.whole, delta.rows(folder, "items")
        removed = delta.removed_keys(folder, "items")
    else:
        manifest = load_manifest(folder)
        rows = ExportRows(folder, manifest, "items")
    upserted = 0
    with opened(to, collection) as store:
        store.create(manifest.dim)
        for start in range(0, len(removed), BATCH):
            store.delete(removed.slice(start, BATCH).to_pylist())
        for part in rows.parts():
            for start in range(0, len(part), BATCH):
                batch = _batch(part.slice(start, BATCH), vectors, manifest.model_version)
                store.upsert(batch)
                upserted += len(batch.keys)
        return LoadReport(upserted, len(removed), store.count())


def _batch(rows: pa.Table, vectors: Vectors, version: str) -> ItemBatch:
    features = [name for name in rows.column_names if name.startswith(ATTRIBUTE)]
    values = {name.removeprefix(ATTRIBUTE): rows[name].to_pylist() for name in features}
    payloads = [
        {"title": title, "attributes": {f: v[i] for f, v in values.items()}, "model_version": version}
        for i, title in enumerate(rows["title"].to_pylist())
    ]
    return ItemBatch(rows["item_key"].to_pylist(), decode(rows[vectors]), payloads)
