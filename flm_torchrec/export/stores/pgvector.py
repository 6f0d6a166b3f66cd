"""PostgreSQL with the pgvector extension: a table with the collection's name. Search is exact until it has an index."""

from __future__ import annotations

import os

import numpy as np
import psycopg
from pgvector.psycopg import register_vector
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.json import Jsonb

from flm_torchrec.errors import RunError
from flm_torchrec.export.stores.protocol import StoreRows

SECONDS = 10
"""In which the server must answer, unless the address has `connect_timeout`, or the environment PGCONNECT_TIMEOUT."""
CREATE = (
    "CREATE TABLE IF NOT EXISTS {table} ({key} text PRIMARY KEY, title text NOT NULL, attributes jsonb NOT NULL,"
    " model_version text NOT NULL, embedding vector({dim}) NOT NULL)"
)
UPSERT = (
    "INSERT INTO {table} VALUES (%s, %s, %s, %s, %s) ON CONFLICT ({key}) DO UPDATE SET title = EXCLUDED.title,"
    " attributes = EXCLUDED.attributes, model_version = EXCLUDED.model_version, embedding = EXCLUDED.embedding"
)


class PgVector:
    """A table of a PostgreSQL database."""

    errors = (psycopg.Error,)

    def __init__(self, location: str, collection: str, key: str) -> None:
        self.collection = collection
        self.key = key
        try:
            asked = conninfo_to_dict(location).get("connect_timeout")
            waits = asked or os.environ.get("PGCONNECT_TIMEOUT", SECONDS)
            self.connection = psycopg.connect(make_conninfo(location, connect_timeout=waits))
        except psycopg.OperationalError as error:
            raise ConnectionError(str(error)) from error

    def create(self, dim: int) -> None:
        """As of `Store`."""
        with self.connection.transaction():
            self.connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            self.connection.execute(self._sql(CREATE, dim=sql.Literal(dim)))
        register_vector(self.connection)
        columns = self._columns()
        if columns.get("embedding") != dim or self.key not in columns:
            raise RunError(f"collection '{self.collection}': holds other vectors; give another --collection")

    def upsert(self, batch: StoreRows) -> None:
        """As of `Store`."""
        rows = [
            (key, p["title"], Jsonb(p["attributes"]), p["model_version"], vector)
            for key, vector, p in zip(batch.keys, batch.vectors, batch.payloads, strict=True)
        ]
        with self.connection.transaction(), self.connection.cursor() as cursor:
            cursor.executemany(self._sql(UPSERT), rows)

    def delete(self, keys: list[str]) -> None:
        """As of `Store`."""
        with self.connection.transaction():
            self.connection.execute(self._sql("DELETE FROM {table} WHERE {key} = ANY(%s)"), [keys])

    def find(self, keys: list[str]) -> list[str]:
        """As of `Store`."""
        columns = self._columns()
        if not columns:
            raise RunError(f"collection '{self.collection}': not found; give the --collection of 'flm load'")
        if self.key not in columns:
            raise RunError(f"collection '{self.collection}': has no {self.key}; give another --collection")
        register_vector(self.connection)
        found = self.connection.execute(self._sql("SELECT {key} FROM {table} WHERE {key} = ANY(%s)"), [keys])
        return [key for (key,) in found.fetchall()]

    def purge(self) -> None:
        """As of `Store`. The write-ahead log keeps deleted rows until the server recycles it."""
        self.connection.commit()
        self.connection.autocommit = True
        self.connection.execute(self._sql("VACUUM FULL {table}"))

    def count(self) -> int:
        """As of `Store`."""
        row = self.connection.execute(self._sql("SELECT count(*) FROM {table}")).fetchone()
        return int(row[0]) if row else 0

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """As of `Store`."""
        best = "SELECT {key}, -(embedding <#> %s) FROM {table} ORDER BY embedding <#> %s LIMIT %s"
        return self.connection.execute(self._sql(best), [vector, vector, k]).fetchall()  # <#> is -1 times it

    def close(self) -> None:
        """As of `Store`."""
        self.connection.commit()
        self.connection.close()

    def _columns(self) -> dict[str, int]:
        """By column of the table, the parameter of its type: of a vector the width. Empty where there is no table."""
        columns = "SELECT attname, atttypmod FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0"
        return dict(self.connection.execute(columns, [f'"{self.collection}"']).fetchall())

    def _sql(self, text: str, **values: sql.Composable) -> sql.Composed:
        return sql.SQL(text).format(table=sql.Identifier(self.collection), key=sql.Identifier(self.key), **values)  # type: ignore[arg-type]
