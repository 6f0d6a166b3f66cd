"""Why an item was recommended: the heads' shares of its score, the nearest items of the history, common attributes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from flm_torchrec.export.manifest import Manifest
from flm_torchrec.export.tower.reader import Represented
from flm_torchrec.export.vectors import unit
from flm_torchrec.serve.loaded_export import LoadedExport

NEAREST = 3
"""Items of the history that are named for each recommended item."""


def explain(
    loaded: LoadedExport, represented: Represented, history: np.ndarray, items: np.ndarray
) -> list[dict[str, Any]]:
    """One reason for each of `items`.

    A reason has

    * `shares`: for each head `weight` w, `score` h_head·v and `share` w·(h_head·v). Where fusion is a weighted sum
      (sum, gated), h = Σ w_head·h_head, so the shares add up to the fused score, except for rounding. With cosine
      similarity h has length 1, and w includes the division by the length. With concat, `weight` and `share` are null.
      Where a mixture scores, `weight` is null and `share` is the head's part of the item's probability;
    * `history`: the items of the history that are nearest to it, by the cosine of their vectors, nearest first;
    * `in_common`: by feature, the values that items of the history have too, and how many of these items.

    Args:
        represented: the tower's output for the history.
        history: [n] rows of the history's items, oldest first; only the last `max_history` count, as in the tower.
        items: [m] rows of the recommended items.
    """
    seen = np.unique(history[-loaded.tower.max_history :])
    vectors = loaded.vectors(items)
    scores = represented.heads[:-1] @ vectors.T  # [heads, m]
    near = unit(vectors) @ unit(loaded.vectors(seen)).T  # [m, seen]
    counts = _values(loaded, seen)
    weights = _weights(represented)
    return [
        {
            "shares": _shares(loaded.manifest, weights, scores[:, position]),
            "history": [
                {"item": loaded.key(row), "title": loaded.title(row), "similarity": float(near[position, n])}
                for n, row in ((n, int(seen[n])) for n in np.argsort(-near[position], kind="stable")[:NEAREST])
            ],
            "in_common": _in_common(loaded.attributes(int(row)), counts),
        }
        for position, row in enumerate(items)
    ]


def common_values(loaded: LoadedExport, row: int, others: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """By feature, the values that an item shares with others, and with how many of them."""
    return _in_common(loaded.attributes(row), _values(loaded, np.array(others, np.int64)))


def common_items(loaded: LoadedExport, user: int, seen: np.ndarray) -> dict[str, Any]:
    """How many items a user of the export has in common with `seen` [n], and `NEAREST` of them.

    Args:
        user: row of the user.
        seen: [n] rows of items.
    """
    common = np.intersect1d(loaded.seen[user].values.to_numpy(), seen)
    named = [{"item": loaded.key(row), "title": loaded.title(row)} for row in common[:NEAREST].tolist()]
    return {"items_in_common": len(common), "items": named}


def _weights(represented: Represented) -> np.ndarray | None:
    """[heads]: the fused h is the sum of the heads by these weights; None where it is no weighted sum."""
    total = represented.weights @ represented.heads[:-1]
    squared = float(total @ total)
    # The fused vector may have been divided by its length after the sum.
    return represented.weights * float(represented.heads[-1] @ total) / squared if squared > 0 else None


def _shares(manifest: Manifest, weights: np.ndarray | None, scores: np.ndarray) -> list[dict[str, Any]]:
    # zip drops the last of `heads`, which is the fusion.
    scored = [{"head": head, "score": float(s)} for head, s in zip(manifest.heads, scores, strict=False)]
    if manifest.mixture is not None:
        shares = manifest.mixture.shares(list(scores))
        return [{**one, "weight": None, "share": float(s)} for one, s in zip(scored, shares, strict=True)]
    if weights is None:
        return [{**one, "weight": None, "share": None} for one in scored]
    return [
        {**one, "weight": float(w), "share": float(w * s)} for one, w, s in zip(scored, weights, scores, strict=True)
    ]


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
