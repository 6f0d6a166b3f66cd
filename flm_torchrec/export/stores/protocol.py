"""What `flm load` needs of a vector database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class ItemBatch:
    """Some items, by their keys in the source of the data."""

    keys: list[str]
    vectors: np.ndarray  # [n, D] float32
    payloads: list[dict[str, Any]]
    """For each item: "title", "attributes" {feature: [values]}, "model_version"."""


class Store(Protocol):
    """One open collection. Scores are inner products."""

    errors: tuple[type[Exception], ...]
    """What the client raises when the database refuses a request."""

    def create(self, dim: int) -> None:
        """Make the collection, unless it exists.

        Args:
            dim: numbers of a vector.

        Raises:
            RunError: the collection exists with vectors of another width.
        """

    def upsert(self, batch: ItemBatch) -> None:
        """Put items in, in place of those with the same keys. A second call with the same items changes nothing."""

    def delete(self, keys: list[str]) -> None:
        """Take items out. A key that is not in the collection is no error."""

    def count(self) -> int:
        """Number of items in the collection."""

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Keys and scores of the k best items for a vector [D] float32, best first."""

    def close(self) -> None:
        """Write what is pending and close the connection."""
