"""Recommendations from an export alone: no model, no training data."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import faiss
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import load_manifest
from flm_torchrec.export.write import INDEX, ITEMS, USERS


@dataclass(frozen=True)
class Recommendation:
    """One item for a user."""

    item_key: str
    title: str
    score: float


class Recommender:
    """Answers from an export.

    Raises:
        RunError: the export is missing, incomplete or changed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self.index = faiss.read_index(str(self.folder / INDEX))
        self.items = pq.read_table(self.folder / ITEMS, columns=["item_key", "title"])

    def recommend(self, user_key: str, k: int, head: str = "fused", include_seen: bool = False) -> list[Recommendation]:
        """The user's k best items by one head, best first, without those the user has had.

        Raises:
            RunError: unknown user or head, or k below 1.
        """
        if k < 1:
            raise RunError(f"-k {k}: ask for at least 1 item")
        if head not in self.manifest.heads:
            raise RunError(f"--head '{head}': choose one of {', '.join(self.manifest.heads)}")
        vector, seen = self._user(user_key, head)
        left_out = set() if include_seen else set(seen.tolist())
        scores, ids = self.index.search(vector[None], min(k + len(left_out), self.index.ntotal))
        found = [(i, s) for i, s in zip(ids[0].tolist(), scores[0].tolist(), strict=True) if i not in left_out]
        return [
            Recommendation(self.items["item_key"][i].as_py(), self.items["title"][i].as_py(), score)
            for i, score in found[:k]
            if i >= 0
        ]

    def _user(self, key: str, head: str) -> tuple[np.ndarray, np.ndarray]:
        columns = ["user_key", "seen", head]
        rows = pq.read_table(self.folder / USERS, columns=columns, filters=pc.field("user_key") == key)
        if len(rows) == 0:
            known = pq.read_table(self.folder / USERS, columns=["user_key"])["user_key"].to_pylist()
            close = get_close_matches(key, known[:100_000], n=1) or known[:1]
            raise RunError(
                f"user '{key}': not in {self.folder / USERS}; ids are those of the source, e.g. '{close[0]}'"
            )
        vector = np.asarray(rows[head][0].as_py(), np.float32)
        return vector, np.asarray(rows["seen"][0].as_py(), np.int64)
