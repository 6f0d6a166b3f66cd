"""Scores by the model's heads, of items whose vectors the processes share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.config.heads import FUSED, HEADS, REPRESENTATIONS
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.protocol import Collectives, Encoder, Of
from flm_torchrec.products import matmul

MIXTURE = "mixture"
"""Not a representation: the heads' scores, each by its own vector, as the encoder's `mixture` joins them."""
ONE_VECTOR = "fused, one vector"

CACHED = 1024
"""Items whose scores are summed at once."""
FETCHED = 16
"""Users whose items' vectors are looked up at once where this process has all: they stay in a processor's cache."""
Range = tuple[int, int]
"""Start and stop of neighbouring items."""


@dataclass(frozen=True)
class ItemShares:
    """Which ranges of items each process scores.

    Ranges are the same at any number of processes, so that products and their rounding are. With fewer ranges than
    processes, each process has all items, and scores them for its own users alone.
    """

    items: int
    block: int
    """Items of a range."""
    comm: Collectives

    @property
    def spread(self) -> bool:
        """Whether a process has a part of the items only."""
        return 1 < self.comm.world_size <= self._blocks

    @property
    def _blocks(self) -> int:
        return -(-self.items // self.block)

    @property
    def ranges(self) -> list[Range]:
        """Of all items."""
        return self._ranges(0, self._blocks)

    @cached_property
    def of_process(self) -> list[list[Range]]:
        """By process, neighbouring ranges."""
        if not self.spread:
            return [self.ranges] * self.comm.world_size
        cuts = np.linspace(0, self._blocks, self.comm.world_size + 1).astype(int).tolist()
        return [self._ranges(first, last) for first, last in pairwise(cuts)]

    def _ranges(self, first: int, last: int) -> list[Range]:
        return [(n * self.block, min((n + 1) * self.block, self.items)) for n in range(first, last)]

    @property
    def own(self) -> list[Range]:
        """Of this process."""
        return self.of_process[self.comm.rank]

    @property
    def first(self) -> int:
        """The first item of this process."""
        return self.own[0][0] if self.spread else 0

    @property
    def count(self) -> int:
        """Items of this process."""
        return self.last - self.first

    @property
    def last(self) -> int:
        """The item after those of this process."""
        return self.own[-1][1] if self.spread else self.items


class HeadScorer:
    """Scores by the model's heads: the dot product of a representation and an item vector.

    A process has the vectors of its items in its device's memory, D x 4 bytes an item, and encodes its share of the
    blocks of users. A device that is a GPU also scores and ranks.

    Args:
        of: which vectors of the items are scored.
        heads: by name in the table of results, the head to score with; None: every head and their fusion, and where
            that is a mixture, also the one vector that stacks for dot products get.

    Raises:
        RunError: a vector is not finite; also from `blocks`.
    """

    alike = False

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
        self.comm = comm
        self.mixture = encoder.mixture
        if heads is None:
            heads = {head: head for head in REPRESENTATIONS}
            if self.mixture is not None:
                heads |= {FUSED: MIXTURE, ONE_VECTOR: FUSED}
        self.heads = heads
        self.names = tuple(self.heads)
        self.shares = ItemShares(items, block, comm)
        self.first = self.shares.first
        self.vectors = torch.empty(self.shares.count, encoder.dim, device=comm.device)  # [items of this process, D]
        for (start, stop), vectors in item_vectors(encoder, self.shares, of):
            self.vectors[start - self.first : stop - self.first] = vectors
        bad = comm.all_reduce_sum(torch.tensor(int(not torch.isfinite(self.vectors).all())))
        _check(not bad, "item vectors")
        self.buffer = self.vectors.new_empty(0, 0)  # of scores: new megabytes each time would cost half a product

    def blocks(self, own: np.ndarray, scored: list[np.ndarray]) -> list[dict[str, Tensor]]:
        """As of `Scorer`: for each block, by head, [b, D]."""
        encoded = self.encoder.users(own)
        every = [torch.stack(list(encoded.values())).to(self.vectors.device)]  # [heads, b, D]
        if self.shares.spread:
            missing = max(map(len, scored)) - len(own)
            every = self.comm.all_gather(F.pad(every[0], (0, 0, 0, missing)))
        found = []
        for users, rows in zip(every, scored, strict=True):
            found.append(dict(zip(encoded, users[:, : len(rows)], strict=True)))
            for name, vectors in found[-1].items():  # of all, so that all processes stop
                _check(bool(torch.isfinite(vectors).all()), f"user vectors of the {name} head")
        return found

    def scores(self, users: dict[str, Tensor], name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start] dot products with items of this process, in a buffer that the next call overwrites."""
        items = self.vectors[start - self.first : stop - self.first]
        if self.heads[name] == MIXTURE:
            return self._mixed(users, items)
        query = users[self.heads[name]]
        if self.buffer.shape != (len(query), len(items)):
            self.buffer = query.new_empty(len(query), len(items))
        return matmul(query, items.T, out=self.buffer)

    def scores_of(self, users: dict[str, Tensor], name: str, items: Tensor) -> Tensor:
        """As of `Scorer`."""
        vectors = self.vectors[items.to(self.vectors.device, torch.int64) - self.first]
        mixes = self.heads[name] == MIXTURE
        return (self._mixed(users, vectors) if mixes else matmul(users[self.heads[name]], vectors.T)).diagonal()

    def _mixed(self, users: dict[str, Tensor], items: Tensor) -> Tensor:
        assert self.mixture is not None
        parts = [
            matmul(users[head] * scale, items.T).add_(bias)
            for head, scale, bias in zip(HEADS, self.mixture.scale, self.mixture.bias, strict=True)
        ]
        return log_sum_exp(parts)

    def fetch(self, ids: Tensor) -> Tensor:
        """[…] item ids → […, D] their vectors, from whichever process has them. Collective."""
        wanted = ids.flatten().to(self.vectors.device, torch.int64)
        if not self.shares.spread:
            return self.vectors.index_select(0, wanted).unflatten(0, ids.shape)
        parts = []
        for others in self._of_all(wanted):
            here = others[(others >= self.first) & (others < self.shares.last)]
            parts.append(self.vectors[here - self.first].flatten().cpu())
        ends = torch.tensor([ranges[-1][1] for ranges in self.shares.of_process], device=wanted.device)
        owner = torch.bucketize(wanted, ends, right=True)
        counts = torch.bincount(owner, minlength=len(ends)).tolist()
        dim = self.vectors.shape[1]
        found = self.vectors.new_empty(len(wanted), dim)
        for process, part in enumerate(self.comm.exchange(parts, [count * dim for count in counts])):
            found[owner == process] = part.view(-1, dim).to(found.device)
        return found.unflatten(0, ids.shape)

    def scores_at(self, users: dict[str, Tensor], names: Sequence[str], ids: Tensor) -> Tensor:
        """[b, C] item ids → [heads, b, C] the scores of these by heads of these names. Collective."""
        queries = torch.stack([users[self.heads[name]] for name in names], 1)  # [b, heads, D]
        whole = self.shares.spread or self.vectors.device.type != "cpu"
        at_once = max(1, len(ids)) if whole else FETCHED
        parts = zip(queries.split(at_once), ids.split(at_once), strict=True)
        return torch.cat([query @ self.fetch(some).transpose(1, 2) for query, some in parts]).transpose(0, 1)

    def _of_all(self, values: Tensor) -> list[Tensor]:
        """[n] → that of each process, which may have another n."""
        lengths = [int(n) for n in self.comm.all_gather(torch.tensor(len(values), device=values.device))]
        padded = self.comm.all_gather(F.pad(values, (0, max(lengths) - len(values))))
        return [part[:length] for part, length in zip(padded, lengths, strict=True)]


def log_sum_exp(parts: list[Tensor]) -> Tensor:
    """torch.logsumexp of tensors [b, n], to the last bit; in parts that a processor's cache holds, which is faster.

    Writes into the first of them.
    """
    for start in range(0, parts[0].shape[1], CACHED):
        these = [part[:, start : start + CACHED] for part in parts]
        most = torch.stack(these).amax(0)
        most.masked_fill_(most.isinf(), 0.0)
        total = (these[0] - most).exp_()
        for part in these[1:]:
            total += (part - most).exp_()
        torch.add(total.log_(), most, out=these[0])
    return parts[0]


def item_vectors(encoder: Encoder, shares: ItemShares, of: Of) -> Iterator[tuple[Range, Tensor]]:
    """The ranges of this process with their vectors [n, D]; collective. Each range is encoded by one process."""
    comm, empty = shares.comm, (shares.items, shares.items)
    if shares.spread:
        for turn in range(max(map(len, shares.of_process))):
            start, stop = shares.own[turn] if turn < len(shares.own) else empty
            yield (start, stop), encoder.items(np.arange(start, stop), of)
        return
    for first in range(0, len(shares.own), comm.world_size):
        turns = shares.own[first : first + comm.world_size]
        start, stop = turns[comm.rank] if comm.rank < len(turns) else empty
        vectors = F.pad(encoder.items(np.arange(start, stop), of), (0, 0, 0, shares.block - (stop - start)))
        for (begin, end), gathered in zip(turns, comm.all_gather(vectors), strict=False):
            yield (begin, end), gathered[: end - begin]


def _check(finite: bool, what: str) -> None:
    if not finite:
        raise RunError(f"{what}: not a number; the model has diverged, train again with a lower learning rate")
