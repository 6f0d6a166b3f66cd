"""The softmax as native code: no logits in memory, and faster.

Of products of bf16 (by AMX where there is AMX) and of float32, on CPUs with avx512_bf16.
`fused_softmax.cpp` is compiled at the first use, by the C++ compiler of this machine for its processor, and kept in the
user's cache. Where that cannot be, `why_not_fused` says why, and `softmax` computes the same with PyTorch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flm_torchrec.machine_code import processor_instructions
from flm_torchrec.model.token_passes import add_at
from flm_torchrec.native_code import OPTIONS, Unavailable, argument, built, why_none

SOURCE = Path(__file__).with_suffix(".cpp")
NEEDED = {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"}
"""Instructions of the processor."""
WITHOUT_AMX = (*OPTIONS, "-mno-amx-bf16", "-mno-amx-tile")
"""For a processor that has AMX, where the system does not allow it."""


class _Problem(ctypes.Structure):
    """As in fused_softmax.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "weight", "items", "log_q", "target")),
        *((name, ctypes.c_void_p) for name in ("hidden_rows", "hidden_columns", "domain")),
        *((name, ctypes.c_void_p) for name in ("losses", "query_grad", "items_grad")),
        *((name, ctypes.c_int64) for name in ("queries", "candidates", "dim", "hidden", "threads")),
        ("float32", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def is_meant(precision: torch.dtype | None) -> bool:
    """Whether native code of such products would be faster than PyTorch on this processor."""
    return precision == torch.bfloat16 or (precision == torch.float32 and processor_instructions() >= NEEDED)


def why_not_fused(precision: torch.dtype | None, device: torch.device) -> str:
    """Why a softmax that could be fused is not, in a few words; empty where it is, or where it is not meant to be."""
    if device.type != "cpu" or not is_meant(precision):
        return ""
    found = _library()
    return found if isinstance(found, str) else ""


def can_fuse(query: Tensor, items: Tensor, precision: torch.dtype) -> bool:
    """Whether `fused_softmax` takes these, [T, D] and [C, D]."""
    if query.device.type != "cpu" or not len(query) or not len(items) or not is_meant(precision):
        return False
    single = query.dtype == items.dtype == torch.float32
    return single and not isinstance(_library(), str)


@dataclass(frozen=True)
class Choice:
    """What T queries have for candidates, of which each has one as its target."""

    log_q: Tensor  # [C] what logits are lowered by, but for the target's
    target: Tensor  # [T] int64
    hidden_rows: Tensor | None  # [P] queries, int64, ascending
    hidden_columns: Tensor | None  # [P] candidates that these leave out, int64
    domain: Tensor | None  # [C] of which a query has those of its target's; None: it has all
    weight: Tensor | None  # [T] of each query's loss in the gradients; None: 1
    precision: torch.dtype = torch.bfloat16
    """Of products: bf16 or float32."""


def fused_softmax(query: Tensor, items: Tensor, scale: float, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """[T] losses without weight, and the gradients of their weighted sum: [T, D] of the queries, [C, D] of the items.

    Sums are fp32. At one thread the bits repeat.

    Args:
        query, items: [T, D], [C, D].
        scale: of logits.
    """
    like = torch.contiguous_format
    query_grad, items_grad = (torch.empty_like(x, memory_format=like) for x in (query, items))
    losses = _call(query, items, scale, choice, query_grad=query_grad, items_grad=items_grad)
    weighted = query if choice.weight is None else query * choice.weight[:, None]
    add_at(items_grad, choice.target, weighted, -scale)
    return losses, query_grad, items_grad


def fused_losses(query: Tensor, items: Tensor, scale: float, choice: Choice) -> Tensor:
    """[T] losses without weight, as of `fused_softmax`."""
    return _call(query, items, scale, choice)


def _call(query: Tensor, items: Tensor, scale: float, choice: Choice, **gradients: Tensor) -> Tensor:
    losses = query.new_empty(len(query))
    domain = None if choice.domain is None else choice.domain.float()
    given = {
        **{name: value for name, value in vars(choice).items() if name != "precision"},
        "log_q": choice.log_q.float(),
        "domain": domain,
        "query": query,
        "items": items,
        **gradients,
    }
    held = {name: None if x is None else x.contiguous() for name, x in {**given, **gradients}.items()}
    shape = {"queries": len(query), "candidates": len(items), "dim": items.shape[1], "threads": torch.get_num_threads()}
    shape["hidden"] = 0 if choice.hidden_rows is None else len(choice.hidden_rows)
    shape["float32"] = choice.precision == torch.float32
    library = _library()
    assert not isinstance(library, str)
    if library.flm_softmax(argument(_Problem, {**held, "losses": losses}, **shape, scale=scale)):
        raise MemoryError(f"no memory for a softmax of {len(query)} queries and {len(items)} candidates")
    return losses


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
