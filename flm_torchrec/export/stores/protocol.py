"""What `flm load` needs of a vector database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

REFUSED = (401, 403)
"""Status of an HTTP server's answer that may be no JSON."""


@dataclass(frozen=True)
class StoreRows:
    """Some items or users, by their keys in the source of the data."""

    keys: list[str]
    vectors: np.ndarray  # [n, D] float32
    payloads: list[dict[str, Any]]
    """For each row: "title", "attributes" {feature: [values]}, "model_version". Of users the first two are empty."""


class Store(Protocol):
    """One open collection, made of a location, the collection's name, and the column of keys: item_key or user_key.

    Scores are inner products.
    """

    errors: tuple[type[Exception], ...]
    """What the client raises when the database refuses a request."""

    def create(self, dim: int) -> None:
        """Make the collection, unless it exists.

        Args:
            dim: numbers of a vector.

        Raises:
            RunError: the collection exists with vectors of another width, or with other keys.
        """

    def upsert(self, batch: StoreRows) -> None:
        """Put rows in, in place of those with the same keys. A second call with the same rows changes nothing."""

    def delete(self, keys: list[str]) -> None:
        """Take rows out, after `create` or `find`. A key that is not in the collection is no error."""

    def find(self, keys: list[str]) -> list[str]:
        """Those of the keys that the collection has.

        Raises:
            RunError: there is no such collection of rows with this column of keys.
        """

    def purge(self) -> None:
        """Drop what the database keeps of deleted rows, such as older versions, as far as a client can."""

    def count(self) -> int:
        """Number of rows in the collection."""

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Keys and scores of the k best rows for a vector [D] float32, best first."""

    def close(self) -> None:
        """Write what is pending and close the connection."""
