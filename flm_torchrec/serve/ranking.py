"""The items of an answer: the best by score, with rules, diversity, pinned items and pages; and items alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flm_torchrec.export.index import top
from flm_torchrec.export.vectors import unit
from flm_torchrec.serve.loaded_export import LoadedExport, Query
from flm_torchrec.serve.messages import Recommend, Similar
from flm_torchrec.serve.resolve import Refused, check_filter, item_row

POOL = 5
"""Candidates for each wanted item from which diverse ones are chosen."""
MOST_POOL = 1000
BLOCK = 65_536
"""Items whose scores are made at once."""
Ranked = list[tuple[int, float]]


def ranked(
    loaded: LoadedExport, request: Recommend, query: Query, excluded: np.ndarray, pinned: Sequence[int]
) -> Ranked:
    """Rows and scores of the items of one page of an answer, in order.

    Args:
        query: what items are scored by.
        excluded: [n] distinct rows to leave out.
        pinned: rows that come first all the same.
    """
    wanted = request.offset + request.k
    rest = wanted - len(pinned)
    chosen: Ranked = []
    if rest > 0:
        left_out = np.unique(np.concatenate([excluded, np.array(pinned, np.int64)])) if pinned else excluded
        pool = rest if not request.diversity else min(MOST_POOL, POOL * rest)
        if request.boost:
            chosen = _boosted(loaded, request, query, left_out, pool)
        else:
            chosen = loaded.best(query, pool, left_out, request.filter)
        if request.diversity:
            chosen = diverse(loaded, chosen, rest, request.diversity, request.k)
    first: Ranked = []
    if pinned:
        scores = query.score(loaded.vectors(np.array(pinned, np.int64)))
        first = list(zip(pinned, scores.tolist(), strict=True))
    return [*first, *chosen][request.offset : wanted]


def diverse(loaded: LoadedExport, candidates: Ranked, k: int, diversity: float, page: int) -> Ranked:
    """k of the candidates by maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998).

    The next item maximises (1 - diversity) · relevance - diversity · similarity: its score, scaled to 0 … 1 over the
    candidates, and the largest cosine to an item that was chosen before.

    Args:
        page: items of a page; the first one may have fewer. Each page is chosen among the best `POOL` candidates for
            each item up to its end, so it has the same items whether later ones are asked for or not.
    """
    if not candidates:
        return []
    rows = np.array([row for row, _ in candidates], np.int64)
    scores = np.array([score for _, score in candidates])
    vectors = unit(loaded.vectors(rows))
    nearest = np.zeros(len(rows))
    left = np.ones(len(rows), bool)
    order: list[int] = []
    for end in range(k % page or page, k + 1, page):
        pool = slice(min(POOL * end, MOST_POOL, len(rows)))
        relevance = (scores[pool] - scores[pool].min()) / max(float(np.ptp(scores[pool])), 1e-12)
        for _ in range(len(order), min(end, len(relevance))):
            gain = np.where(left[pool], (1 - diversity) * relevance - diversity * nearest[pool], -np.inf)
            best = int(gain.argmax())
            order.append(best)
            left[best] = False
            cosines = vectors @ vectors[best]
            nearest = cosines if len(order) == 1 else np.maximum(nearest, cosines)
    return [candidates[n] for n in order]


def alike(loaded: LoadedExport, request: Similar) -> Ranked:
    """Rows and cosines of the items nearest to an item or a vector, nearest first.

    Raises:
        Refused: there is no such item or value of a filter, or the vector has another width or no length.
    """
    check_filter(loaded, request.filter)
    left_out = [item_row(loaded, key, f"exclude.{n}") for n, key in enumerate(request.exclude)]
    if request.item is not None:
        row = item_row(loaded, request.item, "item")
        target = loaded.vectors(np.array([row]))[0]
        left_out.append(row)
    else:
        target = np.array(request.vector, np.float32)
        if target.shape != (loaded.manifest.dim,):
            raise Refused(422, f"vector: has {len(target)} numbers, item vectors have {loaded.manifest.dim}")
    length = float(np.linalg.norm(target))
    if not 0 < length < np.inf:
        raise Refused(422, "vector: has no direction; give one that is not all zeros")
    target = target / length
    excluded = np.unique(np.array(left_out, np.int64))
    rows = _allowed(loaded, excluded, request.filter)
    cosines = _blocks(lambda some: unit(loaded.vectors(some)) @ target, rows)
    found, order = top(cosines, rows, request.k)
    return list(zip(order.tolist(), found.tolist(), strict=True))


def scores_of(loaded: LoadedExport, query: Query, rows: np.ndarray) -> np.ndarray:
    """[n] rows → [n] float32 scores, without the index."""
    return _blocks(lambda some: query.score(loaded.vectors(some)), rows)


def check_boost(loaded: LoadedExport, boost: Mapping[str, Mapping[str, float]]) -> None:
    """Raise Refused where a rule names a feature or a value that no item has."""
    for name, values in boost.items():
        try:
            check_filter(loaded, {name: list(values)})
        except Refused as refused:
            raise Refused(refused.status, str(refused).replace("filter", "boost", 1)) from refused


def pinned_rows(loaded: LoadedExport, request: Recommend) -> list[int]:
    """Rows of the items that come first.

    Raises:
        Refused: one is unknown.
    """
    return [item_row(loaded, key, f"pinned.{n}") for n, key in enumerate(request.pinned)]


def added_by_rules(loaded: LoadedExport, request: Recommend, rows: np.ndarray) -> np.ndarray:
    """[n] rows → [n] what the rules of a request add to the score of each; 0 for pinned ones, which no rule moves."""
    added = np.zeros(len(rows))
    free = ~np.isin(rows, np.array(pinned_rows(loaded, request), np.int64))
    for name, values in request.boost.items():
        for value, amount in values.items():
            added[free & np.isin(rows, _with_value(loaded, name, value))] += amount
    return added


def _boosted(loaded: LoadedExport, request: Recommend, query: Query, excluded: np.ndarray, k: int) -> Ranked:
    """The k best by score and rules. All items are scored: the index knows nothing of rules."""
    rows = _allowed(loaded, excluded, request.filter)
    scores = scores_of(loaded, query, rows)
    place = np.full(loaded.size, -1, np.int64)
    place[rows] = np.arange(len(rows))
    for name, values in request.boost.items():
        for value, amount in values.items():
            hit = place[_with_value(loaded, name, value)]
            scores[hit[hit >= 0]] += amount
    found, order = top(scores, rows, k)
    return list(zip(order.tolist(), found.tolist(), strict=True))


def _with_value(loaded: LoadedExport, name: str, value: str) -> np.ndarray:
    """[n] rows of the items that have the value, each once; added items too."""
    start = len(loaded.catalogue)
    added = [start + n for n, item in enumerate(loaded.added.items) if value in item.attributes.get(name, ())]
    return np.unique(np.concatenate([loaded.catalogue.attributes[name].items_with(value), np.array(added, np.int64)]))


def _allowed(loaded: LoadedExport, excluded: np.ndarray, wanted: Mapping[str, Sequence[str]]) -> np.ndarray:
    """[n] rows that a filter allows and that are not excluded."""
    mask = np.ones(loaded.size, bool)
    for name, values in wanted.items():
        one = np.zeros(loaded.size, bool)
        for value in values:
            one[_with_value(loaded, name, value)] = True
        mask &= one
    mask[excluded] = False
    return np.flatnonzero(mask)


def _blocks(score: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
    """[n] float32 scores of rows, made block by block."""
    parts = [score(rows[start : start + BLOCK]) for start in range(0, len(rows), BLOCK)]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)
