"""LanceDB: a folder. Search is exact until an index is made in it."""

from __future__ import annotations

import json
import warnings
from datetime import timedelta

import lancedb
import numpy as np
import pyarrow as pa

from flm_torchrec.errors import RunError
from flm_torchrec.export.stores.protocol import StoreRows


class LanceDB:
    """A table of a LanceDB folder."""

    errors = (ValueError, RuntimeError, OSError)

    def __init__(self, location: str, collection: str, key: str) -> None:
        self.collection = collection
        self.key = key
        self.database = lancedb.connect(location)

    def create(self, dim: int) -> None:
        """As of `Store`."""
        words = [pa.field(name, pa.string()) for name in (self.key, "title", "attributes", "model_version")]
        self.schema = pa.schema([*words, pa.field("embedding", pa.list_(pa.float32(), dim))])
        try:
            self.table = self.database.create_table(self.collection, schema=self.schema, exist_ok=True)
        except ValueError as error:
            raise RunError(f"collection '{self.collection}': holds other vectors; give another --collection") from error

    def upsert(self, batch: StoreRows) -> None:
        """As of `Store`."""
        columns = {
            self.key: batch.keys,
            "title": [p["title"] for p in batch.payloads],
            "attributes": [json.dumps(p["attributes"], ensure_ascii=False) for p in batch.payloads],
            "model_version": [p["model_version"] for p in batch.payloads],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(batch.vectors.ravel()), batch.vectors.shape[1]),
        }
        rows = pa.table(columns, schema=self.schema)
        self.table.merge_insert(self.key).when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def delete(self, keys: list[str]) -> None:
        """As of `Store`."""
        self.table.delete(self._among(keys))

    def find(self, keys: list[str]) -> list[str]:
        """As of `Store`."""
        try:
            self.table = self.database.open_table(self.collection)
        except ValueError as error:
            problem = f"collection '{self.collection}': not found; give the --collection of 'flm load'"
            raise RunError(problem) from error
        if self.key not in self.table.schema.names:
            raise RunError(f"collection '{self.collection}': has no {self.key}; give another --collection")
        found = self.table.search().where(self._among(keys)).select([self.key]).limit(len(keys)).to_arrow()
        return found[self.key].to_pylist()

    def purge(self) -> None:
        """As of `Store`. A fragment is rewritten only beside another small one, so one row is put in once more."""
        row = self.table.search().limit(1).to_arrow()
        if len(row):
            self.table.merge_insert(self.key).when_matched_update_all().execute(row)
        else:
            self.table = self.database.create_table(self.collection, schema=self.table.schema, mode="overwrite")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optimize.cleanup_older_than=0. removes every version")  # as is wanted
            self.table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)

    def count(self) -> int:
        """As of `Store`."""
        return self.table.count_rows()

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """As of `Store`."""
        query = self.table.search(vector, vector_column_name="embedding", query_type="vector")
        found = query.distance_type("dot").limit(k).to_list()  # type: ignore[attr-defined]
        return [(row[self.key], 1.0 - row["_distance"]) for row in found]  # its distance is 1 - inner product

    def close(self) -> None:
        """There is nothing to close."""

    def _among(self, keys: list[str]) -> str:
        quoted = ", ".join("'" + key.replace("'", "''") + "'" for key in keys)
        return f"{self.key} IN ({quoted})"
