"""The true item's rank among all items, block by block, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.splits import Examples
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.protocol import Comm, Encoder, Of, Scorer


@dataclass(frozen=True)
class Ranked:
    """What one rank found for its share of the examples, by name of the scorer's `names`."""

    rows: np.ndarray  # [e] indices of examples
    ranks: dict[str, np.ndarray]  # [e] int64, 1 is best
    top: dict[str, np.ndarray]  # [e, K] int64 item ids, best first


@dataclass(frozen=True)
class Seen:
    """Items to leave out of the ranking: item `items[i]` for row `rows[i]` of a block of users."""

    rows: Tensor
    items: Tensor


@dataclass(frozen=True)
class Blocks:
    """How much is scored at once: memory is `users` x `items` scores, whatever the size of the data."""

    users: int = 256
    items: int = 16384


class HeadScorer:
    """The model's heads: dot product of representation and item vector.

    Holds one vector an item on every rank, items x D x 4 bytes; each rank encodes its share of the blocks.
    """

    def __init__(
        self, encoder: Encoder, items: int, block: int, comm: Comm, of: Of = "all", heads: dict[str, str] | None = None
    ) -> None:
        self.encoder = encoder
        self.heads = heads or {head: head for head in REPRESENTATIONS}  # by name in the table
        self.names = tuple(self.heads)
        self.vectors = torch.cat([v for _, v in item_vectors(encoder, items, block, comm, of)])  # [items, D]
        _check_finite(self.vectors, "item vectors")
        self.buffer = self.vectors.new_empty(0, 0)  # of scores: to ask for megabytes anew costs half a product

    def block(self, rows: np.ndarray) -> dict[str, Tensor]:
        known = self.encoder.users(rows)
        for name, vectors in known.items():
            _check_finite(vectors, f"user vectors of the {name} head")
        return known

    def scores(self, known: dict[str, Tensor], name: str, start: int, stop: int) -> Tensor:
        query, items = known[self.heads[name]], self.vectors[start:stop]
        if self.buffer.shape != (len(query), len(items)):
            self.buffer = query.new_empty(len(query), len(items))
        return torch.mm(query, items.T, out=self.buffer)


def item_vectors(
    encoder: Encoder, items: int, block: int, comm: Comm, of: Of = "all"
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Blocks of item ids with their vectors [n, D], the same on every rank; each encodes every W-th block."""
    starts = range(0, items, block)
    for first in range(0, len(starts), comm.world_size):
        ids = [np.arange(s, min(s + block, items)) for s in starts[first : first + comm.world_size]]
        mine = ids[comm.rank] if comm.rank < len(ids) else np.zeros(0, np.int64)
        vectors = encoder.items(mine, of)
        padded = torch.cat([vectors, vectors.new_zeros(block - len(mine), encoder.dim)])
        for block_ids, gathered in zip(ids, comm.all_gather(padded), strict=False):
            yield block_ids, gathered[: len(block_ids)]


def user_blocks(examples: int, block: int, comm: Comm) -> Iterator[np.ndarray]:
    """This rank's blocks of examples, equally many on each rank, empty ones at the end.

    Blocks are the same at any number of ranks, so that the same products are computed and ranks come out alike.
    """
    blocks = -(-examples // block)
    for round_ in range(-(-blocks // comm.world_size)):
        start = (round_ * comm.world_size + comm.rank) * block
        yield np.arange(min(start, examples), min(start + block, examples))


def rank_targets(
    data: PreparedData, examples: Examples, scorer: Scorer, comm: Comm, blocks: Blocks, top_k: int = 0,
    among: np.ndarray | None = None,
) -> Ranked:  # fmt: skip
    """Rank each example's true item among all items but those of its known events; collective.

    rank = 1 + number of other items that score at least as high: a tie counts against the scorer, so one that
    gives every item the same score looks as bad as it is. The true item is ranked even if it occurred before.

    Args:
        top_k: best items to keep for each example.
        among: [items] bool, rank only these; None: all.

    Raises:
        RunError: a score is not a number.
    """
    rows: list[np.ndarray] = []
    ranks: dict[str, list[np.ndarray]] = {n: [] for n in scorer.names}
    top: dict[str, list[np.ndarray]] = {n: [] for n in scorer.names}
    for block in user_blocks(len(examples), blocks.users, comm):
        known = scorer.block(block)
        if len(block) == 0:
            continue
        target, seen = _target_and_seen(data, examples.take(block), among)
        rows.append(block)
        for name in scorer.names:
            found, best = _rank_block(scorer, known, name, target, seen, data.schema.items, blocks.items, top_k)
            ranks[name].append(found.numpy())
            top[name].append(best.numpy())
    return Ranked(
        rows=np.concatenate(rows) if rows else np.zeros(0, np.int64),
        ranks={n: np.concatenate(r) if r else np.zeros(0, np.int64) for n, r in ranks.items()},
        top={n: np.concatenate(t) if t else np.zeros((0, top_k), np.int64) for n, t in top.items()},
    )


def count_ranks(ranked: Ranked, name: str, items: int, comm: Comm, ks: tuple[int, ...] = ()) -> RankCounts:
    """The histogram of ranks over all ranks' examples, and coverage of the top K for each of `ks`; collective."""
    histogram = torch.from_numpy(np.bincount(ranked.ranks[name] - 1, minlength=items))
    covered = {}
    for k in ks:
        held = torch.zeros(items, dtype=torch.int64)
        held[torch.from_numpy(ranked.top[name][:, :k]).flatten()] = 1
        covered[k] = int((comm.all_reduce_sum(held) > 0).sum())
    return RankCounts(comm.all_reduce_sum(histogram).numpy(), covered)


def _rank_block(
    scorer: Scorer, known: Any, name: str, target: Tensor, seen: Seen, items: int, block: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Ranks [b] and the ids of the top items [b, K]. Targets are scored by the same product as all others."""
    ranges = [(s, min(s + block, items)) for s in range(0, items, block)]
    only = _masked(scorer, known, name, *ranges[0], seen) if len(ranges) == 1 else None
    truth = torch.empty(len(target))
    for start, stop in ranges:
        here = (target >= start) & (target < stop)
        scores = only if only is not None else _masked(scorer, known, name, start, stop, seen)
        truth[here] = scores[here, target[here] - start]
    if torch.isnan(truth).any():
        raise RunError(f"{name}: a score is not a number; the model has diverged, train again with a lower rate")
    rank = torch.zeros(len(target), dtype=torch.int64)
    best, ids = torch.empty(len(target), 0), torch.empty(len(target), 0, dtype=torch.int64)
    for start, stop in ranges:
        scores = only if only is not None else _masked(scorer, known, name, start, stop, seen)
        # The true item counts itself: the 1 of 1 + others. Summed as int32, three times as fast as int64.
        rank += (scores >= truth[:, None]).sum(1, dtype=torch.int32)
        if top_k:
            values, places = scores.topk(min(top_k, stop - start), 1)
            best, ids = torch.cat([best, values], 1), torch.cat([ids, places + start], 1)
            best, order = best.topk(min(top_k, best.shape[1]), 1)
            ids = ids.gather(1, order)
    return rank, ids


def _masked(scorer: Scorer, known: Any, name: str, start: int, stop: int, seen: Seen) -> Tensor:
    scores = scorer.scores(known, name, start, stop)
    here = (seen.items >= start) & (seen.items < stop)
    scores[seen.rows[here], seen.items[here] - start] = -torch.inf
    return scores


def _target_and_seen(data: PreparedData, examples: Examples, among: np.ndarray | None) -> tuple[Tensor, Seen]:
    """Target ids [b], and where the items not to rank stand: those of the known events, but never the target."""
    target = data.item[examples.end]
    start = data.offsets[examples.user]
    lengths = examples.end - start
    rows = np.repeat(np.arange(len(target)), lengths)
    items = data.item[spans(start, lengths)]
    if among is not None:
        outside = np.flatnonzero(~among)
        rows = np.concatenate([rows, np.repeat(np.arange(len(target)), len(outside))])
        items = np.concatenate([items, np.tile(outside, len(target))])
    kept = items != target[rows]
    return torch.from_numpy(target), Seen(torch.from_numpy(rows[kept]), torch.from_numpy(items[kept]))


def _check_finite(vectors: Tensor, what: str) -> None:
    if not torch.isfinite(vectors).all():
        raise RunError(f"{what}: not a number; the model has diverged, train again with a lower learning rate")
