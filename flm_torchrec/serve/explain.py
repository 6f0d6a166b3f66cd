"""Why an item was recommended, out of what the model computed: heads' shares, nearest history, attributes in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from flm_torchrec.export.tower.reader import Represented
from flm_torchrec.serve.loaded_export import LoadedExport

NEAREST = 3
"""Items of the history told for each recommended item."""


def explain(loaded: LoadedExport, found: Represented, history: np.ndarray, items: np.ndarray) -> list[dict[str, Any]]:
    """One reason a row of `items`.

    Each has

    * `shares`: for each head `weight` w, `score` h_head·v and `share` w·(h_head·v). Where fusion is a weighted sum
      (sum, gated) h = Σ w_head·h_head, so the shares add up to the fused score, exactly but for rounding; a cosine's h
      has length 1, and w is the weight in that. Where it is none (concat) `weight` and `share` are null;
    * `history`: the items of the history nearest to it, by the cosine of their vectors, nearest first;
    * `in_common`: by feature, values that it has in common with items of the history, and of how many of them.

    Args:
        found: what the tower made of the history.
        history: [n] rows of the history's items, oldest first; those before the last that the tower sees are left out.
        items: [m] rows of the recommended items.
    """
    seen = np.unique(history[-loaded.tower.max_history :])
    vectors = loaded.vectors(items)
    scores = found.heads[:-1] @ vectors.T  # [heads, m]
    near = _unit(vectors) @ _unit(loaded.vectors(seen)).T  # [m, seen]
    counts = _values(loaded, seen)
    weights = _weights(found)
    return [
        {
            "shares": _shares(loaded.manifest.heads, weights, scores[:, place]),
            "history": [
                {"item": loaded.key(row), "title": loaded.title(row), "similarity": float(near[place, n])}
                for n, row in ((n, int(seen[n])) for n in np.argsort(-near[place], kind="stable")[:NEAREST])
            ],
            "in_common": _in_common(loaded.attributes(int(row)), counts),
        }
        for place, row in enumerate(items)
    ]


def _weights(found: Represented) -> np.ndarray | None:
    """[heads]: h is exactly their sum of the heads; None where it is no weighted sum."""
    raw = found.weights @ found.heads[:-1]
    length = float(raw @ raw)
    # The fused vector may have been brought to length 1 after the sum.
    return found.weights * float(found.heads[-1] @ raw) / length if length > 0 else None


def _shares(heads: Sequence[str], weights: np.ndarray | None, scores: np.ndarray) -> list[dict[str, Any]]:
    told = [{"head": head, "score": float(s)} for head, s in zip(heads, scores, strict=False)]  # the last is fused
    if weights is None:
        return [{**one, "weight": None, "share": None} for one in told]
    return [{**one, "weight": float(w), "share": float(w * s)} for one, w, s in zip(told, weights, scores, strict=True)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _values(loaded: LoadedExport, rows: np.ndarray) -> Counter[tuple[str, str]]:
    """How many of the items have each value of each feature."""
    return Counter(
        (name, value) for row in rows for name, values in loaded.attributes(int(row)).items() for value in set(values)
    )


def _in_common(attributes: dict[str, list[str]], counts: Counter[tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    common = {
        name: [{"value": v, "items": counts[name, v]} for v in dict.fromkeys(values) if counts[name, v]]
        for name, values in attributes.items()
    }
    return {name: values for name, values in common.items() if values}
