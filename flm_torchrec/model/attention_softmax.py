"""The softmax on a GPU as an attention whose keys and values are the items: no logits in memory.

The first kernel gives each query's log-sum-exp and the mean of the items by its shares, which is the gradient of the
query; the second makes the shares anew for the gradients of items (FlashAttention, Dao et al. 2022). Where the kernels
cannot be used, `why_not_attended` says why, and `softmax` computes the same with PyTorch.
"""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from flm_torchrec.model.softmax_tiles import Scored, Tiles, tiled_softmax
from flm_torchrec.safe_text import first_line

MOST_WIDTH = 256
"""Of vectors: a block of them is held by one processor of the GPU."""
BLOCKS = 512
"""Blocks that a kernel is divided into at least, where there is as much to do: some for each of a GPU's processors."""
MOST_PARTS = 16
"""Parts of a block's work whose results are added up afterwards."""
BITS_BYTES = 2**29
"""Held at once, a bit for each query and candidate; the queries are taken in turn where there are more."""
TOLERANCE = 1e-2
"""Relative difference from PyTorch's products in fp32: shares are rounded to the precision of the products."""


@dataclass(frozen=True)
class Allowed:
    """Which candidates a query is asked about: its target, and all but the hidden ones."""

    target: Tensor  # [T] int64
    hidden: tuple[Tensor, Tensor] | None
    """[P] queries and [P] candidates that are left out, int64."""


def why_not_attended(width: int, precision: torch.dtype | None, device: torch.device) -> str:
    """Why the kernels do not take vectors [N, width], in a few words; empty where they do, or are not meant to."""
    if device.type != "cuda" or precision is None or not _rounded(precision):
        return ""
    return _problem(device.index or 0, width, precision)


def can_attend(query: Tensor, items: Tensor, precision: torch.dtype) -> bool:
    """Whether `attended_softmax` takes these, [T, D] and [C, D]."""
    if query.device.type != "cuda" or not len(query) or not len(items) or not _rounded(precision):
        return False
    single = query.dtype == items.dtype == torch.float32
    return single and not _problem(query.device.index or 0, query.shape[1], precision)


def attended_softmax(scored: Scored, asked: Allowed) -> tuple[Tensor, Tensor, Tensor]:
    """[T] losses without weight; [T, D] sum of the items by their shares, [C, D] sum of the weighted queries by theirs.

    Products are of the precision of `scored`, of TF32 where that is fp32; sums are fp32. The bits repeat.
    """
    queries, candidates = len(scored.query), len(scored.items)
    chunk = queries if asked.hidden is None else max(64, BITS_BYTES * 8 // candidates // 64 * 64)
    losses, of_query = torch.empty_like(scored.truth), scored.truth.new_empty(scored.query.shape)
    of_items = scored.truth.new_zeros(scored.items.shape)
    for at in range(0, queries, chunk):
        here = slice(at, at + chunk)
        sums, of_query[here], part = _chunk(scored, asked, here)
        losses[here] = sums - scored.truth[here]
        of_items += part
    return losses, of_query, of_items


def block_of(width: int, precision: torch.dtype) -> dict[str, int]:
    """Queries, and candidates, of a block; how a kernel runs within the 99 KiB of shared memory of a small GPU."""
    side = 64 if width * precision.itemsize <= 512 else 32
    return {"BLOCK": side, "num_warps": 4, "num_stages": 2 if precision == torch.bfloat16 else 1}


def _rounded(precision: torch.dtype) -> bool:
    """Whether products may round their factors: the kernels have no products of all bits."""
    return precision == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest"


@cache
def _problem(device: int, width: int, precision: torch.dtype) -> str:
    """What is wrong with the kernels on a GPU, tried on a small softmax; empty where nothing is."""
    if width > MOST_WIDTH:
        return f"vectors are wider than {MOST_WIDTH}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from triton.errors import TritonError

    try:
        different = difference(width, precision, torch.device("cuda", device))
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError, TritonError) as error:
        return f"the kernels cannot be built: {first_line(error)}"
    return f"the kernels differ from PyTorch by {different:.1%} here" if different > TOLERANCE else ""


def difference(width: int, precision: torch.dtype, device: torch.device) -> float:
    """Largest relative difference between the kernels and PyTorch, on a small softmax with all that can be left out."""
    draw, single = torch.Generator().manual_seed(0), torch.float32
    query, items = (torch.randn(count, width, generator=draw) / width**0.25 for count in (90, 200))
    query, items = 2 * query.to(device, precision), items.to(device, precision)
    target, place = torch.arange(90, device=device), torch.arange(200, device=device)
    truth = (query.to(single) * items[target].to(single)).sum(1)
    hidden = target, target + 2
    scored = Scored(query, query, items, place / -100, truth, place % 2)
    kernels = attended_softmax(scored, Allowed(target, hidden))
    wide = replace(scored, query=query.to(single), weighted=query.to(single), items=items.to(single))
    _, *plain = tiled_softmax(wide, Tiles(target, hidden, 200, (90, 200)), None, single)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(kernels[1:], plain, strict=True))


def _chunk(scored: Scored, asked: Allowed, here: slice) -> tuple[Tensor, Tensor, Tensor]:
    """[t] log-sum-exp, [t, D] and [C, D], of some queries."""
    from flm_torchrec.model import attention_kernels as kernels

    query, weighted = scored.query[here].contiguous(), scored.weighted[here].contiguous()
    target, truth = asked.target[here].contiguous(), scored.truth[here].contiguous()
    items = scored.items.contiguous()
    (queries, dim), candidates = query.shape, len(items)
    words = -(-candidates // 32)
    bits, domain, wanted = target, target, target  # where they are not read
    if asked.hidden is not None:
        bits = torch.zeros(queries, words, dtype=torch.int32, device=query.device)
        rows, columns = (x.contiguous() for x in asked.hidden)
        if len(rows):
            ends = here.start, here.start + queries
            kernels.hide_kernel[-(-len(rows) // 1024),](bits, (rows, columns), len(rows), ends, words, BLOCK=1024)
    if scored.domain is not None:
        domain, wanted = scored.domain.contiguous(), scored.domain[target]
    side = scored.correction, target, truth, bits, domain, wanted
    kinds = {"HIDE": asked.hidden is not None, "APART": scored.domain is not None}
    fixed = block_of(dim, query.dtype) | kinds | {"DIM": dim, "WIDE": max(16, 1 << (dim - 1).bit_length())}
    blocks, parts, steps = _divided(queries, candidates, fixed["BLOCK"])
    sums, means = truth.new_empty(parts, queries), truth.new_empty(parts, queries, dim)
    sizes = queries, candidates, words, steps
    kernels.queries_kernel[blocks, parts]((query, items), side, (sums, means), sizes, **fixed)
    of_query = torch.einsum("pt,ptd->td", torch.softmax(sums, 0), means)
    total = torch.logsumexp(sums, 0)
    blocks, parts, steps = _divided(candidates, queries, fixed["BLOCK"])
    gradients, sizes = truth.new_empty(parts, candidates, dim), (queries, candidates, words, steps)
    kernels.items_kernel[blocks, parts]((query, weighted, items), side, (total, gradients), sizes, **fixed)
    return total, of_query, gradients.sum(0)


def _divided(own: int, other: int, block: int) -> tuple[int, int, int]:
    """Blocks of `own` rows, parts of the `other` rows, and blocks of a part."""
    blocks, steps = -(-own // block), -(-other // block)
    each = -(-steps // min(max(1, BLOCKS // blocks), MOST_PARTS, steps))
    return blocks, -(-steps // each), each
