"""What any model must beat: popularity, item-to-item neighbours, a linear autoencoder, ranked by the same code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
from scipy import linalg
from torch import Tensor

from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.splits import Examples

EASE_L2 = 100.0
"""Regularisation of EASE-R. Fixed, so that every table of this project has the same baseline to compare with."""
BLOCK_ENTRIES = 2**24
"""Pairs of items that item-kNN holds at once beside those it keeps: 200 MB with their places."""


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


class Random:
    """Scores at random: what chance gives."""

    names: tuple[str, ...] = ("random",)

    def block(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def scores(self, known: np.ndarray, name: str, start: int, stop: int) -> Tensor:
        # Asked twice for the same block, it must say the same.
        generator = torch.Generator().manual_seed(int(known[0]) * 1_000_003 + start)
        return torch.rand(len(known), stop - start, generator=generator)


class _FromHistory:
    """Scores items by a weight from each known item of the user to each item, summed."""

    def __init__(self, data: PreparedData, examples: Examples) -> None:
        self.data = data
        self.examples = examples

    def block(self, rows: np.ndarray) -> sp.csr_matrix:
        examples = self.examples.take(rows)
        start = self.data.offsets[examples.user]
        lengths = examples.end - start
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items = self.data.item[spans(start, lengths)]
        history = (np.ones(len(items), np.float32), items, offsets)
        return sp.csr_matrix(history, shape=(len(rows), self.data.schema.items))


class ItemKNN(_FromHistory):
    """Scores an item by its summed cosine similarity to the items of the user's known events.

    Cosine over the binary user x item matrix of training events, the `neighbours` most similar items kept for
    each item (Sarwar et al., WWW 2001; Deshpande & Karypis, ACM TOIS 2004). Memory grows with items x neighbours.
    """

    names: tuple[str, ...] = ("item-kNN",)

    def __init__(self, data: PreparedData, fit: np.ndarray, examples: Examples, neighbours: int) -> None:
        super().__init__(data, examples)
        self.similar = _nearest(_seen(data, fit), neighbours).tocsc()

    def scores(self, known: sp.csr_matrix, name: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy((known @ self.similar[:, start:stop]).toarray())


class EASE(_FromHistory):
    """Scores by the closed-form linear autoencoder without self-weights, EASE-R (Steck, WWW 2019).

    P = (X'X + l2 I)^-1 of the binary user x item matrix X; the weight from i to j is -P_ij / P_jj. Memory is
    8 items^2 bytes, time grows with items^3.
    """

    names: tuple[str, ...] = ("EASE-R",)

    def __init__(self, data: PreparedData, fit: np.ndarray, examples: Examples, l2: float = EASE_L2) -> None:
        super().__init__(data, examples)
        seen = _seen(data, fit)
        gram = (seen.T @ seen).toarray()
        gram[np.diag_indices_from(gram)] += l2
        inverse = linalg.inv(gram, overwrite_a=True, check_finite=False)
        self.weights = inverse / -np.diag(inverse)
        np.fill_diagonal(self.weights, 0.0)

    def scores(self, known: sp.csr_matrix, name: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(known @ self.weights[:, start:stop])


def _seen(data: PreparedData, fit: np.ndarray) -> sp.csr_matrix:
    """[users, items]: 1 where a training event says so; a repeated event counts once."""
    users = data.event_users()
    shape = (data.schema.users, data.schema.items)
    seen = sp.csr_matrix((np.ones(int(fit.sum()), np.float32), (users[fit], data.item[fit])), shape=shape)
    seen.sum_duplicates()
    seen.data[:] = 1.0
    return seen


def _nearest(seen: sp.csr_matrix, neighbours: int, entries: int = BLOCK_ENTRIES) -> sp.csr_matrix:
    """[items, items]: row i holds the cosine of i to its nearest items, itself left out; those as near as the last too.

    Only pairs that some user has seen both of are ever held, block by block of items.

    Args:
        entries: of one block, at most; a block has one item at least.
    """
    norms = np.sqrt(np.asarray(seen.multiply(seen).sum(0)).ravel())
    unit = (seen @ sp.diags(1 / np.maximum(norms, 1e-12))).tocsr()
    by_item = unit.T.tocsr()
    kept = []
    for start, stop in _blocks(seen, entries):
        cosine = by_item[start:stop] @ unit
        kept.append(_without_far(cosine, start, neighbours))
    return sp.vstack(kept).tocsr()


def _blocks(seen: sp.csr_matrix, entries: int) -> Iterator[tuple[int, int]]:
    """First item and end of blocks whose rows of the item x item matrix have so many entries together at most."""
    items = seen.shape[1]
    # An item's row has an entry for each item of its users at most.
    most = np.minimum(seen.T @ np.diff(seen.indptr), items)
    ends = np.cumsum(most)
    start = 0
    while start < items:
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + entries, side="right")))
        yield start, stop
        start = stop


def _without_far(cosine: sp.csr_matrix, start: int, neighbours: int) -> sp.csr_matrix:
    """Rows of items `start`, `start` + 1, …, each without itself and whatever is less near than its nearest."""
    rows = np.repeat(np.arange(cosine.shape[0]), np.diff(cosine.indptr))
    cosine.data[cosine.indices == rows + start] = 0.0
    cosine.eliminate_zeros()
    for row in np.flatnonzero(np.diff(cosine.indptr) > neighbours):
        values = cosine.data[cosine.indptr[row] : cosine.indptr[row + 1]]
        values[values < np.partition(values, -neighbours)[-neighbours]] = 0.0
    cosine.eliminate_zeros()
    return cosine
