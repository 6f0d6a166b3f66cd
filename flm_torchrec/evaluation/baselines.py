"""What any model must beat: popularity and item-to-item neighbours, ranked by the same code."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from flm_torchrec.data.prepared import PreparedData, spans
from flm_torchrec.data.splits import Examples


class Popularity:
    """Scores an item by the number of its training events."""

    names: tuple[str, ...] = ("popularity",)

    def __init__(self, data: PreparedData, fit: np.ndarray) -> None:
        counts = np.bincount(data.item[fit], minlength=data.schema.items)
        self.counts = torch.from_numpy(counts.astype(np.float32))

    def block(self, rows: np.ndarray) -> int:
        return len(rows)

    def scores(self, known: int, name: str, start: int, stop: int) -> Tensor:
        return self.counts[start:stop].repeat(known, 1)


class ItemKNN:
    """Scores an item by its summed cosine similarity to the items of the user's known events.

    Cosine over the binary user x item matrix of training events, the `neighbours` most similar items kept for
    each item (Sarwar et al., WWW 2001; Deshpande & Karypis, ACM TOIS 2004).
    """

    names: tuple[str, ...] = ("item-kNN",)

    def __init__(self, data: PreparedData, fit: np.ndarray, examples: Examples, neighbours: int) -> None:
        self.examples = examples
        self.data = data
        users = np.repeat(np.arange(data.schema.users), np.diff(data.offsets))
        shape = (data.schema.users, data.schema.items)
        seen = sp.csr_matrix((np.ones(int(fit.sum()), np.float32), (users[fit], data.item[fit])), shape=shape)
        seen.data[:] = 1.0  # a repeated event counts once
        self.similar = _nearest(seen, neighbours).tocsc()

    def block(self, rows: np.ndarray) -> sp.csr_matrix:
        examples = self.examples.take(rows)
        start = self.data.offsets[examples.user]
        lengths = examples.end - start
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items = self.data.item[spans(start, lengths)]
        history = (np.ones(len(items), np.float32), items, offsets)
        return sp.csr_matrix(history, shape=(len(rows), self.data.schema.items))

    def scores(self, known: sp.csr_matrix, name: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy((known @ self.similar[:, start:stop]).toarray())


def _nearest(seen: sp.csr_matrix, neighbours: int, block: int = 1024) -> sp.csr_matrix:
    """[items, items]: row i holds the cosine of i to its nearest items, itself left out."""
    norms = np.sqrt(np.asarray(seen.multiply(seen).sum(0)).ravel())
    unit = (seen @ sp.diags(1 / np.maximum(norms, 1e-12))).tocsc()
    kept = []
    for start in range(0, unit.shape[1], block):
        part = unit[:, start : start + block]
        cosine = (part.T @ unit).toarray()
        rows = np.arange(cosine.shape[0])
        cosine[rows, rows + start] = 0.0
        if neighbours < cosine.shape[1]:
            limit = np.partition(cosine, -neighbours, axis=1)[:, -neighbours]
            cosine[cosine < limit[:, None]] = 0.0
        kept.append(sp.csr_matrix(cosine))
    return sp.vstack(kept).tocsr()
