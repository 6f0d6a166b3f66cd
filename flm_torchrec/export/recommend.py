"""Recommendations from an export alone, without model and training data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow.compute as pc

from flm_torchrec.config.heads import FUSED, HEADS
from flm_torchrec.errors import RunError
from flm_torchrec.export.index import open_index, top
from flm_torchrec.export.manifest import load_manifest
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.vectors import decode
from flm_torchrec.mixture import Mixture, shortlist
from flm_torchrec.names import COMPARED, nearest_key


@dataclass(frozen=True)
class Recommendation:
    """One item for a user."""

    item_key: str
    title: str
    score: float


class Recommender:
    """Recommends items to the users of an export.

    Raises:
        RunError: the export is missing, incomplete or changed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self.index = open_index(self.folder, self.manifest)
        self.items = ExportRows(self.folder, self.manifest, "items")
        self.users = ExportRows(self.folder, self.manifest, "users")
        self.shown = self.items.table(["item_key", "title"])

    def recommend(self, user_key: str, k: int, head: str = "fused", include_seen: bool = False) -> list[Recommendation]:
        """The user's k best items by one head, best first, without items of the user's events.

        Args:
            include_seen: also items of the user's events.

        Raises:
            RunError: the user or the head is unknown, or k is below 1.
        """
        if k < 1:
            raise RunError(f"-k {k}: ask for at least 1 item")
        if head not in self.manifest.heads:
            raise RunError(f"--head '{head}': choose one of {', '.join(self.manifest.heads)}")
        vectors, seen = self._user(user_key)
        left_out = set() if include_seen else set(seen.tolist())
        found = min(k + len(left_out), self.manifest.items)
        if head == FUSED and self.manifest.mixture is not None:
            scores, ids = self._mixed([vectors[name] for name in HEADS], found, self.manifest.mixture)
        else:
            scores, ids = self._search(vectors[head], found)
        unseen = [(i, s) for i, s in zip(ids.tolist(), scores.tolist(), strict=True) if i not in left_out]
        return [
            Recommendation(self.shown["item_key"][i].as_py(), self.shown["title"][i].as_py(), score)
            for i, score in unseen[:k]
            if i >= 0
        ]

    def _search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids [k] of the best items for a query [D]."""
        if self.index is not None:
            scores, ids = self.index.search(query[None], k)
            return scores[0], ids[0]
        best, found = np.zeros(0, np.float32), np.zeros(0, np.int64)
        start = 0
        for vectors in self.items.vectors("embedding"):
            # By faiss: its sum is the same for equal vectors at any position, unlike a BLAS product.
            scores, ids = faiss.knn(query[None], vectors, len(vectors), metric=faiss.METRIC_INNER_PRODUCT)
            best, found = top(np.concatenate([best, scores[0]]), np.concatenate([found, ids[0] + start]), k)
            start += len(vectors)
        return best, found

    def _mixed(self, queries: list[np.ndarray], k: int, mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids [k] of the best items by a mixture of the heads' queries [D], among the best of each."""
        most = min(shortlist(k), self.manifest.items)
        ids = np.unique(np.concatenate([self._search(query, most)[1] for query in queries]))
        ids = ids[ids >= 0]
        vectors, first = np.empty((len(ids), self.manifest.dim), np.float32), 0
        for part in self.items.vectors("embedding"):
            here = slice(*np.searchsorted(ids, [first, first + len(part)]))
            vectors[here] = part[ids[here] - first]
            first += len(part)
        return top(mixture.score([vectors @ query for query in queries]), ids, k)

    def _user(self, key: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """By head the user's vector [D], and [n] ids of the items of the user's events."""
        for part in self.users.parts(["user_key", "seen", *self.manifest.heads]):
            row = part.filter(pc.field("user_key") == key)
            if len(row):
                vectors = {head: decode(row[head])[0] for head in self.manifest.heads}
                return vectors, np.asarray(row["seen"][0].as_py(), np.int64)
        compared = self.users.table(["user_key"])["user_key"].slice(0, COMPARED).to_pylist()
        raise RunError(f"user '{key}': not in {self.folder}; {nearest_key(key, compared, COMPARED)}")
