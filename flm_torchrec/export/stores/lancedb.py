"""LanceDB: a folder. Search is exact until an index is made in it."""

from __future__ import annotations

import json

import lancedb
import numpy as np
import pyarrow as pa

from flm_torchrec.errors import RunError
from flm_torchrec.export.stores.protocol import ItemBatch


class LanceDB:
    """A table of a LanceDB folder."""

    errors = (ValueError, RuntimeError, OSError)

    def __init__(self, location: str, collection: str) -> None:
        self.collection = collection
        self.database = lancedb.connect(location)

    def create(self, dim: int) -> None:
        """As of `Store`."""
        words = [pa.field(name, pa.string()) for name in ("item_key", "title", "attributes", "model_version")]
        self.schema = pa.schema([*words, pa.field("embedding", pa.list_(pa.float32(), dim))])
        try:
            self.table = self.database.create_table(self.collection, schema=self.schema, exist_ok=True)
        except ValueError as error:
            raise RunError(f"collection '{self.collection}': holds other vectors; give another --collection") from error

    def upsert(self, batch: ItemBatch) -> None:
        """As of `Store`."""
        columns = {
            "item_key": batch.keys,
            "title": [p["title"] for p in batch.payloads],
            "attributes": [json.dumps(p["attributes"], ensure_ascii=False) for p in batch.payloads],
            "model_version": [p["model_version"] for p in batch.payloads],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(batch.vectors.ravel()), batch.vectors.shape[1]),
        }
        rows = pa.table(columns, schema=self.schema)
        self.table.merge_insert("item_key").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def delete(self, keys: list[str]) -> None:
        """As of `Store`."""
        quoted = ", ".join("'" + key.replace("'", "''") + "'" for key in keys)
        self.table.delete(f"item_key IN ({quoted})")

    def count(self) -> int:
        """As of `Store`."""
        return self.table.count_rows()

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """As of `Store`."""
        query = self.table.search(vector, vector_column_name="embedding", query_type="vector")
        found = query.distance_type("dot").limit(k).to_list()  # type: ignore[attr-defined]
        return [(row["item_key"], 1.0 - row["_distance"]) for row in found]  # its distance is 1 - inner product

    def close(self) -> None:
        """There is nothing to close."""
