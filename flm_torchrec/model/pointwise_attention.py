"""HSTU's pointwise attention as native code, without padding; in training and evaluation on CPUs.

`pointwise_attention.cpp` has the formula. Where it cannot be compiled, PyTorch makes the same on padded sequences.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flm_torchrec import native_code
from flm_torchrec.model.spans import Spans
from flm_torchrec.native_code import argument, built, why_none

SOURCE = Path(__file__).with_suffix(".cpp")


class _Arguments(ctypes.Structure):
    """`Problem` of pointwise_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("uvqk", "first", "between", "side", "position", "time")),
        *((name, ctypes.c_void_p) for name in ("u_grad", "grad", "u", "mixed", "uvqk_grad")),
        *((name, ctypes.c_void_p) for name in ("position_grad", "time_grad")),
        *((name, ctypes.c_int64) for name in ("sequences", "dim", "heads", "positions", "buckets", "threads")),
    )


def why_not_native(device: torch.device) -> str:
    """Why PyTorch makes the attention on a CPU, in a few words; empty where it does not, and on other devices."""
    return native_code.why_not_native(_library, device)


def can_attend(uvqk: Tensor) -> bool:
    """Whether `pointwise_attention` takes these."""
    return uvqk.device.type == "cpu" and uvqk.dtype == torch.float32 and not isinstance(_library(), str)


def pointwise_attention(
    uvqk: Tensor, heads: int, sequences: Spans, biases: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """[T, 4 D] gates, values, queries and keys before SiLU → [T, D] gates after it, [T, D] what each token mixes.

    Args:
        biases: of scores: [heads, P] by distance in position, [heads, BUCKETS] by time; None: no biases.
    """
    found: tuple[Tensor, Tensor] = _Attended.apply(uvqk, *(biases or (None, None)), heads, sequences)
    return found


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, uvqk: Tensor, position: Tensor | None, time: Tensor | None, heads: int, sequences: Spans
    ) -> tuple[Tensor, Tensor]:
        uvqk = uvqk.contiguous()
        u, mixed = (uvqk.new_empty(len(uvqk), uvqk.shape[1] // 4) for _ in range(2))
        _call(uvqk, (position, time), heads, sequences, u=u, mixed=mixed)
        ctx.save_for_backward(uvqk, position, time)
        ctx.heads, ctx.sequences = heads, sequences
        return u, mixed

    @staticmethod
    def backward(ctx, u_grad: Tensor, grad: Tensor):  # type: ignore[override]
        uvqk, position, time = ctx.saved_tensors
        of_uvqk = torch.empty_like(uvqk)
        of_position, of_time = (None if x is None else torch.zeros_like(x) for x in (position, time))
        given = {"uvqk_grad": of_uvqk, "position_grad": of_position, "time_grad": of_time}
        grads = {"u_grad": u_grad.contiguous(), "grad": grad.contiguous()}
        _call(uvqk, (position, time), ctx.heads, ctx.sequences, **grads, **given)
        return of_uvqk, of_position, of_time, None, None


def _call(
    uvqk: Tensor, biases: tuple[Tensor | None, Tensor | None], heads: int, sequences: Spans, **given: Tensor | None
) -> None:
    position, time = (None if x is None else x.detach().contiguous() for x in biases)
    named = {"uvqk": uvqk, "first": sequences.first, "position": position, "time": time, **given}
    if time is not None:
        named |= sequences.between
    shape = {
        "sequences": len(sequences.first) - 1,
        "dim": uvqk.shape[1] // 4,
        "heads": heads,
        "positions": 0 if position is None else position.shape[1],
        "buckets": 0 if time is None else time.shape[1],
        "threads": torch.get_num_threads(),
    }
    library = _library()
    assert not isinstance(library, str)
    if library.flm_pointwise_attention(argument(_Arguments, named, **shape)):
        raise MemoryError(f"no memory for the attention of {len(uvqk)} tokens")


@cache
def _library() -> ctypes.CDLL | str:
    """The native code; or why there is none, in a few words."""
    return why_none(lambda: built(SOURCE))
