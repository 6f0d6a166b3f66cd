"""Products of matrices in float32, on CPUs by native code where PyTorch's library does not use the processor's AVX-512.

That library (MKL) multiplies by vectors of 256 bits on AMD's processors, half of what they can do.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flm_torchrec import native_code
from flm_torchrec.machine_code import processor_instructions, processor_vendor
from flm_torchrec.native_code import Unavailable, argument, built, why_none

SOURCE = Path(__file__).with_suffix(".cpp")
LEAST = 1 << 20
"""Multiplications of a product below which a call of native code costs more than it saves."""


class _Product(ctypes.Structure):
    """`Product` of products.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "start", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "terms", "columns")),
        *((name, ctypes.c_int64) for name in ("left_row", "left_term", "right_term", "right_column")),
        *((name, ctypes.c_int64) for name in ("out_step", "adds", "threads")),
    )


@cache
def is_wanted() -> bool:
    """Whether the processor can do more than PyTorch's library asks of it."""
    return "avx512f" in processor_instructions() and processor_vendor() == "AuthenticAMD"


def why_not_native(device: torch.device) -> str:
    """Why PyTorch makes products that native code should make on this CPU, in a few words; else empty."""
    return native_code.why_not_native(_library, device) if is_wanted() else ""


def matmul(left: Tensor, right: Tensor, start: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """[M, K], [K, N] → [M, N] left @ right, plus `start` [N] in each row; without a gradient.

    Args:
        out: [M, N] to write to, rows of neighbouring numbers.
    """
    if not multiplies(left, right):
        return torch.mm(left, right, out=out) if start is None else torch.addmm(start, left, right, out=out)
    out = left.new_empty(len(left), right.shape[1]) if out is None else out
    _call(left, right, out, start, False)
    return out


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` [M, N], in place; without a gradient."""
    if multiplies(left, right):
        _call(left, right, total, None, True)
    else:
        total.addmm_(left, right)


def multiplies(left: Tensor, right: Tensor) -> bool:
    """Whether native code multiplies these matrices."""
    matrices = left.dim() == right.dim() == 2 and left.device.type == "cpu"
    fits = matrices and left.dtype == right.dtype == torch.float32 and left.numel() * right.shape[1] >= LEAST
    return fits and not isinstance(_library(), str)


def _call(left: Tensor, right: Tensor, out: Tensor, start: Tensor | None, adds: bool) -> None:
    assert left.shape[1] == right.shape[0] and out.shape == (len(left), right.shape[1]) and out.stride(1) == 1
    start = None if start is None else start.detach().contiguous()
    named = {"left": left.detach(), "right": right.detach(), "start": start, "out": out}
    shape = {"rows": len(left), "terms": left.shape[1], "columns": right.shape[1]}
    names = ("left_row", "left_term", "right_term", "right_column")
    steps = dict(zip(names, left.stride() + right.stride(), strict=True))
    library = _library()
    assert not isinstance(library, str)
    numbers = {**shape, **steps, "out_step": out.stride(0), "adds": adds, "threads": torch.get_num_threads()}
    if library.flm_product(argument(_Product, named, **numbers)):
        raise MemoryError(f"no memory for a product of {len(left)} rows")


@cache
def _library() -> ctypes.CDLL | str:
    """The native code; or why there is none, in a few words."""
    return why_none(_load)


def _load() -> ctypes.CDLL:
    if not is_wanted():
        raise Unavailable("PyTorch's library uses all that this processor can do")
    return built(SOURCE)
