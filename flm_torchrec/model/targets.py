"""The targets of a step: which of them count, which candidate each is, and what its query leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.model.softmax import Hidden
from flm_torchrec.model.token_passes import differing_pairs, is_native


@dataclass(frozen=True)
class CountedTargets:
    """The targets that count in the losses."""

    rows: Tensor | None  # [t] int64; None: all T
    weight: Tensor | None  # [t]; None: all count 1

    @classmethod
    def of(cls, weight: Tensor | None) -> CountedTargets:
        """Args: [T] weights of all targets."""
        if weight is None:
            return cls(None, None)
        rows = weight.nonzero().flatten()
        return cls(None, weight) if len(rows) == len(weight) else cls(rows, weight[rows])

    def only(self, query: Tensor, target: Tensor, hidden: Hidden | None) -> tuple[Tensor, Tensor, Hidden | None]:
        """[T, D] queries, [T] targets and what is hidden of them → those that count, [t, D] and [t]."""
        if self.rows is None:
            return query, target, hidden
        if hidden is not None:
            place = torch.full_like(target, -1)
            place[self.rows] = torch.arange(len(self.rows), device=place.device)
            kept = place[hidden.rows] >= 0
            hidden = Hidden(place[hidden.rows][kept], hidden.columns[kept])
        return query[self.rows], target[self.rows], hidden


def hidden_of(lengths: Tensor, columns: Tensor, whole: bool, had: Tensor | None = None) -> Hidden:
    """[B] lengths, [T] columns of the targets → the candidates that the query of each target leaves out.

    Args:
        whole: all items of the target's sequence but the target; else those before it.
        had: [T] bool, the targets whose items count as had by the user; None: all.
    """
    if is_native(columns, torch.int64):
        return Hidden(*differing_pairs(F.pad(lengths.cumsum(0), (1, 0)), columns, had, whole))
    sequences = torch.arange(len(lengths), device=lengths.device)
    sequence = torch.repeat_interleave(sequences, lengths, output_size=len(columns))  # [T]
    first = (torch.cumsum(lengths, 0) - lengths)[sequence]
    token = torch.arange(len(sequence), device=lengths.device)
    count = lengths[sequence] if whole else token - first
    # Of P pairs by index_select: other indexing takes twice as long on a CPU.
    row = torch.repeat_interleave(token, count)  # [P]
    shift = first - (torch.cumsum(count, 0) - count)  # [T] from the number of a pair to that of its other token
    other = torch.arange(len(row), device=lengths.device) + shift.index_select(0, row)
    column = columns.index_select(0, other)
    kept = column != columns.index_select(0, row)
    if had is not None:
        kept &= had[other]
    pairs = kept.nonzero().flatten()  # once: each look-up by a mask would wait for a GPU
    return Hidden(row.index_select(0, pairs), column.index_select(0, pairs))


def columns_of(candidates: Tensor, real: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[n] first column of each wanted id among the candidates, any column where it is none; [C] bool: a later copy.

    Args:
        candidates: [C] ids.
        real: [C] bool, False at padding.
        wanted: [n] ids.
    """
    if not len(candidates):  # a rank alone that has nothing to learn
        return torch.zeros_like(wanted), torch.zeros_like(real)
    ordered, order = torch.sort(candidates.masked_fill(~real, torch.iinfo(candidates.dtype).max), stable=True)
    copies = F.pad(ordered[1:] == ordered[:-1], (1, 0))
    repeated = torch.zeros_like(real)
    repeated[order] = copies
    return order[torch.searchsorted(ordered, wanted).clamp(max=len(order) - 1)], repeated
