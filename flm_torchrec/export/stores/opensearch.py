"""OpenSearch: an index of a server with its k-NN plugin. Search is approximate, by Lucene's HNSW."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from opensearchpy import NotFoundError, OpenSearch, OpenSearchException, TransportError, helpers

from flm_torchrec.errors import RunError
from flm_torchrec.export.stores.protocol import REFUSED, StoreRows

LONGEST_KEY = 512
"""In bytes: what OpenSearch takes for the id of a document."""
SECONDS = 60
"""In which the server must answer."""
NOT_OPENSEARCH = "the server does not answer as OpenSearch does; check host and port"
NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Names of indices: no capital letters, no underscore in front."""
SPACE = "innerproduct"
VECTOR = {"name": "hnsw", "engine": "lucene", "space_type": SPACE}


class OpenSearchIndex:
    """An index of an OpenSearch server, or an alias of one. The id of a document is the key."""

    errors = (OpenSearchException, OSError, ValueError)

    def __init__(self, location: str, collection: str, key: str) -> None:
        if "://" not in location:
            raise RunError("--to opensearch: wants the address of a server, such as https://USER:PASSWORD@HOST:9200")
        if not NAME.fullmatch(collection):
            raise RunError(f"collection '{collection}': OpenSearch wants lower case, and a letter first; rename it")
        logging.getLogger("opensearch").setLevel(logging.CRITICAL)  # it logs what it raises too
        self.collection = collection
        self.key = key
        self.client = OpenSearch(location, timeout=SECONDS)

    def create(self, dim: int) -> None:
        """As of `Store`."""
        fields = self._fields()
        if fields is None:
            words = {"title": {"type": "text"}, "model_version": {"type": "keyword"}}
            fields = {
                self.key: {"type": "keyword"},
                **words,
                "attributes": {"type": "object", "dynamic": True},
                "embedding": {"type": "knn_vector", "dimension": dim, "method": VECTOR},
            }
            body = {"settings": {"index": {"knn": True}}, "mappings": {"dynamic": False, "properties": fields}}
            self.client.indices.create(index=self.collection, body=body)
        vector = fields.get("embedding", {})
        space = vector.get("method", {}).get("space_type") or vector.get("space_type")
        if (vector.get("type"), vector.get("dimension"), space) != ("knn_vector", dim, SPACE) or self.key not in fields:
            raise RunError(f"collection '{self.collection}': holds other vectors; give another --collection")

    def upsert(self, batch: StoreRows) -> None:
        """As of `Store`."""
        for key in batch.keys:
            if len(key.encode()) > LONGEST_KEY:
                raise RunError(f"key '{key[:40]}…': is longer than {LONGEST_KEY} bytes, the most that OpenSearch takes")
        rows = zip(batch.keys, batch.vectors.tolist(), batch.payloads, strict=True)
        self._bulk({"_op_type": "index", "_id": k, "_source": {self.key: k, "embedding": v, **p}} for k, v, p in rows)

    def delete(self, keys: list[str]) -> None:
        """As of `Store`."""
        self._bulk({"_op_type": "delete", "_id": key} for key in keys)

    def find(self, keys: list[str]) -> list[str]:
        """As of `Store`."""
        fields = self._fields()
        if fields is None:
            raise RunError(f"collection '{self.collection}': not found; give the --collection of 'flm load'")
        if self.key not in fields:
            raise RunError(f"collection '{self.collection}': has no {self.key}; give another --collection")
        wanted = [key for key in keys if len(key.encode()) <= LONGEST_KEY]
        if not wanted:
            return []
        found = self.client.mget(index=self.collection, body={"ids": wanted}, params={"_source": "false"})["docs"]
        return [document["_id"] for document in found if document["found"]]

    def purge(self) -> None:
        """As of `Store`: segments are written again without the deleted documents."""
        self.client.indices.refresh(index=self.collection)
        self.client.indices.forcemerge(index=self.collection, params={"only_expunge_deletes": "true"})

    def count(self) -> int:
        """As of `Store`."""
        self.client.indices.refresh(index=self.collection)
        return int(self.client.count(index=self.collection)["count"])

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """As of `Store`, but approximate."""
        self.client.indices.refresh(index=self.collection)  # what was put in is found from then on
        query = {"knn": {"embedding": {"vector": vector.tolist(), "k": k}}}
        body = {"size": k, "_source": False, "query": query}
        found = self.client.search(index=self.collection, body=body)["hits"]["hits"]
        return [(hit["_id"], _inner_product(hit["_score"])) for hit in found]

    def close(self) -> None:
        """As of `Store`."""
        self.client.close()

    def _fields(self) -> dict[str, Any] | None:
        """The mapping of the index, by field; None where there is no index."""
        try:
            mapping = self.client.indices.get_mapping(index=self.collection)
        except TransportError as error:
            if isinstance(error.status_code, int) and error.status_code not in REFUSED and type(error.info) is not dict:
                raise ValueError(NOT_OPENSEARCH) from error
            if isinstance(error, NotFoundError):
                return None
            raise
        if type(mapping) is not dict or not mapping:
            raise ValueError(NOT_OPENSEARCH)
        if len(mapping) > 1:
            raise RunError(f"collection '{self.collection}': is an alias of several indices; name one of them")
        (index,) = mapping.values()
        if type(index) is not dict or type(index.get("mappings")) is not dict:
            raise ValueError(NOT_OPENSEARCH)
        return index["mappings"].get("properties", {})

    def _bulk(self, actions: Iterable[dict[str, Any]]) -> None:
        """Send actions; a document that is to be deleted may be gone.

        Raises:
            RunError: the server refuses one.
        """
        for done, told in helpers.streaming_bulk(
            self.client, actions, index=self.collection, raise_on_error=False, max_retries=3
        ):
            ((kind, answer),) = told.items()
            if not done and not (kind == "delete" and answer["status"] == 404):
                reason = answer.get("error", {})
                reason = reason.get("reason", reason) if isinstance(reason, dict) else reason
                raise RunError(f"collection '{self.collection}': '{answer.get('_id')}' is refused ({reason})")


def _inner_product(score: float) -> float:
    """Scores of OpenSearch are s + 1 for an inner product s from 0 on, and 1 / (1 - s) below."""
    return score - 1 if score >= 1 else 1 - 1 / score
