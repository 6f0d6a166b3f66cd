"""Items of an export in memory: keys, titles, attributes, vectors, and exact top-k under filters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.export.index import ItemIndex, open_index, top
from flm_torchrec.export.manifest import Manifest
from flm_torchrec.export.parts import ATTRIBUTE, ExportRows, whole

TOP_VALUES = 100
"""Of a feature, that `GET /v1/catalogue` lists."""


@dataclass(frozen=True)
class Attribute:
    """One feature's values, by item and by value."""

    values: pa.Array  # [V] strings
    codes: Mapping[str, int]
    lists: pa.ListArray  # [items] lists of strings
    rows: np.ndarray  # rows of items, those of value 0 first, then those of value 1 …
    starts: np.ndarray  # [V + 1] int64 into `rows`

    def items_with(self, value: str) -> np.ndarray:
        code = self.codes[value]
        return self.rows[self.starts[code] : self.starts[code + 1]]

    def top(self, most: int) -> list[str]:
        """Values by number of items, most first."""
        order = np.argsort(-np.diff(self.starts), kind="stable")[:most]
        return self.values.take(pa.array(order)).to_pylist()


@dataclass(frozen=True)
class Catalogue:
    """The items of one export; nothing in it changes."""

    keys: pa.Array  # [N] strings
    titles: pa.Array  # [N] strings
    row_of: Mapping[str, int]
    known: np.ndarray  # [N] bool: the id was trained
    distinct: np.ndarray  # [R, D] float32: the vectors that representations are scored against, equal ones once
    vector_of: np.ndarray  # [N] rows of `distinct`
    attributes: Mapping[str, Attribute]
    index: ItemIndex | None
    kind: str

    def __len__(self) -> int:
        return len(self.keys)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """[n] rows → [n, D]."""
        return self.distinct[self.vector_of[rows]]

    def attributes_of(self, row: int) -> dict[str, list[str]]:
        """Values of each feature, each once."""
        return {name: list(dict.fromkeys(a.lists[row].as_py() or [])) for name, a in self.attributes.items()}

    def allowed(self, wanted: Mapping[str, Sequence[str]]) -> np.ndarray | None:
        """[N] bool: the items that for every feature have one of the values named; None where nothing is asked.

        Raises:
            KeyError: no such feature or value.
        """
        mask: np.ndarray | None = None
        for name, values in wanted.items():
            one = np.zeros(len(self), bool)
            for value in values:
                one[self.attributes[name].items_with(value)] = True
            mask = one if mask is None else mask & one
        return mask

    def best(
        self, h: np.ndarray, k: int, excluded: np.ndarray, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the k best items by h [D] that are allowed and not excluded, or of all there are.

        The index is asked for more than k, so that enough are left. Where it finds too few, or a filter leaves so few
        that the index would have to be asked for very many, all that are left are scored: k come back if there are k.
        """
        rest = len(self) if allowed is None else int(allowed.sum())
        wanted = k + len(excluded) if allowed is None else int(2 * (k + len(excluded)) * len(self) / max(rest, 1))
        if self.index is not None and wanted <= MOST_ASKED and wanted < len(self):
            scores, rows = self.index.search(h[None], wanted)
            left = (rows[0] >= 0) & ~np.isin(rows[0], excluded)
            left[left] &= True if allowed is None else allowed[rows[0][left]]
            if int(left.sum()) >= k:
                return scores[0][left][:k], rows[0][left][:k]
        mask = np.ones(len(self), bool) if allowed is None else allowed.copy()
        mask[excluded] = False
        rows = np.flatnonzero(mask)
        if len(rows) * 4 < len(self.distinct):
            return best_of(h, self.vectors(rows), rows, k)
        return top((self.distinct @ h)[self.vector_of[rows]], rows, k)

    def search(self, text: str, limit: int) -> list[int]:
        """Rows whose key or title begins with the text, then those that hold it, whatever the case."""
        if not text:
            return list(range(min(limit, len(self))))
        found: dict[int, None] = {}
        for match in (pc.starts_with, pc.match_substring):
            hit = pc.or_(match(self.titles, text, ignore_case=True), match(self.keys, text, ignore_case=True))
            rows = pc.indices_nonzero(hit)[: limit + len(found)].to_pylist()
            found.update(dict.fromkeys(rows))
            if len(found) >= limit:
                break
        return list(found)[:limit]


MOST_ASKED = 4096
"""Results that the index is asked for; a graph takes as long for more as scoring all."""


def best_of(h: np.ndarray, vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the k largest inner products, largest first; of equal ones the lower row first."""
    return top(np.einsum("nd,d->n", vectors, h), rows, k)  # not by BLAS, whose sums differ by the place of a row


def load_catalogue(folder: Path, manifest: Manifest) -> Catalogue:
    """Read the items of an export whose files have been checked.

    Raises:
        RunError: a file cannot be read.
    """
    rows = ExportRows(folder, manifest, "items")
    table = rows.table([n for n in _columns(rows) if n in ("item_key", "title", "known") or n.startswith(ATTRIBUTE)])
    keys = whole(table["item_key"])
    index = open_index(folder, manifest)
    distinct, vector_of = _vectors(rows, index, manifest)
    lists = {n.removeprefix(ATTRIBUTE): whole(table[n]) for n in table.column_names if n.startswith(ATTRIBUTE)}
    return Catalogue(
        keys=keys,
        titles=whole(table["title"]),
        row_of={key: row for row, key in enumerate(keys.to_pylist())},
        known=whole(table["known"]).to_numpy(zero_copy_only=False),
        distinct=distinct,
        vector_of=vector_of,
        attributes={name: _attribute(column) for name, column in lists.items()},
        index=index,
        kind="none" if manifest.index is None or index is None else manifest.index.kind,
    )


def _columns(rows: ExportRows) -> Iterable[str]:
    return next(rows.parts()).column_names


def _vectors(rows: ExportRows, index: ItemIndex | None, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """[R, D] and [N]: those that the index holds where it holds them whole, so that they are in memory once."""
    flat = None if index is None else index.index
    if isinstance(flat, faiss.IndexHNSWFlat):
        flat = faiss.downcast_index(flat.storage)
    if index is not None and isinstance(flat, faiss.IndexFlat):
        return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d), index.groups.row
    vectors = np.empty((manifest.items, manifest.dim), np.float32)
    start = 0
    for part in rows.vectors("embedding"):
        vectors[start : start + len(part)] = part
        start += len(part)
    return vectors, np.arange(manifest.items)


def _attribute(lists: pa.ListArray) -> Attribute:
    encoded = lists.flatten().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    items = np.repeat(np.arange(len(lists)), lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    return Attribute(
        values=encoded.dictionary,
        codes={value: code for code, value in enumerate(encoded.dictionary.to_pylist())},
        lists=lists,
        rows=items[order],
        starts=np.concatenate([[0], np.cumsum(counts)]),
    )
