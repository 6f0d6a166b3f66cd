"""A softmax over more candidates than a block of queries' logits can be held for: in tiles, in two passes.

The first pass finds the log-sum-exp of each query over the tiles (Milakov & Gimelshein, "Online normalizer calculation
for softmax", 2018), the second makes the logits anew and adds up gradients, as FlashAttention does (Dao et al. 2022).
Four products of matrices in place of three, and memory that does not grow with the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from flm_torchrec.products import add_matmul, matmul

TINY = torch.finfo(torch.float32).tiny
"""Minimum of a probability whose logarithm is taken."""


@dataclass(frozen=True)
class Tile:
    """Some queries and some candidates, and positions in their flat logits [rows * columns]."""

    rows: slice
    columns: slice
    queries: Tensor
    """[p] those queries whose target is among the candidates."""
    own: Tensor
    """[p] positions of their targets."""
    hidden: Tensor
    """[h] positions that are left out."""


@dataclass(frozen=True)
class Tiles:
    """All queries and candidates, in tiles of `shape`: the queries one after another for each block of candidates."""

    target: Tensor  # [T]
    hidden: tuple[Tensor, Tensor]
    """[P] queries and [P] candidates that they are not asked about."""
    candidates: int
    shape: tuple[int, int]

    @cached_property
    def _blocks(self) -> tuple[int, int]:
        """Numbers of blocks of queries and of candidates."""
        return -(-len(self.target) // self.shape[0]), -(-self.candidates // self.shape[1])

    def _by_tile(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """By tile, which of the pairs of a query and a candidate it has, and their positions."""
        high, wide = self.shape
        row_blocks, column_blocks = self._blocks
        tile = columns // wide * row_blocks + rows // high
        order = tile.argsort(stable=True)
        counts = torch.bincount(tile, minlength=row_blocks * column_blocks).tolist()
        width = (self.candidates - columns // wide * wide).clamp(max=wide)
        position = rows % high * width + columns % wide
        return zip(order.split(counts), position[order].split(counts), strict=True)

    @cached_property
    def all(self) -> list[Tile]:
        """The tiles."""
        high, wide = self.shape
        queries = torch.arange(len(self.target), device=self.target.device)
        places = product(range(self._blocks[1]), range(self._blocks[0]))
        parts = zip(places, self._by_tile(queries, self.target), self._by_tile(*self.hidden), strict=True)
        return [
            Tile(
                slice(row * high, min((row + 1) * high, len(self.target))),
                slice(column * wide, min((column + 1) * wide, self.candidates)),
                *own,
                hidden,
            )
            for (column, row), own, (_, hidden) in parts
        ]


@dataclass(frozen=True)
class Scored:
    """What logits are made of, in the precision of the products."""

    query: Tensor  # [T, D] scaled
    weighted: Tensor  # [T, D] the same, times the queries' weights
    items: Tensor  # [C, D]
    correction: Tensor  # [C] added to the logits
    truth: Tensor  # [T] logit of the target
    domain: Tensor | None  # [C]

    def logits(self, tile: Tile, target: Tensor, out: Tensor) -> Tensor:
        """[rows, columns] of the tile, in the memory of `out`."""
        query, items = self.query[tile.rows], self.items[tile.columns]
        out = out[: len(query) * len(items)].view(len(query), len(items))
        logits = matmul(query, items.T, self.correction[tile.columns], out=out)
        logits.view(-1).index_fill_(0, tile.hidden, -torch.inf)
        if self.domain is not None:
            wanted = self.domain[target[tile.rows]]
            logits.masked_fill_(wanted[:, None] != self.domain[tile.columns], -torch.inf)
        logits.view(-1)[tile.own] = self.truth[tile.queries]
        return logits


def tiled_softmax(
    scored: Scored, tiles: Tiles, weight: Tensor | None, precision: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """[] the summed loss; [T, D] sum of the items by their shares, [C, D] sum of the weighted queries by theirs.

    Args:
        weight: [T] of each query's loss; None: 1.
        precision: of the sums; that of the products is in `scored`.
    """
    low = scored.query.new_empty(tiles.shape[0] * tiles.shape[1])
    wide = low if low.dtype == precision else low.new_empty(len(low), dtype=precision)

    def logits(tile: Tile) -> Tensor:
        made = scored.logits(tile, tiles.target, low)
        return made if wide is low else wide[: made.numel()].view(made.shape).copy_(made)

    sums = scored.truth.new_full(scored.truth.shape, -torch.inf, dtype=precision)  # [T] log-sum-exp
    for tile in tiles.all:
        part = logits(tile)
        top = part.amax(1).clamp_(min=torch.finfo(precision).min)
        sum_of_part = part.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
        sums[tile.rows] = torch.logaddexp(sums[tile.rows], sum_of_part)
    losses = (sums - scored.truth).clamp(max=-math.log(TINY))
    loss = (losses if weight is None else losses * weight).sum()
    of_query = torch.zeros_like(scored.query, dtype=precision)
    of_items = torch.zeros_like(scored.items, dtype=precision)
    for tile in tiles.all:
        shares = logits(tile).sub_(sums[tile.rows, None]).exp_().to(low.dtype)
        _add_product(of_query[tile.rows], shares, scored.items[tile.columns])
        _add_product(of_items[tile.columns], shares.T, scored.weighted[tile.rows])
    return loss, of_query, of_items


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        add_matmul(total, left, right)
    else:
        total += left @ right
