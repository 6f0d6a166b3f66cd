"""The best items for blocks of users: by one head, or by a mixture of the heads; seen items left out; filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flm_torchrec.config.heads import FUSED, HEADS
from flm_torchrec.data.dataset import Ragged
from flm_torchrec.export.index import ItemIndex, best_first, exact_index, index_of_some
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.mixture import Mixture, shortlist

BLOCK = 1024
"""Users that are ranked at once."""
MOST_RESULTS = 1 << 21
"""Maximum of results of one search, over its users."""
MOST_ASKED = 4096
"""Maximum of results of an approximate index: a graph takes as long for more of them as the scores of all items."""


@dataclass(frozen=True)
class LeftOut:
    """Items that are left out for each user of a block, as sorted distinct numbers: user * items + item."""

    keys: np.ndarray
    users: int
    items: int

    @classmethod
    def of(cls, seen: Ragged, items: int) -> LeftOut:
        """From the items [users, ragged] of the users' events, of a catalogue of so many items."""
        keys = np.repeat(np.arange(len(seen)), seen.lengths) * items + seen.values
        return cls(np.unique(keys), len(seen), items)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[users] number of items left out."""
        return np.bincount(self.keys // self.items, minlength=self.users)

    def has(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Users [q] and items [q, m], -1 for none → [q, m] bool: the item is left out for the user."""
        if not len(self.keys):
            return np.zeros(items.shape, bool)
        keys = users[:, None] * self.items + items
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return (self.keys[place] == keys) & (items >= 0)


class Ranker:
    """Finds the best items of an export for blocks of users. Threads may share it.

    Args:
        rows: the items of the export.
        index: as of `open_index`; None: all items are scored.
        mixture: how the heads' scores become the fused one, if it is no dot product.
    """

    def __init__(self, rows: ExportRows, index: ItemIndex | None, mixture: Mixture | None) -> None:
        self.rows = rows
        self.index = index
        self.mixture = mixture

    @cached_property
    def exact(self) -> ItemIndex:
        """A flat index of all items."""
        return exact_index(self.rows, self.index)

    def heads(self, head: str) -> tuple[str, ...]:
        """The vectors of a user that a head, or the fusion, is ranked by."""
        return HEADS if head == FUSED and self.mixture is not None else (head,)

    def some(self, items: np.ndarray) -> ItemIndex:
        """An index of some items [n], ascending: what a filter allows."""
        return index_of_some(self.exact, items)

    def best(
        self, vectors: Mapping[str, np.ndarray], k: int, left_out: LeftOut, among: ItemIndex | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and items [q, k], best first; score -inf and item -1 where a user has fewer.

        A mixture scores the best items of each of its heads: an item needs one head that is sure of it.

        Args:
            vectors: by each of `heads`, the users' vectors [q, D].
            among: as of `some`; None: all items.
        """
        if len(vectors) == 1:
            return self._nearest(next(iter(vectors.values())), k, left_out, among)
        assert self.mixture is not None
        most = shortlist(k)
        found = np.concatenate([self._nearest(vectors[head], most, left_out, among)[1] for head in HEADS], axis=1)
        found.sort(axis=1)
        found[:, 1:][found[:, 1:] == found[:, :-1]] = -1
        result = _blank(len(found), k)
        for start in range(0, len(found), BLOCK):
            some = slice(start, start + BLOCK)
            items = found[some]
            by_head = [self.exact.scores(vectors[head][some], np.maximum(items, 0)) for head in HEADS]
            scores = np.where(items >= 0, self.mixture.score(by_head), np.float32(-np.inf))
            for target, best in zip(result, best_first(scores, items, k), strict=True):
                target[some, : best.shape[1]] = best
        return result

    def _nearest(
        self, queries: np.ndarray, k: int, left_out: LeftOut, among: ItemIndex | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `best`, by the dot product with the queries [q, D]."""
        scores, items = _blank(len(queries), k)
        lengths = left_out.lengths
        order = np.argsort(lengths, kind="stable")  # a user of many events must not enlarge the search for others
        while len(order):
            users = order[: max(1, min(BLOCK, MOST_RESULTS // (k + int(lengths[order[:BLOCK]].max()))))]
            order = order[len(users) :]
            fast = self.index if among is None and k + int(lengths[users].max()) <= MOST_ASKED else None
            scores[users], items[users] = first_left(fast or among or self.exact, queries, k, left_out, users)
            if fast is not None:  # an approximate index may find too few
                rest = np.minimum(k, self.rows.count - lengths[users])
                short = users[(items[users] >= 0).sum(1) < rest]
                if len(short):
                    scores[short], items[short] = first_left(self.exact, queries, k, left_out, short)
        return scores, items


def first_left(
    index: ItemIndex, queries: np.ndarray, k: int, left_out: LeftOut, users: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best scores and items [n, k] of an index for some users [n] of a block, without what is left out for them."""
    result = _blank(len(users), k)
    asked = k + int(left_out.lengths[users].max())
    scores, items = index.search(queries[users], min(asked, len(index.groups.members)))
    bad = left_out.has(users, items) | (items < 0)
    order = np.argsort(bad, axis=1, kind="stable")[:, :k]
    bad = np.take_along_axis(bad, order, 1)
    for target, source, nothing in zip(result, (scores, items), (-np.inf, -1), strict=True):
        target[:, : order.shape[1]] = np.where(bad, nothing, np.take_along_axis(source, order, 1))
    return result


def _blank(users: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((users, k), -np.inf, np.float32), np.full((users, k), -1, np.int64)
