"""Milvus: a file ending in .db (Milvus Lite) or the URL of a server. The index is FLAT, exact."""

from __future__ import annotations

import json
import logging

import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from flm_torchrec.errors import RunError
from flm_torchrec.export.stores.protocol import StoreRows

LONGEST_KEY = 512
"""In bytes."""


class Milvus:
    """A collection of Milvus Lite or of a Milvus server."""

    errors = (MilvusException, OSError, ValueError)

    def __init__(self, location: str, collection: str, key: str) -> None:
        if "://" not in location and not location.endswith(".db"):
            raise RunError(f"milvus:{location}: Milvus Lite wants a file that ends in .db, or give http://HOST:PORT")
        for noisy in ("pymilvus", "grpc._server"):  # these log a traceback beside every error that is raised
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        self.collection = collection
        self.key = key
        try:
            self.client = MilvusClient(location)
        except MilvusException as error:
            raise ConnectionError(error.message) if "://" in location else error from error

    def create(self, dim: int) -> None:
        """As of `Store`."""
        if not self.client.has_collection(self.collection):
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field(self.key, DataType.VARCHAR, is_primary=True, max_length=LONGEST_KEY)
            schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
            schema.add_field("payload", DataType.JSON)
            index = MilvusClient.prepare_index_params()
            index.add_index("embedding", index_type="FLAT", metric_type="IP")
            self.client.create_collection(self.collection, schema=schema, index_params=index)
        fields = {f["name"]: f["params"] for f in self.client.describe_collection(self.collection)["fields"]}
        if int(fields.get("embedding", {}).get("dim", 0)) != dim or self.key not in fields:
            raise RunError(f"collection '{self.collection}': holds other vectors; give another --collection")

    def upsert(self, batch: StoreRows) -> None:
        """As of `Store`."""
        rows = zip(batch.keys, batch.vectors, batch.payloads, strict=True)
        self.client.upsert(self.collection, [{self.key: k, "embedding": v, "payload": p} for k, v, p in rows])

    def delete(self, keys: list[str]) -> None:
        """As of `Store`."""
        self.client.delete(self.collection, filter=self._among(keys))

    def find(self, keys: list[str]) -> list[str]:
        """As of `Store`."""
        if not self.client.has_collection(self.collection):
            raise RunError(f"collection '{self.collection}': not found; give the --collection of 'flm load'")
        if self.key not in {field["name"] for field in self.client.describe_collection(self.collection)["fields"]}:
            raise RunError(f"collection '{self.collection}': has no {self.key}; give another --collection")
        self.client.load_collection(self.collection)
        found = self.client.query(
            self.collection, filter=self._among(keys), output_fields=[self.key], consistency_level="Strong"
        )
        return [row[self.key] for row in found]

    def purge(self) -> None:
        """Ask for a compaction: Milvus chooses itself which files it rewrites."""
        self.client.flush(self.collection)
        self.client.compact(self.collection)

    def count(self) -> int:
        """As of `Store`."""
        return int(self.client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """As of `Store`."""
        found = self.client.search(self.collection, [vector.tolist()], limit=k, consistency_level="Strong")[0]
        return [(hit[self.key], float(hit["distance"])) for hit in found]

    def close(self) -> None:
        """As of `Store`."""
        self.client.close()

    def _among(self, keys: list[str]) -> str:
        """A filter for keys. The client does not escape quotes in ids, and strings of a filter have JSON's escapes."""
        return f"{self.key} in {json.dumps(keys, ensure_ascii=False)}"
