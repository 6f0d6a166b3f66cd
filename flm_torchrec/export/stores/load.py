"""The items or users of an export or a delta → a vector database, streamed from the part files."""

from __future__ import annotations

import importlib
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.config.heads import FUSED, REPRESENTATIONS
from flm_torchrec.data.keys import are_tombstones
from flm_torchrec.errors import RunError
from flm_torchrec.export.delta import load_delta
from flm_torchrec.export.manifest import load_manifest
from flm_torchrec.export.parts import ATTRIBUTE, VIEWS, Entity, ExportRows
from flm_torchrec.export.stores.protocol import Store, StoreRows
from flm_torchrec.export.vectors import decode
from flm_torchrec.folders import DELTA
from flm_torchrec.names import nearest
from flm_torchrec.safe_text import first_line, redact, redact_address

STORES = {
    "qdrant": ("qdrant", "Qdrant"),
    "milvus": ("milvus", "Milvus"),
    "lancedb": ("lancedb", "LanceDB"),
    "postgresql": ("pgvector", "PgVector"),
    "opensearch": ("opensearch", "OpenSearchIndex"),
}
"""By the start of --to: module and class. The module's name is also that of the extra that installs the client."""
BATCH = 1_000
"""Rows that are sent at once."""
NO_ANSWER = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
"""Names of collections that every database takes."""


@dataclass(frozen=True)
class LoadReport:
    """What a load has changed, in rows."""

    upserted: int
    deleted: int
    total: int
    """In the collection afterwards."""


@contextmanager
def opened(to: str, collection: str, entity: Entity = "items", option: str = "--to") -> Iterator[Store]:
    """The store of items or users that an option names.

    Raises:
        RunError: the store is unknown, not installed or not there, or it refuses a request.
    """
    kind, _, location = to.partition(":")
    shown = redact_address(to)
    if kind not in STORES or not location:
        hint = f"give the place, such as {kind}:…" if kind in STORES else nearest(kind, list(STORES))
        raise RunError(f"{option} '{shown}': wants KIND:PLACE, KIND one of {', '.join(STORES)}; {hint}")
    if not NAME.fullmatch(collection):
        raise RunError(f"--collection '{collection}': use letters, digits and underscores, 63 at most")
    module, name = STORES[kind]
    try:
        opener = getattr(importlib.import_module(f"flm_torchrec.export.stores.{module}"), name)
    except ModuleNotFoundError as error:
        raise RunError(f"{option} {kind}: needs {error.name}; pip install 'flm_torchrec[{module}]'") from error
    try:
        store = opener(to if kind == "postgresql" else location, collection, f"{entity[:-1]}_key")
        try:
            yield store
        finally:
            store.close()
    except RunError as error:
        raise RunError(redact(str(error), to)) from error
    except (*opener.errors, OSError, ValueError) as error:
        raise RunError(f"{option} {shown}: {_reason(error, to)}") from error


def _reason(error: BaseException, to: str) -> str:
    """Why a store failed. Clients bury what the network said under names of their own classes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NO_ANSWER):
            told = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
            return f"no connection ({first_line(told, to)}); start the server, or mend the address"
        cause = cause.__cause__ or cause.__context__
    return first_line(error, to)


@dataclass(frozen=True)
class Chosen:
    """Which rows of an export are loaded, and which of their vectors."""

    entity: Entity = "items"
    vectors: str = ""
    """Column of the rows; empty: that by which all heads score, or the fused one of users."""

    @property
    def column(self) -> str:
        """The column of the vectors.

        Raises:
            RunError: the rows have no such column.
        """
        of_entity = VIEWS if self.entity == "items" else (FUSED, *(r for r in REPRESENTATIONS if r != FUSED))
        if self.vectors and self.vectors not in of_entity:
            raise RunError(f"--vectors {self.vectors}: {self.entity} have {', '.join(of_entity)}; give one of these")
        return self.vectors or of_entity[0]


def load(folder: Path, to: str, collection: str, chosen: Chosen = Chosen()) -> LoadReport:
    """Put the rows of an export into a collection, or update it by a delta. A second call changes nothing.

    Args:
        to: KIND:PLACE, such as qdrant:FOLDER, milvus:FILE.db, lancedb:FOLDER, postgresql://USER@HOST/DATABASE,
            opensearch:https://HOST:9200.

    Raises:
        RunError: the export is incomplete, or the store refuses it.
    """
    entity, column = chosen.entity, chosen.column
    removed = pa.array([], pa.string())
    if (folder / DELTA).is_file():
        delta = load_delta(folder)
        manifest, rows = delta.whole, delta.rows(folder, entity)
        removed = delta.removed_keys(folder, entity)
    else:
        manifest = load_manifest(folder)
        rows = ExportRows(folder, manifest, entity)
    upserted = 0
    with opened(to, collection, entity) as store:
        store.create(manifest.dim)
        for start in range(0, len(removed), BATCH):
            store.delete(removed.slice(start, BATCH).to_pylist())
        for part in rows.parts():
            part = _known(part, entity)
            for start in range(0, len(part), BATCH):
                batch = _batch(part.slice(start, BATCH), entity, column, manifest.model_version)
                store.upsert(batch)
                upserted += len(batch.keys)
        return LoadReport(upserted, len(removed), store.count())


def _known(part: pa.Table, entity: Entity) -> pa.Table:
    """The part without users who were forgotten."""
    if entity == "items":
        return part
    return part.filter(pc.invert(are_tombstones(part["user_key"], part["user_id"])))


def _batch(rows: pa.Table, entity: Entity, column: str, version: str) -> StoreRows:
    features = [name for name in rows.column_names if name.startswith(ATTRIBUTE)]
    values = {name.removeprefix(ATTRIBUTE): rows[name].to_pylist() for name in features}
    titles = rows["title"].to_pylist() if "title" in rows.column_names else [""] * len(rows)
    payloads = [
        {"title": title, "attributes": {f: v[i] for f, v in values.items()}, "model_version": version}
        for i, title in enumerate(titles)
    ]
    return StoreRows(rows[f"{entity[:-1]}_key"].to_pylist(), decode(rows[column]), payloads)
