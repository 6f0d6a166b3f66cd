"""Kernels of `attention_softmax` in Triton, which the builds of PyTorch for GPUs bring."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hide_kernel(bits, pairs, count, ends, words, BLOCK: tl.constexpr):
    """[last - first, words]: set the bit of each pair of a query, from `first` to before `last`, and a candidate."""
    rows, columns = pairs
    first, last = ends
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < count, other=-1)
    column = tl.load(columns + at, mask=at < count, other=0)
    here = (row >= first) & (row < last)
    bit = tl.full((BLOCK,), 1, tl.int32) << (column % 32).to(tl.int32)
    tl.atomic_or(bits + (row - first) * words + column // 32, bit, mask=here)


@triton.jit
def _corrected(logits, numbers, side, sizes, HIDE: tl.constexpr, APART: tl.constexpr):
    """The logits of queries and candidates, whose numbers broadcast to the shape of the logits."""
    row, column = numbers
    correction, target, truth, bits, domain, wanted = side
    queries, candidates, words, _ = sizes
    asked, real = row < queries, column < candidates
    logits += tl.load(correction + column, mask=real, other=float("-inf"))
    if APART:
        theirs = tl.load(domain + column, mask=real, other=0)
        logits = tl.where(tl.load(wanted + row, mask=asked, other=0) == theirs, logits, float("-inf"))
    if HIDE:
        word = tl.load(bits + row * words + column // 32, mask=asked & real, other=0)
        logits = tl.where((word >> (column % 32)) & 1 != 0, float("-inf"), logits)
    own = tl.load(target + row, mask=asked, other=-1) == column
    return tl.where(own, tl.load(truth + row, mask=asked, other=0.0), logits)


@triton.jit
def queries_kernel(
    vectors, side, outputs, sizes,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, HIDE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Of one part of the candidates: [parts, T] log-sum-exp, [parts, T, D] mean of the items by their shares."""
    query, items = vectors
    sums, means = outputs
    queries, candidates, _, steps = sizes
    row, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    dim = tl.arange(0, WIDE)
    inside = (row < queries)[:, None] & (dim < DIM)[None, :]
    q = tl.load(query + row[:, None] * DIM + dim[None, :], mask=inside, other=0)
    top = tl.full((BLOCK,), -1e30, tl.float32)  # finite, so that a block without candidates gives no NaN
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, WIDE), tl.float32)
    for step in range(part * steps, part * steps + steps):
        column = step * BLOCK + tl.arange(0, BLOCK)
        place = column.to(tl.int64)[:, None] * DIM + dim[None, :]
        k = tl.load(items + place, mask=(column < candidates)[:, None] & (dim < DIM)[None, :], other=0)
        logits = tl.dot(q, tl.trans(k), input_precision="tf32")
        logits = _corrected(logits, (row[:, None], column[None, :]), side, sizes, HIDE, APART)
        higher = tl.maximum(top, tl.max(logits, 1))
        shares, rest = tl.exp(logits - higher[:, None]), tl.exp(top - higher)
        total = total * rest + tl.sum(shares, 1)
        mean = tl.dot(shares.to(k.dtype), k, mean * rest[:, None], input_precision="tf32")
        top = higher
    some = total > 0
    mean = tl.where(some[:, None], mean / tl.where(some, total, 1.0)[:, None], 0.0)
    at = part.to(tl.int64) * queries + row
    tl.store(sums + at, tl.where(some, top + tl.log(total), float("-inf")), mask=row < queries)
    tl.store(means + at[:, None] * DIM + dim[None, :], mean, mask=inside)


@triton.jit
def items_kernel(
    vectors, side, outputs, sizes,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, HIDE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Of one part of the queries: [parts, C, D] sum of the weighted queries by their shares."""
    query, weighted, items = vectors
    sums, gradients = outputs
    queries, candidates, _, steps = sizes
    column, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    dim = tl.arange(0, WIDE)
    inside = (column < candidates)[:, None] & (dim < DIM)[None, :]
    k = tl.load(items + column.to(tl.int64)[:, None] * DIM + dim[None, :], mask=inside, other=0)
    total = tl.zeros((BLOCK, WIDE), tl.float32)
    for step in range(part * steps, part * steps + steps):
        row = step * BLOCK + tl.arange(0, BLOCK)
        place, known = row[:, None] * DIM + dim[None, :], (row < queries)[:, None] & (dim < DIM)[None, :]
        logits = tl.dot(k, tl.trans(tl.load(query + place, mask=known, other=0)), input_precision="tf32")
        logits = _corrected(logits, (row[None, :], column[:, None]), side, sizes, HIDE, APART)
        shares = tl.exp(logits - tl.load(sums + row, mask=row < queries, other=float("inf"))[None, :])
        w = tl.load(weighted + place, mask=known, other=0)
        total = tl.dot(shares.to(w.dtype), w, total, input_precision="tf32")
    place = (part.to(tl.int64) * candidates + column)[:, None] * DIM + dim[None, :]
    tl.store(gradients + place, total, mask=inside)
