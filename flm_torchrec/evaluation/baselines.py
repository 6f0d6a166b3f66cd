"""Baselines that a model must beat, in the same ranking: popularity, neighbours, transitions, linear autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy import linalg
from torch import Tensor

from flm_torchrec.data.columns import new_column
from flm_torchrec.data.dataset import PreparedData, Ragged, spans
from flm_torchrec.data.sketch import rarity
from flm_torchrec.data.splits import Examples

EASE_L2 = 100.0
"""Regularisation of EASE-R. Fixed, so that every table of this project has the same baseline to compare with."""
USERS = 2**16
"""Examples whose known items are looked up at once."""
BLOCK_ENTRIES = 2**24
"""Pairs of items that item-kNN has in memory at once, beside the pairs that it keeps: 200 MB with their indices."""
RECENCY = 0.7
"""Content-kNN: what an event of the history counts, of what the event after it counts."""


class _Local:
    """A scorer that needs nothing of other processes: each makes what it needs of all blocks that it scores."""

    alike = False

    def block(self, rows: np.ndarray) -> Any:
        """[b] indices of examples → what `scores` needs of their users."""
        raise NotImplementedError

    def blocks(self, own: np.ndarray, scored: list[np.ndarray]) -> list[Any]:
        """As of `Scorer`."""
        return [self.block(rows) for rows in scored]


class Popularity(_Local):
    """Scores an item by the number of its training events.

    Args:
        train_mask: [interactions] bool, the training events.
    """

    names: tuple[str, ...] = ("popularity",)
    alike = True

    def __init__(self, data: PreparedData, train_mask: np.ndarray) -> None:
        self.counts = torch.from_numpy(data.item_counts(train_mask).astype(np.float32))

    def block(self, rows: np.ndarray) -> int:
        """[b] indices of examples → b: all users get the same scores."""
        return len(rows)

    def scores(self, users: int, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start]: the items' training events."""
        return self.counts[start:stop].repeat(users, 1)

    def scores_of(self, users: int, name: str, items: Tensor) -> Tensor:
        """As of `Scorer`."""
        return self.counts[items]


class Random(_Local):
    """Scores at random: the result of chance."""

    names: tuple[str, ...] = ("random",)

    def block(self, rows: np.ndarray) -> np.ndarray:
        """[b] indices of examples, which seed the scores."""
        return rows

    def scores(self, users: np.ndarray, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start], uniform in 0 … 1."""
        # Ranking asks twice for the same block, and must get the same scores.
        generator = torch.Generator().manual_seed(int(users[:1].sum()) * 1_000_003 + start)
        return torch.rand(len(users), stop - start, generator=generator)

    def scores_of(self, users: np.ndarray, name: str, items: Tensor) -> Tensor:
        """As of `Scorer`; not known here, so that ranking asks `scores` twice."""
        return torch.zeros(len(users))


class _FromHistory(_Local):
    """Scores an item by a sum over the user's known items: of the weights from these to the item.

    An item counts once, as in the publications, which are of what a user has and has not.
    """

    def __init__(self, data: PreparedData, examples: Examples) -> None:
        self.data = data
        self.examples = examples

    def block(self, rows: np.ndarray) -> sp.csr_matrix:
        """[b] indices of examples → [b, items]: 1 where the item is among the user's known events."""
        known = self.events(rows)
        known.sum_duplicates()
        known.data[:] = 1.0
        return known

    def events(self, rows: np.ndarray) -> sp.csr_matrix:
        """[b] indices of examples → [b, items] with a 1 for each known event, in the order of the events."""
        examples = self.examples.take(rows)
        start = self.data.offsets[examples.user]
        lengths = examples.end - start
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items = self.data.item[spans(start, lengths)]
        history = (np.ones(len(items), np.float32), items, offsets)
        return sp.csr_matrix(history, shape=(len(rows), self.data.schema.items))


class ItemKNN(_FromHistory):
    """Scores an item by its summed cosine similarity to the items of the user's known events.

    The cosine is over the binary user x item matrix of training events. Each item keeps its `neighbours` most similar
    items (Sarwar et al., WWW 2001; Deshpande & Karypis, ACM TOIS 2004). Memory grows with neighbours x items that the
    ranked users know.
    """

    names: tuple[str, ...] = ("item-kNN",)

    def __init__(self, data: PreparedData, train_mask: np.ndarray, examples: Examples, neighbours: int) -> None:
        super().__init__(data, examples)
        self.similar = _nearest(_seen(data, train_mask), neighbours, self._known_items())

    def block(self, rows: np.ndarray) -> sp.csr_matrix:
        """[b] indices of examples → [b, items]: sums of cosines, where they are not 0."""
        return super().block(rows) @ self.similar

    def _known_items(self) -> np.ndarray:
        """[items] bool: those of the users' known events; the neighbours of no other item are asked for."""
        known = np.zeros(self.data.schema.items, bool)
        for first in range(0, len(self.examples), USERS):
            part = self.examples.take(np.arange(first, min(first + USERS, len(self.examples))))
            start = self.data.offsets[part.user]
            known[self.data.item[spans(start, part.end - start)]] = True
        return known

    def scores(self, users: sp.csr_matrix, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start]: sums of cosines."""
        return torch.from_numpy(users[:, start:stop].toarray())

    def scores_of(self, users: sp.csr_matrix, name: str, items: Tensor) -> Tensor:
        """As of `Scorer`."""
        return torch.from_numpy(users[:, items.numpy()].diagonal())


class ContentKNN(_FromHistory):
    """Scores an item by the cosine of its features to those of the user's known items: no event is learnt from.

    A value or word of a feature counts log(1 + items / items that have it), so that rare ones count more (inverse
    document frequency: Sparck Jones, 1972). Each feature has length 1. A known event counts RECENCY times the one after
    it. What a trained content head or a source of another domain reaches should be above this.
    """

    names: tuple[str, ...] = ("content-kNN",)

    def __init__(self, data: PreparedData, examples: Examples) -> None:
        super().__init__(data, examples)
        parts = [_weighted(values, data.schema.items) for values in data.items.sparse.values()]
        if data.items.dense.shape[1]:
            parts.append(_unit_rows(sp.csr_matrix(data.items.dense)))
        nothing = sp.csr_matrix((data.schema.items, 1), dtype=np.float32)
        self.content = _unit_rows(sp.hstack(parts or [nothing], "csr"))  # [items, F]

    def block(self, rows: np.ndarray) -> sp.csr_matrix:
        """[b] indices of examples → [b, F]: content of the known items, of length 1."""
        history = self.events(rows)
        lengths = np.diff(history.indptr)
        age = np.repeat(history.indptr[1:], lengths) - 1 - np.arange(len(history.data))
        history.data = RECENCY ** age.astype(np.float32)
        return _unit_rows(history @ self.content)

    def scores(self, users: sp.csr_matrix, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start]: cosines."""
        return torch.from_numpy((users @ self.content[start:stop].T).toarray())

    def scores_of(self, users: sp.csr_matrix, name: str, items: Tensor) -> Tensor:
        """As of `Scorer`."""
        return torch.from_numpy((users @ self.content[items.numpy()].T).diagonal())


class Markov(_Local):
    """Scores an item by the number of training transitions to it from the user's last known item.

    A transition is two consecutive training events of one user: a first-order Markov chain (Rendle et al., WWW 2010,
    without their factors). Popularity ranks items with as many transitions, and all items for a user without events.
    What is kept grows with the distinct transitions, not with the square of the items.
    """

    names: tuple[str, ...] = ("Markov",)

    def __init__(self, data: PreparedData, train_mask: np.ndarray, examples: Examples) -> None:
        self.data = data
        self.examples = examples
        self.transitions = _transitions(data, train_mask)
        counts, place = np.unique(Popularity(data, train_mask).counts.numpy(), return_inverse=True)
        # Below 1, the least number of transitions. Places are further apart than counts, so float32 holds more of them.
        self.popularity = torch.from_numpy((place / len(counts)).astype(np.float32))  # [items]

    def block(self, rows: np.ndarray) -> sp.csr_matrix:
        """[b] indices of examples → [b, items]: transitions from the last known item; none without events."""
        examples = self.examples.take(rows)
        known = examples.end > self.data.offsets[examples.user]
        last = self.data.item[examples.end[known] - 1]
        offsets = np.concatenate([[0], np.cumsum(known)])
        shape = (len(rows), self.data.schema.items)
        return sp.csr_matrix((np.ones(len(last), np.float32), last, offsets), shape=shape) @ self.transitions

    def scores(self, users: sp.csr_matrix, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start]: numbers of transitions, plus less than 1 for popularity."""
        return torch.from_numpy(users[:, start:stop].toarray()) + self.popularity[start:stop]

    def scores_of(self, users: sp.csr_matrix, name: str, items: Tensor) -> Tensor:
        """As of `Scorer`."""
        return torch.from_numpy(users[:, items.numpy()].diagonal()) + self.popularity[items]


class EASE(_FromHistory):
    """Scores by the closed-form linear autoencoder without self-weights, EASE-R (Steck, WWW 2019).

    P = (X'X + l2 I)^-1 of the binary user x item matrix X; the weight from i to j is -P_ij / P_jj. Memory is
    8 items^2 bytes, time grows with items^3.
    """

    names: tuple[str, ...] = ("EASE-R",)

    def __init__(self, data: PreparedData, train_mask: np.ndarray, examples: Examples, l2: float = EASE_L2) -> None:
        super().__init__(data, examples)
        seen = _seen(data, train_mask)
        gram = (seen.T @ seen).toarray()
        gram[np.diag_indices_from(gram)] += l2
        inverse = linalg.inv(gram, overwrite_a=True, check_finite=False)
        inverse /= -np.diag(inverse).copy()
        self.weights = np.ascontiguousarray(inverse)
        np.fill_diagonal(self.weights, 0.0)
        self._columns = {(0, len(self.weights)): self.weights}

    def scores(self, users: sp.csr_matrix, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start]: sums of weights."""
        if (start, stop) not in self._columns:  # the product would copy them, for each block of users
            self._columns[start, stop] = np.ascontiguousarray(self.weights[:, start:stop])
        return torch.from_numpy(users @ self._columns[start, stop])

    def scores_of(self, users: sp.csr_matrix, name: str, items: Tensor) -> Tensor:
        """As of `Scorer`."""
        return torch.from_numpy(users @ self.weights[:, items.numpy()]).diagonal()


def _weighted(values: Ragged, items: int) -> sp.csr_matrix:
    """Codes of a feature of each item → [items, codes]: inverse document frequencies, each row of length 1."""
    ones = np.ones(len(values.values), np.float32)
    codes = 1 + int(values.values.max(initial=0))
    held = sp.csr_matrix((ones, values.values, values.offsets), shape=(items, codes))
    held.sum_duplicates()
    held.data = rarity(values, codes)[held.indices]
    return _unit_rows(held)


def _unit_rows(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Each row divided by its length; a row of zeros stays one."""
    squares = np.bincount(
        np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)), matrix.data**2, minlength=matrix.shape[0]
    )
    inverse = (1 / np.sqrt(np.maximum(squares, 1e-12))).astype(np.float32)
    return sp.csr_matrix(sp.diags(inverse) @ matrix)


def _seen(data: PreparedData, train_mask: np.ndarray) -> sp.csr_matrix:
    """[users, items]: 1 where the user has a training event of the item, however many."""
    items, offsets = _items_by_user(data, train_mask)
    shape = (data.schema.users, data.schema.items)
    seen = sp.csr_matrix((np.ones(len(items), np.float32), items, offsets), shape=shape)
    seen.sum_duplicates()
    seen.data[:] = 1.0
    return seen


def _transitions(data: PreparedData, train_mask: np.ndarray) -> sp.csr_matrix:
    """[items, items] float32: how often a training event of item j is the user's next one after item i."""
    items, offsets = _items_by_user(data, train_mask)
    same = np.ones(max(0, len(items) - 1), bool)
    ends = offsets[1:-1]
    same[ends[(ends > 0) & (ends < len(items))] - 1] = False  # the last event of a user has none after it
    ones = np.ones(int(same.sum()), np.float32)
    shape = (data.schema.items, data.schema.items)
    return sp.csr_matrix((ones, (items[:-1][same], items[1:][same])), shape=shape)


def _items_by_user(data: PreparedData, train_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] the items of all training events, and [users + 1] int64 where those of each user begin."""
    offsets = np.concatenate([[0], np.cumsum(data.user_counts(train_mask))])
    items, done = new_column(int(offsets[-1]), data.item.dtype), 0
    for block in data.blocks():
        part = data.item[block.rows][train_mask[block.rows]]
        items[done : done + len(part)] = part
        done += len(part)
    return items, offsets


def _nearest(seen: sp.csr_matrix, neighbours: int, wanted: np.ndarray, entries: int = BLOCK_ENTRIES) -> sp.csr_matrix:
    """[items, items]: row i has the cosines of item i to its nearest items without itself; ties with the last stay too.

    Works on blocks of items. Only pairs of items that one user has both of are ever in memory.

    Args:
        wanted: [items] bool: rows of other items are empty.
        entries: maximum of pairs in one block; a block has at least one item.
    """
    norms = np.sqrt(np.bincount(seen.indices, minlength=seen.shape[1]).astype(np.float32))
    inverse = 1 / np.maximum(norms, np.float32(1e-12))
    unit = sp.csr_matrix((inverse[seen.indices], seen.indices, seen.indptr), shape=seen.shape)
    asked = Ragged(seen.indptr, seen.indices).only(wanted[seen.indices])
    by_item = sp.csr_matrix((inverse[asked.values], asked.values, asked.offsets), shape=seen.shape).T.tocsr()
    kept = []
    for start, stop in _blocks(seen, wanted, entries):
        cosine = by_item[start:stop] @ unit
        kept.append(_without_far(cosine, start, neighbours))
    return sp.vstack(kept).tocsr()


def _blocks(seen: sp.csr_matrix, wanted: np.ndarray, entries: int) -> Iterator[tuple[int, int]]:
    """Start and stop of blocks of items, whose wanted rows of the item x item matrix have at most `entries` entries."""
    items = seen.shape[1]
    # An item's row has at most one entry for each item of each of its users.
    most = np.where(wanted, np.minimum(seen.T @ np.diff(seen.indptr), items), 0)
    ends = np.cumsum(most)
    start = 0
    while start < items:
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + entries, side="right")))
        yield start, stop
        start = stop


def _without_far(cosine: sp.csr_matrix, start: int, neighbours: int) -> sp.csr_matrix:
    """Rows of the items `start`, `start` + 1, …: without the item itself, and without all but its nearest."""
    rows = np.repeat(np.arange(cosine.shape[0]), np.diff(cosine.indptr))
    cosine.data[cosine.indices == rows + start] = 0.0
    cosine.eliminate_zeros()
    for row in np.flatnonzero(np.diff(cosine.indptr) > neighbours):
        values = cosine.data[cosine.indptr[row] : cosine.indptr[row + 1]]
        values[values < np.partition(values, -neighbours)[-neighbours]] = 0.0
    cosine.eliminate_zeros()
    return cosine
