"""faiss indices over an export's items, built in one pass over the parts, tuned against brute force."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import RECALL_WANTED, IndexReport, Kind, Manifest
from flm_torchrec.export.rows import Rows
from flm_torchrec.export.vectors import decode

INDEX = "items.faiss"

SAMPLE = 256
"""Users of whom each head's recall is taken."""
CUTS = (10, 100)

LINKS, CONSTRUCTION = 32, 200
"""HNSW's M and efConstruction (Malkov & Yashunin, IEEE TPAMI 2020)."""
TRAINING_ROWS = 39
"""Of a centroid: below that faiss warns of too few."""
BITS = 8
"""Of a number of PQ's code."""
LISTS = 32_768

STEPS: dict[str, tuple[dict[str, int], ...]] = {
    "hnsw": tuple({"efSearch": ef} for ef in (128, 256, 512, 1024, 2048, 4096)),
    "ivfpq": tuple({"nprobe": 2 << n, "k_factor_rf": 2 << n // 2} for n in range(2, 12)),
    "flat": ({},),
}
"""Search effort, raised until recall@100 is RECALL_WANTED or there is no more."""


def check_index(kind: Kind, items: int) -> None:
    """Raise RunError where the catalogue is too small to train the index."""
    if kind == "ivfpq" and items < TRAINING_ROWS << BITS:
        raise RunError(
            f"--index ivfpq: trains on {TRAINING_ROWS << BITS} items at least, not {items}; use flat or hnsw"
        )


def build_index(folder: Path, manifest: Manifest, kind: Kind) -> IndexReport | None:
    """Write the index over the stored embeddings; it alone is in memory, beside one part of the items.

    Its recall is that of the least of the heads, each asked for a sample of users.
    """
    if kind == "none":
        return None
    items = Rows(folder, manifest, "items")
    index, parameters = _new(kind, items, manifest)
    for vectors in items.vectors("embedding"):
        index.add(vectors)
    users = Rows(folder, manifest, "users").sample(REPRESENTATIONS, SAMPLE)
    queries = np.concatenate([decode(users[head])[:SAMPLE] for head in REPRESENTATIONS])
    _, best = brute_force(items.vectors("embedding"), queries, min(max(CUTS), index.ntotal))
    recall: dict[str, dict[str, float]] = {}
    for step in STEPS[kind]:
        _set(index, step)
        recall = _recall(index, queries, best)
        parameters |= step
        if min(r[f"@{max(CUTS)}"] for r in recall.values()) >= RECALL_WANTED:
            break
    with (folder / INDEX).open("wb") as stream:  # faiss's own writer does not tell of a full disk at the end
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))  # type: ignore[attr-defined]
    return IndexReport(kind, parameters, recall, (folder / INDEX).stat().st_size / index.ntotal)


def open_index(folder: Path, manifest: Manifest) -> faiss.Index:
    """The index, set to search as hard as its measured recall took.

    Raises:
        RunError: the export was made with none, or faiss cannot read it.
    """
    if manifest.index is None:
        raise RunError(f"{folder}: has no index; export again with --index flat or hnsw")
    try:
        index = faiss.read_index(str(folder / INDEX))
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("cpp:")[2].partition(": ")[2]
        raise RunError(f"{folder / INDEX}: faiss cannot read it ({reason}); export again") from error
    _set(index, {k: v for k, v in manifest.index.parameters.items() if k in ("efSearch", "nprobe", "k_factor_rf")})
    return index


def brute_force(blocks: Iterator[np.ndarray], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids [q, k] of the k largest inner products, over blocks of items in order of id."""
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    first = 0
    for vectors in blocks:
        scores, ids = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, ids + first)
        first += len(vectors)
    heap.finalize()
    return heap.D, heap.I


def _new(kind: Kind, items: Rows, manifest: Manifest) -> tuple[faiss.Index, dict[str, int]]:
    dim = manifest.dim
    if kind == "flat":
        return faiss.IndexFlatIP(dim), {}
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = CONSTRUCTION
        return graph, {"M": LINKS, "efConstruction": CONSTRUCTION}
    # About four lists to the square root of the items (faiss guidelines); a byte of code for four numbers or so,
    # and fp16 vectors beside them by which what the codes found is ordered anew.
    lists = min(LISTS, 2 ** round(math.log2(4 * math.sqrt(manifest.items))))
    lists = min(lists, manifest.items // TRAINING_ROWS)
    m = max(m for m in range(1, max(2, dim // 4 + 1)) if dim % m == 0)
    index = faiss.index_factory(dim, f"OPQ{m},IVF{lists},PQ{m}x{BITS},Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT)
    step = max(1, manifest.items // (TRAINING_ROWS * max(lists, 1 << BITS)))
    index.train(np.concatenate([vectors[::step] for vectors in items.vectors("embedding")]))
    return index, {"m": m, "nlist": lists}


def _set(index: faiss.Index, values: dict[str, int]) -> None:
    for name, value in values.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)


def _recall(index: faiss.Index, queries: np.ndarray, best: np.ndarray) -> dict[str, dict[str, float]]:
    """By head, whose queries stand one after another; ids of equal scores count as they come."""
    _, found = index.search(queries, best.shape[1])
    recall: dict[str, dict[str, float]] = {}
    parts = (np.split(rows, len(REPRESENTATIONS)) for rows in (found, best))
    for head, mine, true in zip(REPRESENTATIONS, *parts, strict=True):
        recall[head] = {
            f"@{k}": float(np.mean([np.isin(b[:k], f[:k]).mean() for f, b in zip(mine, true, strict=True)]))
            for k in CUTS
        }
    return recall
