"""Rows that ranks show to each other for a loss: all losses of a step share one exchange of sizes and one of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Gather(Protocol):
    """What the losses need of the other ranks."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def place(self) -> int:
        """This rank's number among those that it shares rows with."""

    @property
    def ranks(self) -> int:
        """Number of ranks that share rows: of all, or of a node."""

    @property
    def alone(self) -> bool:
        """Whether the targets of this rank are candidates of this rank only; the drawn negatives are shared by all."""

    def all_gather(self, numbers: Tensor) -> Tensor:
        """[n] of each rank → [world_size, n] of all ranks; no gradient."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks; no gradient."""

    def concat(self, vectors: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """[v] and [b] float32, as long on each rank → [ranks, v] and [ranks, b] of those that share rows.

        The first is differentiable: each rank gets back the gradient that these ranks together have for its part.
        """


@dataclass(frozen=True)
class Rows:
    """What a loss of this rank shows to the same loss of others."""

    vectors: Tensor  # [n, S] float32, with gradient
    ids: Tensor  # [n] int64
    numbers: Tensor  # [n, k] float32, without gradient
    total: int | None = None
    """Rows of all sharing ranks together, if they are dealt out in turn: then no rank asks for the others' number."""


@dataclass(frozen=True)
class Shared:
    """What the sharing ranks have shown: the rows of one rank after those of the other."""

    targets: Tensor
    """[] float: targets of all ranks."""
    near: Tensor
    """[] float: targets of the ranks whose targets are candidates here."""
    weight: Tensor
    """[] float: sum of the weights of all ranks' targets; their number where all count alike."""
    vectors: Tensor  # [R n, S]; as long for each of R ranks, padded with zeros
    ids: Tensor  # [R n]
    numbers: Tensor  # [R n, k]
    real: Tensor  # [R n] bool: no padding


def share(parts: Sequence[Rows | None], targets: Tensor, gather: Gather, weights: Tensor | None = None) -> list[Shared]:
    """What the ranks show each other in a step, by loss; None shows nothing, and gets no rows. Collective.

    Args:
        parts: by loss, the rows of this rank.
        targets: [T] of this rank; their number is exchanged.
        weights: [T] what each counts, on all ranks or on none; None: 1.
    """
    own = torch.tensor([len(targets)], device=targets.device)
    shown = [part for part in parts if part is not None]
    if gather.world_size == 1:
        found = [(p.vectors, p.ids, p.numbers, torch.ones_like(p.ids, dtype=torch.bool)) for p in shown]
        total = near = own[0].float()
    elif all(part.total is not None for part in shown) and gather.alone:
        sizes = [[dealt(p.total or 0, rank, gather.ranks) for p in shown] for rank in range(gather.ranks)]
        found, counted = _exchange(shown, sizes, own, gather)
        total, near = counted.sum().float(), own[0].float()
    else:
        start = gather.rank - gather.place
        told = gather.all_gather(torch.tensor([len(targets), *(len(p.ids) for p in shown)], device=targets.device))
        numbers = told.tolist()
        sharing = slice(start, start + gather.ranks)
        found, _ = _exchange(shown, [row[1:] for row in numbers[sharing]], own, gather)
        near = own[0].float() if gather.alone else told[sharing, 0].sum().float()
        total = told[:, 0].sum().float()
    rows = iter(found)
    none = (targets.new_zeros(0, 0, dtype=torch.float32), targets[:0], targets.new_zeros(0, 0), targets[:0].bool())
    weight = total if weights is None else gather.all_reduce_sum(weights.sum())
    return [Shared(total, near, weight, *(none if part is None else next(rows))) for part in parts]


def dealt(total: int, rank: int, ranks: int) -> int:
    """Rows of a rank where `total` are dealt out in turn."""
    return total // ranks + (rank < total % ranks)


def _exchange(
    parts: Sequence[Rows], sizes: Sequence[Sequence[int]], own: Tensor, gather: Gather
) -> tuple[list[tuple[Tensor, Tensor, Tensor, Tensor]], Tensor]:
    """One exchange of the rows of all parts → by part what `Shared` holds; [ranks] the number `own` [1] of each rank.

    Ids and numbers travel in the bytes of float32 values, so that one collective takes all.

    Args:
        sizes: by rank and part, the number of rows.
    """
    longest = [max(of_part) for of_part in zip(*sizes, strict=True)]
    vectors, beside = [own.new_zeros(0, dtype=torch.float32)], [own.view(torch.float32)]
    for part, most in zip(parts, longest, strict=True):
        missing = most - len(part.ids)
        vectors.append(F.pad(part.vectors, (0, 0, 0, missing)).flatten())
        beside += [F.pad(part.ids, (0, missing)).view(torch.float32), F.pad(part.numbers, (0, 0, 0, missing)).flatten()]
    all_vectors, all_beside = gather.concat(torch.cat(vectors), torch.cat(beside))
    rows = all_vectors.split([len(v) for v in vectors], 1)[1:]
    texts = all_beside.split([len(b) for b in beside], 1)
    found = []
    for number, (part, most) in enumerate(zip(parts, longest, strict=True)):
        counts = own.new_tensor([of_rank[number] for of_rank in sizes])
        real = (torch.arange(most, device=own.device) < counts.unsqueeze(1)).flatten()  # [ranks * most]
        ids, numbers = texts[1 + 2 * number], texts[2 + 2 * number]
        found.append(
            (
                rows[number].reshape(len(real), part.vectors.shape[1]),
                _integers(ids),
                numbers.reshape(len(real), part.numbers.shape[1]),
                real,
            )
        )
    return found, _integers(texts[0])


def _integers(packed: Tensor) -> Tensor:
    """[ranks, 2 n] bytes of integers as float32 → [ranks * n] int64."""
    return packed.flatten().clone().view(torch.int64)  # a copy of its own begins at a multiple of eight bytes
