"""The true item's rank among all items, block by block. The processes share the examples, and large catalogues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.best_items import best_items
from flm_torchrec.evaluation.head_scorer import ItemShares, Range
from flm_torchrec.evaluation.known_items import known_items
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.protocol import Collectives, Scorer


@dataclass(frozen=True)
class Ranked:
    """The result of one process for its share of the examples, by each of the scorer's `names`."""

    rows: np.ndarray  # [e] indices of examples
    ranks: dict[str, np.ndarray]  # [e] int64, 1 is best
    top: dict[str, np.ndarray]  # [e, K] int64 item ids, best first; -1 where fewer than K items are ranked


@dataclass(frozen=True)
class Seen:
    """Items to leave out of the ranking of a block of users: item `items[i]` for the user in row `rows[i]`."""

    rows: Tensor  # [n] int64
    items: Tensor  # [n] int64


@dataclass(frozen=True)
class Blocks:
    """How much is scored at once. Memory is `users` x `items` scores, whatever the size of the data."""

    users: int = 512
    items: int = 16384


@dataclass(frozen=True)
class RankingProblem:
    """Whose next items are ranked, and among which items."""

    data: PreparedData
    examples: Examples
    blocks: Blocks = Blocks()
    among: np.ndarray | None = None  # [items] bool: rank only these, of the examples whose next item is one; None: all

    @property
    def ranked(self) -> np.ndarray:
        """[n] indices of the examples that are ranked, in order."""
        if self.among is None:
            return np.arange(len(self.examples))
        return np.flatnonzero(self.among[self.data.item[self.examples.end]])

    @property
    def outside(self) -> Tensor | None:
        """[n] int64 items that are never ranked, in order; None: all are."""
        return None if self.among is None else torch.from_numpy(np.flatnonzero(~self.among))

    @property
    def domain(self) -> Tensor | None:
        """[items] the domain of each item of joint data, of which only the true item's is ranked; else None."""
        return None if self.data.item_domain is None else torch.from_numpy(self.data.item_domain)


def block_rounds(examples: int, block: int, comm: Collectives) -> Iterator[list[np.ndarray]]:
    """By process, a block of indices of examples, round after round. Blocks of the last round may be empty.

    The blocks are the same at any number of processes, so the products and their rounding are the same.
    """
    starts = range(0, examples, block)
    for first in range(0, len(starts), comm.world_size):
        begins = [(first + rank) * block for rank in range(comm.world_size)]
        yield [np.arange(min(start, examples), min(start + block, examples)) for start in begins]


def user_blocks(examples: int, block: int, comm: Collectives) -> Iterator[np.ndarray]:
    """This process's blocks of `block_rounds`."""
    return (blocks[comm.rank] for blocks in block_rounds(examples, block, comm))


def rank_targets(problem: RankingProblem, scorer: Scorer, comm: Collectives, top_k: int = 0) -> Ranked:
    """Rank each example's true item among all items of its domain but those of its known events; collective.

    rank = 1 + the number of other items that score at least as high. A tie counts against the scorer, so a scorer that
    gives every item the same score looks as bad as it is. The true item is ranked even if it occurred before.

    Where the processes share the items, each scores its own for the users of all: counts are added up, and the best
    items of each range go to the process of the user. The results are the same at any number of processes.

    Args:
        top_k: best items to keep for each example.

    Raises:
        RunError: a score is not a number.
    """
    rows: list[np.ndarray] = []
    ranks: dict[str, list[np.ndarray]] = {n: [] for n in scorer.names}
    top: dict[str, list[np.ndarray]] = {n: [] for n in scorer.names}
    shares = ItemShares(problem.data.schema.items, problem.blocks.items, comm)
    chosen, limits = problem.ranked, _Limits(problem.domain, problem.outside)
    for places in block_rounds(len(chosen), problem.blocks.users, comm):
        every = [chosen[block] for block in places]
        own = every[comm.rank]
        scored = every if shares.spread else [own]
        users = scorer.blocks(own, scored)
        if not any(map(len, scored)):
            continue
        pairs = zip(users, scored, strict=True)
        blocks = [_Block(scorer, part, *target_and_seen(problem, indices), limits) for part, indices in pairs]
        rows.append(own)
        for name in scorer.names:
            rank, best = _rank_round(blocks, name, shares, top_k)
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
        top, counted = ranked.top[name][:, :k], torch.zeros(items, dtype=torch.int64)
        counted[torch.from_numpy(top[top >= 0])] = 1
        covered[k] = int((comm.all_reduce_sum(counted) > 0).sum())
    return RankCounts(comm.all_reduce_sum(histogram).numpy(), covered)


@dataclass(frozen=True)
class _Limits:
    """Which items are ranked, beside what a user has had."""

    domain: Tensor | None
    """[items] of joint data: only the items of the true item's domain are ranked."""
    outside: Tensor | None
    """[n] items that are never ranked, in order."""


@dataclass(frozen=True)
class _Block:
    """Users that are ranked together."""

    scorer: Scorer
    users: Any
    """What the scorer's `blocks` gave."""
    target: Tensor  # [b] int64: the true items
    seen: Seen
    limits: _Limits

    def scores(self, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start] scores of the items `start:stop`; -inf for items that are left out."""
        scores = self.scorer.scores(self.users, name, start, stop)
        here = (self.seen.items >= start) & (self.seen.items < stop)
        left_out = self.seen.rows[here].to(scores.device), (self.seen.items[here] - start).to(scores.device)
        scores[left_out] = -torch.inf
        domain, outside = self.limits.domain, self.limits.outside
        if domain is not None:
            wanted, found = domain[self.target].to(scores.device), domain[start:stop].to(scores.device)
            scores.masked_fill_(wanted[:, None] != found, -torch.inf)
        if outside is not None:
            first, last = torch.searchsorted(outside, torch.tensor([start, stop])).tolist()
            scores.index_fill_(1, outside[first:last].to(scores.device) - start, -torch.inf)
        return scores

    def truth(self, name: str, shares: ItemShares) -> Tensor:
        """[b] scores of the true items, as `Scorer.scores_of` tells them; 0 for items of other processes."""
        here = (self.target >= shares.first) & (self.target < shares.last)
        found = self.scorer.scores_of(self.users, name, self.target.clamp(shares.first, shares.last - 1))
        return torch.where(here.to(found.device), found, 0.0)

    def count(self, name: str, ranges: list[Range], truth: Tensor, top_k: int) -> _Counts:
        """Count and keep the items of these ranges that score at least as high as `truth` [b]."""
        target = self.target.to(truth.device, torch.int64)
        above, found, lists = torch.zeros_like(target), torch.zeros_like(truth), []
        alike = self.scorer.alike and self.limits.domain is None
        for start, stop in ranges:
            counted = self._count_alike if alike else self._count_each
            more, own, best = counted(name, (start, stop), truth, top_k)
            above += more
            found = torch.where((target >= start) & (target < stop), own, found)
            if best is not None:
                lists.append((best[0], best[1] + start))
        return _Counts(above, found, lists)

    def _count_each(self, name: str, items: Range, truth: Tensor, top_k: int) -> _RangeCounts:
        scores = self.scores(name, *items)
        return _RangeCounts.of(scores, truth, self._target_in(items), top_k)

    def _count_alike(self, name: str, items: Range, truth: Tensor, top_k: int) -> _RangeCounts:
        """As `_count_each`, where all users have the same scores, but for the items that a user has had."""
        start, stop = items
        target = self._target_in(items)
        alone = replace(self, users=1, target=self.target[:1], seen=Seen(self.seen.rows[:0], self.seen.items[:0]))
        scores = alone.scores(name, start, stop)  # [1, items]
        below = torch.searchsorted(scores[0].sort().values, truth)
        best = None
        if top_k:
            _, values, positions = best_items(scores, scores[:, 0], min(top_k, stop - start))
            best = values.repeat(len(truth), 1), positions.repeat(len(truth), 1)
        found = _RangeCounts((stop - start) - below, scores[0, target], best)
        here = (self.seen.items >= start) & (self.seen.items < stop)
        rows, place = self.seen.rows[here].unique(return_inverse=True)
        if len(rows):
            seen = Seen(place, self.seen.items[here])
            some = replace(self, users=len(rows), target=self.target[rows], seen=seen)
            found.put(rows, some._count_each(name, items, truth[rows], top_k))
        return found

    def _target_in(self, items: Range) -> Tensor:
        """[b] place of each true item among the items, or of another item where it is not among them."""
        return (self.target - items[0]).clamp(0, items[1] - items[0] - 1).to(torch.int64)


class _RangeCounts(NamedTuple):
    """What is found for b users in a range of items."""

    above: Tensor  # [b] items that score at least as high as the true one
    own: Tensor  # [b] score at the place of the true item
    best: tuple[Tensor, Tensor] | None  # [b, K] the best scores and their places in the range

    @classmethod
    def of(cls, scores: Tensor, truth: Tensor, target: Tensor, top_k: int) -> _RangeCounts:
        """Of scores [b, items]."""
        own = scores.gather(1, target.to(scores.device)[:, None])[:, 0]
        above, values, places = best_items(scores, truth, min(top_k, scores.shape[1]))
        return cls(above, own, (values, places) if top_k else None)

    def put(self, rows: Tensor, counts: _RangeCounts) -> None:
        """Replace what was found for the users in these rows."""
        self.above[rows], self.own[rows] = counts.above, counts.own
        if self.best is not None and counts.best is not None:
            self.best[0][rows], self.best[1][rows] = counts.best


@dataclass(frozen=True)
class _Counts:
    """What one process finds for a block of users among its items."""

    above: Tensor  # [b] int64: items that score at least as high as the true one, which counts itself
    truth: Tensor  # [b] scores of the true items, 0 for items of other processes
    lists: list[tuple[Tensor, Tensor]]  # by range, [b, K] the best scores and their ids


def _rank_round(blocks: list[_Block], name: str, shares: ItemShares, top_k: int) -> tuple[Tensor, Tensor]:
    """Ranks [b] and the ids of the top items [b, K] of this process's block, as `Ranked` has them.

    The true items must be scored by the same product as all others, or ties would be missed. That product is one of
    many, so it is told before by a smaller one, and made twice only where that was rounded in another way.
    """
    comm, sizes = shares.comm, [len(block.target) for block in blocks]

    def total(parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts)
        return comm.all_reduce_sum(joined) if shares.spread else joined

    truth = total([block.truth(name, shares) for block in blocks])
    while True:
        each = zip(blocks, truth.split(sizes), strict=True)
        counted = [block.count(name, shares.own, own, top_k) for block, own in each]
        exact = total([counts.truth for counts in counted])
        if torch.isnan(exact).any():
            raise RunError(f"{name}: a score is not a number; the model has diverged, train again with a lower rate")
        if torch.equal(exact, truth):
            break
        truth = exact
    ranks = total([counts.above for counts in counted]).split(sizes)[comm.rank if shares.spread else 0]
    best, ids = truth.new_empty(len(ranks), 0).cpu(), ranks.new_empty(len(ranks), 0).cpu()
    for values, more in _lists([counts.lists for counts in counted], shares, sizes, top_k):
        best, ids = torch.cat([best, values.cpu()], 1), torch.cat([ids, more.cpu()], 1)
        best, order = best.topk(min(top_k, best.shape[1]), 1)
        ids = ids.gather(1, order)
    return ranks, ids.masked_fill(best == -torch.inf, -1)


def _lists(
    lists: list[list[tuple[Tensor, Tensor]]], shares: ItemShares, sizes: list[int], top_k: int
) -> list[tuple[Tensor, Tensor]]:
    """By block, the lists of this process's ranges → those of all ranges, in their order, of this process's block."""
    if not shares.spread or not top_k:
        return lists[0]
    comm, columns = shares.comm, []
    own = sizes[comm.rank]
    lengths = [[min(top_k, stop - start) for start, stop in ranges] for ranges in shares.of_process]
    for column in range(2):  # scores, then ids
        parts = [torch.cat([pair[column].flatten() for pair in of_block]).cpu() for of_block in lists]
        received = torch.cat(comm.exchange(parts, [own * sum(of_process) for of_process in lengths]))
        every = [k for of_process in lengths for k in of_process]
        pieces = received.split([own * k for k in every])
        columns.append([piece.view(own, k) for piece, k in zip(pieces, every, strict=True)])
    return list(zip(*columns, strict=True))


def target_and_seen(problem: RankingProblem, indices: np.ndarray) -> tuple[Tensor, Seen]:
    """True items [b], and the items to leave out: those of `known_items`, but never the true item."""
    data, examples = problem.data, problem.examples.take(indices)
    target = data.item[examples.end]
    rows, items = known_items(data, examples)
    kept = items != target[rows]
    return torch.from_numpy(target), Seen(torch.from_numpy(rows[kept]), torch.from_numpy(items[kept]))
