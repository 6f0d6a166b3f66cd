"""What loading needs of a vector database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class ItemBatch:
    """Some items, by their keys in the source."""

    keys: list[str]
    vectors: np.ndarray  # [n, D] float32
    payloads: list[dict[str, Any]]
    """Of each: "title", "attributes" {feature: [values]}, "model_version"."""


class Store(Protocol):
    """One collection, open. Scores are inner products."""

    errors: tuple[type[Exception], ...]
    """What its client raises when the database says no."""

    def create(self, dim: int) -> None:
        """Make the collection, unless it is there.

        Raises:
            RunError: it is there with vectors of another width.
        """

    def upsert(self, batch: ItemBatch) -> None:
        """Put items in, in place of those with the same keys: twice the same is as once."""

    def delete(self, keys: list[str]) -> None:
        """Take items out; a key that is not there is no error."""

    def count(self) -> int: ...

    def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Keys and scores of the k best items for a vector [D], best first."""

    def close(self) -> None: ...
