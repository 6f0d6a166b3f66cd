"""How many of the best items an export's index finds, measured on what is served, against the scores of all items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flm_torchrec.data.history import NO_EVENTS
from flm_torchrec.export.index import CLOSE
from flm_torchrec.export.parts import ExportRows, spread
from flm_torchrec.export.tower.reader import Represented, TowerQuery
from flm_torchrec.serve.loaded_export import LoadedExport
from flm_torchrec.serve.ranking import BLOCK

SAMPLE = 32
"""Users by which recall is measured."""
CUT = 100


def sample_recall(loaded: LoadedExport) -> float:
    """As `measured_recall`, for users of the export, spread evenly over it, and the vectors in its files.

    Raises:
        RunError: a file cannot be read.
    """
    rows = spread(loaded.manifest.users, SAMPLE).tolist() if loaded.manifest.users else []
    queries = [TowerQuery(loaded.tower.known_history(row), row) for row in rows] or [TowerQuery()]
    vectors = ExportRows(loaded.folder, loaded.manifest, "items").vectors("embedding")
    return measured_recall(loaded, loaded.represent(queries), vectors)


def measured_recall(
    loaded: LoadedExport, users: Sequence[Represented], vectors: Iterable[np.ndarray] | None = None
) -> float:
    """The minimum over the heads of recall@100, the mean over users. A score that is no number is not found.

    An item counts as found if its score is at least that of the 100th best item.

    Args:
        vectors: [n, D] each, of all items; None: those in memory.
    """
    heads = loaded.manifest.heads
    queries = [loaded.query(user, head) for head in heads for user in users]
    k = min(CUT, loaded.size)
    served = [np.array([row for row, _ in loaded.best(query, k, NO_EVENTS.item, {})]) for query in queries]
    best = [np.zeros(0, np.float32)] * len(queries)
    mine = list(best)  # scores of the served items: an index may have scores of its own, of rounded vectors
    start = 0
    for block in vectors or _in_memory(loaded):
        for n, query in enumerate(queries):
            scores = query.score(block)
            best[n] = _largest(np.concatenate([best[n], scores]), k)
            inside = served[n][(served[n] >= start) & (served[n] < start + len(block))]
            mine[n] = np.concatenate([mine[n], scores[inside - start]])
        start += len(block)
    found = [(m >= b.min() - CLOSE * np.abs(b).max()).sum() / k for m, b in zip(mine, best, strict=True)]
    return float(np.reshape(found, (len(heads), len(users))).mean(1).min())


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    return scores if len(scores) <= k else np.partition(scores, len(scores) - k)[len(scores) - k :]


def _in_memory(loaded: LoadedExport) -> Iterator[np.ndarray]:
    """Vectors of all items, with the added ones, block by block."""
    for start in range(0, loaded.size, BLOCK):
        yield loaded.vectors(np.arange(start, min(start + BLOCK, loaded.size)))
