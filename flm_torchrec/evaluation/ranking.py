"""The true item's rank among all items, block by block. The processes share the examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from flm_torchrec.config.heads import FUSED, HEADS, REPRESENTATIONS
from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.splits import Examples
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.protocol import Collectives, Encoder, Of, Scorer


@dataclass(frozen=True)
class Ranked:
    """The result of one process for its share of the examples, by each of the scorer's `names`."""

    rows: np.ndarray  # [e] indices of examples
    ranks: dict[str, np.ndarray]  # [e] int64, 1 is best
    top: dict[str, np.ndarray]  # [e, K] int64 item ids, best first


@dataclass(frozen=True)
class Seen:
    """Items to leave out of the ranking of a block of users: item `items[i]` for the user in row `rows[i]`."""

    rows: Tensor  # [n] int64
    items: Tensor  # [n] int64


@dataclass(frozen=True)
class Blocks:
    """How much is scored at once. Memory is `users` x `items` scores, whatever the size of the data."""

    users: int = 256
    items: int = 16384


@dataclass(frozen=True)
class RankingProblem:
    """Whose next items are ranked, and among which items."""

    data: PreparedData
    examples: Examples
    blocks: Blocks = Blocks()
    among: np.ndarray | None = None  # [items] bool: rank only these; None: all

    @property
    def domain(self) -> Tensor | None:
        """[items] the domain of each item of joint data, of which only the true item's is ranked; else None."""
        return None if self.data.item_domain is None else torch.from_numpy(self.data.item_domain)


MIXTURE = "mixture"
"""Not a representation: the heads' scores, each by its own vector, as the encoder's `mixture` joins them."""
ONE_VECTOR = "fused, one vector"


class HeadScorer:
    """Scores by the model's heads: the dot product of a representation and an item vector.

    Every process has a vector of each item in its device's memory, items x D x 4 bytes, and encodes its share of the
    blocks. A device that is a GPU also scores and ranks.

    Args:
        of: which vectors of the items are scored.
        heads: by name in the table of results, the head to score with; None: every head and their fusion, and where
            that is a mixture, also the one vector that stacks for dot products get.

    Raises:
        RunError: a vector is not finite; also from `block`.
    """

    def __init__(
        self,
        encoder: Encoder,
        items: int,
        block: int,
        comm: Collectives,
        of: Of = "all",
        heads: dict[str, str] | None = None,
    ) -> None:
        self.encoder = encoder
        self.mixture = encoder.mixture
        if heads is None:
            heads = {head: head for head in REPRESENTATIONS}
            if self.mixture is not None:
                heads |= {FUSED: MIXTURE, ONE_VECTOR: FUSED}
        self.heads = heads
        self.names = tuple(self.heads)
        self.vectors = _room_for(items, encoder.dim, comm.device)  # [items, D]
        for ids, vectors in item_vectors(encoder, items, block, comm, of):
            self.vectors[ids[0] : ids[-1] + 1] = vectors
        _check_finite(self.vectors, "item vectors")
        self.buffer = self.vectors.new_empty(0, 0)  # of scores: new megabytes each time would cost half a product

    def block(self, rows: np.ndarray) -> dict[str, Tensor]:
        """[b] indices of examples → by head, [b, D]; collective."""
        users = self.encoder.users(rows)
        for name, vectors in users.items():
            _check_finite(vectors, f"user vectors of the {name} head")
        return {name: vectors.to(self.vectors.device) for name, vectors in users.items()}

    def scores(self, users: dict[str, Tensor], name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start] dot products, in a buffer that the next call overwrites."""
        items = self.vectors[start:stop]
        if self.heads[name] == MIXTURE:
            assert self.mixture is not None
            parts = [
                torch.mm(users[head] * scale, items.T).add_(bias)
                for head, scale, bias in zip(HEADS, self.mixture.scale, self.mixture.bias, strict=True)
            ]
            return torch.logsumexp(torch.stack(parts), 0)
        query = users[self.heads[name]]
        if self.buffer.shape != (len(query), len(items)):
            self.buffer = query.new_empty(len(query), len(items))
        return torch.mm(query, items.T, out=self.buffer)


def item_vectors(
    encoder: Encoder, items: int, block: int, comm: Collectives, of: Of = "all"
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Blocks of item ids with their vectors [n, D], the same on each of W ranks; a rank encodes every W-th block."""
    starts = range(0, items, block)
    for first in range(0, len(starts), comm.world_size):
        ids = [np.arange(s, min(s + block, items)) for s in starts[first : first + comm.world_size]]
        mine = ids[comm.rank] if comm.rank < len(ids) else np.zeros(0, np.int64)
        vectors = encoder.items(mine, of)
        padded = torch.cat([vectors, vectors.new_zeros(block - len(mine), encoder.dim)])
        for block_ids, gathered in zip(ids, comm.all_gather(padded), strict=False):
            yield block_ids, gathered[: len(block_ids)]


def user_blocks(examples: int, block: int, comm: Collectives) -> Iterator[np.ndarray]:
    """This rank's blocks of indices of examples. All ranks have the same number of blocks; the last may be empty.

    The blocks are the same at any number of ranks, so the products and their rounding are the same.
    """
    blocks = -(-examples // block)
    for round_ in range(-(-blocks // comm.world_size)):
        start = (round_ * comm.world_size + comm.rank) * block
        yield np.arange(min(start, examples), min(start + block, examples))


def rank_targets(problem: RankingProblem, scorer: Scorer, comm: Collectives, top_k: int = 0) -> Ranked:
    """Rank each example's true item among all items of its domain but those of its known events; collective.

    rank = 1 + the number of other items that score at least as high. A tie counts against the scorer, so a scorer that
    gives every item the same score looks as bad as it is. The true item is ranked even if it occurred before.

    Args:
        top_k: best items to keep for each example.

    Raises:
        RunError: a score is not a number.
    """
    rows: list[np.ndarray] = []
    ranks: dict[str, list[np.ndarray]] = {n: [] for n in scorer.names}
    top: dict[str, list[np.ndarray]] = {n: [] for n in scorer.names}
    domain = problem.domain
    for indices in user_blocks(len(problem.examples), problem.blocks.users, comm):
        users = scorer.block(indices)
        if len(indices) == 0:
            continue
        block = _Block(scorer, users, *target_and_seen(problem, indices), domain)
        rows.append(indices)
        for name in scorer.names:
            rank, best = _rank_block(block, name, _item_ranges(problem), top_k)
            ranks[name].append(rank.cpu().numpy())
            top[name].append(best.cpu().numpy())
    return Ranked(
        rows=np.concatenate(rows) if rows else np.zeros(0, np.int64),
        ranks={n: np.concatenate(r) if r else np.zeros(0, np.int64) for n, r in ranks.items()},
        top={n: np.concatenate(t) if t else np.zeros((0, top_k), np.int64) for n, t in top.items()},
    )


def count_ranks(ranked: Ranked, name: str, items: int, comm: Collectives, ks: tuple[int, ...] = ()) -> RankCounts:
    """Histogram of the true items' ranks over all processes' examples, and what coverage@K needs; collective."""
    histogram = torch.from_numpy(np.bincount(ranked.ranks[name] - 1, minlength=items))
    covered = {}
    for k in ks:
        counted = torch.zeros(items, dtype=torch.int64)
        counted[torch.from_numpy(ranked.top[name][:, :k]).flatten()] = 1
        covered[k] = int((comm.all_reduce_sum(counted) > 0).sum())
    return RankCounts(comm.all_reduce_sum(histogram).numpy(), covered)


@dataclass(frozen=True)
class _Block:
    """Users that are ranked together."""

    scorer: Scorer
    users: Any
    """What the scorer's `block` gave."""
    target: Tensor  # [b] int64: the true items
    seen: Seen
    domain: Tensor | None
    """[items] of joint data: only the items of the true item's domain are ranked."""

    def scores(self, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start] scores of the items `start:stop`; -inf for items that are left out."""
        scores = self.scorer.scores(self.users, name, start, stop)
        here = (self.seen.items >= start) & (self.seen.items < stop)
        left_out = self.seen.rows[here].to(scores.device), (self.seen.items[here] - start).to(scores.device)
        scores[left_out] = -torch.inf
        if self.domain is not None:
            wanted, domain = self.domain[self.target].to(scores.device), self.domain[start:stop].to(scores.device)
            scores.masked_fill_(wanted[:, None] != domain, -torch.inf)
        return scores

    def truth(self, name: str, ranges: list[tuple[int, int]], only: Tensor | None) -> Tensor:
        """[b] scores of the true items, on the scorer's device.

        Args:
            only: the scores of the range, if there is only one.
        """
        parts = []
        for start, stop in ranges:
            scores = only if only is not None else self.scores(name, start, stop)
            target = self.target.to(scores.device, torch.int64)
            here = (target >= start) & (target < stop)
            found = scores.gather(1, (target - start).clamp(0, stop - start - 1)[:, None])[:, 0]
            parts.append(torch.where(here, found, 0.0))
        return torch.stack(parts).sum(0)


def _item_ranges(problem: RankingProblem) -> list[tuple[int, int]]:
    items, block = problem.data.schema.items, problem.blocks.items
    return [(start, min(start + block, items)) for start in range(0, items, block)]


def _rank_block(block: _Block, name: str, ranges: list[tuple[int, int]], top_k: int) -> tuple[Tensor, Tensor]:
    """Ranks [b] and the ids of the top items [b, K]. Targets are scored by the same product as all others."""
    only = block.scores(name, *ranges[0]) if len(ranges) == 1 else None
    truth = block.truth(name, ranges, only)
    if torch.isnan(truth).any():
        raise RunError(f"{name}: a score is not a number; the model has diverged, train again with a lower rate")
    rank = torch.zeros_like(truth, dtype=torch.int64)
    best, ids = truth.new_empty(len(truth), 0), rank.new_empty(len(rank), 0)
    for start, stop in ranges:
        scores = only if only is not None else block.scores(name, start, stop)
        # The true item counts itself, which is the 1 of 1 + others. A sum in int32 is three times as fast as in int64.
        rank += (scores >= truth[:, None]).sum(1, dtype=torch.int32)
        if top_k:
            values, positions = scores.topk(min(top_k, stop - start), 1)
            best, ids = torch.cat([best, values], 1), torch.cat([ids, positions + start], 1)
            best, order = best.topk(min(top_k, best.shape[1]), 1)
            ids = ids.gather(1, order)
    return rank, ids


def target_and_seen(problem: RankingProblem, indices: np.ndarray) -> tuple[Tensor, Seen]:
    """True items [b], and the items to leave out: those of the known events, but never the true item.

    Events of a kind that is not predicted leave no item out.
    """
    data, examples = problem.data, problem.examples.take(indices)
    target = data.item[examples.end]
    start = data.offsets[examples.user]
    lengths = examples.end - start
    rows = np.repeat(np.arange(len(target)), lengths)
    known = spans(start, lengths)
    if data.targets is not None:
        had = data.targets[data.event[known]]
        rows, known = rows[had], known[had]
    items = data.item[known]
    if problem.among is not None:
        outside = np.flatnonzero(~problem.among)
        rows = np.concatenate([rows, np.repeat(np.arange(len(target)), len(outside))])
        items = np.concatenate([items, np.tile(outside, len(target))])
    kept = items != target[rows]
    return torch.from_numpy(target), Seen(torch.from_numpy(rows[kept]), torch.from_numpy(items[kept]))


def _room_for(items: int, dim: int, device: torch.device) -> Tensor:
    """[items, dim] float32 on a device, to be filled.

    Raises:
        RunError: the device has not so much memory left.
    """
    on_gpu = device.type == "cuda"
    needed = 4 * items * dim
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise RunError(
            f"ranking {items:,} items of {dim} numbers needs {needed / 2**30:.1f} GiB on each"
            f" {'GPU' if on_gpu else 'rank'}, and {free / 2**30:.1f} GiB are free: run fewer ranks on a machine, or"
            " train a narrower model.dim"
        )
    return torch.empty(items, dim, device=device)


def _check_finite(vectors: Tensor, what: str) -> None:
    if not torch.isfinite(vectors).all():
        raise RunError(f"{what}: not a number; the model has diverged, train again with a lower learning rate")
