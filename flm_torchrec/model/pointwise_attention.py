"""HSTU's pointwise attention as native code, without padding; in training and evaluation on CPUs.

`pointwise_attention.cpp` has the formula. Where it cannot be compiled, PyTorch makes the same on padded sequences.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flm_torchrec.model.native_code import built, why_none

SOURCE = Path(__file__).with_suffix(".cpp")


class _Problem(ctypes.Structure):
    """As in pointwise_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("vqk", "first", "between", "position", "time")),
        *((name, ctypes.c_void_p) for name in ("grad", "mixed", "vqk_grad", "position_grad", "time_grad")),
        *((name, ctypes.c_int64) for name in ("step", "sequences", "side", "dim", "heads", "positions", "buckets")),
        ("threads", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Sequences:
    """B sequences whose tokens lie one after the other."""

    first: Tensor  # [B + 1] int64: the first token of each, and how many tokens there are
    between: Tensor | None  # [B, L, L] int32 of `elapsed`; None: no biases


def why_not_native(device: torch.device) -> str:
    """Why PyTorch makes the attention on a CPU, in a few words; empty where it does not, and on other devices."""
    found = _library() if device.type == "cpu" else ""
    return found if isinstance(found, str) else ""


def can_attend(vqk: Tensor) -> bool:
    """Whether `pointwise_attention` takes these."""
    return vqk.device.type == "cpu" and vqk.dtype == torch.float32 and not isinstance(_library(), str)


def pointwise_attention(vqk: Tensor, heads: int, sequences: Sequences, biases: tuple[Tensor, Tensor] | None) -> Tensor:
    """[T, 3 D] values, queries and keys → [T, D].

    Args:
        biases: of scores: [heads, P] by distance in position, [heads, BUCKETS] by time; None: no biases.
    """
    found: Tensor = _Attended.apply(vqk, *(biases or (None, None)), heads, sequences)
    return found


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, vqk: Tensor, position: Tensor | None, time: Tensor | None, heads: int, sequences: Sequences
    ) -> Tensor:
        vqk = vqk if vqk.stride(1) == 1 else vqk.contiguous()
        mixed = vqk.new_empty(len(vqk), vqk.shape[1] // 3)
        _call(vqk, (position, time), heads, sequences, mixed=mixed)
        ctx.save_for_backward(vqk, position, time)
        ctx.heads, ctx.sequences = heads, sequences
        return mixed

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        vqk, position, time = ctx.saved_tensors
        of_vqk = torch.empty_like(vqk, memory_format=torch.contiguous_format)
        of_position, of_time = (None if x is None else torch.zeros_like(x) for x in (position, time))
        given = {"vqk_grad": of_vqk, "position_grad": of_position, "time_grad": of_time}
        _call(vqk, (position, time), ctx.heads, ctx.sequences, grad=grad.contiguous(), **given)
        return of_vqk, of_position, of_time, None, None


def _call(
    vqk: Tensor, biases: tuple[Tensor | None, Tensor | None], heads: int, sequences: Sequences, **given: Tensor | None
) -> None:
    position, time = (None if x is None else x.detach().contiguous() for x in biases)
    between = None if sequences.between is None else sequences.between.contiguous()
    named = {"vqk": vqk, "first": sequences.first, "between": between, "position": position, "time": time, **given}
    problem = _Problem(
        **{name: x.data_ptr() for name, x in named.items() if x is not None},
        step=vqk.stride(0),
        sequences=len(sequences.first) - 1,
        side=0 if between is None else between.shape[1],
        dim=vqk.shape[1] // 3,
        heads=heads,
        positions=0 if position is None else position.shape[1],
        buckets=0 if time is None else time.shape[1],
        threads=torch.get_num_threads(),
    )
    library = _library()
    assert not isinstance(library, str)
    if library.flm_pointwise_attention(ctypes.byref(problem)):
        raise MemoryError(f"no memory for the attention of {len(vqk)} tokens")


@cache
def _library() -> ctypes.CDLL | str:
    """The native code; or why there is none, in a few words."""
    return why_none(lambda: built(SOURCE))
