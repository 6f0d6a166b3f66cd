"""Qdrant: a folder (its embedded mode, exact search) or the URL of a server."""

from __future__ import annotations

import json
import uuid

import numpy as np
from pydantic import ValidationError
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from flm_torchrec.errors import RunError
from flm_torchrec.export.stores.protocol import REFUSED, StoreRows

SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "flm_torchrec")
"""Qdrant has no strings as ids. The id of a point is the UUID of its key in this namespace."""
NOT_QDRANT = "the server does not answer as Qdrant does; check host and port"


class Qdrant:
    """A collection of an embedded Qdrant or of a Qdrant server."""

    errors = (ApiException, ValueError, RuntimeError, OSError)

    def __init__(self, location: str, collection: str, key: str) -> None:
        self.collection = collection
        self.key = key
        self.client = QdrantClient(url=location) if "://" in location else QdrantClient(path=location)

    def create(self, dim: int) -> None:
        """As of `Store`."""
        if not self._exists():
            vectors = models.VectorParams(size=dim, distance=models.Distance.DOT)
            self.client.create_collection(self.collection, vectors_config=vectors)
        has = self.client.get_collection(self.collection).config.params.vectors
        if not isinstance(has, models.VectorParams) or (has.size, has.distance) != (dim, models.Distance.DOT):
            raise RunError(f"collection '{self.collection}': holds other vectors; give another --collection")
        self._check_keys()

    def upsert(self, batch: StoreRows) -> None:
        """As of `Store`."""
        payloads = [{self.key: key, **p} for key, p in zip(batch.keys, batch.payloads, strict=True)]
        ids = [_point(key) for key in batch.keys]
        self.client.upsert(self.collection, models.Batch(ids=ids, vectors=batch.vectors.tolist(), payloads=payloads))

    def delete(self, keys: list[str]) -> None:
        """As of `Store`."""
        self.client.delete(self.collection, models.PointIdsList(points=[_point(key) for key in keys]))

    def find(self, keys: list[str]) -> list[str]:
        """As of `Store`."""
        if not self._exists():
            raise RunError(f"collection '{self.collection}': not found; give the --collection of 'flm load'")
        self._check_keys()
        found = self.client.retrieve(self.collection, [_point(key) for key in keys], with_payload=[self.key])
        return [p.payload[self.key] for p in found if p.payload]

    def purge(self) -> None:
        """The embedded mode keeps nothing; a server cleans up by itself."""

    def count(self) -> int:
        """As of `Store`."""
        return self.client.count(self.collection).count

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """As of `Store`."""
        found = self.client.query_points(self.collection, query=vector.tolist(), limit=k).points
        return [(p.payload[self.key], p.score) for p in found if p.payload]

    def close(self) -> None:
        """As of `Store`."""
        self.client.close()

    def _exists(self) -> bool:
        """Whether the collection is there.

        Raises:
            ValueError: another kind of server answers.
        """
        try:
            return self.client.collection_exists(self.collection)
        except (AssertionError, json.JSONDecodeError) as error:  # the client asserts that an answer has a result
            raise ValueError(NOT_QDRANT) from error
        except ApiException as error:
            if _is_of_another(error):
                raise ValueError(NOT_QDRANT) from error
            raise

    def _check_keys(self) -> None:
        """Raise RunError where the collection has rows without the column of keys."""
        first, _ = self.client.scroll(self.collection, limit=1)
        if first and self.key not in (first[0].payload or {}):
            raise RunError(f"collection '{self.collection}': has no {self.key}; give another --collection")


def _is_of_another(error: ApiException) -> bool:
    """Whether an answer cannot be that of a Qdrant server: its errors are JSON, {"status": {"error": …}, …}."""
    if isinstance(error, ResponseHandlingException):
        return isinstance(error.source, ValidationError)
    if not isinstance(error, UnexpectedResponse) or error.status_code in REFUSED:
        return False
    try:
        answer = error.structured()
    except ValueError:
        return True
    return type(answer) is not dict or type(answer.get("status")) is not dict


def _point(key: str) -> str:
    return str(uuid.uuid5(SPACE, key))
