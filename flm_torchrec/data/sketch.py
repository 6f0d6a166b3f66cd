"""What features say of how alike items are, in a few numbers an item and with nothing learnt."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from flm_torchrec.data.dataset import PreparedData, Ragged
from flm_torchrec.data.event_files import as_data_error
from flm_torchrec.data.feature_values import describe
from flm_torchrec.data.hashing import mix
from flm_torchrec.data.schema import Feature

WORD_BITS = 64
SHORTEST = 1e-12
"""Length below which a vector counts as zeros."""
KEPT_BYTES = 256 * 2**20
"""Sketches of all items that take at most so much memory are made once, others in every batch."""


class Sketches:
    """Items → vectors of length 1 whose dot products are about the cosines of the items' features; zeros without any.

    Each value or word of a feature has a fixed row of random signs, times log(1 + items / items that have it), so that
    rare ones count more (inverse document frequency: Sparck Jones, 1972). The rows of an item's values are summed, and
    each feature counts the same. The error of a cosine is about 1 / sqrt(width) (random projections with signs:
    Achlioptas, 2003; feature hashing: Weinberger et al., ICML 2009).

    The signs are a hash of what a value says, not of its code, so that they are the same in all data. Words have the
    hash of their row. Numbers and vectors are projected by fixed signs.

    Args:
        data: prepared data. How many items have a value is counted in them.
        width: of the vectors; 0: none are wanted.

    Raises:
        DataError: the vocabulary of a feature is missing.
    """

    def __init__(self, data: PreparedData, width: int) -> None:
        self.items, self.width = data.items, width
        self.features = data.schema.of("item", sparse=True) if width else ()
        self.keys = {f.name: _keys(data, f) for f in self.features}
        """By feature, [cardinality] uint64 of its values."""
        self.weights = {f.name: rarity(data.items.sparse[f.name], f.cardinality) for f in self.features}
        """By feature, [cardinality] float32."""
        numbers = [f"{f.name}/{n}" for f in data.schema.of("item", sparse=False) for n in range(f.width)]
        self.dense = self._signs(_hashes(numbers))  # [F, width]
        items = data.schema.items
        keeps = kept_bytes(items, width) > 0
        self.kept = np.empty((items, width), np.float32) if keeps else None
        self.made = np.zeros(items if keeps else 0, bool)
        """By item, whether `kept` has its sketch."""

    @property
    def growth(self) -> int:
        """Bytes that sketches not made yet will take, once they are asked for."""
        return 4 * self.width * int(np.count_nonzero(~self.made))

    def of(self, ids: np.ndarray) -> np.ndarray:
        """[n] items → [n, width] float32."""
        if self.kept is None:
            return self._make(ids)
        new = np.unique(ids[~self.made[ids]])
        if len(new):
            self.kept[new] = self._make(new)
            self.made[new] = True  # after the rows: another thread may ask for them meanwhile
        return self.kept[ids]

    def _make(self, ids: np.ndarray) -> np.ndarray:
        total = np.zeros((len(ids), self.width), np.float32)
        for feature in self.features:
            taken = self.items.sparse[feature.name].take(ids)
            codes, place = np.unique(taken.values, return_inverse=True)
            ones = np.ones(len(place), np.float32)
            held = sp.csr_matrix((ones, place, taken.offsets), shape=(len(ids), len(codes)))
            total += _unit(held @ self.rows(feature.name, codes))
        if self.width and len(self.dense):
            total += _unit(self.items.dense[ids] @ self.dense)
        return _unit(total)

    def rows(self, feature: str, codes: np.ndarray) -> np.ndarray:
        """[n] codes of a feature → [n, width] float32: what each adds, before the feature is made as long as others."""
        return self._signs(self.keys[feature][codes]) * self.weights[feature][codes, None]

    def _signs(self, keys: np.ndarray) -> np.ndarray:
        """[n] uint64 → [n, width] float32 of 1 / sqrt(width) and its negative."""
        words = -(-self.width // WORD_BITS)
        numbered = keys[:, None] + np.arange(words, dtype=np.uint64)  # wraps around
        bits = np.unpackbits(mix(numbered.view(np.int64)).astype("<u8").view(np.uint8), axis=1)[:, : self.width]
        return (2 * bits.astype(np.float32) - 1) * np.float32(max(1, self.width) ** -0.5)


def kept_bytes(items: int, width: int) -> int:
    """Of the sketches that a process keeps, float32 in host memory; 0 where each batch makes its own."""
    needed = 4 * items * width
    return needed if needed <= KEPT_BYTES else 0


def rarity(held: Ragged, codes: int) -> np.ndarray:
    """Codes of a feature of each item → [codes] float32: log(1 + items / items that have it)."""
    of_item = np.repeat(np.arange(len(held)), held.lengths)
    # Sorted, as np.unique puts integers into a hash table, which takes many times longer where most of them differ.
    pairs = np.sort(of_item * codes + held.values)
    once = pairs[np.diff(pairs, prepend=-1) > 0] % codes
    return np.log1p(len(held) / np.maximum(np.bincount(once, minlength=codes), 1)).astype(np.float32)


def _keys(data: PreparedData, feature: Feature) -> np.ndarray:
    """[cardinality] uint64: hashes of a feature's values; features that share a table share them."""
    if feature.kind == "text":
        return _hashes([f"{feature.table}/{row}" for row in range(feature.cardinality)])
    with as_data_error(data.path / "vocab"):
        values = describe(data.path, feature)["values"]
    # A feature without values has a row all the same, which no item asks for.
    return _hashes([f"{feature.table}/{value}" for value in values] or [feature.table] * feature.cardinality)


def _hashes(texts: Sequence[str]) -> np.ndarray:
    """[n] texts → [n] uint64, evenly spread."""
    return mix(np.array([zlib.crc32(text.encode()) for text in texts], np.int64))


def _unit(rows: np.ndarray) -> np.ndarray:
    """[n, width] → rows of length 1; a row of zeros stays one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), SHORTEST)
