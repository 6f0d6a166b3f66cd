"""Metrics of whole lists: what they are made of, and how many of several true items they hold.

Sums are of integers, so that metrics do not depend on the number of processes; the diversity is rounded for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.splits import Examples
from flm_torchrec.evaluation.protocol import Collectives

UNIT = 2**30
"""A number between 0 and 1 is summed over processes as so many parts."""
DIGITS = 4
"""Decimals of the diversity, which is of learned vectors."""
EXAMPLES = 2**14
"""Examples whose events are looked at together."""
BLOCK = 1024
"""Lists whose diversity is computed at once; memory is BLOCK x K x D."""


@dataclass(frozen=True)
class ItemFacts:
    """What lists are judged by."""

    popularity: np.ndarray  # [items] int64: training events
    fetch: Callable[[Tensor], Tensor]
    """[b, K] ids → [b, K, D] float32 vectors; two items are alike if the angle between theirs is small. Collective."""

    def novelty(self) -> np.ndarray:
        """[items] bits: -log2 of the item's share of the training events; an item without events counts as one."""
        events = np.maximum(self.popularity, 1)
        return -np.log2(events / max(1, self.popularity.sum()))


def list_metrics(top: np.ndarray, facts: ItemFacts, comm: Collectives) -> dict[str, float]:
    """Novelty, diversity, popularity and Gini of all processes' lists, `Ranked.top`; collective.

    * novelty@K: mean of `ItemFacts.novelty` over the recommended items, in bits (Zhou et al., PNAS 2010).
    * diversity@K: mean of 1 - cosine over the pairs of a list, then over the lists (Ziegler et al., WWW 2005); 0 for a
      list of one item.
    * popularity@K: mean number of training events of the recommended items, ARP (Yin et al., VLDB 2012).
    * gini@K: how unequally items are recommended; 0: all equally often, near 1: the same few to everyone.
    """
    k = top.shape[1]
    items = len(facts.popularity)
    counts = comm.all_reduce_sum(torch.from_numpy(np.bincount(top[top >= 0], minlength=items))).numpy()
    spread = comm.all_reduce_sum(torch.tensor([_diversity(top, facts.fetch, comm), len(top)]))
    return {
        f"novelty@{k}": float(counts @ facts.novelty() / counts.sum()),
        # The last bits of the vectors differ between numbers of ranks, and so would further digits.
        f"diversity@{k}": round(float(spread[0]) / UNIT / float(spread[1]), DIGITS),
        f"popularity@{k}": float(counts @ facts.popularity / counts.sum()),
        f"gini@{k}": gini(counts),
    }


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of how often each of n items [n] is recommended: 0 if all equally, 1 - 1 / n if one alone."""
    n = len(counts)
    ascending = np.sort(counts.astype(np.float64))
    return float((2 * np.arange(1, n + 1) - n - 1) @ ascending / (n * ascending.sum()))


def _diversity(top: np.ndarray, fetch: Callable[[Tensor], Tensor], comm: Collectives) -> int:
    """Sum over the lists [e, K] of the mean of (1 - cosine) / 2 over pairs, doubled, in parts of UNIT; collective."""
    total = 0
    if top.shape[1] < 2:
        return 0
    most = max(int(lists) for lists in comm.all_gather(torch.tensor(len(top), device=comm.device)))
    for start in range(0, most, BLOCK):
        ids = torch.from_numpy(top[start : start + BLOCK])
        unit = F.normalize(fetch(ids.clamp(min=0)).cpu().double(), dim=2) * (ids >= 0)[:, :, None]  # [b, K, D]
        pairs = unit.sum(1).square().sum(1) - unit.square().sum((1, 2))  # twice the sum of the cosines of the pairs
        k = (ids >= 0).sum(1)
        total += int(((1 - pairs / (k * (k - 1)))[k > 1] * UNIT).round().sum())
    return total


@dataclass(frozen=True)
class Targets:
    """Of each example, the different items that are right: those of the events `end:until` but for known items.

    Events of a kind that is not predicted count neither as right nor as known.
    """

    rows: np.ndarray  # [n] example, ascending
    items: np.ndarray  # [n] item

    @classmethod
    def of(cls, data: PreparedData, examples: Examples) -> Targets | None:
        """None where no example has more than one event to predict.

        An item of the known events is no target: lists leave it out. The next item always is, as in the ranking.
        """
        if examples.until is None:
            return None
        parts = []
        for first in range(0, max(1, len(examples)), EXAMPLES):  # known events of all examples would be all events
            part = examples.take(np.arange(first, min(first + EXAMPLES, len(examples))))
            rows, items = cls._of_part(data, part)
            parts.append(np.stack([first + rows, items]))
        return cls(*np.concatenate(parts, 1))

    @staticmethod
    def _of_part(data: PreparedData, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """[n] example and [n] item."""
        assert examples.until is not None
        stride = data.schema.items

        def keys(first: np.ndarray, end: np.ndarray) -> np.ndarray:
            """Pairs of example and item, as one number each."""
            rows = np.repeat(np.arange(len(first)), end - first)
            events = spans(first, end - first)
            found = rows * stride + data.item[events]
            return found if data.targets is None else found[data.targets[data.event[events]]]

        known = keys(data.offsets[examples.user], examples.end)
        later = np.setdiff1d(keys(examples.end, examples.until), known)
        right = np.union1d(later, keys(examples.end, examples.end + 1))
        rows, items = right // stride, right % stride
        if data.item_domain is None:
            return rows, items
        own = data.item_domain[items] == data.item_domain[data.item[examples.end]][rows]
        return rows[own], items[own]


def target_metrics(
    top: np.ndarray, rows: np.ndarray, targets: Targets, ks: tuple[int, ...], comm: Collectives
) -> dict[str, float]:
    """recall@K, precision@K and map@K over several true items, means over all processes' examples; collective.

    AP@K = sum over the hits among the first K of the precision at the hit, divided by min(K, true items) (Manning et
    al., Introduction to Information Retrieval, 8.4).

    Args:
        top: [e, K] lists of the examples `rows`, `Ranked.top`.
    """
    size = int(targets.rows.max()) + 1
    count = np.bincount(targets.rows, minlength=size)[rows]  # [e] true items
    stride = 1 + max(int(targets.items.max()), int(top.max(initial=0)))
    hit = (top >= 0) & np.isin(rows[:, None] * stride + top, targets.rows * stride + targets.items)  # [e, K]
    found: dict[str, np.ndarray] = {}
    for k in ks:
        hits, best = hit[:, :k].cumsum(1), np.minimum(count, k)
        found[f"recall@{k}"] = hits[:, -1] / count
        found[f"precision@{k}"] = hits[:, -1] / k
        found[f"map@{k}"] = (hits / np.arange(1, hits.shape[1] + 1) * hit[:, :k]).sum(1) / best
    sums = [int((values * UNIT).round().sum()) for values in found.values()]
    total = comm.all_reduce_sum(torch.tensor([*sums, len(rows)], dtype=torch.int64)).tolist()
    return {name: value / UNIT / total[-1] for name, value in zip(found, total, strict=False)}
