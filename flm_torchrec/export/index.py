"""faiss indices over an export's distinct item vectors, tuned against brute force.

A graph finds only some of many equal vectors, and these may hide better ones. So each distinct vector is indexed once,
and `items.rows.npy` has the row of each item in the index; without that file item i has row i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import faiss
import numpy as np

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import RECALL, IndexKind, IndexReport, Manifest
from flm_torchrec.export.mapped import IN_MEMORY, MappedFiles
from flm_torchrec.export.memory import check_fits
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.shards import (
    LEAST_ROWS,
    IndexShards,
    distinct_vectors,
    map_codes,
    memory_of_shards,
    reason_of,
    shards_for,
    write_index,
)
from flm_torchrec.export.vectors import decode, unit

INDEX, ROWS = "items.faiss", "items.rows.npy"
BuiltKind = Literal["flat", "hnsw", "ivfpq"]
FLAT = "flat.fp32"
"""Vectors of a flat index, while it is built."""

SAMPLE = 256
"""Users by which the recall of each head is measured."""
CUTS = (10, 100)
CLOSE = 1e-5
"""A score may be below the k-th best by this share of the largest score and still count: sums depend on their order."""

SLACK = 8
"""Results asked for beyond k where scores are summed again: the k best must be among them."""
LINKS, CONSTRUCTION = 32, 200
"""HNSW's M and efConstruction (Malkov & Yashunin, IEEE TPAMI 2020)."""
GROUP_BYTES = 32
"""Of an item in `Groups`."""
COPIED = 65_536
"""Vectors copied from one index to another at once."""

STEPS: dict[str, tuple[dict[str, int], ...]] = {
    "hnsw": tuple({"efSearch": ef} for ef in (128, 256, 512, 1024, 2048, 4096)),
    "ivfpq": tuple({"nprobe": 2 << n, "k_factor_rf": 2 << n // 2} for n in range(2, 12)),
    "flat": ({},),
}
"""Steps of search effort, tried until recall@100 is what was promised."""
EFFORT = ("efSearch", "nprobe", "k_factor_rf")
TYPES: dict[str, type] = {"flat": faiss.IndexFlat, "hnsw": faiss.IndexHNSW, "ivfpq": faiss.IndexRefine}


@dataclass(frozen=True)
class Groups:
    """Items by their row in the index: items with the same vector share a row."""

    row: np.ndarray  # [items] int64: the row of each item
    first: np.ndarray  # [rows] int64: the first item of each row
    starts: np.ndarray  # [rows + 1] int64 into `members`
    members: np.ndarray  # [items] int64: items of row 0, then of row 1 …, ascending in each

    @classmethod
    def of(cls, row: np.ndarray, rows: int) -> Groups:
        """The groups by each item's row [items], from 0 to `rows` - 1; every row has an item."""
        members = np.argsort(row, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
        return cls(row, members[starts[:-1]], starts, members)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The fields in order."""
        return self.row, self.first, self.starts, self.members

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class ItemIndex:
    """A faiss index over distinct vectors. Its results are items."""

    index: faiss.Index
    groups: Groups
    owner: faiss.Index | None = None
    """The index that `index` is a part of, and whose memory it uses."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries [q, D] → scores and items [q, k], best first, and of equal scores the lower item first.

        Where fewer are found, the rest has score -inf and item -1. A query has the same result alone and among others.
        """
        many = len(queries) > 1 and isinstance(self.index, faiss.IndexFlat)
        found, rows = self.index.search(queries, min(k + SLACK if many else k, len(self.groups)))
        if many:  # faiss multiplies matrices then, and the last bits of a sum depend on the other queries
            found = self._scores(queries, rows)
        if len(queries) == 1 and rows.shape[1] == k and self._is_in_order(found[0], rows[0]):
            return found, self.groups.first[rows]
        scores = np.full((len(queries), k), -np.inf, np.float32)
        items = np.full((len(queries), k), -1, np.int64)
        single = (self.groups.starts[rows + 1] - self.groups.starts[rows] == 1).all(1)  # row -1 counts as it may
        best, members = self._in_order(found[single], rows[single], k)
        scores[single, : best.shape[1]], items[single, : best.shape[1]] = best, members
        for q in np.flatnonzero(~single):
            there = rows[q] >= 0
            best, members = self._members(found[q][there], rows[q][there], k)
            best, members = top(best, members, k)
            scores[q, : len(best)], items[q, : len(best)] = best, members
        return scores, items

    def scores(self, queries: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Inner products [q, n] of queries [q, D] with n items each [q, n]; only of a flat index."""
        return self._scores(queries, self.groups.row[items])

    def _scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        queries, rows = np.ascontiguousarray(queries, np.float32), np.ascontiguousarray(rows, np.int64)
        scores = np.empty(rows.shape, np.float32)
        numbers, result, labels = map(faiss.swig_ptr, (queries, scores, rows))  # type: ignore[attr-defined]
        self.index.compute_distance_subset(len(queries), numbers, rows.shape[1], result, labels)  # type: ignore[attr-defined]
        return scores

    def _is_in_order(self, scores: np.ndarray, rows: np.ndarray) -> bool:
        """Whether the rows [m] are found ones of one item each, no two with equal scores [m], best first."""
        starts = self.groups.starts
        return bool(
            (scores[:-1] > scores[1:]).all() and rows.min() >= 0 and (starts[rows + 1] - starts[rows] == 1).all()
        )

    def _in_order(self, scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows [q, m], each row that of one item → scores and items [q, k or fewer], in order."""
        items = np.where(rows >= 0, self.groups.first[rows], -1)
        scores = np.where(rows >= 0, scores, np.float32(-np.inf))
        return best_first(scores, items, k)

    def _members(self, scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and items of rows, best first: the k best items or more, and at most k of each row."""
        starts = self.groups.starts[rows]
        lengths = np.minimum(self.groups.starts[rows + 1] - starts, k)
        ends = np.cumsum(lengths)
        enough = int(np.searchsorted(ends, k))
        if enough < len(rows):  # later rows count only where their score is that of the k-th item
            kept = int(np.searchsorted(-scores, -scores[enough], side="right"))
            starts, lengths, ends, scores = starts[:kept], lengths[:kept], ends[:kept], scores[:kept]
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return np.repeat(scores, lengths), self.groups.members[np.repeat(starts, lengths) + within]


def inner(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """[n, D] and [D] → [n] inner products: equal vectors have equal ones.

    In BLAS, and so with `@`, the order of a sum depends on the position of its row, and so does its rounding.
    """
    return np.einsum("nd,d->n", vectors, query)


def best_first(scores: np.ndarray, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and items [q, m] → the k largest of each row, or fewer, largest first; equal scores in order of items."""
    order = np.lexsort((items, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(items, order, 1)


def top(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of scores [n] and their ids, largest first; of equal scores those of the lowest ids, in order."""
    if k < len(scores):
        kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        scores, ids = scores[kept], ids[kept]
    order = np.lexsort((ids, -scores))[:k]
    return scores[order], ids[order]


def check_index(kind: IndexKind, items: int) -> None:
    """Raise RunError where there are too few items to train the index."""
    if kind == "ivfpq" and items < LEAST_ROWS:
        raise RunError(f"--index ivfpq: trains on {LEAST_ROWS} items at least, not {items}; use flat or hnsw")


def check_memory(kind: IndexKind, items: int, width: int, growth: int = 0) -> None:
    """Check that an index over vectors of so many numbers fits into the free memory; it is built on rank 0.

    Args:
        growth: bytes that encoding all items keeps until the index is built.

    Raises:
        RunError: it does not.
    """
    of_index = {"hnsw": items * (4 * width + 8 * LINKS), "ivfpq": memory_of_shards(items, width)}
    needed = 0 if kind == "none" else items * GROUP_BYTES + of_index.get(kind, 0) + growth
    instead = "--index none, and search in a vector database ('flm load')"
    check_fits(needed, f"--index {kind}", f"{items:,} items", instead)


def build_index(folder: Path, manifest: Manifest, kind: IndexKind, promised: float = RECALL) -> IndexReport | None:
    """Write the index over the distinct embeddings. In memory are a graph or the codes, and one part of the items.

    Recall is measured for each head with a sample of users, and the minimum over heads counts. If it is less than
    promised, or there are too few distinct vectors to train the index, a flat index is written, and the report says so.
    """
    if kind == "none":
        return None
    with TemporaryDirectory(dir=folder) as work:
        return _build(folder, manifest, (kind, promised), Path(work))


def merge_shards(folder: Path, manifest: Manifest, shards: IndexShards, promised: float = RECALL) -> IndexReport:
    """As `build_index` for an ivfpq index whose shards were built apart.

    Raises:
        RunError: as of `IndexShards.merge`.
    """
    with TemporaryDirectory(dir=shards.work) as work:
        return _build(folder, manifest, ("ivfpq", promised), Path(work), shards)


def _build(
    folder: Path,
    manifest: Manifest,
    asked: tuple[BuiltKind, float],
    work: Path,
    shards: IndexShards | None = None,
) -> IndexReport:
    wanted, promised = asked
    items = ExportRows(folder, manifest, "items")
    groups = groups_of(items)
    users = ExportRows(folder, manifest, "users").sample(REPRESENTATIONS, SAMPLE)
    queries = np.concatenate([decode(users[head])[:SAMPLE] for head in REPRESENTATIONS])
    best, _ = brute_force(items.vectors("embedding"), queries, min(max(CUTS), manifest.items))
    kind: BuiltKind = "flat" if wanted == "ivfpq" and len(groups) < LEAST_ROWS else wanted
    if kind == "ivfpq" and shards is None:
        shards = IndexShards.train(items, groups.first, work, shards_for(items, len(groups)))
        for shard in range(shards.plan.shards):
            shards.build(shard)
    found, parameters = _new(kind, items, groups, shards, work)
    effort, recall = _tuned(items, found, kind, (queries, best), promised)
    if _min_recall(recall) < promised:
        kind = "flat"
        found, parameters = _new(kind, items, groups, None, work)
        effort, recall = _tuned(items, found, kind, (queries, best), promised)
    write_index(found.index, folder / INDEX)
    size = (folder / INDEX).stat().st_size
    if len(groups) < manifest.items:
        np.save(folder / ROWS, groups.row.astype(np.int32), allow_pickle=False)
        size += (folder / ROWS).stat().st_size
    return IndexReport(kind, parameters | effort, recall, size / manifest.items, len(groups), promised, wanted)


def open_index(folder: Path, manifest: Manifest, mapped: MappedFiles = IN_MEMORY) -> ItemIndex | None:
    """The index, set to the search effort of its measured recall; None where all items must be scored.

    That is the case where the export has no index, or where an older version indexed equal vectors several times: its
    graph may hide the best items.

    Args:
        mapped: where the index is mapped from a file, rather than read into the memory of this process.

    Raises:
        RunError: faiss cannot read the index, or it has other rows than the manifest says.
    """
    report = manifest.index
    if report is None or (report.rows is None and report.kind != "flat"):
        return None
    file = folder / INDEX
    try:
        flags = faiss.IO_FLAG_MMAP_IFC if mapped.folder else 0  # type: ignore[attr-defined]
        index = faiss.read_index(str(mapped.copy(file)), flags)
        _set(index, {k: v for k, v in report.parameters.items() if k in EFFORT})
    except (RuntimeError, MemoryError) as error:
        raise RunError(f"{file}: faiss cannot read it ({reason_of(error)}); export again") from error
    rows = report.rows or manifest.items
    alike = index.d == manifest.dim and index.ntotal == rows and index.metric_type == faiss.METRIC_INNER_PRODUCT
    if not alike or not isinstance(index, TYPES[report.kind]):
        raise RunError(
            f"{file}: {type(index).__name__} of {index.ntotal} x {index.d}, and the manifest says {report.kind} of"
            f" {rows} x {manifest.dim}; export again"
        )
    groups = mapped.arrays("groups", 4, lambda: _read_groups(folder, manifest.items, rows).arrays())
    return ItemIndex(index, Groups(*groups))


def exact_index(items: ExportRows, index: ItemIndex | None) -> ItemIndex:
    """A flat index of all items, in memory; it shares the vectors of an export's index that has them in full."""
    flat = None if index is None else index.index
    if isinstance(flat, faiss.IndexHNSWFlat):
        flat = faiss.downcast_index(flat.storage)
    if index is not None and isinstance(flat, faiss.IndexFlat):
        return replace(index, index=flat, owner=index.index)
    groups = groups_of(items) if index is None else index.groups
    flat = faiss.IndexFlatIP(items.dim)
    for vectors in distinct_vectors(items, groups.first, range(len(items.files))):
        flat.add(vectors)
    return ItemIndex(flat, groups)


def index_of_some(exact: ItemIndex, items: np.ndarray) -> ItemIndex:
    """A flat index of some items [n], ascending, of a flat index of all. Its results are items of the catalogue."""
    distinct, row = np.unique(exact.groups.row[items], return_inverse=True)
    groups = Groups.of(row, len(distinct))
    flat = faiss.IndexFlatIP(exact.index.d)
    for start in range(0, len(distinct), COPIED):
        flat.add(exact.index.reconstruct_batch(distinct[start : start + COPIED]))
    return ItemIndex(flat, replace(groups, first=items[groups.first], members=items[groups.members]))


def cosine_index(exact: ItemIndex) -> ItemIndex:
    """A flat index of the same items by cosine: its vectors have length 1, those without length stay 0."""
    flat = faiss.IndexFlatIP(exact.index.d)
    for start in range(0, len(exact.groups), COPIED):
        vectors = exact.index.reconstruct_n(start, min(COPIED, len(exact.groups) - start))
        flat.add(unit(vectors))
    return ItemIndex(flat, exact.groups)


def brute_force(blocks: Iterator[np.ndarray], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids [q, k] of the k largest inner products with queries [q, D].

    Args:
        blocks: [n, D] each, the vectors of all items in order of id.
    """
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    first = 0
    for vectors in blocks:
        scores, ids = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, ids + first)
        first += len(vectors)
    heap.finalize()
    return heap.D, heap.I


def groups_of(items: ExportRows) -> Groups:
    """Groups of items with equal vectors, by a digest of 128 bits; rows are in order of their first item."""
    digests = [
        np.frombuffer(b"".join(blake2b(vector, digest_size=16).digest() for vector in vectors + 0.0), np.uint64)
        for vectors in items.vectors("embedding")  # + 0.0: minus zero is zero
    ]
    pairs = np.concatenate(digests).reshape(-1, 2)
    del digests
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # stable: equal vectors stay in order of id
    fresh = np.zeros(len(order), bool)
    fresh[0] = True
    for half in range(2):
        ordered = pairs[order, half]
        fresh[1:] |= ordered[1:] != ordered[:-1]
    first = np.minimum.reduceat(order, np.flatnonzero(fresh))
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    row = np.empty(len(order), np.int64)
    row[order] = rank[np.cumsum(fresh) - 1]
    return Groups.of(row, len(first))


def _read_groups(folder: Path, items: int, rows: int) -> Groups:
    if rows == items:
        return Groups.of(np.arange(items), items)
    file = folder / ROWS
    try:
        row = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({error}); export again") from error
    if row.shape != (items,) or row.dtype != np.int32 or row.min() < 0 or row.max() >= rows:
        raise RunError(f"{file}: is not of {items} items in {rows} rows; export again")
    if len(np.unique(row)) < rows:
        raise RunError(f"{file}: a row of the index has no item; export again")
    return Groups.of(row.astype(np.int64), rows)


def _tuned(
    items: ExportRows, found: ItemIndex, kind: IndexKind, known: tuple[np.ndarray, np.ndarray], promised: float
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Set the minimum effort that reaches the promised recall, or the maximum; the effort, and the recall.

    Args:
        known: queries, and the scores of their best items.
    """
    queries, best = known
    effort: dict[str, int] = {}
    recall: dict[str, dict[str, float]] = {}
    for effort in STEPS[kind]:
        _set(found.index, effort)
        scores, ids = found.search(queries, best.shape[1])
        if kind == "ivfpq":  # its own scores are of rounded vectors
            scores = _scores(items, queries, ids)
        recall = _recall(scores, best)
        if _min_recall(recall) >= promised:
            break
    return effort, recall


def _min_recall(recall: dict[str, dict[str, float]]) -> float:
    """The minimum over the heads of recall@100."""
    return min(r[f"@{max(CUTS)}"] for r in recall.values())


def _new(
    kind: IndexKind, items: ExportRows, groups: Groups, shards: IndexShards | None, work: Path
) -> tuple[ItemIndex, dict[str, int]]:
    """An index of all vectors, and how it was built. It may map files of `work`, or of the folder of the shards."""
    if shards is not None:
        return ItemIndex(shards.merge(), groups), dict(shards.plan.parameters)
    blocks = distinct_vectors(items, groups.first, range(len(items.files)))
    if kind == "flat":
        with (work / FLAT).open("wb") as stream:
            for vectors in blocks:
                stream.write(vectors.data)
        flat = faiss.IndexFlatIP(items.dim)
        flat.referenced_objects = [map_codes(flat, work / FLAT, len(groups))]  # type: ignore[attr-defined]
        return ItemIndex(flat, groups), {}
    graph = faiss.IndexHNSWFlat(items.dim, LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = CONSTRUCTION
    for vectors in blocks:
        graph.add(vectors)
    return ItemIndex(graph, groups), {"M": LINKS, "efConstruction": CONSTRUCTION}


def _set(index: faiss.Index, values: dict[str, int]) -> None:
    for name, value in values.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)


def _scores(items: ExportRows, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[q, k] inner products of queries with the found items; -inf where none was found."""
    wanted = np.unique(ids[ids >= 0])
    loaded = np.empty((len(wanted), queries.shape[1]), np.float32)
    start = 0
    for vectors in items.vectors("embedding"):
        low, high = np.searchsorted(wanted, [start, start + len(vectors)])
        loaded[low:high] = vectors[wanted[low:high] - start]
        start += len(vectors)
    scores = np.full(ids.shape, -np.inf, np.float32)
    for query, found, row in zip(queries, ids, scores, strict=True):
        row[found >= 0] = loaded[np.searchsorted(wanted, found[found >= 0])] @ query
    return scores


def _recall(scores: np.ndarray, best: np.ndarray) -> dict[str, dict[str, float]]:
    """Recall by head; the rows of `scores` and `best` are grouped by head.

    An item counts as found if its score is at least that of the k-th best item.
    """
    recall: dict[str, dict[str, Any]] = {}
    parts = (np.split(of_all, len(REPRESENTATIONS)) for of_all in (scores, best))
    for head, mine, true in zip(REPRESENTATIONS, *parts, strict=True):
        slack = CLOSE * np.abs(true).max(1, keepdims=True)
        cuts = {k: min(k, best.shape[1]) for k in CUTS}
        recall[head] = {
            f"@{k}": float((mine[:, :most] >= true[:, most - 1 : most] - slack).mean()) for k, most in cuts.items()
        }
    return recall
