"""Sampled softmax with logQ correction that never holds a [T, C] matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flm_torchrec.model.attention_softmax import Allowed, attended_softmax, can_attend, why_not_attended
from flm_torchrec.model.fused_softmax import Choice, can_fuse, fused_losses, fused_softmax, why_not_fused
from flm_torchrec.model.softmax_tiles import TINY, Scored, Tiles, tiled_softmax
from flm_torchrec.model.token_passes import add_at, take
from flm_torchrec.products import add_matmul, matmul

CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**29}
"""Bytes of logits that are held at once, by type of device: about a CPU's cache; a GPU needs much work for a kernel."""
LEAST_ROWS = 128
"""Minimum of queries in a chunk, however many candidates: each chunk reads and writes the gradients of all of them."""
MOST_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Where the logits of so few queries take more, a GPU's kernels hold none; else they are made twice, in tiles."""
TILE_ROWS = 1024
"""Queries of a tile."""


@dataclass(frozen=True)
class CandidateVectors:
    """The items that a softmax runs over."""

    vectors: Tensor  # [C, D]
    log_q: Tensor
    """[C] log-probability of each candidate to be one; +inf takes it out (padding, a repeated item). Zeros for a full
    softmax."""
    domain: Tensor | None = None
    """[C] a query is asked only about the candidates of its target's domain; None: about all."""
    precision: torch.dtype | None = None
    """Of the logits and of products with them; None: that of the vectors. Sums keep that of the vectors."""


def inclusion_log_probability(log_not_sampled: Tensor, in_batch: Tensor | int, drawn: int) -> Tensor:
    """[C]: log-probability that an item is among the candidates of a step.

    An item is no candidate if none of `in_batch` targets and none of `drawn` negatives is that item:
    pi = 1 - (1 - p)^in_batch (1 - q)^drawn, with `log_not_sampled` = [log(1 - p), log(1 - q)], [C, 2].
    """
    log_missing = in_batch * log_not_sampled[:, 0] + drawn * log_not_sampled[:, 1]
    return torch.log(-torch.expm1(log_missing).clamp(max=-1e-12))


@dataclass(frozen=True)
class Hidden:
    """Candidates that a query is not asked about: `columns[i]` for the query `rows[i]`; rows in ascending order."""

    rows: Tensor  # [P] int64
    columns: Tensor  # [P] int64


def sampled_softmax(
    query: Tensor,
    candidates: CandidateVectors,
    target: Tensor,
    scale: Tensor,
    hidden: Hidden | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum over T queries of -weight log softmax(scale * query . items)[target], Z estimated from the candidates.

    Each candidate but the target stands for 1 / pi items like it, so its logit is lowered by log_q = log pi
    (Bengio & Senecal 2008; Yi et al., RecSys 2019). The target is a candidate with certainty, so its logit is not
    lowered (Khrylchenko et al., "Correcting the LogQ Correction", RecSys 2025). Candidates are different items and
    the target is one of them, so no copy of the target counts as a negative.

    Args:
        query: [T, D].
        candidates: C items.
        target: [T] index of each query's true item among the candidates.
        scale: [] inverse temperature.
        hidden: what to leave out of the softmax of single queries; a query's target stays.
        weight: [T] of each query's loss; None: 1.

    Returns:
        [] the summed loss, with gradients for query, items and scale.
    """
    precision = candidates.precision or candidates.vectors.dtype
    fixed = _Fixed(target, candidates.log_q, hidden, precision, candidates.domain, weight)
    return _SampledSoftmax.apply(query, candidates.vectors, scale, fixed)


@torch.no_grad()
def log_probability(
    query: Tensor, candidates: CandidateVectors, target: Tensor, scale: Tensor, hidden: Hidden | None = None
) -> Tensor:
    """[T] log-probability of each query's target, which `sampled_softmax` makes greater; arguments as there."""
    items = candidates.vectors
    precision = candidates.precision or items.dtype
    fixed = _Fixed(target, candidates.log_q, hidden, precision, candidates.domain, None)
    if can_fuse(query, items, precision):
        return -fused_losses(query, items, float(scale), fixed.choice)
    scaled = query * scale
    rows = max(1, CHUNK_BYTES[query.device.type] // (precision.itemsize * max(1, len(items))))
    found = torch.empty_like(scaled[:, 0])
    for at, logits, own in _logits_by_chunk(scaled, items, fixed, rows):
        wide = logits.to(items.dtype)
        found[at : at + len(logits)] = wide.view(-1)[own] - wide.logsumexp(1)
    return found


def chunk_rows(candidates: int, precision: torch.dtype, device: torch.device) -> int:
    """Queries whose logits are held at once."""
    return max(LEAST_ROWS, CHUNK_BYTES[device.type] // (precision.itemsize * max(1, candidates)))


def tile_shape(queries: int, candidates: int, precision: torch.dtype, device: torch.device) -> tuple[int, int] | None:
    """Queries and candidates of a tile; None where a chunk of queries' logits can be held."""
    if LEAST_ROWS * candidates * precision.itemsize <= MOST_BYTES[device.type]:
        return None
    rows = max(1, min(TILE_ROWS, queries))
    return rows, CHUNK_BYTES[device.type] // (precision.itemsize * rows)


def why_pytorch(candidates: int, width: int, precision: torch.dtype, device: torch.device) -> str:
    """Why PyTorch makes a softmax that native code or kernels should make, in a few words; empty where none should."""
    if device.type == "cpu":
        return why_not_fused(precision, device)
    return why_not_attended(width, precision, device) if tile_shape(1, candidates, precision, device) else ""


@dataclass(frozen=True)
class _Fixed:
    """What a softmax has no gradient of."""

    target: Tensor
    log_q: Tensor
    hidden: Hidden | None
    precision: torch.dtype
    domain: Tensor | None
    weight: Tensor | None

    @property
    def choice(self) -> Choice:
        """As native code takes it."""
        rows, columns = (None, None) if self.hidden is None else (self.hidden.rows, self.hidden.columns)
        return Choice(self.log_q, self.target, rows, columns, self.domain, self.weight, self.precision)

    def weighted(self, values: Tensor, at: int = 0) -> Tensor:
        """[n] or [n, D] values of the queries from `at` on, times their weights."""
        if self.weight is None:
            return values
        weight = self.weight[at : at + len(values)]
        return values * (weight if values.dim() == 1 else weight[:, None])

    def total(self, losses: Tensor) -> Tensor:
        """[T] losses, which this overwrites → [] their weighted sum; the probability of a target is TINY at least."""
        return self.weighted(losses.clamp_(max=-math.log(TINY))).sum()

    def hide_other_domains(self, logits: Tensor, at: int) -> None:
        """Leave the candidates of other domains out of the logits [t, C] of the queries from `at` on."""
        if self.domain is not None:
            wanted = self.domain[self.target[at : at + len(logits)]]
            logits.masked_fill_(wanted[:, None] != self.domain, -torch.inf)

    def hidden_by_chunk(self, chunk: int, candidates: int) -> list[Tensor]:
        """By chunk of queries, [p] positions in its logits that are left out."""
        chunks = -(-len(self.target) // chunk)
        if self.hidden is None:
            return [self.target[:0]] * chunks
        if chunks == 1:
            return [self.hidden.rows * candidates + self.hidden.columns]
        of_chunk = self.hidden.rows // chunk
        position = (self.hidden.rows - of_chunk * chunk) * candidates + self.hidden.columns
        return list(position.split(torch.bincount(of_chunk, minlength=chunks).tolist()))


class _SampledSoftmax(torch.autograd.Function):
    """Computes gradients together with the loss, so that no logits are kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, query: Tensor, items: Tensor, scale: Tensor, fixed: _Fixed
    ) -> Tensor:
        if can_fuse(query, items, fixed.precision):
            losses, query_grad, items_grad = fused_softmax(query, items, float(scale), fixed.choice)
            loss = fixed.total(losses)
        else:
            loss, query_grad, items_grad = _by_pytorch(query, items, scale, fixed)
        scale_grad = torch.dot(query_grad.flatten(), query.flatten()) / scale
        ctx.save_for_backward(query_grad, items_grad, scale_grad)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        query_grad, items_grad, scale_grad = ctx.saved_tensors
        # In place, so a second backward is refused by autograd.
        return query_grad.mul_(grad), items_grad.mul_(grad), scale_grad * grad, None


def _by_pytorch(query: Tensor, items: Tensor, scale: Tensor, fixed: _Fixed) -> tuple[Tensor, Tensor, Tensor]:
    """[] loss and its gradients, [T, D] of the queries and [C, D] of the items; on a GPU by kernels where they fit."""
    scaled = query * scale
    weighted = fixed.weighted(scaled)
    shape = tile_shape(len(query), len(items), fixed.precision, query.device)
    if shape is None:
        loss, query_grad, items_grad = _in_chunks(scaled, weighted, items, fixed)
    elif can_attend(query, items, fixed.precision):
        loss, query_grad, items_grad = _attended(scaled, weighted, items, fixed)
    else:
        loss, query_grad, items_grad = _in_tiles(scaled, weighted, items, fixed, shape)
    query_grad -= take(items, fixed.target)
    add_at(items_grad, fixed.target, weighted, -1.0)
    return loss, fixed.weighted(query_grad).mul_(scale), items_grad


def _in_chunks(scaled: Tensor, weighted: Tensor, items: Tensor, fixed: _Fixed) -> tuple[Tensor, Tensor, Tensor]:
    """What `tiled_softmax` gives, chunk by chunk of queries: one pass over the logits."""
    precision = fixed.precision
    loss = scaled.new_zeros(())
    query_grad, items_grad = torch.empty_like(scaled), torch.zeros_like(items)
    low_items, low_weighted = items.to(precision), weighted.to(precision)
    narrow, widened = torch.empty_like(low_items), torch.empty_like(items)  # mixed precisions would make copies
    rows = chunk_rows(len(items), precision, scaled.device)
    for at, logits, own in _logits_by_chunk(scaled, items, fixed, rows):
        chunk = slice(at, at + len(logits))
        shares = torch.softmax(logits, 1, out=logits)
        loss -= fixed.weighted(shares.view(-1)[own].to(items.dtype).clamp(min=TINY).log(), at).sum()
        query_grad[chunk] = matmul(shares, low_items)
        if precision == items.dtype:
            add_matmul(items_grad, shares.T, low_weighted[chunk])
        else:
            items_grad += widened.copy_(torch.mm(shares.T, low_weighted[chunk], out=narrow))
    return loss, query_grad, items_grad


def _logits_by_chunk(scaled: Tensor, items: Tensor, fixed: _Fixed, rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Chunk by chunk of `rows` queries: its first query, its logits [t, C] and [t] where its targets are in them, flat.

    The logits share memory.
    """
    target, precision = fixed.target, fixed.precision
    low_items, low_scaled, corrections = (x.to(precision) for x in (items, scaled, -fixed.log_q))
    buffer = low_items.new_empty(min(rows, len(scaled)), len(items))
    truth = (scaled * items[target]).sum(1).to(precision)  # [T]
    first = torch.arange(len(buffer), device=scaled.device) * len(items)
    hidden = fixed.hidden_by_chunk(rows, len(items))
    for number, at in enumerate(range(0, len(scaled), rows)):
        part = low_scaled[at : at + rows]
        logits = matmul(part, low_items.T, corrections, out=buffer[: len(part)])
        logits.view(-1).index_fill_(0, hidden[number], -torch.inf)
        fixed.hide_other_domains(logits, at)
        own = first[: len(part)] + target[at : at + rows]
        logits.view(-1)[own] = truth[at : at + rows]  # scatter_ would copy all of the logits
        yield at, logits, own


def _attended(scaled: Tensor, weighted: Tensor, items: Tensor, fixed: _Fixed) -> tuple[Tensor, Tensor, Tensor]:
    """What `tiled_softmax` gives, by the kernels of a GPU."""
    query, low_weighted, low_items = (x.to(fixed.precision) for x in (scaled, weighted, items))
    truth = (scaled * items[fixed.target]).sum(1)
    scored = Scored(query, low_weighted, low_items, -fixed.log_q.float(), truth, fixed.domain)
    hidden = None if fixed.hidden is None else (fixed.hidden.rows, fixed.hidden.columns)
    losses, of_query, of_items = attended_softmax(scored, Allowed(fixed.target, hidden))
    return fixed.total(losses), of_query, of_items


def _in_tiles(
    scaled: Tensor, weighted: Tensor, items: Tensor, fixed: _Fixed, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    target, none = fixed.target, fixed.target[:0]
    query, low_weighted, low_items, correction, truth = (
        x.to(fixed.precision) for x in (scaled, weighted, items, -fixed.log_q, (scaled * items[target]).sum(1))
    )
    scored = Scored(query, low_weighted, low_items, correction, truth, fixed.domain)
    hidden = (none, none) if fixed.hidden is None else (fixed.hidden.rows, fixed.hidden.columns)
    return tiled_softmax(scored, Tiles(target, hidden, len(items), shape), fixed.weight, items.dtype)
