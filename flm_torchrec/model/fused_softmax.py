"""The softmax of bf16 products as native code: no logits in memory, and faster; on CPUs with AMX or avx512_bf16.

`fused_softmax.cpp` is compiled at the first use, by the C++ compiler of this machine for its processor, and kept in the
user's cache. Where that cannot be, `why_not_fused` says why, and `softmax` computes the same with PyTorch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flm_torchrec.machine_code import processor_instructions
from flm_torchrec.model.native_code import OPTIONS, Unavailable, built, why_none
from flm_torchrec.model.token_passes import take

SOURCE = Path(__file__).with_suffix(".cpp")
NEEDED = {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"}
"""Instructions of the processor."""
WITHOUT_AMX = (*OPTIONS, "-mno-amx-bf16", "-mno-amx-tile")
"""For a processor that has AMX, where the system does not allow it."""


class _Problem(ctypes.Structure):
    """As in fused_softmax.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "weighted", "items", "log_q", "truth", "target")),
        *((name, ctypes.c_void_p) for name in ("hidden_rows", "hidden_columns", "domain", "wanted")),
        *((name, ctypes.c_void_p) for name in ("log_sum", "query_grad", "items_grad")),
        *((name, ctypes.c_int64) for name in ("queries", "candidates", "dim", "hidden", "threads")),
    )


def why_not_fused(precision: torch.dtype | None, device: torch.device) -> str:
    """Why a softmax that could be fused is not, in a few words; empty where it is, or where it is not meant to be."""
    if precision != torch.bfloat16 or device.type != "cpu":
        return ""
    found = _library()
    return found if isinstance(found, str) else ""


def can_fuse(query: Tensor, items: Tensor, precision: torch.dtype) -> bool:
    """Whether `fused_softmax` takes these, [T, D] and [C, D]."""
    if precision != torch.bfloat16 or query.device.type != "cpu" or not len(query) or not len(items):
        return False
    single = query.dtype == items.dtype == torch.float32
    return single and not isinstance(_library(), str)


LeftOut = tuple[Tensor | None, Tensor | None, Tensor | None]
"""[P] queries in ascending order and [P] candidates that they leave out, int64; [C] domains."""


def fused_softmax(
    scaled: Tensor, weighted: Tensor, items: Tensor, log_q: Tensor, target: Tensor, left_out: LeftOut
) -> tuple[Tensor, Tensor, Tensor]:
    """[T] losses without weight; [T, D] sum of the items by their shares, [C, D] sum of the weighted queries by theirs.

    Products are of bf16, sums are fp32. At one thread the bits repeat.

    Args:
        scaled, weighted: [T, D] queries, and times their weights.
        items: [C, D].
        log_q: [C] what logits are lowered by, but for the target's.
        target: [T] int64.
    """
    like = torch.contiguous_format
    query_grad, items_grad = (torch.empty_like(x, memory_format=like) for x in (scaled, items))
    losses = fused_losses(scaled, items, log_q, target, left_out, (weighted, query_grad, items_grad))
    return losses, query_grad, items_grad


def fused_losses(
    scaled: Tensor,
    items: Tensor,
    log_q: Tensor,
    target: Tensor,
    left_out: LeftOut,
    gradients: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """[T] losses, arguments as of `fused_softmax`.

    Args:
        gradients: the weighted queries, and where the sums by shares of items and of weighted queries are written.
    """
    rows, columns, domain = left_out
    weighted, *sums = gradients or (None, None, None)
    truth = torch.einsum("td,td->t", scaled, take(items, target))
    losses = torch.empty_like(truth)
    places = None if domain is None else domain.float()
    wanted = None if places is None else places[target]
    inputs = [scaled, weighted, items, log_q.float(), truth, target, rows, columns, places, wanted]
    held = [None if x is None else x.contiguous() for x in inputs]
    problem = _Problem(
        *(None if x is None else x.data_ptr() for x in [*held, losses, *sums]),
        *(*scaled.shape[:1], *items.shape, 0 if rows is None else len(rows), torch.get_num_threads()),
    )
    library = _library()
    assert not isinstance(library, str)
    if library.flm_softmax(ctypes.byref(problem)):
        raise MemoryError(f"no memory for a softmax of {len(scaled)} queries and {len(items)} candidates")
    return losses.sub_(truth)


@cache
def _library() -> ctypes.CDLL | str:
    """The native code; or why there is none, in a few words."""
    return why_none(_load)


def _load() -> ctypes.CDLL:
    missing = NEEDED - processor_instructions()
    if missing:
        raise Unavailable(f"the processor has no {min(missing)}")
    library = built(SOURCE, OPTIONS)
    return built(SOURCE, WITHOUT_AMX) if library.flm_softmax_refused() else library
