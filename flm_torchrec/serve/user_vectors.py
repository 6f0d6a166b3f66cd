"""The vectors of an export's users, and which of them are near: one search over all, in half precision."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import faiss
import numpy as np

from flm_torchrec.config.heads import FUSED, HEADS
from flm_torchrec.export.manifest import Manifest
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.tower.reader import Represented
from flm_torchrec.export.vectors import decode, unit
from flm_torchrec.serve.loaded_export import LoadedExport
from flm_torchrec.serve.ranking import Ranked
from flm_torchrec.serve.resolve import Refused


def load_user_vectors(folder: Path, manifest: Manifest) -> faiss.Index:
    """An exact index of the users of an export by cosine. It has 2 bytes a number: [users, S] of the fused vectors.

    Where the fusion is a mixture, no single vector represents a user. Then the index has the vectors of all heads one
    behind the other, [users, heads * S], and finds by the mean of the heads' cosines.

    Raises:
        RunError: the export's users cannot be read.
    """
    heads = _heads(manifest)
    index = faiss.IndexScalarQuantizer(
        len(heads) * manifest.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.is_trained = True  # numbers of half precision have nothing to learn
    for part in ExportRows(folder, manifest, "users").parts(heads):
        index.add(_joined([decode(part[head]) for head in heads]))
    return index


def nearest_users(loaded: LoadedExport, found: Represented, k: int, excluded: Collection[int]) -> Ranked:
    """Rows and cosines of at most k users, nearest first.

    Args:
        found: the tower's output for the user to compare with.
        excluded: rows of users to leave out.

    Raises:
        Refused: the users' vectors are not loaded.
    """
    if loaded.user_vectors is None:
        raise Refused(403, "users alike: are off; start the server with --similar-users to use them")
    manifest = loaded.manifest
    rows = [found.heads[manifest.heads.index(head)][None] for head in _heads(manifest)]
    excluded = loaded.forgotten.union(excluded)
    most = min(k + len(excluded), loaded.user_vectors.ntotal)
    if not most:
        return []
    scores, users = loaded.user_vectors.search(_joined(rows), most)
    best = [(int(user), float(score)) for user, score in zip(users[0], scores[0], strict=True)]
    return [(user, score) for user, score in best if user >= 0 and user not in excluded][:k]


def _heads(manifest: Manifest) -> list[str]:
    return [FUSED] if manifest.mixture is None else list(HEADS)


def _joined(by_head: list[np.ndarray]) -> np.ndarray:
    """Vectors [n, S] of each head → [n, heads * S], whose dot product is the mean of the heads' cosines."""
    return np.ascontiguousarray(
        np.concatenate([unit(vectors) / np.sqrt(len(by_head)) for vectors in by_head], axis=1), np.float32
    )
