"""The catalogue: the items of an export in memory, with keys, titles, attributes, vectors and top-k under filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.export.index import ItemIndex, inner, open_index, top
from flm_torchrec.export.manifest import Manifest
from flm_torchrec.export.mapped import IN_MEMORY, MappedFiles
from flm_torchrec.export.parts import ATTRIBUTE, ExportRows, single_array
from flm_torchrec.serve.key_rows import KeyRows

TOP_VALUES = 100
"""Values of a feature that `GET /v1/catalogue` lists."""
MOST_SHOWN = 10_000
"""Items that are kept as answers show them."""
MOST_COMPARED = 16_384
"""Pairs of rows that are compared one by one."""
MOST_ASKED = 4096
"""Maximum of results of the index: a graph takes as long for more of them as the scores of all items."""


@dataclass(frozen=True)
class Attribute:
    """One feature's values, by item and by value."""

    values: pa.Array  # [V] strings
    codes: Mapping[str, int]
    lists: pa.ListArray  # [items] lists of strings
    rows: np.ndarray  # rows of items: those of value 0, then those of value 1 …
    starts: np.ndarray  # [V + 1] int64 into `rows`

    def items_with(self, value: str) -> np.ndarray:
        """[n] rows of the items with the value.

        Raises:
            KeyError: no item has it.
        """
        code = self.codes[value]
        return self.rows[self.starts[code] : self.starts[code + 1]]

    def top(self, most: int) -> list[str]:
        """At most `most` values, those of the most items first."""
        order = np.argsort(-np.diff(self.starts), kind="stable")[:most]
        return self.values.take(pa.array(order)).to_pylist()


@dataclass(frozen=True)
class Catalogue:
    """The items of one export. Nothing in it changes."""

    keys: pa.Array  # [N] strings
    titles: pa.Array  # [N] strings
    row_of: Mapping[str, int]
    distinct: np.ndarray  # [R, D] float32: the distinct vectors that representations are scored against
    vector_of: np.ndarray  # [N] rows of `distinct`
    attributes: Mapping[str, Attribute]
    index: ItemIndex | None
    kind: str
    shown: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Items that answers have shown, by row: reading one from Arrow takes as long as finding it."""

    def __len__(self) -> int:
        return len(self.keys)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """[n] rows of items → their vectors [n, D]."""
        return self.distinct[self.vector_of[rows]]

    def item(self, row: int) -> dict[str, Any]:
        """An item as answers show it; not to be changed."""
        found = self.shown.get(row)
        if found is None:
            if len(self.shown) >= MOST_SHOWN:
                self.shown.clear()
            attributes = self.attributes_of(row)
            found = {"item": self.keys[row].as_py(), "title": self.titles[row].as_py(), "attributes": attributes}
            self.shown[row] = found
        return found

    def attributes_of(self, row: int) -> dict[str, list[str]]:
        """By feature, the distinct values of the item."""
        return {name: list(dict.fromkeys(a.lists[row].as_py() or [])) for name, a in self.attributes.items()}

    def allowed(self, wanted: Mapping[str, Sequence[str]]) -> np.ndarray | None:
        """[N] bool: the items that have one of the wanted values for each feature; None without a filter.

        Raises:
            KeyError: there is no such feature or value.
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
        """Scores and rows of the k best items by h [D] that are allowed and not excluded; fewer if there are fewer.

        The index is searched for more than k items, so that k remain. All remaining items are scored where the index
        gives too few, or where a filter leaves so few items that the index would have to give very many.

        Args:
            excluded: [n] rows of items.
            allowed: [N] bool; None: every item.
        """
        rest = len(self) if allowed is None else int(allowed.sum())
        wanted = k + len(excluded) if allowed is None else int(2 * (k + len(excluded)) * len(self) / max(rest, 1))
        if self.index is not None and wanted <= MOST_ASKED and wanted < len(self):
            scores, rows = self.index.search(h[None], wanted)
            left = (rows[0] >= 0) & ~_among(rows[0], excluded)
            if allowed is not None:
                left[left] &= allowed[rows[0][left]]
            kept = np.flatnonzero(left)[:k]
            if len(kept) == k:
                return scores[0][kept], rows[0][kept]
        mask = np.ones(len(self), bool) if allowed is None else allowed.copy()
        mask[excluded] = False
        rows = np.flatnonzero(mask)
        if len(rows) * 4 < len(self.distinct):
            return best_of(h, self.vectors(rows), rows, k)
        return top((self.distinct @ h)[self.vector_of[rows]], rows, k)

    def search(self, text: str, limit: int) -> list[int]:
        """Rows of items whose key or title starts with the text, then of those that contain it; case is ignored."""
        if not text:
            return list(range(min(limit, len(self))))
        matches: dict[int, None] = {}
        for compare in (pc.starts_with, pc.match_substring):
            hit = pc.or_(compare(self.titles, text, ignore_case=True), compare(self.keys, text, ignore_case=True))
            rows = pc.indices_nonzero(hit)[: limit + len(matches)].to_pylist()
            matches.update(dict.fromkeys(rows))
            if len(matches) >= limit:
                break
        return list(matches)[:limit]


def best_of(h: np.ndarray, vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the k largest inner products of h [D] and vectors [n, D]; of equals the lower row first."""
    return top(inner(vectors, h), rows, k)


def _among(rows: np.ndarray, some: np.ndarray) -> np.ndarray:
    """[n] bool: which rows are among `some` [m]. numpy.isin sorts, which takes longer where both are few."""
    if len(rows) * len(some) > MOST_COMPARED:
        return np.isin(rows, some)
    return (rows[:, None] == some).any(1)


def load_catalogue(folder: Path, manifest: Manifest, mapped: MappedFiles = IN_MEMORY) -> Catalogue:
    """Read the items of an export whose files have been checked.

    Raises:
        RunError: a file cannot be read, or is not what the manifest says.
    """
    rows = ExportRows(folder, manifest, "items")
    table = mapped.table("items", lambda: _shown(rows))
    keys = single_array(table["item_key"])
    index = open_index(folder, manifest, mapped)
    distinct, vector_of = _vectors(rows, index, mapped)
    names = [name for name in table.column_names if name.startswith(ATTRIBUTE)]
    attributes = {
        name.removeprefix(ATTRIBUTE): _attribute(single_array(table[name]), f"attribute-{position}", mapped)
        for position, name in enumerate(names)  # the name of a feature may be no name of a file
    }
    return Catalogue(
        keys=keys,
        titles=single_array(table["title"]),
        row_of=KeyRows(keys, "item-keys", mapped),
        distinct=distinct,
        vector_of=vector_of,
        attributes=attributes,
        index=index,
        kind="none" if manifest.index is None or index is None else manifest.index.kind,
    )


def _shown(rows: ExportRows) -> pa.Table:
    """Keys, titles and attributes of all items."""
    columns = next(rows.parts()).column_names
    return rows.table([n for n in columns if n in ("item_key", "title") or n.startswith(ATTRIBUTE)])


def _vectors(rows: ExportRows, index: ItemIndex | None, mapped: MappedFiles) -> tuple[np.ndarray, np.ndarray]:
    """`distinct` and `vector_of`. Where the index has the full vectors, it shares their memory."""
    flat = None if index is None else index.index
    if isinstance(flat, faiss.IndexHNSWFlat):
        flat = faiss.downcast_index(flat.storage)
    if index is not None and isinstance(flat, faiss.IndexFlat):
        return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d), index.groups.row
    vectors = mapped.array("vectors", lambda: _all_vectors(rows))
    return vectors, mapped.array("vector-of", lambda: np.arange(len(vectors)))


def _all_vectors(rows: ExportRows) -> np.ndarray:
    vectors = np.empty((rows.count, rows.dim), np.float32)
    start = 0
    for part in rows.vectors("embedding"):
        vectors[start : start + len(part)] = part
        start += len(part)
    return vectors


def _attribute(lists: pa.ListArray, name: str, mapped: MappedFiles) -> Attribute:
    """A feature's values.

    Args:
        name: of its arrays in `mapped`.
    """
    values = single_array(mapped.table(name, lambda: _values(lists))["value"])
    rows, starts = mapped.arrays(f"{name}-rows", 2, lambda: _by_value(lists))
    return Attribute(values, KeyRows(values, f"{name}-keys", mapped), lists, rows, starts)


def _values(lists: pa.ListArray) -> pa.Table:
    return pa.table({"value": lists.flatten().dictionary_encode().dictionary})


def _by_value(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """`rows` and `starts` of an attribute; values are in the order in which they come first."""
    encoded = lists.flatten().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    items = np.repeat(np.arange(len(lists)), lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    return items[order], np.concatenate([[0], np.cumsum(counts)])
